"""Makes everything that the study needs, measures what is not measured yet, and reports.

    python -m value_models.study [--out DIR] [--workers N] [--report DIR]
    python -m value_models.study --results docs/study/results.json --report docs/study
    python -m value_models.study --wrong twice

The first goes on where it was interrupted; the second only reports again; the third shows the
mistakes of a target that the first has steered.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers

from value_models.study import report
from value_models.study.cells import Cell, cells, measure, wrong_answers
from value_models.study.family import NAMES, make_base
from value_models.study.maps import make_maps
from value_models.study.recipes import RECIPES, SEEDS, fine_tune, train_network, write_data

RESULTS = "results.json"
Job = tuple[Callable[..., Any], tuple[Any, ...]]


def make(folder: Path, workers: int) -> dict[Cell, float]:
    """Make the models and measure all cells; returns the accuracies."""
    models: list[Job] = [
        (make_maps, (folder,)),
        *((fine_tune, (base, seed, folder)) for seed in SEEDS for base in NAMES),
        *((train_network, (recipe, seed, folder)) for seed in SEEDS for recipe in RECIPES),
    ]
    write_data(folder)  # before several processes would
    for jobs in ([(make_base, (name, folder / "bases")) for name in NAMES], models):
        for _ in _run(jobs, workers):
            pass
    file = folder / RESULTS
    measured = load_results(file) if file.exists() else {}
    missing = [cell for cell in cells() if cell not in measured]
    for (_, (cell, _)), score in _run([(measure, (cell, folder)) for cell in missing], workers):
        measured[cell] = score.share
        _save_results(measured, file)
    return measured


def load_results(file: Path) -> dict[Cell, float]:
    """Read what `make` wrote: the share of right answers of each cell."""
    return {Cell(*fields): share for *fields, share in json.loads(file.read_text())["cells"]}


def _save_results(measured: dict[Cell, float], file: Path) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    content = {
        "command": "python -m value_models.study",
        "machine": gpu or f"{_cpu_name()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "columns": [*Cell._fields, "accuracy"],
        "cells": [[*cell, share] for cell, share in sorted(measured.items())],
    }
    unfinished = file.with_suffix(".unfinished")
    lines = json.dumps(content, indent=1).replace("\n   ", " ").replace("\n  ]", " ]")
    unfinished.write_text(lines + "\n", encoding="utf-8")
    unfinished.replace(file)


def _cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _run(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Any]]:
    """Run jobs in processes of one thread each; yields each with its result, as they finish.

    A single worker is this process.
    """
    if workers == 1:
        for job, arguments in jobs:
            yield (job, arguments), job(*arguments)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _settle_in) as pool:
        running = {pool.submit(job, *arguments): (job, arguments) for job, arguments in jobs}
        for number, future in enumerate(as_completed(running), start=1):
            job, arguments = running[future]
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            print(
                f"[{number}/{len(jobs)}] {time.strftime('%H:%M:%S')} {job.__name__} "
                f"{' '.join(map(str, arguments[:-1]))}",
                file=sys.stderr,
            )
            yield (job, arguments), future.result()


def _settle_in() -> None:
    """One thread each, and no progress bars over each other."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _show_wrong(cell: Cell, folder: Path) -> None:
    wrong = wrong_answers(cell, folder)
    for question, said in wrong:
        print(f"{question.text} {said!r}")
    counts = Counter(question.relation for question, _ in wrong)
    print(f"{len(wrong)} wrong: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or report; the tables also go to stdout."""
    parser = argparse.ArgumentParser(prog="python -m value_models.study")
    parser.add_argument(
        "--out", type=Path, default=Path("build/study"), help="models and results (build/study)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1 if torch.cuda.is_available() else os.cpu_count() or 1,
        help="processes at a time (default: one per core, one with a GPU)",
    )
    parser.add_argument("--report", type=Path, help="tables and plots (default: in OUT)")
    parser.add_argument("--results", type=Path, help="report these, and measure nothing")
    parser.add_argument(
        "--wrong", choices=NAMES, help="show what this target, guided, has wrong (seed 0)"
    )
    args = parser.parse_args(arguments)
    if args.wrong:
        _show_wrong(Cell(args.wrong, "network", "residual"), args.out)
        return 0
    if args.results:
        results = report.Results(load_results(args.results))
    else:
        results = report.Results(make(args.out, args.workers))
    folder = args.report or args.out
    report.plot(results, folder)
    (folder / "tables.md").write_text(report.tables(results), encoding="utf-8")
    print(report.tables(results))
    return 0
