"""Many networks: a batch spread over several, and many that are only resident.

Three engines take turns: vLLM plain (set up as trimtab is), trimtab with one network, and trimtab
with many, on which the same rows use one network, or are spread evenly over 2, 4, 8 or 16.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from deploy.bench.arguments import add_batches, add_dtype, add_rounds, within
from deploy.bench.checkpoints import make_checkpoints
from deploy.bench.engine import Engine, Run
from deploy.bench.report import Answer, Plot, Table, rounded, say
from deploy.bench.rounds import (
    ALIKE,
    Round,
    Rounds,
    by_case,
    make_requests,
    median,
    plain_and_trimtab,
    ratio,
    require_guided,
    runs_of,
    same_tokens,
    seconds,
    step_seconds,
    take_turns,
)

ALONE = "1 resident"
SPREADS = (1, 2, 4, 8, 16)
MOST = 1.02
"""Goal: a step with all resident, against one with one, the same rows on one network."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 7)
    add_batches(parser, [16])
    parser.add_argument(
        "--resident",
        type=within(max(SPREADS)),
        default=64,
        help="networks in the engine that has many (64)",
    )
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    names = [f"network-{number}" for number in range(arguments.resident)]
    checkpoints = make_checkpoints(folder, arguments.dtype, names)
    target = checkpoints.target
    one = {names[0]: checkpoints.networks[names[0]]}
    spread = {f"{arguments.resident} resident, rows on {count}": count for count in SPREADS}
    with (
        plain_and_trimtab(checkpoints, folder) as (plain, trimtab),
        Engine(target, one, folder / "alone.log", **checkpoints.engine_options) as alone,
    ):
        engines = dict.fromkeys(spread, trimtab) | {ALIKE: plain, ALONE: alone}

        def measure(name: str, batch_size: int, number: int) -> Run | None:
            count = spread.get(name, 1)
            if count > batch_size:
                return None
            requests = make_requests(batch_size, arguments.tokens, number)
            if name != ALIKE:
                requests = [
                    request._replace(networks=(names[row % count],))
                    for row, request in enumerate(requests)
                ]
            return engines[name].run(requests)

        configurations = [ALIKE, ALONE, *spread]
        rounds = take_turns(arguments.batch_sizes, configurations, arguments.rounds, measure)
        engine = {"plain": plain.description, "trimtab": trimtab.description}
    require_guided(rounds, [ALONE, *spread], ALIKE)
    together = next(iter(spread))
    return Answer(
        tables=make_tables(rounds, list(spread), 1 + checkpoints.share(names[0])),
        plots=[make_plot(rounds, spread)],
        models=checkpoints.describe(),
        engine=engine,
        checks={"same_tokens_with_one_and_many_resident": same_tokens(rounds, ALONE, together)},
        runs=runs_of(rounds, step_seconds=step_seconds, seconds=seconds),
    )


def make_tables(rounds: Rounds[int, Run], spread: Sequence[str], limit: float) -> list[Table]:
    """Return the figures; `spread`: those with many resident, the one on one network first."""
    together = spread[0]
    return [
        Table(
            "Milliseconds of the median step",
            by_case(rounds, [ALIKE, ALONE, *spread], step_milliseconds),
        ),
        Table(
            f"A step with many resident against {ALONE}, the same rows on one network",
            [
                {
                    "batch": batch_size,
                    "many / one": rounded(ratio(found, together, ALONE, step_seconds)),
                    "goal: at most": MOST,
                    "one / plain": rounded(ratio(found, ALONE, ALIKE, step_seconds)),
                    "limit": rounded(limit),
                }
                for batch_size, found in rounds.items()
            ],
        ),
        Table(
            "A step of rows spread over several networks against the same rows on one",
            [
                {"": name, "batch": batch_size, "step": rounded(cost)}
                for batch_size, found in rounds.items()
                for name in spread[1:]
                for cost in (ratio(found, name, together, step_seconds),)
                if cost is not None
            ],
        ),
    ]


def step_milliseconds(found: Sequence[Round[Run]], name: str) -> float | None:
    return median(found, name, lambda run: 1e3 * run.step_seconds)


def make_plot(rounds: Rounds[int, Run], spread: dict[str, int]) -> Plot:
    return Plot(
        name="spread",
        title="Rows of one batch, spread over several networks",
        x="networks in the batch",
        y="milliseconds of the median step",
        curves={
            f"batch {batch_size}": [
                (count, milliseconds)
                for name, count in spread.items()
                for milliseconds in (step_milliseconds(found, name),)
                if milliseconds is not None
            ]
            for batch_size, found in rounds.items()
        },
        log_x=True,
    )
