from pathlib import Path

import pytest

from deploy.bench.plots import draw
from deploy.bench.report import Plot


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_plot_shows_its_curves_and_is_the_same_each_time(
    tmp_path: Path, logarithmic: bool
) -> None:
    plot = Plot(
        "first-token",
        "Time to first token",
        "tokens",
        "milliseconds",
        {"guided": [(16, 10.0), (4096, 900.0)], "plain": [(16, 9.0), (4096, 800.0)]},
        log_x=logarithmic,
        log_y=logarithmic,
    )
    first = draw(plot, tmp_path / "first.svg").read_bytes()
    assert first == draw(plot, tmp_path / "second.svg").read_bytes()
    assert first.count(b"<!-- guided -->") == first.count(b"<!-- plain -->") == 1
    # What was measured is marked on a logarithmic axis, not powers of ten.
    assert (b"<!-- 4096 -->" in first) == logarithmic
