"""A guided model in plain transformers, as lm-eval runs one: what the server is compared with.

`guided = target + scale * network`, in float32, without any of the server's code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)


class GuidedLM(HFLM):
    """lm-eval's own model for transformers, whose logits a residual network changes.

    Args:
        target: folder of the target.
        network: folder of a network of the target's vocabulary; None: the target alone.
        scale: the network's.
    """

    def __init__(
        self, target: Path, network: Path | None = None, scale: float = 1.0, batch_size: int = 32
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(target)
        super().__init__(
            _load(target), tokenizer=tokenizer, backend="causal", batch_size=batch_size
        )
        self._network = _load(network) if network else None
        self._scale = scale

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits behind each token, `[num_rows, length, vocab_size]`; rows padded on the right."""
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        if self._network is not None:
            with torch.inference_mode():
                logits = self._guide(logits, self._network(inps).logits)
        return logits

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """Tokens `[num_rows, <= max_length]` behind prompts that are padded on the left."""
        if self._network is not None:
            reader = _Reader(self._network, kwargs["attention_mask"])
            guidance = _Guidance(lambda ids, logits: self._guide(logits, reader.read(ids)))
            kwargs["logits_processor"] = LogitsProcessorList([guidance])
        tokens: torch.Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        return tokens

    def _guide(self, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return logits + self._scale * value


class _Guidance(LogitsProcessor):
    """Changes the next token's logits as `guide(token_ids, logits)` says."""

    def __init__(self, guide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self._guide = guide

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._guide(input_ids, scores)


class _Reader:
    """A network with the KV cache of one batch, whose prompts are padded on the left."""

    def __init__(self, network: PreTrainedModel, mask: torch.Tensor) -> None:
        self._network = network
        self._mask = mask  # int64 [num_rows, length], 0 on padding
        self._past: Any = None

    @torch.inference_mode()
    def read(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[num_rows, vocab_size]` behind all tokens so far, `[num_rows, length]`."""
        if self._past is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
            token_ids = token_ids[:, -1:]
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -token_ids.shape[1] :]
        output = self._network(
            token_ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._past,
            use_cache=True,
        )
        self._past = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
