"""Curves of an answer, drawn."""

from pathlib import Path

from deploy.bench.report import Plot


def draw(plot: Plot, file: Path) -> Path:
    """Draw into an SVG file and return it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trimtab"  # the same figures give the same file
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for label, points in plot.curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    logarithmic = [(axes.xaxis, plot.log_x), (axes.yaxis, plot.log_y)]
    for axis, _ in (each for each in logarithmic if each[1]):
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    if plot.log_x:  # what was measured, instead of powers of ten
        axes.set_xticks(sorted({x for points in plot.curves.values() for x, _ in points}))
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return file
