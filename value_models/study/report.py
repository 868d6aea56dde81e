"""The study's tables and plots, from its measurements.

An accuracy is the mean over seeds with its 95 % confidence interval (Student's t over the seeds).
Gap recovery is `(guided - alone) / (fully fine-tuned - alone)`, each of the same target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from value_models.study.cells import Cell, Method
from value_models.study.family import NAMES

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""97.5 % quantiles of Student's t distribution, by number of values."""
TITLES = {
    "small": "the training base",
    "twice": "2x",
    "fivefold": "5x",
    "newer": "5x, continued",
    "foreign": "2x, other vocabulary",
}
RECIPE_TITLES = {"residual": "residual, norm 0.1 (default)"}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half the width of its 95 % confidence interval."""

    mean: float
    margin: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} ± {100 * self.margin:.1f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Raises KeyError for a number of values that `STUDENT_T` does not list."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, STUDENT_T[len(values)] * math.sqrt(variance / len(values)))


@dataclass(frozen=True)
class Results:
    """All measurements of a study: the accuracy in each cell, 0 to 1."""

    shares: Mapping[Cell, float]

    def alone(self, base: str) -> float:
        """The floor: the target without any guidance."""
        return self.shares[Cell(base, "alone")]

    def tuned(self, base: str) -> Estimate:
        """The ceiling: all weights of the target fine-tuned on the same demonstrations."""
        return self.accuracy(base, "tuned")

    def accuracy(self, base: str, method: Method, recipe: str = "", scale: float = 1.0) -> Estimate:
        """Raises KeyError if it was not measured."""
        return estimate(self._by_seed(base, method, recipe, scale))

    def recovery(self, base: str, method: Method, recipe: str = "", scale: float = 1.0) -> Estimate:
        """How much of the gap between a target and its full fine-tuning is closed."""
        floor = self.alone(base)
        gap = self.tuned(base).mean - floor
        values = self._by_seed(base, method, recipe, scale)
        return estimate([(value - floor) / gap for value in values])

    def _by_seed(self, base: str, method: Method, recipe: str, scale: float) -> list[float]:
        wanted = (base, method, recipe, scale)
        values = [
            share
            for cell, share in sorted(self.shares.items())
            if (cell.base, cell.method, cell.recipe, cell.scale) == wanted
        ]
        if len(values) < 2:
            raise KeyError(f"{wanted}: measured with {len(values)} seeds")
        return values


def tables(results: Results) -> str:
    """Every question with its table, as markdown."""
    parts = [
        "| target | knows | alone | guided | fully fine-tuned | gap recovery | ... at scale 1.5 "
        "| ... by proxy tuning |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for base in NAMES:
        pair = results.recovery(base, "pair") if base in PAIRED else ""
        parts.append(
            f"| {TITLES[base]} | {results.shares[Cell(base, 'knows')]:.1%} | "
            f"{results.alone(base):.1%} | "
            f"{results.accuracy(base, 'network', 'residual')} | {results.tuned(base)} | "
            f"**{results.recovery(base, 'network', 'residual')}** | "
            f"{results.recovery(base, 'network', 'residual', 1.5)} | {pair} |"
        )
    for title, recipes, bases in SECTIONS:
        parts += ["", f"### {title}", "", *_by_recipe(results, recipes, bases)]
    parts += ["", "### Which map to the other vocabulary?", ""]
    parts += ["| norm weight | exact matches | time warping | same start (default) |"]
    parts += ["| ---: | ---: | ---: | ---: |"]
    for recipe in ("norm 0", "residual"):
        found = [results.recovery("foreign", m, recipe) for m in ("exact", "warping", "network")]
        parts.append(f"| {NORM_WEIGHTS[recipe]} | " + " | ".join(map(str, found)) + " |")
    return "\n".join(parts) + "\n"


PAIRED = ("twice", "fivefold", "newer")
NORM_WEIGHTS = {"norm 0": 0.0, "residual": 0.1, "norm 1": 1.0, "norm 10": 10.0}
SECTIONS: tuple[tuple[str, Sequence[str], Sequence[str]], ...] = (
    (
        "Which connection?",
        ("residual", "cascade", "cascade+"),
        ("small", "fivefold"),
    ),
    ("Does the start matter?", ("residual", "random start"), ("small", "fivefold")),
    ("Does the norm term help?", tuple(NORM_WEIGHTS), ("small", "fivefold", "foreign")),
    (
        "Which objective?",
        ("residual", "KL", "chi2", "hellinger", "larger step"),
        ("small", "fivefold"),
    ),
)


def _by_recipe(results: Results, recipes: Iterable[str], bases: Sequence[str]) -> list[str]:
    lines = [
        "| network | " + " | ".join(f"{TITLES[base]} | recovery" for base in bases) + " |",
        "| --- |" + " ---: | ---: |" * len(bases),
    ]
    for recipe in recipes:
        cells = [
            f"{results.accuracy(base, 'network', recipe)} | "
            f"{results.recovery(base, 'network', recipe)}"
            for base in bases
        ]
        lines.append(f"| {RECIPE_TITLES.get(recipe, recipe)} | " + " | ".join(cells) + " |")
    return lines


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw the two curves that say more than their tables; returns the files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trimtab"  # the same figures give the same file
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    _draw_targets(axes, results)
    files = [folder / "targets.svg", folder / "norm.svg"]
    figure.savefig(files[0], metadata={"Date": None})
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    _draw_norm(axes, results)
    figure.savefig(files[1], metadata={"Date": None})
    return files


def _draw_targets(axes: Any, results: Results) -> None:
    bars = (
        ("alone", [Estimate(results.alone(base), 0.0) for base in NAMES], "#b8bec6"),
        ("guided", [results.accuracy(b, "network", "residual") for b in NAMES], "#1f6feb"),
        ("fully fine-tuned", [results.tuned(base) for base in NAMES], "#2f3a46"),
    )
    width = 0.27
    for place, (label, estimates, color) in enumerate(bars, start=-1):
        axes.bar(
            [i + place * width for i in range(len(NAMES))],
            [100 * e.mean for e in estimates],
            width,
            yerr=[100 * e.margin for e in estimates],
            capsize=3,
            label=label,
            color=color,
        )
    axes.set_xticks(range(len(NAMES)), [TITLES[base] for base in NAMES])
    axes.set_ylabel("right to the letter, %")
    axes.set_ylim(0, 105)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_norm(axes: Any, results: Results) -> None:
    places = range(len(NORM_WEIGHTS))
    for base, color in (("small", "#8a94a0"), ("fivefold", "#1f6feb"), ("foreign", "#d1622b")):
        estimates = [results.recovery(base, "network", recipe) for recipe in NORM_WEIGHTS]
        axes.errorbar(
            places,
            [100 * e.mean for e in estimates],
            yerr=[100 * e.margin for e in estimates],
            marker="o",
            capsize=3,
            label=TITLES[base],
            color=color,
        )
    axes.set_xticks(places, [f"{weight:g}" for weight in NORM_WEIGHTS.values()])
    axes.set_xlabel("weight of the norm term")
    axes.set_ylabel("gap recovery, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
