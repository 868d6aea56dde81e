"""How long running streams wait while a long prompt is read.

Four streams run; in half of the runs a request with a long new prompt joins them, which vLLM reads
in chunks, a step each. What is compared is the longest time that any stream waits for a token.
Networks follow the target chunk by chunk; beside, they do not, and read a prompt at its end.
"""

import argparse
from pathlib import Path
from typing import Any

from deploy.bench.arguments import add_dtype, add_rounds, within
from deploy.bench.checkpoints import (
    WIDTHS,
    Checkpoints,
    make_sized_networks,
    make_target,
    num_parameters,
)
from deploy.bench.engine import Run
from deploy.bench.report import Answer, Table, rounded, say
from deploy.bench.rounds import (
    ALIKE,
    GUIDED,
    UNGUIDED,
    Rounds,
    by_case,
    make_requests,
    median,
    plain_and_trimtab,
    ratio,
    require_guided,
    runs_of,
    same_tokens,
    take_turns,
)

STREAMS = 4
POSITIONS = 8192
QUIET, JOINED = "alone", "joined by a long prompt"
AT_ONCE = "trimtab guided, prompts read at their end"
CONFIGURATIONS = (ALIKE, UNGUIDED, GUIDED, AT_ONCE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 9)
    parser.add_argument(
        "--tokens", type=within(4), default=48, help="new tokens per running stream (48)"
    )
    parser.add_argument(
        "--length", type=within(2, POSITIONS - 1), default=4096, help="of the long prompt (4096)"
    )
    parser.add_argument(
        "--chunk",
        type=within(STREAMS + 1),
        default=512,
        help="tokens that vLLM reads in a step, of the prompt and the streams (512)",
    )
    parser.add_argument(
        "--size",
        type=float,
        choices=WIDTHS,
        default=0.055,
        help="of the network, for each parameter of the target (0.055)",
    )
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    target = make_target(folder, arguments.dtype, POSITIONS)
    networks = make_sized_networks(
        folder, [arguments.size], arguments.dtype, num_parameters(target), POSITIONS
    )
    (network,) = networks
    checkpoints = Checkpoints(target, networks, arguments.dtype)
    chunk = arguments.chunk
    with plain_and_trimtab(checkpoints, folder, max_num_batched_tokens=chunk) as (plain, trimtab):

        def measure(name: str, case: str, number: int) -> Run:
            chosen = (network,) if name in (GUIDED, AT_ONCE) else ()
            requests = make_requests(STREAMS, arguments.tokens, number, *chosen)
            if case == JOINED:
                # Of each configuration's own, for two of them share an engine and its caches.
                (long,) = make_requests(1, 1, (number, name), *chosen, length=arguments.length)
                requests.append(long._replace(joins_after=arguments.tokens // 2))
            if name == ALIKE:
                return plain.run(requests)
            trimtab.call(read_at_once, name == AT_ONCE)
            return trimtab.run(requests)

        rounds = take_turns([QUIET, JOINED], CONFIGURATIONS, arguments.rounds, measure)
        engine = {"plain": plain.description, "trimtab": trimtab.description}
    require_guided(rounds, [GUIDED, AT_ONCE], ALIKE)
    return Answer(
        tables=make_tables(rounds, 1 + checkpoints.share(network)),
        models=checkpoints.describe(),
        engine=engine,
        checks={
            "unguided_tokens_equal_plain": same_tokens({QUIET: rounds[QUIET]}, UNGUIDED, ALIKE)
        },
        runs=runs_of(rounds, longest_gap=longest_gap, long_prompt_first_token=first_token),
    )


def read_at_once(worker: Any, on: bool) -> None:
    """Have networks read no prompt before the target has read all of it; runs in the worker."""
    guidance = worker._processor().steering.guidance
    divide = type(guidance)._divide
    vars(guidance).pop("_divide", None)
    if on:
        guidance._divide = lambda *arguments: (divide(guidance, *arguments)[0], None)


def longest_gap(run: Run) -> float:
    """Return the seconds of the longest wait of a running stream.

    The first is left out: at first they may wait for each other's prompts.
    """
    return max(gap for stream in run.streams[:STREAMS] for gap in stream.gaps[1:])


def first_token(run: Run) -> float | None:
    """Return the seconds that the long prompt's first token took, if there was one."""
    return run.streams[STREAMS].time_to_first_token if len(run.streams) > STREAMS else None


def make_tables(rounds: Rounds[str, Run], limit: float) -> list[Table]:
    longest = by_case(
        rounds,
        CONFIGURATIONS,
        lambda found, name: median(found, name, lambda run: 1e3 * longest_gap(run)),
        "{}",
    )
    for row in longest:
        name = str(row[""])
        taken = median(rounds[JOINED], name, lambda run: 1e3 * (first_token(run) or 0))
        row["first token of the long prompt"] = rounded(taken)
    against = [
        {"": name}
        | {case: rounded(ratio(found, name, ALIKE, longest_gap)) for case, found in rounds.items()}
        | {
            "first token of the long prompt": rounded(
                ratio(rounds[JOINED], name, ALIKE, lambda run: first_token(run) or 0)
            ),
            "limit": 1.0 if name == UNGUIDED else rounded(limit),
        }
        for name in CONFIGURATIONS[1:]
    ]
    return [
        Table(f"Longest wait of any of {STREAMS} streams for a token, milliseconds", longest),
        Table(f"The same against {ALIKE}", against),
    ]
