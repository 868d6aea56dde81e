"""What guidance costs, and what resident networks cost others, within one engine.

The other questions compare processes, and two of them differ by more than what these goals leave.
Here the same engine decodes unguided requests with trimtab taken out of its steps, then with it,
then guided ones, in turns. What vLLM itself gains or loses by how trimtab sets it up is not in it:
that is `throughput`'s. Each figure has an interval: with the rounds' ratios independent, 19 of 20
such intervals hold the true median.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.bench.arguments import add_batches, add_dtype, add_rounds, within
from deploy.bench.checkpoints import make_checkpoints
from deploy.bench.engine import Engine, Run
from deploy.bench.report import Answer, Cell, Table, rounded, say
from deploy.bench.rounds import (
    GUIDED,
    UNGUIDED,
    Round,
    Rounds,
    by_case,
    efficiency,
    interval,
    make_requests,
    median,
    ratio,
    require_guided,
    runs_of,
    same_tokens,
    seconds,
    step_seconds,
    take_turns,
    tokens_per_second,
)

BARE = "trimtab taken out of the step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 30)
    add_batches(parser, (1, 4, 16), tokens=32)
    parser.add_argument(
        "--resident", type=within(1), default=8, help="networks in the engine's memory (8)"
    )
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    names = [f"network-{number}" for number in range(arguments.resident)]
    checkpoints = make_checkpoints(folder, arguments.dtype, names)
    say(f"starting vLLM with trimtab, networks: {len(names)}")
    with Engine(
        checkpoints.target,
        checkpoints.networks,
        folder / "trimtab.log",
        **checkpoints.engine_options,
    ) as engine:
        description = engine.description
        if description["v2_model_runner"]:
            sys.exit("Only vLLM's V1 model runner can do without: set VLLM_USE_V2_MODEL_RUNNER=0")

        def measure(name: str, batch_size: int, number: int) -> Run:
            chosen = (names[0],) if name == GUIDED else ()
            requests = make_requests(batch_size, arguments.tokens, number, *chosen)
            if name != BARE:
                return engine.run(requests)
            # Rows that have left are told of in the next step, so one with trimtab comes between.
            engine.run(make_requests(1, 1, number))
            engine.call(take_out)
            run = engine.run(requests)
            engine.call(put_back)
            return run

        configurations = (BARE, UNGUIDED, GUIDED)
        rounds = take_turns(arguments.batch_sizes, configurations, arguments.rounds, measure)
    require_guided(rounds, [GUIDED], BARE)
    return Answer(
        tables=make_tables(rounds, 1 + checkpoints.share(names[0])),
        models=checkpoints.describe(),
        engine=description,
        checks={"unguided_tokens_equal_bare": same_tokens(rounds, UNGUIDED, BARE)},
        runs=runs_of(rounds, seconds=seconds, step_seconds=step_seconds),
    )


def make_tables(rounds: Rounds[int, Run], limit: float) -> list[Table]:
    """Return the figures; `limit`: the arithmetic one of guided / plain."""
    names = (BARE, UNGUIDED, GUIDED)
    return [
        Table(
            "Tokens per second, all requests of a batch together",
            by_case(rounds, names, lambda found, name: median(found, name, tokens_per_second)),
        ),
        Table(
            "Time of guided requests against vLLM without trimtab in its step, and efficiency",
            [
                {"batch": batch_size} | against_bare(found, GUIDED, limit)
                for batch_size, found in rounds.items()
            ],
        ),
        Table(
            "Time of unguided requests against the same, the networks resident",
            [
                {"batch": batch_size} | against_bare(found, UNGUIDED)
                for batch_size, found in rounds.items()
            ],
        ),
    ]


def against_bare(
    found: Sequence[Round[Run]], name: str, limit: float | None = None
) -> dict[str, Cell]:
    """Return the ratio and its interval, and with an arithmetic limit those of efficiency."""
    times = (ratio(found, name, BARE, seconds), *interval(found, name, BARE, seconds))
    row: dict[str, Cell] = dict(zip(("time", "from", "to"), map(rounded, times), strict=True))
    if limit is not None:
        values = [None if time is None else efficiency(time, limit) for time in times]
        cells = [rounded(value, 2) for value in values]
        row |= zip(("efficiency", "efficiency from", "efficiency to"), cells, strict=True)
    return row


# What follows runs in vLLM's worker.

_taken: dict[str, Any] = {}


def take_out(worker: Any) -> None:
    """Leave vLLM's V1 runner as it is without trimtab. No guided request may be running."""
    runner = worker.model_runner
    processor, processors = worker._processor(), runner.input_batch.logitsprocs
    if processor._rows:
        raise RuntimeError("guided requests are running")
    sampler = runner.sampler
    _taken["processor"] = processor
    _taken["hooks"] = dict(sampler._forward_pre_hooks), dict(sampler._forward_hooks)
    processors.non_argmax_invariant.remove(processor)
    sampler._forward_pre_hooks.clear()
    sampler._forward_hooks.clear()
    runner.input_batch.logitsprocs_need_output_token_ids = False


def put_back(worker: Any) -> None:
    """Undo `take_out`."""
    runner = worker.model_runner
    before, after = _taken.pop("hooks")
    runner.input_batch.logitsprocs.non_argmax_invariant.append(_taken.pop("processor"))
    runner.sampler._forward_pre_hooks.update(before)
    runner.sampler._forward_hooks.update(after)
    runner.input_batch.logitsprocs_need_output_token_ids = True
