"""Tokens per second where requests differ in length.

Lengths of prompts and answers are drawn evenly from a range. vLLM runs so many requests at once,
and each that ends makes room for the next. Transformers with KV caches, as proxy tuning runs, takes
as many as one batch, which is padded to its longest prompt and computed until its longest answer
has ended.
"""

import argparse
import contextlib
import random
from collections.abc import Sequence
from pathlib import Path

from deploy.bench.arguments import add_dtype, add_rounds, within
from deploy.bench.baseline import Baseline
from deploy.bench.checkpoints import make_checkpoints
from deploy.bench.engine import Engine, Request, Run, Stream
from deploy.bench.report import Answer, Cell, Table, rounded, say
from deploy.bench.rounds import (
    ALIKE,
    GUIDED,
    PLAIN,
    Round,
    Rounds,
    gaps,
    plain_and_trimtab,
    rates,
    ratio,
    require_guided,
    runs_of,
    same_tokens,
    seconds,
    take_turns,
    tokens_per_second,
)
from deploy.bench.throughput import CACHED

CONFIGURATIONS = (PLAIN, ALIKE, GUIDED, CACHED)
PROMPTS = (16, 256)
ANSWERS = (1, 128)
"""Tokens, from and to."""
NETWORK = "guiding"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 3)
    add_dtype(parser)
    parser.add_argument(
        "--at-once", type=within(1, 64), nargs="+", default=[4, 16], help="requests (4 16)"
    )
    parser.add_argument(
        "--batches", type=within(1), default=4, help="times as many requests in all (4)"
    )


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    checkpoints = make_checkpoints(folder, arguments.dtype, [NETWORK])
    with contextlib.ExitStack() as engines:
        pair = plain_and_trimtab(checkpoints, folder, set_up_alike=False)
        plain, trimtab = engines.enter_context(pair)
        target, options = checkpoints.target, checkpoints.engine_options
        alike = Engine(target, {}, folder / "alike.log", set_up_alike=True, **options)
        vllm = {PLAIN: plain, ALIKE: engines.enter_context(alike), GUIDED: trimtab}
        baseline = Baseline(checkpoints.target, checkpoints.networks[NETWORK], arguments.dtype)

        def measure(name: str, at_once: int, number: int) -> Run:
            networks = () if name in (PLAIN, ALIKE) else (NETWORK,)
            num_requests = at_once * (arguments.batches if number else 1)
            requests = make_traffic(num_requests, (at_once, number), *networks)
            if name == CACHED:
                return run_in_batches(baseline, requests, at_once)
            return vllm[name].run(requests, at_once=at_once)

        rounds = take_turns(arguments.at_once, CONFIGURATIONS, arguments.rounds, measure)
        engine = {"plain": plain.description, "trimtab": trimtab.description}
    require_guided(rounds, [GUIDED], PLAIN)
    return Answer(
        tables=make_tables(rounds, 1 + checkpoints.share(NETWORK)),
        models=checkpoints.describe(),
        engine=engine,
        checks={
            "unguided_tokens_equal_plain": same_tokens(rounds, ALIKE, PLAIN),
            "share_of_answers_equal_to_transformers": rounded(share_of_same(rounds)),
        },
        runs=runs_of(rounds, seconds=seconds, tokens_per_second=tokens_per_second),
    )


def make_traffic(num_requests: int, seed: object, *networks: str) -> list[Request]:
    """Return requests of random lengths, the same for the same `seed`."""
    draw = random.Random(f"{seed} {num_requests}")
    return [
        Request(
            [draw.randrange(8, 256) for _ in range(draw.randint(*PROMPTS))],
            draw.randint(*ANSWERS),
            networks,
        )
        for _ in range(num_requests)
    ]


def run_in_batches(baseline: Baseline, requests: Sequence[Request], batch_size: int) -> Run:
    """Run one batch after the other, with KV caches; each of the next that are waiting."""
    streams: list[Stream] = []
    elapsed = 0.0
    for first in range(0, len(requests), batch_size):
        run = baseline.run(requests[first : first + batch_size], cached=True)
        streams += [
            stream._replace(arrivals=[elapsed + time for time in stream.arrivals])
            for stream in run.streams
        ]
        elapsed += run.seconds
    return Run(streams)


def share_of_same(rounds: Rounds[int, Run]) -> float:
    """Return the share of trimtab's answers that transformers gave too, to the last token."""
    same = [
        ours == theirs
        for found in rounds.values()
        for measured in found
        for ours, theirs in zip(measured[GUIDED].tokens, measured[CACHED].tokens, strict=True)
    ]
    return sum(same) / len(same)


def make_tables(rounds: Rounds[int, Run], limit: float) -> list[Table]:
    """Return the figures; `limit`: the arithmetic one of guided / plain."""
    return [
        rates(rounds, CONFIGURATIONS),
        gaps(rounds, CONFIGURATIONS),
        Table(
            "Time against vLLM, and speed against transformers",
            [{"at once": case, **ratios(found, limit)} for case, found in rounds.items()],
        ),
    ]


def ratios(found: Sequence[Round[Run]], limit: float) -> dict[str, Cell]:
    """Return those of one number of requests at once."""
    return {
        "guided / plain": rounded(ratio(found, GUIDED, PLAIN, seconds)),
        "guided / plain set up alike": rounded(ratio(found, GUIDED, ALIKE, seconds)),
        "limit": rounded(limit),
        "times as fast as transformers": rounded(ratio(found, CACHED, GUIDED, seconds), 2),
        "plain set up alike, times as fast": rounded(ratio(found, CACHED, ALIKE, seconds), 2),
    }
