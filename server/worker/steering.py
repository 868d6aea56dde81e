"""What both adapters hand to vLLM's model runner: the worker's networks, and the steps they guide.

It also keeps the engine from our mistakes: an exception in a hook of
vLLM's would end the engine and every request.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from server.choice import carried
from server.settings import Settings
from server.token_bytes import TokenBytes
from server.worker.guidance import Guidance
from server.worker.history import History
from server.worker.residency import Residency
from server.worker.row import GuidedRow
from server.worker.soundness import FORCED

logger = init_logger(__name__)

IDLE_SECONDS = 1
"""Steps further apart than this do not follow each other."""


class Steering:
    """A worker's value networks, and how they steer its requests.

    Attributes:
        residency: the networks.
        guidance: the rows that are in the batch, and their steps.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Load the networks that the server starts with. For errors see `Residency`."""
        settings = Settings.load()
        self._key = settings.key
        self.residency = Residency(vllm_config, settings, device)
        self.guidance = Guidance(self.residency, device, settings.run_dir)
        # Mapped now: a file that cannot be read must not end an engine that serves.
        spelled = settings.token_bytes
        self._spelling = None if spelled is None else TokenBytes.load(spelled)
        self._last_step = 0.0

    def settle(self) -> None:
        """The engine is up and about to serve."""
        self.residency.settle()
        self.guidance.explanations.wanted = get_tensor_model_parallel_rank() == 0

    def new_row(self, params: SamplingParams, history: History) -> GuidedRow | None:
        """Return a row for a request that joins the batch, if it is guided.

        Raises:
            ValueError: its choice is not this server's; `validate_params` lets none of those pass.
        """
        choice = carried(params.extra_args, self._key)
        if choice is None:
            return None
        spelling = None if choice.until_text is None else self._spelling
        scores = params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
        return GuidedRow(choice, history, spelling, scores)

    def begin_step(self) -> None:
        """Keep track of how long a step takes: loading takes its share of that."""
        now = time.perf_counter()
        seconds = now - self._last_step
        self._last_step = now
        if seconds < IDLE_SECONDS:
            self.residency.step_seconds += 0.1 * (seconds - self.residency.step_seconds)

    def note_sampled(self, sampled: torch.Tensor) -> None:
        """Write down what guidance did to the tokens of a step: int `[num_rows, 1]`."""
        if not self.guidance.explanations.waiting:
            return
        try:
            self.guidance.explanations.write(sampled)
        except Exception:  # an exception here would end the engine and every request
            logger.exception("explanations cannot be written")

    @contextmanager
    def contained(self, what: str) -> Iterator[None]:
        """Let no exception out: the networks have failed instead."""
        try:
            yield
        except Exception as error:
            logger.exception("guidance: %s threw", what)
            self.guidance.fail(f"{what} threw {type(error).__name__}: {error}")


def end_row(logits: torch.Tensor, index: int, row: GuidedRow) -> None:
    """Leave a row nothing to sample but its failure token.

    Args:
        logits: float32 `[num_rows, vocab_size]`; all masks have been applied.
        index: of the row.
    """
    logits[index] = float("-inf")
    logits[index, row.choice.failure_token_id] = FORCED
