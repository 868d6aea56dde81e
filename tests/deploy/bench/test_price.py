import pytest

from deploy.bench.price import APART, BARE, GUIDED, UNGUIDED, make_tables
from tests.deploy.bench.runs import timed


def test_each_price_is_a_ratio_within_a_round_and_has_an_interval() -> None:
    # The machine becomes faster from round to round, and guidance cheaper.
    rounds = [
        {
            BARE: timed(0.1 * number),
            UNGUIDED: timed(0.1 * number),
            GUIDED: timed(0.1 * number * (1 + number / 100)),
            APART: timed(0.2 * number * (1 + number / 100)),
        }
        for number in reversed(range(1, 8))
    ]
    _, guided, unguided, apart = make_tables({16: rounds}, limit=1.05)
    assert guided.rows == [
        {
            "batch": 16,
            "time": pytest.approx(1.04),
            "from": pytest.approx(1.01),
            "to": pytest.approx(1.07),
            "efficiency": pytest.approx(0.8),
            "efficiency from": pytest.approx(0.2),
            "efficiency to": pytest.approx(1.4),
        }
    ]
    assert unguided.rows == [{"batch": 16, "time": 1.0, "from": 1.0, "to": 1.0}]
    twice = dict.fromkeys(("time", "from", "to"), pytest.approx(2.0))
    assert apart.rows == [{"batch": 16, **twice}]
