"""Measuring by turns: every configuration once in each round, and figures taken within rounds.

A machine is slow at times. What is compared is therefore measured within seconds of each other, a
ratio is one of the same round, and its median over the rounds is reported.
"""

import collections
import contextlib
import math
import random
import statistics
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deploy.bench.checkpoints import Checkpoints
from deploy.bench.engine import Engine, Request, Run
from deploy.bench.report import Cell, Table, rounded, say

PLAIN = "vLLM plain"
"""At its defaults."""
ALIKE = "vLLM plain, set up alike"
"""With trimtab's way of sharing cores and waiting, on a CPU: guidance is all that differs."""
UNGUIDED = "trimtab unguided, networks resident"
GUIDED = "trimtab guided"

CaseT = TypeVar("CaseT", bound=Hashable)
T = TypeVar("T")

Round = dict[str, T]
"""configuration -> what was measured; those that were left out are not in it"""
Rounds = dict[CaseT, list[Round[T]]]
"""case, such as a batch size -> its rounds"""


def take_turns(
    cases: Sequence[CaseT],
    configurations: Iterable[str],
    rounds: int,
    measure: Callable[[str, CaseT, int], T | None],
) -> Rounds[CaseT, T]:
    """Measure every configuration for every case, once in each round.

    Args:
        measure: takes a configuration, a case and the number of the round, which is 0 for one that
            warms up and is not kept. Returns None to leave it out.
    """
    found: Rounds[CaseT, T] = {case: [] for case in cases}
    names = list(configurations)
    for number in range(rounds + 1):
        order = turn_order(names, number)
        for case in cases:
            measured = {name: measure(name, case, number) for name in order}
            if number:
                found[case].append({k: v for k, v in measured.items() if v is not None})
        say(f"round {number} of {rounds}" if number else "warmed up")
    return found


def turn_order(names: Sequence[str], number: int) -> list[str]:
    """Return the order of a round: each is first at times, and none always follows another."""
    first = number // 2 % len(names)
    order = [*names[first:], *names[:first]]
    return order[::-1] if number % 2 else order


def median(rounds: Sequence[Round[T]], name: str, value: Callable[[T], float]) -> float | None:
    """Return a configuration's median over the rounds; None if it was always left out."""
    values = [value(measured[name]) for measured in rounds if name in measured]
    return statistics.median(values) if values else None


def ratio(
    rounds: Sequence[Round[T]], over: str, under: str, value: Callable[[T], float]
) -> float | None:
    """Return the median of the rounds' ratios; None if no round has both."""
    ratios = _ratios(rounds, over, under, value)
    return statistics.median(ratios) if ratios else None


def interval(
    rounds: Sequence[Round[T]], over: str, under: str, value: Callable[[T], float]
) -> tuple[float, float] | tuple[None, None]:
    """Return two of the rounds' ratios, between which the true median is with 95 % confidence.

    Of independent rounds, whose ratios are each as likely above the median as below it, whatever
    their distribution (the binomial interval of order statistics). None if there are fewer than 6.
    """
    ratios = sorted(_ratios(rounds, over, under, value))
    beyond = 0  # of 2 ** rounds ways to be above or below it, those that leave it outside an end
    for index in range(len(ratios) // 2):
        beyond += math.comb(len(ratios), index)
        if 2 * beyond > 0.05 * 2 ** len(ratios):
            return (ratios[index - 1], ratios[-index]) if index else (None, None)
    return None, None


def _ratios(
    rounds: Sequence[Round[T]], over: str, under: str, value: Callable[[T], float]
) -> list[float]:
    return [
        value(measured[over]) / value(measured[under])
        for measured in rounds
        if over in measured and under in measured
    ]


def efficiency(overhead: float, limit: float) -> float:
    """Return what guidance costs for each of what its arithmetic does (research.md, "Measures").

    Args:
        overhead: time of guided requests over that of unguided ones.
        limit: the same, by arithmetic alone.
    """
    return (overhead - 1) / (limit - 1)


def pooled(
    rounds: Sequence[Round[T]], name: str, values: Callable[[T], Sequence[float]]
) -> list[float]:
    """Return all values of a configuration, of all rounds together."""
    return [v for measured in rounds if name in measured for v in values(measured[name])]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that this share of them does not exceed: one that was seen."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def by_case(
    rounds: Rounds[CaseT, T],
    names: Iterable[str],
    figure: Callable[[Sequence[Round[T]], str], Cell],
    column: str = "batch {}",
) -> list[dict[str, Cell]]:
    """Return a table's rows: a configuration each, with a column for each case."""
    return [
        {"": name}
        | {
            column.format(case): rounded(cell) if isinstance(cell, float) else cell
            for case, found in rounds.items()
            for cell in (figure(found, name),)
        }
        for name in names
    ]


def rates(rounds: Rounds[CaseT, Run], names: Iterable[str]) -> Table:
    """Return the table of tokens per second."""
    return Table(
        "Tokens per second, all requests of a batch together",
        by_case(rounds, names, lambda found, name: median(found, name, tokens_per_second)),
    )


def gaps(rounds: Rounds[CaseT, Run], names: Iterable[str]) -> Table:
    """Return the table of the time between two tokens."""
    return Table(
        "Milliseconds between two tokens of a stream, median / 99th percentile",
        by_case(rounds, names, gap_figures),
    )


def curves(
    rounds: Rounds[Any, T],
    names: Iterable[str],
    figure: Callable[[Sequence[Round[T]], str], float | None],
) -> dict[str, list[tuple[float, float]]]:
    """Return a plot's curves: a configuration each, over the cases, which are numbers."""
    points = {
        name: [
            (case, value)
            for case, found in sorted(rounds.items())
            for value in (figure(found, name),)
            if value is not None
        ]
        for name in names
    }
    return {name: drawn for name, drawn in points.items() if drawn}


def runs_of(rounds: Rounds[CaseT, T], **values: Callable[[T], Any]) -> list[dict[str, Any]]:
    """Return what was measured round by round, for whoever wants to look closer."""
    records: dict[tuple[CaseT, str], dict[str, list[Any]]] = collections.defaultdict(
        lambda: {name: [] for name in values}
    )
    for case, measured in ((c, m) for c, found in rounds.items() for m in found):
        for configuration, result in sorted(measured.items()):
            for name, value in values.items():
                found = value(result)
                kept = round(found, 6) if isinstance(found, float) else found
                records[case, configuration][name].append(kept)
    return [
        {"case": case, "configuration": configuration, **record}
        for (case, configuration), record in records.items()
    ]


def seconds(run: Run) -> float:
    return run.seconds


def tokens_per_second(run: Run) -> float:
    return run.tokens_per_second


def step_seconds(run: Run) -> float:
    return run.step_seconds


def gap_figures(rounds: Sequence[Round[Run]], name: str) -> str | None:
    """Return the milliseconds between two tokens of a stream: their median and 99th percentile."""
    gaps = pooled(rounds, name, lambda run: run.gaps)
    if not gaps:
        return None
    return " / ".join(f"{1e3 * percentile(gaps, share):.1f}" for share in (0.5, 0.99))


@contextlib.contextmanager
def plain_and_trimtab(
    checkpoints: Checkpoints, folder: Path, set_up_alike: bool = True, **options: Any
) -> Iterator[tuple[Engine, Engine]]:
    """Start vLLM plain, and vLLM with trimtab and all networks.

    Args:
        set_up_alike: plain is `ALIKE`; otherwise `PLAIN`.
        options: of both engines.
    """
    target, networks = checkpoints.target, checkpoints.networks
    options = checkpoints.engine_options | options
    say("starting vLLM plain (it compiles the target at first)")
    plain_options = options | {"set_up_alike": set_up_alike}
    with Engine(target, {}, folder / "plain.log", **plain_options) as plain:
        say(f"starting vLLM with trimtab, networks: {len(networks)}")
        with Engine(target, networks, folder / "trimtab.log", **options) as trimtab:
            yield plain, trimtab


def same_tokens(rounds: Rounds[CaseT, Run], one: str, other: str) -> bool:
    """Whether two configurations always generated the same."""
    measured = [m for found in rounds.values() for m in found if one in m and other in m]
    return all(m[one].tokens == m[other].tokens for m in measured)


def require_guided(rounds: Rounds[CaseT, Run], guided: Iterable[str], unguided: str) -> None:
    """End the program if a guided configuration ever generated just what an unguided one did."""
    for name in guided:
        for measured in (m for found in rounds.values() for m in found if name in m):
            if measured[name].tokens == measured[unguided].tokens:
                sys.exit(f"Not guided, though it should have been: {name}")


def make_prompts(batch_size: int, length: int, seed: object) -> list[list[int]]:
    """Return random prompts, the same for the same `seed`."""
    draw = random.Random(f"{seed} {batch_size} {length}")
    return [[draw.randrange(8, 256) for _ in range(length)] for _ in range(batch_size)]


def make_requests(
    batch_size: int, num_tokens: int, seed: object, *networks: str, length: int = 32
) -> list[Request]:
    """Return requests of `make_prompts`, guided by `networks` or by nothing.

    Prompts of 32 tokens leave no block in a network's KV cache that a later run could use again.
    """
    prompts = make_prompts(batch_size, length, seed)
    return [Request(prompt, num_tokens, networks) for prompt in prompts]
