"""What it costs a step that vLLM's processes wait for each other asleep (on a CPU).

vLLM at its defaults, which spins; the same vLLM without trimtab, waiting as trimtab's server does;
and trimtab, which always waits so. What guidance costs at a given way to wait is among the ratios.
"""

import argparse
from pathlib import Path

from deploy.bench.arguments import add_batches, add_dtype, add_rounds
from deploy.bench.checkpoints import make_checkpoints
from deploy.bench.engine import Engine, Run
from deploy.bench.report import Answer, Table, rounded, say
from deploy.bench.rounds import (
    GUIDED,
    PLAIN,
    UNGUIDED,
    Rounds,
    by_case,
    gap_figures,
    make_requests,
    median,
    plain_and_trimtab,
    ratio,
    require_guided,
    runs_of,
    same_tokens,
    seconds,
    take_turns,
)

ASLEEP = "vLLM plain, waiting asleep"
CONFIGURATIONS = (PLAIN, ASLEEP, UNGUIDED, GUIDED)
RATIOS = ((ASLEEP, PLAIN), (UNGUIDED, ASLEEP), (GUIDED, ASLEEP), (GUIDED, PLAIN))
GUIDING = "guiding"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 9)
    add_batches(parser, (1, 4, 16))
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    checkpoints = make_checkpoints(folder, arguments.dtype, [GUIDING])
    target, options = checkpoints.target, checkpoints.engine_options
    with (
        plain_and_trimtab(checkpoints, folder) as (plain, trimtab),
        Engine(target, {}, folder / "asleep.log", waits_asleep=True, **options) as asleep,
    ):
        engines = {PLAIN: plain, ASLEEP: asleep, UNGUIDED: trimtab, GUIDED: trimtab}

        def measure(name: str, batch_size: int, number: int) -> Run:
            networks = (GUIDING,) if name == GUIDED else ()
            requests = make_requests(batch_size, arguments.tokens, number, *networks)
            return engines[name].run(requests)

        rounds = take_turns(arguments.batch_sizes, CONFIGURATIONS, arguments.rounds, measure)
        engine = {"plain": plain.description, "trimtab": trimtab.description}
    require_guided(rounds, [GUIDED], PLAIN)
    return Answer(
        tables=make_tables(rounds),
        models=checkpoints.describe(),
        engine=engine,
        checks={"tokens_equal_plain": same_tokens(rounds, ASLEEP, PLAIN)},
        runs=runs_of(rounds, seconds=seconds),
    )


def make_tables(rounds: Rounds[int, Run]) -> list[Table]:
    return [
        Table(
            "Seconds for a batch",
            by_case(rounds, CONFIGURATIONS, lambda found, name: median(found, name, seconds)),
        ),
        Table(
            "Milliseconds between two tokens of a stream, median / 99th percentile",
            by_case(rounds, CONFIGURATIONS, gap_figures),
        ),
        Table(
            "Time of one against another",
            [
                {"": f"{over} / {under}"}
                | {
                    f"batch {size}": rounded(ratio(found, over, under, seconds))
                    for size, found in rounds.items()
                }
                for over, under in RATIOS
            ],
        ),
    ]
