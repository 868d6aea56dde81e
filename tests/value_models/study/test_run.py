"""The whole way from bases to results, with next to no training."""

from pathlib import Path

import pytest

from value_models.study import family, recipes
from value_models.study import run as study
from value_models.study.cells import Cell, cells
from value_models.study.family import NAMES
from value_models.study.recipes import RECIPES, SEEDS
from value_models.study.report import SECTIONS, Results, plot, tables


@pytest.fixture
def small_study(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    wanted = [
        Cell("small", "alone"),
        Cell("small", "tuned", seed=0),
        Cell("small", "network", "cascade+", 0),
        Cell("fivefold", "network", "cascade+", 0, 1.5),
        Cell("fivefold", "pair", seed=0),
    ]
    monkeypatch.setattr(family, "NUM_ASKED_ABOUT", 1)
    monkeypatch.setattr(recipes, "STEPS", 1)
    monkeypatch.setattr(study, "NAMES", ("small",))
    monkeypatch.setattr(study, "SEEDS", (0,))
    monkeypatch.setattr(study, "RECIPES", {"cascade+": RECIPES["cascade+"]})
    monkeypatch.setattr(study, "make_maps", lambda folder: None)
    monkeypatch.setattr(study, "cells", lambda: iter(wanted))
    return wanted


def test_a_study_measures_each_cell_once(
    small_study: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = study.make(tmp_path, workers=1)
    assert set(measured) == set(small_study)
    assert all(0 <= share <= 1 for share in measured.values())
    assert study.load_results(tmp_path / study.RESULTS) == measured

    monkeypatch.setattr(study, "measure", None)  # nothing is left to measure
    assert study.make(tmp_path, workers=1) == measured


def test_every_cell_can_be_made_and_the_report_needs_no_other(tmp_path: Path) -> None:
    listed = list(cells())
    assert len(set(listed)) == len(listed)
    assert {cell.recipe for cell in listed} <= {"", *RECIPES}
    assert {cell.base for cell in listed} == set(NAMES)
    assert len(SEEDS) >= 3
    shares = {cell: 0.1 if cell.method == "alone" else 0.9 for cell in listed}
    results = Results(shares)
    text = tables(results)
    assert all(f"### {title}" in text for title, _, _ in SECTIONS)
    assert "100.0% ± 0.0" in text
    first, second = plot(results, tmp_path / "a"), plot(results, tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_wrong_answers_are_shown_and_counted(
    small_study: list[Cell],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study.make(tmp_path, workers=1)
    recipes.network_path("cascade+", 0, tmp_path).rename(
        recipes.network_path("residual", 0, tmp_path)
    )
    assert study.main(["--out", str(tmp_path), "--wrong", "small"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    right = round(12 * study.measure(Cell("small", "network", "residual"), tmp_path).share)
    assert last.startswith(f"{12 - right} wrong: ")
    assert len(shown) >= 12 - right
