"""Guidance' adapter to vLLM's V2 model runner.

As in V1's, guidance happens before anything else that the sampler does, and `apply` ends requests.
The rest differs: it happens on the sampler's own copy of the logits, where that has them first;
a request has a *slot* for as long as it runs, which is `GuidedRow.slot` too; vLLM says when a slot
is taken, not when it is given back; the batch is put together anew in each step, from slots in any
order; and tokens are on the device (`server.worker.mirror`).

Reads vLLM 0.32's `Sampler`, `RequestState`, `StagedWriteTensor` and `InputBatch`, all in
`vllm.v1.worker.gpu`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from server.worker.guidance import Batch
from server.worker.mirror import MirroredHistory, TokenMirror
from server.worker.row import GuidedRow
from server.worker.scoring import guide_prompt_worker
from server.worker.steering import Steering, end_row

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

logger = init_logger(__name__)


class V2Processor(LogitsProcessor):
    """Keeps track of which slots are guided, and hands each step to `Guidance`.

    Interface: `vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor` (vLLM 0.32).
    """

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        self.steering = Steering(vllm_config, req_states.device)
        self._guidance = self.steering.guidance
        self._req_states = req_states
        self._mirror = TokenMirror(*req_states.all_token_ids.gpu.shape)
        self._rows: dict[int, GuidedRow] = {}
        self._runner: GPUModelRunner | None = None
        self._slots = np.empty(0, dtype=np.int64)
        self._changed = False
        self._guided = np.empty(0, dtype=np.int64)
        self._due: InputBatch | None = None  # was announced, and is to be guided

    def attach(self, runner: "GPUModelRunner") -> None:
        """Guide at the sampler's door from now on. Harmless when called again.

        Raises:
            RuntimeError: the sampler is not vLLM's own; a model may bring another.
        """
        from vllm.v1.worker.gpu.sample.sampler import Sampler

        if self._runner is not None:
            return
        if not isinstance(runner.sampler, Sampler):
            raise RuntimeError(f"{type(runner.sampler).__name__} cannot be guided")
        self.steering.settle()
        self._guide_sampler(runner.sampler)
        self._watch_slots(runner.req_states)
        guide_prompt_worker(runner.prompt_logprobs_worker, self._guidance, self._rows)
        self._runner = runner

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take note of a request that gets a slot: a new one, or one back from preemption."""
        self._leave(req_idx)
        prompt_length = int(self._req_states.prompt_len.np[req_idx])
        history = MirroredHistory(self._mirror, req_idx, prompt_length)
        row = self.steering.new_row(sampling_params, history)
        if row is None:
            return False
        row.slot = req_idx
        try:
            self._mirror.open(req_idx, _staged(self._req_states.all_token_ids, req_idx))
            # What came before `attach` was not guided from its first token on.
            row.failed = self._runner is None
        except Exception:  # an exception here would end the engine and every request
            logger.exception("guidance: the tokens of a request cannot be read")
            row.failed = True
        self._rows[req_idx] = row
        self._changed = True
        return True

    def apply_staged_writes(self) -> None:
        """Called before every forward."""
        self.steering.begin_step()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """End rows that cannot be guided on: only their failure token can be sampled.

        Args:
            logits: float32 `[num_rows, vocab_size]`.
        """
        if not self._rows:
            return logits
        with self.steering.contained("ending requests"):
            if self._runner is None or self._guidance.any_ended:
                for index, slot in enumerate(ctx.idx_mapping_np.tolist()):
                    row = self._rows.get(slot)
                    if row is not None and self._guidance.ended(row):
                        end_row(logits, index, row)
            self._guidance.end_unsound(logits)
        return logits

    def _guide_sampler(self, sampler: Any) -> None:
        """Have the sampler guide its logits before it does anything else with them.

        It is a plain object, which has no hooks, and calls are looked up in its class: it becomes
        one of a class made from its own.
        """
        announce, guide, leave = self._announce, self._guide, self._leave_sampler
        kind = type(sampler)

        class GuidedSampler(kind):
            def __call__(self, logits: torch.Tensor, input_batch: "InputBatch") -> "SamplerOutput":
                # What is announced is guided as the first of the sampler's processors, on the
                # float32 copy that it makes for them. But log-probabilities are of the logits that
                # it is called with: if anybody asks for them, those have to be guided.
                due = announce(input_batch)
                if due and self.get_logprobs_dims(input_batch.idx_mapping_np) is not None:
                    logits = guide(logits)
                output = super().__call__(logits, input_batch)
                leave(output)
                return output

        sampler.__class__ = GuidedSampler
        sampler.logits_processors.insert(0, _First(guide))

    def _watch_slots(self, req_states: Any) -> None:
        """Have slots announced that are given back: by requests that end, or are preempted."""
        remove = req_states.remove_request

        def remove_request(req_id: str) -> int | None:
            slot = remove(req_id)
            if slot is not None:
                self._leave(slot)
            return slot

        req_states.remove_request = remove_request
        for slot in sorted(self._rows.keys() - req_states.index_to_req_id.keys()):
            self._leave(slot)

    def _leave(self, slot: int) -> None:
        row = self._rows.pop(slot, None)
        if row is not None:
            self._changed = True
            with self.steering.contained("releasing a request"):
                self._guidance.release(row)

    def _announce(self, batch: "InputBatch") -> bool:
        """Take note of the batch that is sampled next. Returns whether any row of it is guided."""
        self._due = None
        if not self._rows:
            return False
        with self.steering.contained("the guidance step"):
            if not self._is_dummy(batch):
                self._arrange(batch.idx_mapping_np)
                if len(self._guided):
                    self._due = batch
        return self._due is not None

    def _guide(self, logits: torch.Tensor) -> torch.Tensor:
        """Guide the batch that was announced, once."""
        batch, self._due = self._due, None
        if batch is not None:
            with self.steering.contained("the guidance step"):
                return self._guidance.step(logits, self._described(batch))
        return logits

    def _leave_sampler(self, output: "SamplerOutput") -> None:
        """Write down what guidance did to the tokens that were sampled."""
        self.steering.note_sampled(output.sampled_token_ids)

    def _is_dummy(self, batch: "InputBatch") -> bool:
        """Whether the batch is made up, to measure or warm up: it names slots that are others'."""
        assert self._runner is not None
        owner = self._runner.req_states.index_to_req_id.get(int(batch.idx_mapping_np[0]))
        return owner != batch.req_ids[0]

    def _arrange(self, slots: np.ndarray) -> None:
        """Take note of where rows are now: int `[num_rows]`, the slot of each row of the batch.

        A batch that only decodes stays as it is, and this costs one comparison.
        """
        if not self._changed and np.array_equal(slots, self._slots):
            return
        rows = {i: self._rows[slot] for i, slot in enumerate(slots.tolist()) if slot in self._rows}
        self._guidance.arrange(rows)
        self._guided = np.array(list(rows), dtype=np.int64)
        self._slots, self._changed = slots.copy(), False

    def _described(self, batch: "InputBatch") -> Batch:
        num_rows = batch.num_reqs
        # An upper bound only where tokens are drafted, and drafts are refused.
        lengths = batch.seq_lens_cpu_upper_bound[:num_rows].numpy()
        last_tokens = batch.input_ids[batch.logits_indices]
        self._mirror.follow(
            last_tokens, self._guided, self._slots[self._guided], lengths[self._guided]
        )
        return Batch(
            lengths=lengths,
            sampled=lengths >= batch.prefill_len_np,
            last_tokens=last_tokens,
            request_ids=batch.req_ids,
            history=self._req_states.all_token_ids.gpu,
        )


class _First(LogitsProcessor):
    """What vLLM's own processors come after."""

    def __init__(self, guide: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._guide = guide

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False  # `V2Processor` says which requests have their logits changed

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        return self._guide(logits)


def _staged(tensor: "StagedWriteTensor", slot: int) -> list[int]:
    """Return what the runner is about to write to a slot's row, and has not sent yet.

    Raises:
        ValueError: it is not about to write to the row, or not from its beginning.
    """
    slots, ends = tensor._staged_write_indices, tensor._staged_write_cu_lens
    last = len(slots) - 1 - slots[::-1].index(slot)
    if tensor._staged_write_starts[last] != 0:
        raise ValueError(f"slot {slot} gets a part of its tokens only")
    return tensor._staged_write_contents[ends[last - 1] if last else 0 : ends[last]]
