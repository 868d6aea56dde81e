"""Measures what running streams feel while value networks are loaded, replaced and unloaded.

16 clients stream without pause, half of them guided. Between quiet times, networks of 6 M and 60 M
parameters come and go over the management API, and each gap between two tokens of a stream counts
as quiet, or as of the change that it overlaps.
"""

import argparse
import json
import math
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from deploy.bench import report
from deploy.bench.checkpoints import VOCAB_SIZE, make_checkpoints, num_parameters
from deploy.bench.streams import Gap, Streams
from tests.models import make_network
from tests.server.operator import Operator
from tests.server.serving import TARGET, serving

QUIET = "quiet"
GUIDING = "guiding"
MAX_TOKENS = 192
POLL_SECONDS = 0.2
P99_LIMIT = 2.0
"""Times the quiet p99, and seconds: what issue 4 allows."""
GAP_LIMIT = 0.150


class Window(NamedTuple):
    """A time in which one change was under way."""

    change: str
    start: float  # seconds on this machine's monotonic clock
    end: float


def main() -> None:
    arguments = parse_arguments()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder:
        say("making random checkpoints")
        checkpoints = make_checkpoints(Path(folder), arguments.dtype)
        store = Path(folder) / "store"
        store.mkdir()
        checkpoints.networks[GUIDING].rename(store / GUIDING)
        sizes = make_networks(Path(folder) / "unpublished", arguments.dtype)
        say("starting trimtab (vLLM compiles the target at first)")
        flags = ("--max-model-len", "512", "--seed", "0", "--dtype", arguments.dtype)
        with serving(
            Path(folder) / "server",
            checkpoints.target,
            *("--value-network-dir", store, "--state-file", Path(folder) / "state.json"),
            flags=flags,
        ) as served:
            # Published only now: a server may never have seen what it is to load.
            for network in (Path(folder) / "unpublished").iterdir():
                network.rename(store / network.name)
            windows, gaps = measure(served.url, arguments)
    found = {
        "command": shlex.join(["python", "-m", "deploy.bench.swapping", *sys.argv[1:]]),
        "machine": report.describe_machine(),
        "versions": report.versions(),
        "models": {
            "dtype": arguments.dtype,
            "target_parameters": checkpoints.target_parameters,
            "guiding_parameters": checkpoints.network_parameters,
            "swapped_parameters": sizes,
            "vocab_size": checkpoints.vocab_size,
        },
        "settings": {
            "streams": arguments.streams,
            "guided_streams": arguments.streams // 2,
            "cycles": arguments.cycles,
            "quiet_seconds": arguments.quiet,
            "new_tokens": MAX_TOKENS,
        },
        **summarise(windows, gaps),
    }
    show(found)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
        say(f"written to {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.swapping", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--cycles", type=int, default=5, help="times that each network is swapped")
    parser.add_argument(
        "--quiet", type=float, default=8, help="seconds without a change before each"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return parser.parse_args()


def make_networks(folder: Path, dtype: str) -> dict[str, int]:
    """Write two versions each of the networks that come and go; `<name>-next` is the second.

    Returns the names with their parameters.
    """
    common = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "dtype": dtype,
    }
    shapes = {
        "6M": {
            "hidden_size": 256,
            "intermediate_size": 832,
            "layers": 4,
            "heads": 4,
            "kv_heads": 4,
        },
        "60M": {
            "hidden_size": 640,
            "intermediate_size": 1984,
            "layers": 10,
            "heads": 10,
            "kv_heads": 10,
        },
    }
    for seed, (name, shape) in enumerate(shapes.items(), start=10):
        for version, source in enumerate((name, f"{name}-next")):
            make_network(folder / source, seed=100 * seed + version, **common, **shape)
    return {name: num_parameters(folder / name) for name in shapes}


def measure(url: str, arguments: argparse.Namespace) -> tuple[list[Window], list[Gap]]:
    """Swap while streams run. Returns when what changed, quiet times included, and all gaps."""
    host, port = url.removeprefix("http://").split(":")
    windows: list[Window] = []
    names = ("6M", "60M")
    with httpx.Client(base_url=url, timeout=120) as client:
        operator = Operator(client, POLL_SECONDS)
        with Streams(host, int(port), make_requests(arguments.streams)) as streams:
            time.sleep(2 * arguments.quiet)  # warm up
            for cycle in range(arguments.cycles):
                for name in names:
                    load = f"load {name}" if cycle else f"first load {name}"
                    changes: dict[str, Callable[[], object]] = {
                        QUIET: partial(time.sleep, arguments.quiet),
                        load: partial(operator.swap, name),
                        f"replace {name}": partial(operator.swap, name, f"{name}-next"),
                        f"unload {name}": partial(operator.unload, name),
                    }
                    for change, make in changes.items():
                        start = time.monotonic()
                        make()
                        windows.append(Window(change, start, time.monotonic()))
                say(f"cycle {cycle + 1} of {arguments.cycles}")
            return windows, streams.stop()


def make_requests(num_streams: int) -> list[dict[str, Any]]:
    """Return requests of equal length, every other one guided."""
    draw = random.Random(0)
    return [
        {
            "model": GUIDING if index % 2 else TARGET,
            "prompt": [draw.randrange(8, 256) for _ in range(8)],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        for index in range(num_streams)
    ]


def summarise(windows: Sequence[Window], gaps: Sequence[Gap]) -> dict[str, Any]:
    """Return the gaps' figures in milliseconds, for each kind of change and for all together."""
    by_change: dict[str, list[float]] = {QUIET: []}
    changed: list[float] = []
    ordered = sorted(windows, key=lambda window: window.start)
    for gap in gaps:
        seconds = gap.end - gap.start
        touched = {w.change for w in ordered if w.start < gap.end and gap.start < w.end}
        for change in touched - {QUIET}:
            by_change.setdefault(change, []).append(seconds)
        if touched - {QUIET}:
            changed.append(seconds)
        elif touched:
            by_change[QUIET].append(seconds)
    figures = {change: _figures(seconds) for change, seconds in by_change.items() if seconds}
    together, quiet = _figures(changed), figures[QUIET]
    seconds_of = {
        change: [w.end - w.start for w in windows if w.change == change] for change in figures
    }
    worst = max((figures[change]["p99_ms"] for change in figures if change != QUIET), default=0)
    return {
        "inter_token_latency": [
            {
                "during": change,
                "median_seconds": round(statistics.median(seconds_of[change]), 2),
                **row,
            }
            for change, row in figures.items()
        ],
        "during_changes": together,
        "p99_ratio": round(together["p99_ms"] / quiet["p99_ms"], 2),
        "worst_p99_ratio": round(worst / quiet["p99_ms"], 2),
        "longest_gap_ms": together["max_ms"],
        "limits": {"p99_ratio": P99_LIMIT, "longest_gap_ms": 1000 * GAP_LIMIT},
    }


def _figures(seconds: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(seconds)

    def percentile(share: float) -> float:
        return round(1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)], 2)

    return {
        "gaps": len(ordered),
        "p50_ms": percentile(0.5),
        "p99_ms": percentile(0.99),
        "max_ms": percentile(1),
    }


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    models, settings = found["models"], found["settings"]
    table = Table(
        title=f"Milliseconds between two tokens of a stream; {settings['streams']} streams, "
        f"{settings['guided_streams']} guided ({models['dtype']}; target "
        f"{models['target_parameters'] / 1e6:.1f} M parameters)"
    )
    table.add_column("during")
    for column in ("takes, s", "gaps", "p50", "p99", "max"):
        table.add_column(column, justify="right")
    for row in found["inter_token_latency"]:
        figures = (f"{row[name]:.1f}" for name in ("p50_ms", "p99_ms", "max_ms"))
        table.add_row(row["during"], f"{row['median_seconds']:.2f}", str(row["gaps"]), *figures)
    together = found["during_changes"]
    figures = (f"{together[name]:.1f}" for name in ("p50_ms", "p99_ms", "max_ms"))
    table.add_row("all changes", "", str(together["gaps"]), *figures)
    console = Console()
    console.print(table)
    limits = found["limits"]
    console.print(
        f"p99 during changes: {found['p99_ratio']:.2f} times the quiet one "
        f"(at most {limits['p99_ratio']:g}); longest gap {found['longest_gap_ms']:.0f} ms "
        f"(at most {limits['longest_gap_ms']:.0f})"
    )


def say(line: str) -> None:
    print(f"[bench] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
