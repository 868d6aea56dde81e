"""What it costs to combine: several networks, pairs, dynamic fusion, a floor, explanations.

All configurations take turns on one engine.
"""

import argparse
import secrets
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deploy.bench.arguments import add_batches, add_dtype, add_rounds
from deploy.bench.checkpoints import make_checkpoints, make_pair
from deploy.bench.engine import Engine, Run
from deploy.bench.report import Answer, Cell, Table, rounded, say
from deploy.bench.rounds import (
    Round,
    Rounds,
    by_case,
    make_requests,
    median,
    require_guided,
    runs_of,
    seconds,
    take_turns,
)

UNGUIDED = "unguided"
ONE = "one residual network"
OTHER = "another residual network"
TWO = "two residual networks"
PAIR = "a pair"
DYNAMIC = "a pair, dynamic"
FLOOR = "one, with a floor"
EXPLAINED = "one, explained"
CONFIGURATIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    UNGUIDED: ((), {}),
    ONE: (("first",), {}),
    OTHER: (("second",), {}),
    TWO: (("first", "second"), {}),
    PAIR: (("pair",), {}),
    DYNAMIC: (("pair",), {"dynamic": True}),
    FLOOR: (("first",), {"floor": 1e-4}),
    EXPLAINED: (("first",), {"explain": ""}),
}

Seconds = dict[str, float]
"""configuration -> of one batch, within one round"""


class Ratio(NamedTuple):
    """One that somebody cares about: of two medians over the rounds.

    A cost is a small difference of times. Within one round it may be next to nothing, or less.
    """

    name: str
    limit: float | None
    over: Callable[[Seconds], float]
    under: Callable[[Seconds], float] = lambda _: 1.0


def cost(taken: Seconds, name: str) -> float:
    """Return what guidance added, as a share of the time without."""
    return taken[name] / taken[UNGUIDED] - 1


RATIOS = (
    Ratio("time with one network / unguided", None, lambda s: s[ONE] / s[UNGUIDED]),
    Ratio("time with two / unguided", None, lambda s: s[TWO] / s[UNGUIDED]),
    Ratio("time with a pair / unguided", None, lambda s: s[PAIR] / s[UNGUIDED]),
    Ratio(
        "cost of two networks / sum of each alone",
        1.05,
        lambda s: cost(s, TWO),
        lambda s: cost(s, ONE) + cost(s, OTHER),
    ),
    Ratio(
        "cost of a pair / of two networks",
        1.0,
        lambda s: cost(s, PAIR),
        lambda s: cost(s, TWO),
    ),
    Ratio("time of a pair, dynamic / static", 1.10, lambda s: s[DYNAMIC] / s[PAIR]),
    Ratio("time with a floor / without", None, lambda s: s[FLOOR] / s[ONE]),
    Ratio("time explained / not", None, lambda s: s[EXPLAINED] / s[ONE]),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 9)
    add_batches(parser, (1, 4, 16))
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    checkpoints = make_checkpoints(folder, arguments.dtype, ["first", "second"])
    checkpoints.networks["pair"] = make_pair(folder, arguments.dtype)
    say("starting vLLM with trimtab (it compiles the target and the networks at first)")
    log, options = folder / "trimtab.log", checkpoints.engine_options
    with Engine(checkpoints.target, checkpoints.networks, log, **options) as engine:

        def measure(name: str, batch_size: int, number: int) -> Run:
            networks, choice = CONFIGURATIONS[name]
            requests = make_requests(batch_size, arguments.tokens, number, *networks)
            return engine.run(
                [
                    request._replace(
                        choice={"explain": secrets.token_hex(8)} if "explain" in choice else choice
                    )
                    for request in requests
                ]
            )

        rounds = take_turns(arguments.batch_sizes, CONFIGURATIONS, arguments.rounds, measure)
        description = engine.description
    require_guided(rounds, [name for name in CONFIGURATIONS if name != UNGUIDED], UNGUIDED)
    return Answer(
        tables=[
            Table(
                f"Seconds for {arguments.tokens} tokens",
                by_case(rounds, CONFIGURATIONS, lambda found, name: median(found, name, seconds)),
            ),
            Table("Ratios", ratios(rounds)),
        ],
        models=checkpoints.describe(),
        engine=description,
        runs=runs_of(rounds, seconds=seconds),
    )


def ratios(rounds: Rounds[int, Run]) -> list[dict[str, Cell]]:
    """Return a row for each of `RATIOS`."""

    def of(ratio: Ratio, found: Sequence[Round[Run]]) -> float | None:
        taken = [{name: run.seconds for name, run in measured.items()} for measured in found]
        over, under = (statistics.median(map(part, taken)) for part in (ratio.over, ratio.under))
        return rounded(over / under)

    return [
        {"": ratio.name}
        | {f"batch {batch_size}": of(ratio, found) for batch_size, found in rounds.items()}
        | {"limit": ratio.limit}
        for ratio in RATIOS
    ]
