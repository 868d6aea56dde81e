"""Time to first token against the prompt's length, with a cold and a warm prefix cache.

Cold: a new random prompt, which nobody has read; warm: the same one again, which the target's
cache and the network's hold but for its last tokens. One request at a time; vLLM plain is set
up as trimtab is. Two processes read the same prompt at speeds of their own, so on a CPU the engine
with trimtab also does so with trimtab taken out of its steps (`price`).
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from deploy.bench.arguments import add_dtype, add_rounds, within
from deploy.bench.checkpoints import make_checkpoints
from deploy.bench.engine import Engine
from deploy.bench.price import BARE, leave, put_back, take_out
from deploy.bench.report import Answer, Cell, Plot, Table, rounded, say
from deploy.bench.rounds import (
    ALIKE,
    GUIDED,
    UNGUIDED,
    Round,
    Rounds,
    by_case,
    curves,
    make_requests,
    median,
    plain_and_trimtab,
    ratio,
    runs_of,
    take_turns,
)

POSITIONS = 8192
CONFIGURATIONS = (ALIKE, BARE, UNGUIDED, GUIDED)


class FirstTokens(NamedTuple):
    """Seconds to the first token."""

    cold: float
    warm: float
    read_cold: int  # tokens that the network read meanwhile
    read_warm: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 7)
    parser.add_argument(
        "--lengths",
        type=within(2, POSITIONS - 1),
        nargs="+",
        default=[16, 64, 256, 1024, 4096],
        help="of the prompts, in tokens (16 64 256 1024 4096)",
    )
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    checkpoints = make_checkpoints(folder, arguments.dtype, ["guiding"], POSITIONS)
    fresh = itertools.count()
    # Only V1's runner, which a CPU has, can do without trimtab once it has it.
    left_out = {BARE} if torch.cuda.is_available() else set()
    names = [name for name in CONFIGURATIONS if name not in left_out]
    with plain_and_trimtab(checkpoints, folder) as (plain, trimtab):

        def measure(name: str, length: int, _: int) -> FirstTokens:
            engine = plain if name == ALIKE else trimtab
            networks = ("guiding",) if name == GUIDED else ()
            requests = make_requests(1, 1, f"fresh {next(fresh)}", *networks, length=length)
            # vLLM tells of rows that have left in the next step: here, the same for all.
            engine.run(make_requests(1, 1, "before"))
            engine.call(take_out if name == BARE else leave)
            read_by = tokens_read if name in (UNGUIDED, GUIDED) else lambda _: 0
            read, taken = [read_by(engine)], []
            for warm in (False, True):
                (stream,) = engine.run(requests, warm).streams
                taken.append(stream.time_to_first_token)
                read.append(read_by(engine))
            engine.call(put_back if name == BARE else leave)
            if wrong := what_is_wrong(name, length, read):
                sys.exit(wrong)
            return FirstTokens(*taken, read[1] - read[0], read[2] - read[1])

        rounds = take_turns(arguments.lengths, names, arguments.rounds, measure)
        engine = {"plain": plain.description, "trimtab": trimtab.description}
    return Answer(
        tables=make_tables(rounds, names, 1 + checkpoints.share("guiding")),
        plots=[make_plot(rounds)],
        models=checkpoints.describe(),
        engine=engine,
        runs=runs_of(
            rounds,
            cold=lambda found: found.cold,
            warm=lambda found: found.warm,
            network_read_cold=lambda found: found.read_cold,
            network_read_warm=lambda found: found.read_warm,
        ),
    )


def tokens_read(engine: Engine) -> int:
    """Return how many tokens the networks of an engine have read since they were loaded."""
    return sum(network["forward_tokens"] for network in engine.call("trimtab_networks")["networks"])


def what_is_wrong(name: str, length: int, read: Sequence[int]) -> str | None:
    """Say so if what the network read by then is not what this configuration is about."""
    cold, warm = read[1] - read[0], read[2] - read[1]
    if name != GUIDED and (cold or warm):
        return f"{name}: the network read {cold + warm} tokens of an unguided request"
    if name == GUIDED and (cold < length or not 0 < warm <= length):
        return f"of a prompt of {length} tokens the network read {cold}, and {warm} when warm"
    return None


def make_tables(
    rounds: Rounds[int, FirstTokens], names: Sequence[str], limit: float
) -> list[Table]:
    return [
        Table(
            f"Milliseconds to the first token, {state} prefix cache",
            by_case(rounds, names, milliseconds(state), "{} tokens"),
        )
        for state in ("cold", "warm")
    ] + [
        Table(
            f"Time to first token against {reference}",
            [
                {"tokens": length, **ratios(found, reference), "limit": rounded(limit)}
                for length, found in rounds.items()
            ],
        )
        for reference in (ALIKE, BARE)
        if reference in names
    ]


def milliseconds(state: str) -> Callable[[Sequence[Round[FirstTokens]], str], float | None]:
    return lambda found, name: median(found, name, lambda taken: 1e3 * getattr(taken, state))


def ratios(found: Sequence[Round[FirstTokens]], reference: str) -> dict[str, Cell]:
    named = {"guided": GUIDED, "unguided": UNGUIDED}
    return {
        f"{label}, {state}": rounded(
            ratio(found, name, reference, lambda taken, state=state: getattr(taken, state))
        )
        for state in ("cold", "warm")
        for label, name in named.items()
    }


def make_plot(rounds: Rounds[int, FirstTokens]) -> Plot:
    return Plot(
        name="first-token",
        title="Time to first token",
        x="tokens of the prompt",
        y="milliseconds",
        curves={
            f"{name}, {state}": points
            for state in ("cold", "warm")
            for name, points in curves(rounds, CONFIGURATIONS, milliseconds(state)).items()
        },
        log_x=True,
        log_y=True,
    )
