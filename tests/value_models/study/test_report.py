import pytest

from value_models.study.cells import Cell
from value_models.study.report import Results, estimate


def results(**guided: list[float]) -> Results:
    shares = {Cell("small", "alone"): 0.2, Cell("twice", "alone"): 0.0}
    for seed in range(3):
        shares[Cell("small", "tuned", seed=seed)] = 0.7
        shares[Cell("twice", "tuned", seed=seed)] = (0.9, 1.0, 0.8)[seed]
        for base, values in guided.items():
            shares[Cell(base, "network", "residual", seed)] = values[seed]
            shares[Cell(base, "network", "residual", seed, 1.5)] = 0.0
    return Results(shares)


def test_the_confidence_interval_is_students_over_seeds() -> None:
    # By hand: deviations -1, 0, 1 per cent, so s = 1, and 4.303 / sqrt(3) = 2.484.
    found = estimate([0.89, 0.90, 0.91])
    assert found.mean == pytest.approx(0.90)
    assert found.margin == pytest.approx(0.02484, abs=1e-4)
    assert str(found) == "90.0% ± 2.5"


def test_recovery_is_the_share_of_the_gap_that_is_closed() -> None:
    found = results(small=[0.45, 0.45, 0.45], twice=[0.9, 0.9, 0.9])
    assert found.recovery("small", "network", "residual").mean == pytest.approx(0.5)
    assert found.recovery("twice", "network", "residual").mean == pytest.approx(1.0)
    assert found.recovery("small", "network", "residual").margin == pytest.approx(0.0)


def test_scales_are_not_mixed() -> None:
    found = results(small=[0.4, 0.5, 0.6])
    assert found.accuracy("small", "network", "residual").mean == pytest.approx(0.5)
    assert found.accuracy("small", "network", "residual", 1.5).mean == 0.0


def test_what_was_not_measured_is_never_reported() -> None:
    with pytest.raises(KeyError, match="0 seeds"):
        results(small=[0.4, 0.5, 0.6]).accuracy("small", "pair")
