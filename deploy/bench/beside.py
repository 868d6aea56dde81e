"""What unguided requests pay for guided ones beside them, and for resident networks.

Of a batch, none, a quarter, half and three quarters are guided; what counts is the time between
two tokens of the unguided rows. vLLM plain is set up as trimtab is; all of its rows are
unguided.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deploy.bench.arguments import add_batches, add_dtype, add_rounds, within
from deploy.bench.checkpoints import make_checkpoints
from deploy.bench.engine import Run
from deploy.bench.report import Answer, Cell, Table, rounded, say
from deploy.bench.rounds import (
    ALIKE,
    Round,
    Rounds,
    by_case,
    gap_figures,
    make_requests,
    plain_and_trimtab,
    ratio,
    require_guided,
    runs_of,
    seconds,
    step_seconds,
    take_turns,
)

MOST = 1.01
"""Goal: unguided / plain, with the networks resident."""


class Mix(NamedTuple):
    """How much of a batch is guided."""

    quarters: int

    @property
    def name(self) -> str:
        return ("nothing", "a quarter", "half", "three quarters")[self.quarters] + " guided"

    def guided(self, batch_size: int) -> int:
        """Return the number of guided rows, which are the batch's last."""
        return batch_size * self.quarters // 4


MIXES = {mix.name: mix for mix in map(Mix, range(4))}
UNGUIDED = Mix(0).name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 9)
    add_batches(parser, (1, 4, 16))
    parser.add_argument(
        "--resident", type=within(1), default=8, help="networks in the engine's memory (8)"
    )
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    names = [f"network-{number}" for number in range(arguments.resident)]
    checkpoints = make_checkpoints(folder, arguments.dtype, names)
    with plain_and_trimtab(checkpoints, folder) as (plain, trimtab):

        def measure(name: str, batch_size: int, number: int) -> Run | None:
            requests = make_requests(batch_size, arguments.tokens, number)
            if name == ALIKE:
                return plain.run(requests)
            guided = MIXES[name].guided(batch_size)
            if not guided and name != UNGUIDED:
                return None
            first = batch_size - guided
            requests[first:] = [r._replace(networks=(names[0],)) for r in requests[first:]]
            return trimtab.run(requests)

        rounds = take_turns(arguments.batch_sizes, [ALIKE, *MIXES], arguments.rounds, measure)
        engine = {"plain": plain.description, "trimtab": trimtab.description}
    require_guided(rounds, [name for name in MIXES if name != UNGUIDED], ALIKE)
    unguided = unguided_rows(rounds)
    return Answer(
        tables=make_tables(rounds, unguided),
        models=checkpoints.describe(),
        engine=engine,
        checks={"unguided_tokens_equal_plain": equal_plain(rounds, unguided)},
        runs=runs_of(unguided, step_seconds=step_seconds, seconds=seconds),
    )


def unguided_rows(rounds: Rounds[int, Run]) -> Rounds[int, Run]:
    """Return the runs without their guided rows."""
    return {
        batch_size: [
            {
                name: run
                if name == ALIKE
                else Run(run.streams[: batch_size - MIXES[name].guided(batch_size)])
                for name, run in measured.items()
            }
            for measured in found
        ]
        for batch_size, found in rounds.items()
    }


def equal_plain(rounds: Rounds[int, Run], unguided: Rounds[int, Run]) -> bool:
    """Whether unguided rows got plain vLLM's tokens, whatever was beside them."""
    return all(
        run.tokens == whole[ALIKE].tokens[: len(run.streams)]
        for batch_size in rounds
        for whole, rows in zip(rounds[batch_size], unguided[batch_size], strict=True)
        for run in rows.values()
    )


def make_tables(rounds: Rounds[int, Run], unguided: Rounds[int, Run]) -> list[Table]:
    return [
        Table(
            "Unguided rows: milliseconds between two tokens, median / 99th percentile",
            by_case(unguided, [ALIKE, *MIXES], gap_figures),
        ),
        Table(
            f"Unguided rows: time of a step against {ALIKE}",
            by_case(unguided, MIXES, lambda found, name: ratio(found, name, ALIKE, step_seconds)),
        ),
        Table(
            f"A batch of unguided requests against {ALIKE}, the networks resident",
            [whole_batch(batch_size, found) for batch_size, found in rounds.items()],
        ),
    ]


def whole_batch(batch_size: int, found: Sequence[Round[Run]]) -> dict[str, Cell]:
    return {
        "batch": batch_size,
        "unguided / plain": rounded(ratio(found, UNGUIDED, ALIKE, seconds)),
        "a step": rounded(ratio(found, UNGUIDED, ALIKE, step_seconds)),
        "goal: at most": MOST,
    }
