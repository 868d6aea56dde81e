import pytest

from deploy.bench.rounds import GUIDED, PLAIN, UNGUIDED
from deploy.bench.waiting import ASLEEP, make_tables
from tests.deploy.bench.runs import timed


def test_what_waiting_costs_and_what_guidance_costs_are_told_apart() -> None:
    one = {PLAIN: timed(0.1), ASLEEP: timed(0.11), UNGUIDED: timed(0.11), GUIDED: timed(0.121)}
    found = {str(row[""]): row["batch 4"] for row in make_tables({4: [one]})[-1].rows}
    assert found[f"{ASLEEP} / {PLAIN}"] == pytest.approx(1.1)
    assert found[f"{UNGUIDED} / {ASLEEP}"] == pytest.approx(1.0)
    assert found[f"{GUIDED} / {ASLEEP}"] == pytest.approx(1.1)
    assert found[f"{GUIDED} / {PLAIN}"] == pytest.approx(1.21)
