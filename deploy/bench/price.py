"""What guidance costs, and what trimtab costs unguided requests, within one engine.

The other questions compare processes, and two of them differ by more than what these goals leave.
Here the same engine decodes unguided requests with trimtab taken out of its steps, then with it,
then guided ones, in turns, and these also with tokens asked for in a message of their own, as vLLM
does (`server/worker/sampling.py`). Networks are resident throughout, so what their memory costs is
not in it (`mixture` compares 64 with 1), nor is how trimtab sets vLLM up (`throughput`). Each
figure has an interval that holds the true median with 95 % confidence, if rounds are independent.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.bench.arguments import add_batches, add_dtype, add_models, add_rounds
from deploy.bench.checkpoints import MODELS, make_checkpoints_of
from deploy.bench.engine import Engine, Run
from deploy.bench.report import Answer, Cell, Table, rounded, say
from deploy.bench.rounds import (
    GUIDED,
    UNGUIDED,
    Round,
    Rounds,
    efficiency,
    interval,
    make_requests,
    rates,
    ratio,
    require_guided,
    runs_of,
    same_tokens,
    seconds,
    step_seconds,
    take_turns,
)

BARE = "trimtab taken out of the step"
APART = "guided, tokens asked for in a second message"
RESIDENT = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 30)
    add_batches(parser, (1, 4, 16), tokens=32)
    add_dtype(parser)
    add_models(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    names = [f"network-{number}" for number in range(RESIDENT)]
    checkpoints = make_checkpoints_of(arguments.models, folder, arguments.dtype, names)
    say(f"starting vLLM with trimtab, networks: {RESIDENT}")
    with Engine(
        checkpoints.target,
        checkpoints.networks,
        folder / "trimtab.log",
        value_memory_gb=MODELS[arguments.models].value_memory_gb,
        environment={"VLLM_USE_V2_MODEL_RUNNER": "0"},  # V1's can do without trimtab
        **checkpoints.engine_options,
    ) as engine:

        def measure(name: str, batch_size: int, number: int) -> Run:
            chosen = (names[0],) if name in (GUIDED, APART) else ()
            requests = make_requests(batch_size, arguments.tokens, number, *chosen)
            # vLLM tells of rows that have left in the next step: here, the same for all.
            engine.run(make_requests(1, 1, number))
            engine.call({BARE: take_out, APART: ask_apart}.get(name, leave))
            run = engine.run(requests)
            engine.call({BARE: put_back, APART: ask_at_once}.get(name, leave))
            return run

        configurations = (BARE, UNGUIDED, GUIDED, APART)
        rounds = take_turns(arguments.batch_sizes, configurations, arguments.rounds, measure)
        description = engine.description
    require_guided(rounds, [GUIDED, APART], BARE)
    return Answer(
        tables=make_tables(rounds, 1 + checkpoints.share(names[0])),
        models=checkpoints.describe(),
        engine=description,
        checks={
            "unguided_tokens_equal_bare": same_tokens(rounds, UNGUIDED, BARE),
            "guided_tokens_equal_apart": same_tokens(rounds, GUIDED, APART),
        },
        runs=runs_of(rounds, seconds=seconds, step_seconds=step_seconds),
    )


def make_tables(rounds: Rounds[int, Run], limit: float) -> list[Table]:
    """Return the figures; `limit`: the arithmetic one of guided / plain."""
    names = (BARE, UNGUIDED, GUIDED, APART)
    return [
        rates(rounds, names),
        Table(
            "Guided requests: time against trimtab taken out, efficiency, and 95 % intervals",
            [
                {"batch": batch_size} | against(found, GUIDED, BARE, limit)
                for batch_size, found in rounds.items()
            ],
        ),
        Table(
            "Unguided requests: time against trimtab taken out, and 95 % intervals",
            [
                {"batch": batch_size} | against(found, UNGUIDED, BARE)
                for batch_size, found in rounds.items()
            ],
        ),
        Table(
            "Guided requests, tokens asked for in a second message: time against guided requests",
            [
                {"batch": batch_size} | against(found, APART, GUIDED)
                for batch_size, found in rounds.items()
            ],
        ),
    ]


def against(
    found: Sequence[Round[Run]], name: str, reference: str, limit: float | None = None
) -> dict[str, Cell]:
    """Return the ratio and its interval, and with an arithmetic limit those of efficiency."""
    times = (ratio(found, name, reference, seconds), *interval(found, name, reference, seconds))
    row: dict[str, Cell] = dict(zip(("time", "from", "to"), map(rounded, times), strict=True))
    if limit is not None:
        values = [None if time is None else efficiency(time, limit) for time in times]
        cells = [rounded(value, 2) for value in values]
        row |= zip(("efficiency", "efficiency from", "efficiency to"), cells, strict=True)
    return row


# What follows runs in vLLM's worker.

_taken: dict[str, Any] = {}
EXECUTE = "execute_model"
REPLACED = ("_get_prompt_logprobs_dict", EXECUTE)
"""vLLM's methods that trimtab replaces in its runner."""


def take_out(worker: Any) -> None:
    """Leave vLLM's V1 runner as it is without trimtab. No guided request may be running."""
    runner, processor = worker.model_runner, worker._processor()
    if processor._rows:
        raise RuntimeError("guided requests are running")
    batch, sampler = runner.input_batch, runner.sampler
    _taken["processor"] = processor
    _taken["hooks"] = dict(sampler._forward_pre_hooks), dict(sampler._forward_hooks)
    _taken["methods"] = {name: runner.__dict__.pop(name) for name in REPLACED}
    _taken["needs tokens"] = batch.logitsprocs_need_output_token_ids
    batch.logitsprocs.non_argmax_invariant.remove(processor)
    batch.logitsprocs_need_output_token_ids = False
    sampler._forward_pre_hooks.clear()
    sampler._forward_hooks.clear()


def put_back(worker: Any) -> None:
    """Undo `take_out`."""
    runner = worker.model_runner
    batch, sampler = runner.input_batch, runner.sampler
    before, after = _taken.pop("hooks")
    sampler._forward_pre_hooks.update(before)
    sampler._forward_hooks.update(after)
    batch.logitsprocs_need_output_token_ids = _taken.pop("needs tokens")
    batch.logitsprocs.non_argmax_invariant.append(_taken.pop("processor"))
    runner.__dict__ |= _taken.pop("methods")


def ask_apart(worker: Any) -> None:
    """Have the engine ask for tokens in a message of their own."""
    _taken["at once"] = worker.model_runner.__dict__.pop(EXECUTE)


def ask_at_once(worker: Any) -> None:
    """Undo `ask_apart`."""
    setattr(worker.model_runner, EXECUTE, _taken.pop("at once"))


def leave(_worker: Any) -> None:
    """Do nothing, which takes as long as to be called."""
