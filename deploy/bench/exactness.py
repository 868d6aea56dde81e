"""Whether guided logits are those that transformers computes: largest difference in nats.

One batch of prompts of different lengths, unguided rows beside guided ones, runs on the engine,
which returns the log probabilities of the likeliest tokens at each step. They are compared with
target and networks in transformers on the same device, over the same tokens: in the checkpoints'
dtype, and in float32, which tells how far rounding alone takes logits apart.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from deploy.bench.arguments import add_dtype, add_rounds, within
from deploy.bench.baseline import load_model
from deploy.bench.checkpoints import Checkpoints, make_checkpoints
from deploy.bench.engine import Engine, Request, Stream
from deploy.bench.report import Answer, Cell, Table, rounded, say
from deploy.bench.rounds import make_prompts

CHOICES = {
    "unguided": (),
    "one network": ("first",),
    "two networks": ("first", "second"),
}
LENGTHS = (5, 17, 64, 130, 200)
LOGPROBS = 20
TOLERANCES = {"float32": 0.002, "bfloat16": 0.5}
"""Nats, between the engine and transformers in the same dtype."""


class Compared(NamedTuple):
    """Differences of log probabilities in nats, over all tokens that the engine returned."""

    to_same: torch.Tensor  # to transformers in the checkpoint's dtype
    to_exact: torch.Tensor  # to transformers in float32
    same_to_exact: torch.Tensor  # between those two
    behind: float  # of a sampled token, at most, behind the likeliest one of transformers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 2)
    parser.add_argument("--tokens", type=within(1), default=64, help="new tokens per request (64)")
    parser.add_argument(
        "--tolerance", type=float, help=f"nats (by dtype: {TOLERANCES})".replace("'", "")
    )
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    checkpoints = make_checkpoints(folder, arguments.dtype, ["first", "second"])
    requests = {
        choice: [
            Request(prompt, arguments.tokens, networks, logprobs=LOGPROBS)
            for number in range(arguments.rounds)
            for length in LENGTHS
            for prompt in make_prompts(1, length, (choice, number))
        ]
        for choice, networks in CHOICES.items()
    }
    say("starting vLLM with trimtab")
    options = {"logprobs_mode": "processed_logprobs", "max_logprobs": LOGPROBS}
    log = folder / "trimtab.log"
    with Engine(checkpoints.target, checkpoints.networks, log, **options) as engine:
        streams = iter(engine.run([r for each in requests.values() for r in each]).streams)
        description = engine.description
    say("computing the same with transformers")
    reference = Reference(checkpoints)
    compared = {
        choice: compare(reference, [(request, next(streams)) for request in asked])
        for choice, asked in requests.items()
    }
    tolerance = arguments.tolerance or TOLERANCES[arguments.dtype]
    return Answer(
        tables=[
            Table(
                "Log probabilities of the likeliest tokens, differences in nats",
                [row(choice, of, tolerance) for choice, of in compared.items()],
            )
        ],
        models=checkpoints.describe(),
        engine=description,
        failed=verdict(compared, tolerance),
    )


class Reference:
    """Target and networks in transformers, in their own dtype and in float32."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        folders = {"target": checkpoints.target, **checkpoints.networks}
        self._models = {
            (name, dtype): load_model(folder, dtype, self._device)
            for name, folder in folders.items()
            for dtype in {checkpoints.dtype, "float32"}
        }
        self.dtype = checkpoints.dtype

    @torch.inference_mode()
    def logprobs(self, request: Request, tokens: Sequence[int], dtype: str) -> torch.Tensor:
        """Return what each of `tokens` was sampled from: float32 `[len(tokens), vocab_size]`."""
        ids = torch.tensor([[*request.prompt, *tokens]], device=self._device)
        first = len(request.prompt) - 1
        logits = sum(
            self._models[name, dtype](ids).logits[0, first:-1].float()
            for name in ("target", *request.networks)
        )
        if request.networks:
            logits[:, -1] = float("-inf")  # the failure token
        return logits.log_softmax(-1)


def compare(reference: Reference, asked: Sequence[tuple[Request, Stream]]) -> Compared:
    """Compare what the engine returned for these requests."""
    differences: list[torch.Tensor] = []
    behind = 0.0
    for request, stream in asked:
        assert stream.logprobs is not None
        same = reference.logprobs(request, stream.tokens, reference.dtype)
        exact = reference.logprobs(request, stream.tokens, "float32")
        for position, found in enumerate(stream.logprobs):
            ids = list(found)
            engine = torch.tensor([found[token] for token in ids], device=same.device)
            there, precise = same[position, ids], exact[position, ids]
            differences.append(torch.stack([engine - there, engine - precise, there - precise]))
            sampled = same[position, stream.tokens[position]]
            behind = max(behind, float(same[position].max() - sampled))
    return Compared(*torch.cat(differences, 1).abs(), behind)


def row(choice: str, found: Compared, tolerance: float) -> dict[str, Cell]:
    return {
        "": choice,
        "compared": found.to_same.numel(),
        "largest": rounded(float(found.to_same.max()), 6),
        "mean": rounded(float(found.to_same.mean()), 6),
        "tolerance": tolerance,
        "largest to float32": rounded(float(found.to_exact.max()), 6),
        "transformers' own to float32": rounded(float(found.same_to_exact.max()), 6),
        "sampled token behind the likeliest": rounded(found.behind, 6),
    }


def verdict(compared: dict[str, Compared], tolerance: float) -> str | None:
    """Return what is wrong, if anything is."""
    wrong = [
        f"{choice}: {largest:.3g} nats apart"
        for choice, found in compared.items()
        for largest in (max(float(found.to_same.max()), found.behind),)
        if not largest <= tolerance
    ]
    return "; ".join(wrong) or None
