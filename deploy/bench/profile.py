"""Where the time of a guided decoding step goes, part by part.

The parts are timed inside vLLM's worker, each without the parts that it calls, while batches of
guided rows decode. Timing takes a microsecond or two a call, which falls on the part around it. On
CUDA the device is waited for at both ends of a part, so that a part has the work that it launched;
steps take longer then than without the profile.
"""

import argparse
import collections
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from deploy.bench.arguments import add_batches, add_dtype, add_models
from deploy.bench.checkpoints import MODELS, make_checkpoints_of
from deploy.bench.engine import Engine
from deploy.bench.report import Answer, Cell, Table, say
from deploy.bench.rounds import make_requests

GUIDING = "guiding"
TARGET = "target: forward and logits"
GUIDANCE = (
    "bookkeeping: rows, lengths, slots",
    "layout: positions, places, blocks",
    "metadata of attention",
    "launch: forward context, compiled call",
    "value forward",
    "value logits (LM head)",
    "soundness of the logits",
    "mapping and combination",
)
(BOOKKEEPING, LAYOUT, METADATA, LAUNCH, FORWARD, HEAD, SOUNDNESS, COMBINATION) = GUIDANCE


class Spent(NamedTuple):
    """What `stop` returns."""

    seconds: dict[str, float]  # by part
    calls: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_batches(parser, (1, 4, 16), tokens=96)
    add_dtype(parser)
    add_models(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    checkpoints = make_checkpoints_of(arguments.models, folder, arguments.dtype, [GUIDING])
    found: dict[int, Spent] = {}
    say("starting vLLM with trimtab")
    with Engine(
        checkpoints.target,
        checkpoints.networks,
        folder / "trimtab.log",
        value_memory_gb=MODELS[arguments.models].value_memory_gb,
        **checkpoints.engine_options,
    ) as engine:
        engine.call(start)
        for batch_size in arguments.batch_sizes:
            for seed in range(2):  # the first one warms up
                requests = make_requests(batch_size, arguments.tokens, seed, GUIDING)
                engine.call(reset)
                engine.run(requests)
            found[batch_size] = Spent(*engine.call(spent))
        description = engine.description
    return Answer(
        tables=[make_table(found)],
        models=checkpoints.describe(),
        engine=description,
        runs=[{"batch": size, **run._asdict()} for size, run in found.items()],
    )


def make_table(found: dict[int, Spent]) -> Table:
    """Return microseconds of the mean step, and of guidance the share of each part."""
    rows: list[dict[str, Cell]] = []
    for part in (*GUIDANCE, "guidance, all of it", TARGET, "guidance / target"):
        row: dict[str, Cell] = {"part": part}
        for size, run in found.items():
            row[f"batch {size}"] = _cell(part, run)
        rows.append(row)
    return Table("Microseconds of a guided decoding step, by part", rows)


def _cell(part: str, run: Spent) -> Cell:
    steps = run.calls[TARGET] / 2  # the forward and the logits are a call each
    guidance = sum(run.seconds.get(part, 0.0) for part in GUIDANCE)
    match part:
        case "guidance, all of it":
            return round(1e6 * guidance / steps)
        case "guidance / target":
            return round(guidance / run.seconds[TARGET], 4)
        case _:
            return round(1e6 * run.seconds.get(part, 0.0) / steps)


# What follows runs in vLLM's worker.

_spent: "collections.defaultdict[str, float]" = collections.defaultdict(float)
_calls: "collections.Counter[str]" = collections.Counter()
_inner = [0.0]
"""Seconds that were spent in parts within the one that runs, for each that is open."""


def start(worker: Any) -> None:
    """Time the parts from now on."""
    import torch

    from server.worker import guidance as step

    steering = worker._processor().steering
    wait = torch.cuda.synchronize if torch.cuda.is_available() else None
    parts: list[tuple[Any, str, str]] = [
        (steering.guidance, "step", BOOKKEEPING),
        (steering.guidance._soundness, "admits", SOUNDNESS),
        (step, "add_value_logits", COMBINATION),
        (worker.model_runner, "_model_forward", TARGET),
        (worker.model_runner.model, "compute_logits", TARGET),
    ]
    for network in steering.residency.networks():
        for model in network.models.values():
            parts += [
                (model._forward, "decode", LAYOUT),
                (model._forward._metadata, "build", METADATA),
                (model._forward, "_run", LAUNCH),
                (model._forward, "run_model", FORWARD),
                (model._forward, "head", HEAD),
            ]
            if model._forward.bound is not None:
                parts.append((model._forward, "bound", FORWARD))
    for owner, name, part in parts:
        setattr(owner, name, _timed(getattr(owner, name), part, wait))


def reset(_worker: Any) -> None:
    """Begin to count."""
    _spent.clear()
    _calls.clear()


def spent(_worker: Any) -> tuple[dict[str, float], dict[str, int]]:
    """Return what was counted; see `Spent`."""
    return dict(_spent), dict(_calls)


def _timed(
    call: Callable[..., Any], part: str, wait: Callable[[], None] | None
) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        if wait is not None:
            wait()
        _inner.append(0.0)
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            if wait is not None:
                wait()
            seconds = time.perf_counter() - began
            _spent[part] += seconds - _inner.pop()
            _calls[part] += 1
            _inner[-1] += seconds

    return timed
