"""How trimtab's worker should share the cores of a small machine: one reserved, or all.

A worker on all cores stands in the way of the others, unless its OpenMP threads fall asleep soon
where they have nothing to do. To wake them takes time, which guidance may pay as well as the
target: what it costs is taken within one engine, so no two processes' differences are in it.
What loads make of it, `swapping` tells. On a CPU only.
"""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deploy.bench.arguments import add_batches, add_dtype, add_rounds, within
from deploy.bench.checkpoints import make_checkpoints
from deploy.bench.engine import Engine, Run
from deploy.bench.report import Answer, Cell, Table, rounded, say
from deploy.bench.rounds import (
    Round,
    Rounds,
    by_case,
    efficiency,
    make_requests,
    rates,
    ratio,
    require_guided,
    runs_of,
    seconds,
    step_seconds,
    take_turns,
)
from server.cpu import SPINS

GUIDING = "guiding"
GNU_SPINS = 300_000
"""Looks of GNU's OpenMP by default, where each of its threads has a core."""


class Sharing(NamedTuple):
    """One way to share them."""

    name: str
    environment: Mapping[str, str]  # of the engine

    @property
    def unguided(self) -> str:
        return f"{self.name}, unguided"

    @property
    def guided(self) -> str:
        return f"{self.name}, guided"


RESERVED = Sharing("a core reserved", {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"})


def all_cores(spins: int) -> Sharing:
    """Compute on all cores; `spins`: looks of a thread for its next work before it sleeps."""
    environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "GOMP_SPINCOUNT": str(spins)}
    return Sharing(f"all, {spins} looks", environment)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 7)
    add_batches(parser, (1, 4, 16))
    add_dtype(parser)
    parser.add_argument(
        "--spins",
        type=within(0),
        nargs="+",
        default=[SPINS, GNU_SPINS],
        help="looks of an idle thread before it sleeps; the first one is what the others are "
        f"compared with ({SPINS} {GNU_SPINS}: trimtab's, and GNU's OpenMP's default)",
    )


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    checkpoints = make_checkpoints(folder, arguments.dtype, [GUIDING])
    ways = [*map(all_cores, dict.fromkeys(arguments.spins)), RESERVED]
    engines: dict[str, Engine] = {}
    with contextlib.ExitStack() as running:
        for number, way in enumerate(ways):
            say(f"starting vLLM with trimtab, cores: {way.name}")
            engine = Engine(
                checkpoints.target,
                checkpoints.networks,
                folder / f"trimtab-{number}.log",
                environment=way.environment,
                **checkpoints.engine_options,
            )
            engines |= dict.fromkeys((way.unguided, way.guided), running.enter_context(engine))

        def measure(name: str, batch_size: int, number: int) -> Run:
            chosen = (GUIDING,) if name in [way.guided for way in ways] else ()
            requests = make_requests(batch_size, arguments.tokens, number, *chosen)
            return engines[name].run(requests)

        rounds = take_turns(arguments.batch_sizes, engines, arguments.rounds, measure)
        description = engine.description
    for way in ways:
        require_guided(rounds, [way.guided], way.unguided)
    return Answer(
        tables=make_tables(rounds, ways, 1 + checkpoints.share(GUIDING)),
        models=checkpoints.describe(),
        engine=description,
        runs=runs_of(rounds, seconds=seconds, step_seconds=step_seconds),
    )


def make_tables(rounds: Rounds[int, Run], ways: Sequence[Sharing], limit: float) -> list[Table]:
    """Return the figures.

    Args:
        ways: those measured, the first of them what the others are compared with.
        limit: the arithmetic one of guided / unguided.
    """
    first = ways[0]
    names = [name for way in ways for name in (way.unguided, way.guided)]
    reference = {way.unguided: first.unguided for way in ways}
    reference |= {way.guided: first.guided for way in ways}

    def against_first(found: Sequence[Round[Run]], name: str) -> float | None:
        return ratio(found, name, reference[name], seconds)

    return [
        rates(rounds, names),
        Table(f"Time against {first.name}", by_case(rounds, names[2:], against_first)),
        Table(
            "Guided / unguided in the same engine, and efficiency",
            [{"": way.name, **prices(rounds, way, limit)} for way in ways],
        ),
    ]


def prices(rounds: Rounds[int, Run], way: Sharing, limit: float) -> dict[str, Cell]:
    """Return what guidance costs at each batch size (research.md, "Measures")."""
    row: dict[str, Cell] = {}
    for batch_size, found in rounds.items():
        price = ratio(found, way.guided, way.unguided, seconds)
        assert price is not None
        row[f"batch {batch_size}"] = rounded(price)
        row[f"efficiency, batch {batch_size}"] = rounded(efficiency(price, limit), 2)
    return row
