import pytest

from deploy.bench.mixture import ALONE, make_plot, make_tables
from deploy.bench.rounds import ALIKE
from tests.deploy.bench.runs import timed

SPREAD = {"64 resident, rows on 1": 1, "64 resident, rows on 16": 16}
FEW = {ALIKE: timed(0.1), ALONE: timed(0.11), "64 resident, rows on 1": timed(0.121)}
ROUNDS = {16: [{**FEW, "64 resident, rows on 16": timed(0.2)}], 4: [FEW]}


def test_many_resident_are_compared_with_one_and_spread_rows_with_those_together() -> None:
    _, resident, spread = make_tables(ROUNDS, list(SPREAD), limit=1.055)
    assert resident.rows[0]["many / one"] == pytest.approx(1.1)
    assert resident.rows[0]["one / plain"] == pytest.approx(1.1)
    (row,) = spread.rows  # a batch of 4 is not spread over 16
    assert (row["batch"], row["step"]) == (16, pytest.approx(0.2 / 0.121, abs=1e-4))


def test_a_curve_runs_over_the_networks_in_a_batch() -> None:
    drawn = make_plot(ROUNDS, SPREAD).curves
    assert drawn["batch 16"] == [(1, pytest.approx(121)), (16, pytest.approx(200))]
    assert [count for count, _ in drawn["batch 4"]] == [1]
