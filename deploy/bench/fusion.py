"""What it costs to combine networks in one decoding step, of random logits on the CPU.

For each vocabulary size the milliseconds of a step at batch 16, over rounds in which all take turns
(on a machine with other work the least says most): the static sum; the same with weights that are
solved for (dynamic fusion), distances included; and what a floor or an explanation adds.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from deploy.bench.arguments import add_rounds, within
from deploy.bench.report import Answer, Table
from deploy.bench.rounds import by_case, median, runs_of, take_turns
from value_models.combine import keep_target_in_charge
from value_models.explain import explain
from value_models.fusion import divergence, solve_weights

BATCH_SIZE = 16
NETWORKS = (1, 2, 3, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 21)
    parser.add_argument("--threads", type=within(1), default=2, help="(2)")
    parser.add_argument(
        "--vocab-sizes",
        type=within(16),
        nargs="+",
        default=[8192, 32_000, 131_072],
        help="(8192 32000 131072)",
    )


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    torch.set_num_threads(arguments.threads)
    parts = {size: make_parts(size) for size in arguments.vocab_sizes}
    names = list(next(iter(parts.values())))

    def measure(name: str, vocab_size: int, _: int) -> float:
        start = time.perf_counter()
        parts[vocab_size][name]()
        return 1e3 * (time.perf_counter() - start)

    rounds = take_turns(arguments.vocab_sizes, names, arguments.rounds, measure)
    return Answer(
        tables=[
            Table(
                f"Milliseconds of a step at batch {BATCH_SIZE}, {title}, by number of logits",
                by_case(rounds, names, figure, "{:,}"),
            )
            for title, figure in {
                "median": lambda found, name: median(found, name, float),
                "least": lambda found, name: min(measured[name] for measured in found),
            }.items()
        ],
        runs=runs_of(rounds, milliseconds=float),
    )


def make_parts(vocab_size: int) -> dict[str, Callable[[], object]]:
    """Return what is measured, on logits like those of a model that has been tuned a little."""
    generator = torch.Generator().manual_seed(0)

    def logits(*shape: int, spread: float) -> torch.Tensor:
        return spread * torch.randn(*shape, vocab_size, generator=generator)

    target, base = logits(BATCH_SIZE, spread=3.0), logits(BATCH_SIZE, spread=3.0)
    # Some positions are all but decided, at others tuning changed much.
    target[::2, 7] += 20
    values = logits(BATCH_SIZE, max(NETWORKS), spread=1.0)
    values *= torch.rand(BATCH_SIZE, max(NETWORKS), 1, generator=generator)
    bounds = torch.full((BATCH_SIZE, max(NETWORKS)), 2.0)
    floor = torch.full((BATCH_SIZE, 1), 1e-4)
    guided = target + values[:, 0]

    def add(weights: torch.Tensor) -> torch.Tensor:
        added = target.clone()
        for network in range(weights.shape[1]):
            added.addcmul_(values[:, network], weights[:, network, None])
        return added

    def distances(num_networks: int) -> torch.Tensor:
        return torch.stack(
            [divergence(base + values[:, i], base) for i in range(num_networks)], dim=1
        )

    def fuse(num_networks: int) -> torch.Tensor:
        used, limits = values[:, :num_networks], bounds[:, :num_networks]
        return add(solve_weights(target, used, distances(num_networks), limits).weights)

    parts: dict[str, Callable[[], object]] = {}
    for n in NETWORKS:
        parts[f"static sum, {n}"] = partial(lambda n: add(bounds[:, :n]), n)
        parts[f"dynamic, {n}"] = partial(fuse, n)
        parts[f"  of it distances, {n}"] = partial(distances, n)
    parts["floor"] = lambda: keep_target_in_charge(guided, target, floor)
    parts["explain, 1"] = lambda: explain(target, guided, values[:, :1], bounds[:, :1], target)
    return parts
