import pytest

from deploy.bench.combining import CONFIGURATIONS, DYNAMIC, ONE, OTHER, PAIR, TWO, UNGUIDED, ratios
from tests.deploy.bench.runs import timed

SECONDS = dict.fromkeys(CONFIGURATIONS, 0.2) | {
    UNGUIDED: 0.1,
    ONE: 0.11,
    OTHER: 0.12,
    TWO: 0.13,
    PAIR: 0.115,
    DYNAMIC: 0.138,
}


def test_costs_are_what_guidance_adds() -> None:
    rounds = {4: [{name: timed(step) for name, step in SECONDS.items()}]}
    found = {str(row[""]): row["batch 4"] for row in ratios(rounds)}
    assert found["time with two / unguided"] == pytest.approx(1.3)
    assert found["cost of two networks / sum of each alone"] == pytest.approx(1.0)
    assert found["cost of a pair / of two networks"] == pytest.approx(0.5)
    assert found["time of a pair, dynamic / static"] == pytest.approx(1.2)


def test_a_round_in_which_guidance_cost_nothing_decides_nothing() -> None:
    rounds = {4: [{name: timed(step) for name, step in SECONDS.items()} for _ in range(4)]}
    for measured in rounds[4][:2]:
        measured[TWO] = timed(0.1001)
    found = {str(row[""]): row["batch 4"] for row in ratios(rounds)}
    # The median of the ratios would be 75, and the mean 75, too.
    assert found["cost of a pair / of two networks"] == pytest.approx(1.0, rel=0.01)
