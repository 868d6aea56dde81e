import pytest

from deploy.bench.rounds import ALIKE, UNGUIDED
from deploy.bench.sizes import make_plot, overheads
from tests.deploy.bench.runs import timed

ROUNDS = {4: [{ALIKE: timed(0.1), UNGUIDED: timed(0.104), "10%": timed(0.115), "20%": timed(0.13)}]}
SHARES = {"10%": 0.1, "20%": 0.2}


def test_each_size_is_measured_against_its_own_limit() -> None:
    small, large = overheads(ROUNDS, SHARES, ALIKE)
    assert small == {
        "network": "10%",
        "limit": pytest.approx(1.1),
        "batch 4": pytest.approx(1.15),
        "efficiency, batch 4": pytest.approx(1.5),
    }
    assert large["efficiency, batch 4"] == pytest.approx(1.5)
    _, large = overheads(ROUNDS, SHARES, UNGUIDED)
    assert large["batch 4"] == pytest.approx(1.25)


def test_the_limit_is_drawn_from_no_network_at_all() -> None:
    drawn = make_plot(ROUNDS, SHARES).curves
    assert drawn["limit"] == [(0, 1), (10, pytest.approx(1.1)), (20, pytest.approx(1.2))]
    assert drawn["batch 4"] == [(10, pytest.approx(1.15)), (20, pytest.approx(1.3))]
