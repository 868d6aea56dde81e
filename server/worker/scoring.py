"""Guided log-probabilities of prompts.

vLLM computes prompt log-probabilities past its logits processors, from the hidden states of the
tokens that this step has computed. The function that makes logits of hidden states is, for that
long, one that guides what it returns. The tokens that it was called for are told from where the
hidden states lie in the batch. So nothing of vLLM's own bookkeeping (chunks, ranks, top tokens,
transfers) is repeated here.

In the V1 runner that is the target's `compute_logits`, which a method of the runner calls once for
each request that asked. In the V2 runner it is an argument of two methods of a worker; one of them
calls it for pieces of the whole batch, whoever asked.

Reads vLLM 0.32's `GPUModelRunner._get_prompt_logprobs_dict` and
`vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.logger import init_logger

from server.worker.guidance import Guidance
from server.worker.prompt_scores import PromptScorer
from server.worker.row import GuidedRow

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = init_logger(__name__)

_LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""Returns logits, `[num_tokens, vocab_size]`, of hidden states, `[num_tokens, hidden_size]`."""


def guide_prompt_scores(
    runner: "GPUModelRunner", guidance: Guidance, rows: Mapping[int, GuidedRow]
) -> None:
    """Have the runner's prompt log-probabilities guided, for rows that are: index -> row."""
    original = runner._get_prompt_logprobs_dict
    scorer = PromptScorer(guidance)

    def prompt_logprobs(
        hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        if not rows or not runner.num_prompt_logprobs:
            return original(hidden_states, num_scheduled_tokens)
        with _guided_logits(runner, scorer, rows, hidden_states):
            return original(hidden_states, num_scheduled_tokens)

    runner._get_prompt_logprobs_dict = prompt_logprobs


@contextmanager
def _guided_logits(
    runner: "GPUModelRunner",
    scorer: PromptScorer,
    rows: Mapping[int, GuidedRow],
    hidden_states: torch.Tensor,
) -> Iterator[None]:
    model = runner.model
    plain = model.compute_logits

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(hidden)
        try:
            first = _place(hidden, hidden_states)
            starts = runner.query_start_loc.np[: runner.input_batch.num_reqs]
            index = int(starts.searchsorted(first, side="right")) - 1
            row = rows.get(index)
            if row is None:
                return logits
            computed = int(runner.input_batch.num_computed_tokens_cpu[index])
            return scorer.score(row, logits, computed + first - int(starts[index]))
        except Exception:  # an exception here would end the engine and every request
            # What has failed is this request, and NaN says so; its networks steer others well.
            logger.exception("guidance: scoring a prompt threw")
            return torch.full_like(logits, float("nan"))

    model.compute_logits = compute_logits
    try:
        yield
    finally:
        del model.compute_logits


def guide_prompt_worker(
    worker: "PromptLogprobsWorker", guidance: Guidance, rows: Mapping[int, GuidedRow]
) -> None:
    """Have the V2 runner's prompt log-probabilities guided, for rows that are: slot -> row."""
    scorer = PromptScorer(guidance)
    of_likeliest = worker.compute_prompt_logprobs
    of_given = worker.compute_prompt_token_id_logprobs

    def compute_prompt_logprobs(
        logits_fn: _LogitsOf, hidden_states: torch.Tensor, input_batch: "InputBatch", *rest: Any
    ) -> dict[str, Any]:
        asked = np.flatnonzero(worker.uses_prompt_logprobs[input_batch.idx_mapping_np])
        spans = _spans(input_batch, rows, asked.tolist())
        logits_fn = _guiding(logits_fn, scorer, hidden_states, spans)
        return of_likeliest(logits_fn, hidden_states, input_batch, *rest)

    def compute_prompt_token_id_logprobs(
        logits_fn: _LogitsOf, hidden_states: torch.Tensor, input_batch: "InputBatch", *rest: Any
    ) -> dict[str, Any]:
        asking = worker.token_id_scores
        req_ids = input_batch.req_ids if asking else ()
        asked = [index for index, req_id in enumerate(req_ids) if req_id in asking]
        spans = _spans(input_batch, rows, asked)
        logits_fn = _guiding(logits_fn, scorer, hidden_states, spans)
        return of_given(logits_fn, hidden_states, input_batch, *rest)

    worker.compute_prompt_logprobs = compute_prompt_logprobs
    worker.compute_prompt_token_id_logprobs = compute_prompt_token_id_logprobs


class _Span(NamedTuple):
    """Tokens of one prompt in a batch whose log-probabilities are wanted."""

    row: GuidedRow
    begin: int  # of the batch's tokens
    end: int
    start: int  # the first token's place in the prompt


def _spans(batch: "InputBatch", rows: Mapping[int, GuidedRow], asked: Iterable[int]) -> list[_Span]:
    """Return what is wanted of guided prompts; `asked`: rows of the batch that asked."""
    spans = []
    for index in asked:
        row = rows.get(int(batch.idx_mapping_np[index]))
        if row is None:
            continue
        prompt_length = row.history.prompt_length
        if batch.prefill_len_np[index] > prompt_length:
            continue  # back from preemption: vLLM has returned them before
        begin = int(batch.query_start_loc_np[index])
        start = int(batch.num_computed_prefill_tokens_np[index])
        # What follows the prompt's last token is sampled.
        stop = min(start + int(batch.num_scheduled_tokens[index]), prompt_length - 1)
        if start < stop:
            spans.append(_Span(row, begin, begin + stop - start, start))
    return spans


def _guiding(
    logits_of: _LogitsOf,
    scorer: PromptScorer,
    hidden_states: torch.Tensor,
    spans: Sequence[_Span],
) -> _LogitsOf:
    """Return `logits_of`, for views of `hidden_states`, with the logits of spans guided."""
    if not spans:
        return logits_of

    def logits_fn(hidden: torch.Tensor) -> torch.Tensor:
        logits = logits_of(hidden).to(torch.float32)
        first = _place(hidden, hidden_states)
        for span in spans:
            begin, end = max(span.begin, first), min(span.end, first + len(hidden))
            if begin >= end:
                continue
            piece = logits[begin - first : end - first]
            if span.row.failed:  # its tokens cannot be read, which is no fault of its networks
                piece.fill_(float("nan"))
                continue
            try:
                start = span.start + begin - span.begin
                piece.copy_(scorer.score(span.row, piece, start))
            except Exception:  # as in the V1 runner
                logger.exception("guidance: scoring a prompt threw")
                piece.fill_(float("nan"))
        return logits

    return logits_fn


def _place(part: torch.Tensor, whole: torch.Tensor) -> int:
    """Return which row of `whole` its view `part` begins with."""
    return (part.storage_offset() - whole.storage_offset()) // whole.stride(0)
