"""What it costs to combine: several networks, pairs, dynamic fusion, a floor, explanations.

    python -m deploy.bench.combining [--out FILE] [--rounds 7] [--batch-sizes 1 4 16]

All configurations take turns on one engine, so that a slow moment of the machine falls on each of
them alike; ratios are taken within a round, and their median over the rounds is reported.
"""

import argparse
import collections
import json
import secrets
import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from deploy.bench import report
from deploy.bench.__main__ import make_prompts, say
from deploy.bench.checkpoints import make_combining_checkpoints
from deploy.bench.engine import Engine

UNGUIDED = "unguided"
TWO = "two residual networks"
PAIR = "a pair"
DYNAMIC = "a pair, dynamic"
ONE = "one residual network"
CONFIGURATIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    UNGUIDED: ((), {}),
    ONE: (("first",), {}),
    "another residual network": (("second",), {}),
    TWO: (("first", "second"), {}),
    PAIR: (("pair",), {}),
    DYNAMIC: (("pair",), {"dynamic": True}),
    "one, with a floor": (("first",), {"floor": 1e-4}),
    "one, explained": (("first",), {"explain": ""}),
}

Seconds = dict[str, float]
"""configuration -> of one batch, within one round"""


class Question(NamedTuple):
    """A ratio that somebody cares about."""

    name: str
    limit: float | None
    ratio: Callable[[Seconds], float]


def cost(seconds: Seconds, name: str) -> float:
    """Return what guidance added."""
    return seconds[name] - seconds[UNGUIDED]


QUESTIONS = (
    Question(
        "cost of two networks / sum of each alone",
        1.05,
        lambda s: cost(s, TWO) / (cost(s, ONE) + cost(s, "another residual network")),
    ),
    Question("cost of a pair / of two networks", 1.0, lambda s: cost(s, PAIR) / cost(s, TWO)),
    Question("time of a pair, dynamic / static", 1.10, lambda s: s[DYNAMIC] / s[PAIR]),
    Question("time with a floor / without", None, lambda s: s["one, with a floor"] / s[ONE]),
    Question("time explained / not", None, lambda s: s["one, explained"] / s[ONE]),
)


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder:
        say("making random checkpoints")
        target, networks = make_combining_checkpoints(Path(folder), arguments.dtype)
        rounds = measure(target, networks, arguments, Path(folder))
    found = {
        "command": shlex.join(["python", "-m", "deploy.bench.combining", *sys.argv[1:]]),
        "machine": report.describe_machine(),
        "versions": report.versions(),
        "settings": {
            "dtype": arguments.dtype,
            "rounds": arguments.rounds,
            "new_tokens": arguments.tokens,
        },
        **summarise(rounds),
    }
    show(found)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
        say(f"written to {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.bench.combining",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--rounds", type=int, default=9, help="times that each is measured")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per request")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return parser.parse_args()


def measure(
    target: Path, networks: dict[str, Path], arguments: argparse.Namespace, folder: Path
) -> dict[int, list[Seconds]]:
    """Return the rounds by batch size."""
    rounds: dict[int, list[Seconds]] = collections.defaultdict(list)
    say("starting vLLM with trimtab (it compiles the target and the networks at first)")
    with Engine(target, networks, folder / "trimtab.log") as engine:
        turns = list(CONFIGURATIONS.items())
        for round_number in range(arguments.rounds + 1):  # the first one warms up
            for batch_size in arguments.batch_sizes:
                prompts = make_prompts(batch_size, seed=round_number)
                seconds: Seconds = {}
                for name, (chosen, choice) in turns:
                    if "explain" in choice:
                        choice = {"explain": secrets.token_hex(8)}
                    run = engine.generate(prompts, arguments.tokens, *chosen, **choice)
                    seconds[name] = run.seconds
                if round_number:
                    rounds[batch_size].append(seconds)
            turns.append(turns.pop(0))  # no configuration always follows the same other one
            say(f"round {round_number} of {arguments.rounds}")
    return rounds


def summarise(rounds: dict[int, list[Seconds]]) -> dict[str, Any]:
    """Return medians."""
    return {
        "seconds": [
            {
                "configuration": name,
                "batch_size": batch_size,
                "median": round(statistics.median(seconds[name] for seconds in found), 4),
                "runs": [round(seconds[name], 4) for seconds in found],
            }
            for name in CONFIGURATIONS
            for batch_size, found in rounds.items()
        ],
        "ratios": [
            {
                "question": question.name,
                "limit": question.limit,
                "batch_size": batch_size,
                "ratio": round(statistics.median(map(question.ratio, found)), 4),
            }
            for question in QUESTIONS
            for batch_size, found in rounds.items()
        ],
    }


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    sizes = sorted({row["batch_size"] for row in found["seconds"]})
    tables = {
        f"Seconds for {found['settings']['new_tokens']} tokens": ("seconds", "configuration"),
        "Ratios": ("ratios", "question"),
    }
    for title, (part, label) in tables.items():
        table = Table(title=title)
        table.add_column("")
        for size in sizes:
            table.add_column(f"batch {size}", justify="right")
        if part == "ratios":
            table.add_column("limit", justify="right")
        value = "median" if part == "seconds" else "ratio"
        for name in dict.fromkeys(row[label] for row in found[part]):
            rows = [row for row in found[part] if row[label] == name]
            cells = [f"{row[value]:.3f}" for row in rows]
            if part == "ratios":
                cells.append("" if rows[0]["limit"] is None else f"{rows[0]['limit']:.2f}")
            table.add_row(name, *cells)
        Console().print(table)


if __name__ == "__main__":
    main()
