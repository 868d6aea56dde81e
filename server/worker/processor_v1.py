"""Guidance' adapter to vLLM's V1 model runner.

Guidance happens as the sampler is entered rather than in `apply`: there, penalties, bad words and
`logit_bias` still follow, and reported log-probabilities are those of the guided distribution.
`apply` comes after all masks of vLLM's own, and ends the requests whose network has failed or can
read no more.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from server.worker.guidance import Batch
from server.worker.history import ListedHistory
from server.worker.row import GuidedRow
from server.worker.sampling import sample_at_once
from server.worker.scoring import guide_prompt_scores
from server.worker.steering import Steering, end_row

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class V1Processor(LogitsProcessor):
    """Keeps track of which rows of the batch are guided, and hands each step to `Guidance`.

    Interface: `vllm.v1.sample.logits_processor.LogitsProcessor` (vLLM 0.32).
    """

    def __init__(
        self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool
    ) -> None:
        self.steering = Steering(vllm_config, device)
        self._guidance = self.steering.guidance
        self._rows: dict[int, GuidedRow] = {}
        self._free_slots = list(range(vllm_config.scheduler_config.max_num_seqs))
        self._runner: GPUModelRunner | None = None

    def is_argmax_invariant(self) -> bool:
        """False: `apply` comes after the masks that vLLM's other processors set."""
        return False

    def attach(self, runner: "GPUModelRunner") -> None:
        """Guide at the sampler's door from now on. Harmless when called again."""
        if self._runner is None:
            self._runner = runner
            self.steering.settle()
            runner.sampler.register_forward_pre_hook(self._enter_sampler, with_kwargs=True)
            runner.sampler.register_forward_hook(self._leave_sampler)
            guide_prompt_scores(runner, self._guidance, self._rows)
            sample_at_once(runner)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow rows as they join, leave and move; called before every forward."""
        self.steering.begin_step()
        if batch_update is None:
            return
        before = list(self._rows.values())
        if not process_dict_updates(self._rows, batch_update, self._new_row):
            return
        # In the same order on all tensor-parallel ranks: they must make the same choices.
        staying = set(self._rows.values())
        for row in before:
            if row not in staying:
                self._guidance.release(row)
                self._free_slots.append(row.slot)
        for _, row in sorted(self._rows.items()):
            if row.slot is None:
                row.slot = self._free_slots.pop()
        self._guidance.arrange(self._rows)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """End rows that cannot be guided on: only their failure token can be sampled.

        Args:
            logits: float32 `[num_rows, vocab_size]`.
        """
        if self._runner is None or self._guidance.any_ended:
            for index, row in self._rows.items():
                if self._runner is None or self._guidance.ended(row):
                    end_row(logits, index, row)
        with self.steering.contained("ending requests"):
            self._guidance.end_unsound(logits)
        return logits

    def _new_row(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> GuidedRow | None:
        return self.steering.new_row(params, ListedHistory(prompt_ids or [], output_ids))

    def _enter_sampler(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the logits that the sampler is called with by guided ones."""
        runner = self._runner
        assert runner is not None
        batch = runner.input_batch
        if not self._rows or kwargs.get("sampling_metadata") is not batch.sampling_metadata:
            return None  # nothing guided, or a warm-up of vLLM's
        with self.steering.contained("the guidance step"):
            num_rows = batch.num_reqs
            last: slice | torch.Tensor = slice(num_rows)
            if runner.query_start_loc.np[num_rows] != num_rows:  # more than a token of each
                last = runner.query_start_loc.gpu[1 : num_rows + 1].long() - 1
            kwargs["logits"] = self._guidance.step(
                kwargs["logits"],
                Batch(
                    lengths=runner.optimistic_seq_lens_cpu[:num_rows].numpy(),
                    sampled=~runner.discard_request_mask.np[:num_rows],
                    last_tokens=runner.input_ids.gpu[last],
                    request_ids=batch.req_ids,
                ),
            )
        return args, kwargs

    def _leave_sampler(
        self, _: torch.nn.Module, args: tuple[Any, ...], output: "SamplerOutput"
    ) -> None:
        """Write down what guidance did to the tokens that were sampled."""
        self.steering.note_sampled(output.sampled_token_ids)
