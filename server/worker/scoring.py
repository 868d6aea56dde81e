"""Guided log-probabilities of prompts.

vLLM computes prompt log-probabilities past its logits processors, in a method of the model runner:
for each request, from the hidden states of the tokens that this step has computed. While that
method runs, the target's `compute_logits`, which it calls once for each request, is one that guides
what it returns. The rows that it was called for are told from where the hidden states lie in the
batch. So nothing of vLLM's own bookkeeping (chunks, ranks, top tokens, transfers) is repeated here.

Reads vLLM 0.32's `GPUModelRunner._get_prompt_logprobs_dict`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from server.worker.guidance import Guidance
from server.worker.row import GuidedRow

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = init_logger(__name__)


def guide_prompt_scores(
    runner: "GPUModelRunner", guidance: Guidance, rows: Mapping[int, GuidedRow]
) -> None:
    """Have the runner's prompt log-probabilities guided, for rows that are: index -> row."""
    original = runner._get_prompt_logprobs_dict

    def prompt_logprobs(
        hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        if not rows or not runner.num_prompt_logprobs:
            return original(hidden_states, num_scheduled_tokens)
        with _guided_logits(runner, guidance, rows, hidden_states):
            return original(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = prompt_logprobs


@contextmanager
def _guided_logits(
    runner: "GPUModelRunner",
    guidance: Guidance,
    rows: Mapping[int, GuidedRow],
    hidden_states: torch.Tensor,
) -> Iterator[None]:
    model = runner.model
    plain = model.compute_logits

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(hidden)
        try:
            distance = hidden.storage_offset() - hidden_states.storage_offset()
            first = distance // hidden_states.stride(0)  # of the batch's tokens
            starts = runner.query_start_loc.np[: runner.input_batch.num_reqs]
            index = int(starts.searchsorted(first, side="right")) - 1
            row = rows.get(index)
            if row is None:
                return logits
            computed = int(runner.input_batch.num_computed_tokens_cpu[index])
            return guidance.score_prompt(row, logits, computed + first - int(starts[index]))
        except Exception:  # an exception here would end the engine and every request
            # What has failed is this request, and NaN says so; its networks steer others well.
            logger.exception("guidance: scoring a prompt threw")
            return torch.full_like(logits, float("nan"))

    model.compute_logits = compute_logits
    try:
        yield
    finally:
        del model.compute_logits
