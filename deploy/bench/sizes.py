"""What guidance costs against the network's size, beside its arithmetic limit.

Networks of 1 to 30 % of the target's parameters are resident together. The limit of guided /
plain is 1 + size; plain is set up as trimtab is. Unguided requests of trimtab's engine are compared
with too: between two processes there is more than guidance.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from deploy.bench.arguments import add_batches, add_dtype, add_rounds
from deploy.bench.checkpoints import (
    WIDTHS,
    Checkpoints,
    make_sized_networks,
    make_target,
    num_parameters,
)
from deploy.bench.engine import Run
from deploy.bench.report import Answer, Cell, Plot, Table, rounded, say
from deploy.bench.rounds import (
    ALIKE,
    UNGUIDED,
    Rounds,
    efficiency,
    make_requests,
    plain_and_trimtab,
    rates,
    ratio,
    require_guided,
    runs_of,
    same_tokens,
    seconds,
    take_turns,
)

VALUE_MEMORY_GB = 6.0
"""Each network is of a KV shape of its own, and each shape's pool takes half of what is free."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 7)
    add_batches(parser, (4, 16))
    parser.add_argument(
        "--sizes",
        type=float,
        nargs="+",
        choices=WIDTHS,
        metavar="SHARE",
        default=list(WIDTHS),
        help=f"of the target's parameters ({' '.join(map(str, WIDTHS))})",
    )
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    target = make_target(folder, arguments.dtype)
    networks = make_sized_networks(folder, arguments.sizes, arguments.dtype, num_parameters(target))
    checkpoints = Checkpoints(target, networks, arguments.dtype)
    names = [ALIKE, UNGUIDED, *networks]
    memory = VALUE_MEMORY_GB
    with plain_and_trimtab(checkpoints, folder, value_memory_gb=memory) as (plain, trimtab):

        def measure(name: str, batch_size: int, number: int) -> Run:
            chosen = (name,) if name in networks else ()
            requests = make_requests(batch_size, arguments.tokens, number, *chosen)
            return (plain if name == ALIKE else trimtab).run(requests)

        rounds = take_turns(arguments.batch_sizes, names, arguments.rounds, measure)
        engine = {"plain": plain.description, "trimtab": trimtab.description}
    require_guided(rounds, networks, ALIKE)
    shares = {name: checkpoints.share(name) for name in networks}
    return Answer(
        tables=[
            rates(rounds, names),
            *(
                Table(
                    f"Time against {reference}, and efficiency",
                    overheads(rounds, shares, reference),
                )
                for reference in (ALIKE, UNGUIDED)
            ),
        ],
        plots=[make_plot(rounds, shares)],
        models=checkpoints.describe(),
        engine=engine,
        checks={"unguided_tokens_equal_plain": same_tokens(rounds, UNGUIDED, ALIKE)},
        runs=runs_of(rounds, seconds=seconds),
    )


def overheads(
    rounds: Rounds[int, Run], shares: dict[str, float], reference: str
) -> list[dict[str, Cell]]:
    """Return a row for each network; `shares`: their parameters for each of the target."""
    rows: list[dict[str, Cell]] = []
    for name, share in shares.items():
        row: dict[str, Cell] = {"network": name, "limit": rounded(1 + share)}
        for batch_size, found in rounds.items():
            overhead = ratio(found, name, reference, seconds)
            assert overhead is not None
            row[f"batch {batch_size}"] = rounded(overhead)
            row[f"efficiency, batch {batch_size}"] = rounded(efficiency(overhead, 1 + share), 2)
        rows.append(row)
    return rows


def make_plot(rounds: Rounds[int, Run], shares: dict[str, float]) -> Plot:
    def points(batch_size: int) -> Sequence[tuple[float, float]]:
        found = rounds[batch_size]
        return [
            (100 * share, ratio(found, name, ALIKE, seconds) or 0.0)
            for name, share in shares.items()
        ]

    return Plot(
        name="overhead",
        title="Cost of guidance against the network's size",
        x="parameters of the network, % of the target's",
        y="time guided / plain",
        curves={f"batch {size}": list(points(size)) for size in rounds}
        | {"limit": [(100 * share, 1 + share) for share in [0.0, *shares.values()]]},
    )
