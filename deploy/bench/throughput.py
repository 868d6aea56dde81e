"""Tokens per second, and the time between two tokens, against the batch size.

vLLM plain is vLLM at its defaults, and all run the same target; trimtab has its networks resident
throughout. On a CPU, trimtab has vLLM's processes wait for each other asleep and compute on all
cores of a small machine: a vLLM without trimtab that is set up alike tells what that changes from
what guidance costs. Transformers are measured beside: with KV caches, as proxy tuning runs, and
without, as the method's authors serve it (in the first round only: it takes minutes). What those
with KV caches pay for a step grows with what they have read, so the same run tells how many times
as fast shorter answers would have been.
"""

import argparse
import contextlib
import itertools
import operator
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from deploy.bench.arguments import add_batches, add_dtype, add_models, add_rounds, within
from deploy.bench.baseline import Baseline
from deploy.bench.checkpoints import MODELS, SMALL, Checkpoints, make_checkpoints_of, make_mapped
from deploy.bench.engine import Engine, Run
from deploy.bench.report import Answer, Cell, Plot, Table, rounded, say
from deploy.bench.rounds import (
    ALIKE,
    GUIDED,
    PLAIN,
    UNGUIDED,
    Round,
    Rounds,
    curves,
    efficiency,
    gaps,
    make_requests,
    median,
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

MAPPED = "trimtab guided, another vocabulary"
CACHED = "transformers, KV caches"
UNCACHED = "transformers, no caches"
CONFIGURATIONS = (PLAIN, ALIKE, UNGUIDED, GUIDED, MAPPED, CACHED, UNCACHED)
LARGEST_UNCACHED_BATCH = 16
NETWORKS = {GUIDED: ("guiding",), MAPPED: ("mapped",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 7)
    add_batches(parser, (1, 4, 16))
    add_dtype(parser)
    add_models(parser)
    parser.add_argument(
        "--prompt",
        type=within(1, 384),
        default=32,
        help="tokens of each prompt (32); without caches, each step reads them again",
    )
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure transformers beside",
    )
    parser.add_argument(
        "--uncached",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="transformers without KV caches, too",
    )
    parser.add_argument(
        "--peer-threads",
        type=within(1),
        help="threads of transformers (torch's default: all; plain vLLM computes on one less)",
    )


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    # One network guides, one is just resident, and beside the small target, one is mapped.
    checkpoints = make_checkpoints_of(
        arguments.models, folder, arguments.dtype, ("guiding", "resident")
    )
    if arguments.models == SMALL:
        checkpoints.networks["mapped"] = make_mapped(folder, arguments.dtype)
    names = configurations(
        checkpoints, arguments.peers, arguments.uncached, torch.cuda.is_available()
    )
    memory = MODELS[arguments.models].value_memory_gb
    with contextlib.ExitStack() as engines:
        pair = plain_and_trimtab(checkpoints, folder, set_up_alike=False, value_memory_gb=memory)
        plain, trimtab = engines.enter_context(pair)
        runners = dict.fromkeys(names, trimtab.run) | {PLAIN: plain.run}
        if ALIKE in names:
            target, options = checkpoints.target, checkpoints.engine_options
            alike = Engine(target, {}, folder / "alike.log", set_up_alike=True, **options)
            runners[ALIKE] = engines.enter_context(alike).run
        if arguments.peers:
            if arguments.peer_threads:
                torch.set_num_threads(arguments.peer_threads)
            network = checkpoints.networks["guiding"]
            baseline = Baseline(checkpoints.target, network, arguments.dtype)
            runners[CACHED] = partial(baseline.run, cached=True)
            runners[UNCACHED] = partial(baseline.run, cached=False)

        def measure(name: str, batch_size: int, number: int) -> Run | None:
            networks = NETWORKS.get(name, ())
            tokens = arguments.tokens
            if name == UNCACHED:
                if batch_size > LARGEST_UNCACHED_BATCH or number > 1:
                    return None
                tokens = tokens if number else 2
            length = arguments.prompt
            return runners[name](
                make_requests(batch_size, tokens, number, *networks, length=length)
            )

        rounds = take_turns(arguments.batch_sizes, names, arguments.rounds, measure)
        engine = {"plain": plain.description, "trimtab": trimtab.description}
    require_guided(rounds, NETWORKS.keys() & set(names), PLAIN)
    return Answer(
        tables=make_tables(rounds, names, 1 + checkpoints.share("guiding")),
        plots=[make_plot(rounds, names)],
        models=checkpoints.describe(),
        engine=engine,
        checks={
            "unguided_tokens_equal_plain": all(
                same_tokens(rounds, name, PLAIN) for name in (UNGUIDED, ALIKE)
            )
        },
        runs=runs_of(rounds, seconds=seconds, tokens_per_second=tokens_per_second),
    )


def configurations(
    checkpoints: Checkpoints, peers: bool, uncached: bool, on_device: bool
) -> list[str]:
    """Return what is measured.

    Args:
        peers: transformers too.
        uncached: those without KV caches among them.
        on_device: where trimtab sets vLLM up as it is.
    """
    left_out = {ALIKE} if on_device else set()
    if "mapped" not in checkpoints.networks:
        left_out.add(MAPPED)
    if not peers:
        left_out |= {CACHED, UNCACHED}
    if not uncached:
        left_out.add(UNCACHED)
    return [name for name in CONFIGURATIONS if name not in left_out]


def make_tables(rounds: Rounds[int, Run], names: Sequence[str], limit: float) -> list[Table]:
    """Return the figures; `limit`: the arithmetic one of guided / plain."""
    tables = [
        rates(rounds, names),
        gaps(rounds, names),
        Table(
            f"Time against {PLAIN}, and speed against transformers",
            [{"batch": size, **ratios(found, limit)} for size, found in rounds.items()],
        ),
    ]
    if CACHED in names:
        by_lengths = [{"batch": size, **by_length(found)} for size, found in rounds.items()]
        tables.append(Table(f"Times as fast as {CACHED}, by tokens of each answer", by_lengths))
    return tables


def ratios(found: Sequence[Round[Run]], limit: float) -> dict[str, Cell]:
    """Return those of one batch size (research.md, "Measures").

    Efficiency is about guidance alone, so against a vLLM that is set up alike, if there is one.
    """
    guided = ratio(found, GUIDED, PLAIN, seconds)
    alike = ratio(found, GUIDED, ALIKE, seconds) or guided
    return {
        "guided / plain": rounded(guided),
        "limit": rounded(limit),
        "efficiency": rounded(None if alike is None else efficiency(alike, limit), 2),
        "guided / plain set up alike": rounded(ratio(found, GUIDED, ALIKE, seconds)),
        "plain set up alike / plain": rounded(ratio(found, ALIKE, PLAIN, seconds)),
        "unguided / plain": rounded(ratio(found, UNGUIDED, PLAIN, seconds)),
        "another vocabulary / plain": rounded(ratio(found, MAPPED, PLAIN, seconds)),
        "times as fast as cached": rounded(ratio(found, CACHED, GUIDED, seconds), 2),
        "times as fast as uncached": rounded(ratio(found, UNCACHED, GUIDED, seconds), 1),
    }


def by_length(found: Sequence[Round[Run]]) -> dict[str, Cell]:
    """Return how many times as fast guided answers of 1, 2, 4, ... tokens are, and whole ones.

    Until all requests of the batch have so many.
    """
    longest = len(found[0][GUIDED].streams[0].tokens)
    lengths = [*itertools.takewhile(longest.__gt__, (2**n for n in itertools.count())), longest]
    return {
        str(length): rounded(
            ratio(found, CACHED, GUIDED, operator.methodcaller("seconds_until", length)), 2
        )
        for length in lengths
    }


def make_plot(rounds: Rounds[int, Run], names: Sequence[str]) -> Plot:
    return Plot(
        name="tokens-per-second",
        title="Tokens per second, all requests together",
        x="batch",
        y="tokens per second",
        curves=curves(rounds, names, lambda found, name: median(found, name, tokens_per_second)),
        log_x=True,
        log_y=True,
    )
