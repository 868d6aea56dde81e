"""Whether guided logits are those that transformers computes: largest difference in nats.

One batch of prompts of different lengths, unguided rows beside guided ones, runs on the engine,
which returns the log probabilities of the likeliest tokens at each step. They are compared with
target and networks in transformers on the same device, over the same tokens, in float32. The engine
may be at most twice as far from that as transformers is in the checkpoints' own dtype: that is how
far rounding alone takes logits apart.
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
FACTOR = 2.0
LEAST_TOLERANCE = 0.002
"""Nats, where transformers itself computes in float32: kernels add in different orders."""


class Compared(NamedTuple):
    """Differences of log probabilities in nats, over all tokens that the engine returned.

    Of the engine and of transformers in the checkpoints' dtype, both to transformers in float32.
    """

    engine: torch.Tensor  # [num_compared]
    rounding: torch.Tensor  # [num_compared]
    behind: float  # of a sampled token, at most, behind the likeliest one in float32

    @property
    def tolerance(self) -> float:
        return max(LEAST_TOLERANCE, FACTOR * float(self.rounding.max()))

    @property
    def is_exact(self) -> bool:
        return max(float(self.engine.max()), self.behind) <= self.tolerance and (
            float(self.engine.mean()) <= max(LEAST_TOLERANCE, FACTOR * float(self.rounding.mean()))
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 2)
    parser.add_argument("--tokens", type=within(1), default=64, help="new tokens per request (64)")
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
    options |= checkpoints.engine_options
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
    wrong = [choice for choice, found in compared.items() if not found.is_exact]
    return Answer(
        tables=[
            Table(
                "Log probabilities of the likeliest tokens: nats from those in float32",
                [row(choice, found) for choice, found in compared.items()],
            )
        ],
        models=checkpoints.describe(),
        engine=description,
        failed=f"not what transformers computes: {', '.join(wrong)}" if wrong else None,
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
        exact = reference.logprobs(request, stream.tokens, "float32")
        same = reference.logprobs(request, stream.tokens, reference.dtype)
        for position, found in enumerate(stream.logprobs):
            ids = list(found)
            engine = torch.tensor([found[token] for token in ids], device=exact.device)
            precise = exact[position, ids]
            differences.append(torch.stack([engine - precise, same[position, ids] - precise]))
            sampled = exact[position, stream.tokens[position]]
            behind = max(behind, float(exact[position].max() - sampled))
    engines, rounding = torch.cat(differences, 1).abs()
    return Compared(engines, rounding, behind)


def row(choice: str, found: Compared) -> dict[str, Cell]:
    return {
        "": choice,
        "compared": found.engine.numel(),
        "largest": rounded(float(found.engine.max()), 6),
        "tolerance": rounded(found.tolerance, 6),
        "mean": rounded(float(found.engine.mean()), 6),
        "mean of rounding": rounded(float(found.rounding.mean()), 6),
        "sampled, behind the likeliest": rounded(found.behind, 6),
    }
