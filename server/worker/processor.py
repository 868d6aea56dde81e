"""The logits processor that vLLM's V1 model runner calls: guidance' adapter to that runner.

vLLM also imports this class in the API processes, to validate requests: nothing heavy at the top.

Guidance happens as the sampler is entered rather than in `apply`: there, penalties, bad words and
`logit_bias` still follow, and reported log-probabilities are those of the guided distribution.
`apply` comes after all masks of vLLM's own, and ends the requests whose network has failed or can
read no more.
"""

import time
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from server.choice import EXTRA_ARG, Choice, unseal
from server.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from server.worker.row import GuidedRow

logger = init_logger(__name__)

IDLE_SECONDS = 1
"""Steps further apart than this do not follow each other."""


class ValueGuidance(LogitsProcessor):
    """Keeps track of which rows of the batch are guided, and hands each step to `Guidance`.

    Interface: `vllm.v1.sample.logits_processor.LogitsProcessor` (vLLM 0.32).
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Let only choices pass that a route of this server has resolved and signed.

        Raises:
            ValueError: a client filled the reserved key itself.
        """
        _choice_of(sampling_params, Settings.load().key)

    def __init__(
        self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool
    ) -> None:
        from server.token_bytes import TokenBytes
        from server.worker.guidance import Guidance
        from server.worker.residency import Residency

        settings = Settings.load()
        self._key = settings.key
        self._rows: dict[int, GuidedRow] = {}
        self._free_slots = list(range(vllm_config.scheduler_config.max_num_seqs))
        self._runner: GPUModelRunner | None = None
        self.residency = Residency(vllm_config, settings, device)
        self.guidance = Guidance(self.residency, device, settings.run_dir)
        # Mapped now: a file that cannot be read must not end an engine that serves.
        spelled = settings.token_bytes
        self._spelling = None if spelled is None else TokenBytes.load(spelled)
        self._last_step = 0.0

    def is_argmax_invariant(self) -> bool:
        """False: `apply` comes after the masks that vLLM's other processors set."""
        return False

    def attach(self, runner: "GPUModelRunner") -> None:
        """Guide at the sampler's door from now on. Harmless when called again."""
        from vllm.distributed import get_tensor_model_parallel_rank

        from server.worker.scoring import guide_prompt_scores

        if self._runner is None:
            self._runner = runner
            self.residency.settle()
            runner.sampler.register_forward_pre_hook(self._enter_sampler, with_kwargs=True)
            self.guidance.explanations.wanted = get_tensor_model_parallel_rank() == 0
            runner.sampler.register_forward_hook(self._leave_sampler)
            guide_prompt_scores(runner, self.guidance, self._rows)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow rows as they join, leave and move; called before every forward."""
        self._time_step()
        if batch_update is None:
            return
        before = list(self._rows.values())
        if not process_dict_updates(self._rows, batch_update, self._new_row):
            return
        # In the same order on all tensor-parallel ranks: they must make the same choices.
        staying = set(self._rows.values())
        for row in before:
            if row not in staying:
                self.guidance.release(row)
                self._free_slots.append(row.slot)
        for _, row in sorted(self._rows.items()):
            if row.slot is None:
                row.slot = self._free_slots.pop()
        self.guidance.arrange(self._rows)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """End rows that cannot be guided on: only their failure token can be sampled.

        Args:
            logits: float32 `[num_rows, vocab_size]`.
        """
        if self._runner is not None and not self.guidance.any_ended:
            return logits
        for index, row in self._rows.items():
            if self._runner is None or self.guidance.ended(row):
                logits[index] = float("-inf")
                # More than vLLM's thinking budget, which comes later, gives its end token.
                logits[index, row.choice.failure_token_id] = 1e30
        return logits

    def _time_step(self) -> None:
        """Keep track of how long a step takes: loading takes its share of that."""
        now = time.perf_counter()
        seconds = now - self._last_step
        self._last_step = now
        if seconds < IDLE_SECONDS:
            self.residency.step_seconds += 0.1 * (seconds - self.residency.step_seconds)

    def _new_row(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> "GuidedRow | None":
        from server.worker.row import GuidedRow

        choice = _choice_of(params, self._key)
        if choice is None:
            return None
        spelling = None if choice.until_text is None else self._spelling
        return GuidedRow(choice, prompt_ids or [], output_ids, spelling)

    def _enter_sampler(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the logits that the sampler is called with by guided ones."""
        runner = self._runner
        assert runner is not None
        batch = runner.input_batch
        if not self._rows or kwargs.get("sampling_metadata") is not batch.sampling_metadata:
            return None  # nothing guided, or a warm-up of vLLM's
        from server.worker.guidance import Batch

        try:
            num_rows = batch.num_reqs
            last = runner.query_start_loc.gpu[1 : num_rows + 1].long() - 1
            kwargs["logits"] = self.guidance.step(
                kwargs["logits"],
                Batch(
                    lengths=runner.optimistic_seq_lens_cpu[:num_rows].numpy(),
                    sampled=~runner.discard_request_mask.np[:num_rows],
                    last_tokens=runner.input_ids.gpu[last],
                    request_ids=batch.req_ids,
                ),
            )
        except Exception as error:  # an exception here would end the engine and every request
            logger.exception("guidance: the step threw")
            self.guidance.fail(f"the guidance step threw {type(error).__name__}: {error}")
        return args, kwargs

    def _leave_sampler(
        self, _: torch.nn.Module, args: tuple[Any, ...], output: "SamplerOutput"
    ) -> None:
        """Write down what guidance did to the tokens that were sampled."""
        if not self.guidance.explanations.waiting:
            return
        try:
            self.guidance.explanations.write(output.sampled_token_ids)
        except Exception:  # an exception here would end the engine and every request
            logger.exception("explanations cannot be written")


def _choice_of(params: SamplingParams, key: str) -> Choice | None:
    sealed = (params.extra_args or {}).get(EXTRA_ARG)
    return None if sealed is None else unseal(sealed, key)
