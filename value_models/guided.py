"""Guided greedy decoding in plain PyTorch, over transformers models with KV caches.

What the server does inside vLLM, on a page: the reference that readers learn from, and the way to
measure kinds that cannot be served. `guided = base + sum_i scale_i * value_i`, one batch at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from value_models.combine import add_value_logits
from value_models.connection import CONNECTIONS

if TYPE_CHECKING:
    from value_models.vocabulary.map import VocabularyMap
    from value_models.vocabulary.reading import Reader


class Step(NamedTuple):
    """One decoding step of a batch whose prompts are padded on the left."""

    histories: list[list[int]]  # [num_rows], all tokens of each row
    inputs: torch.Tensor  # int64 [num_rows, num_new], tokens that no model has seen yet
    mask: torch.Tensor  # int64 [num_rows, length], 0 on padding
    base_logits: torch.Tensor  # [num_rows, num_new, vocab_size]


class Guide(Protocol):
    """Something that steers: a network, or a pair of models."""

    def start(self) -> Guiding:
        """Begin with a new batch."""
        ...


class Guiding(Protocol):
    """A guide at work on one batch."""

    def steer(self, logits: torch.Tensor, step: Step) -> None:
        """Add the value logits to `logits`, float32 `[num_rows, vocab_size]`, in place."""
        ...


@dataclass(frozen=True)
class NetworkGuide:
    """A value network of the base's own vocabulary, of any kind in `CONNECTIONS`."""

    model: PreTrainedModel
    scale: float = 1.0
    kind: str = "residual"

    def start(self) -> Guiding:
        return _NetworkGuiding(self, _Cached(self.model))


@dataclass(frozen=True)
class PairGuide:
    """Proxy tuning (Liu et al., COLM 2024, arXiv 2401.08565): `expert - antiexpert`."""

    expert: PreTrainedModel
    antiexpert: PreTrainedModel
    scale: float = 1.0

    def start(self) -> Guiding:
        return _PairGuiding(self.scale, _Cached(self.expert), _Cached(self.antiexpert))


@dataclass(frozen=True)
class MappedGuide:
    """A residual network of another vocabulary; without KV caches, since its tail changes."""

    model: PreTrainedModel
    map: VocabularyMap
    reader: Reader
    scale: float = 1.0

    def start(self) -> Guiding:
        return _MappedGuiding(self)


@torch.inference_mode()
def decode(
    base: PreTrainedModel,
    guides: Sequence[Guide],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> list[list[int]]:
    """Continue each prompt greedily, until a stop token (left out) or `max_new_tokens`.

    Args:
        base: the target; without guides it decodes alone.
        prompts: token ids of the base's vocabulary, one batch.
    """
    histories = [list(prompt) for prompt in prompts]
    longest = max(map(len, histories))
    padding = [longest - len(history) for history in histories]
    inputs = torch.tensor([[0] * pad + h for pad, h in zip(padding, histories, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    cached, at_work = _Cached(base), [guide.start() for guide in guides]
    generated: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        base_logits = cached(inputs, mask)
        logits = base_logits[:, -1].float()
        step = Step(histories, inputs, mask, base_logits)
        for guiding in at_work:
            guiding.steer(logits, step)
        tokens = logits.argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            histories[row].append(token)
            if token in stop_ids:
                running.discard(row)
            elif row in running:
                generated[row].append(token)
        if not running:
            break
        inputs = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return generated


class _Cached:
    """A model with the KV cache of one batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._past: Any = None

    def __call__(
        self,
        inputs: torch.Tensor | None,
        mask: torch.Tensor,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read new tokens, or their embeddings; returns `[num_rows, num_new, vocab_size]`."""
        new = inputs if embeddings is None else embeddings
        assert new is not None
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        output = self.model(
            input_ids=inputs if embeddings is None else None,
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._past,
            use_cache=True,
        )
        self._past = output.past_key_values
        logits: torch.Tensor = output.logits
        return logits


@dataclass(frozen=True)
class _NetworkGuiding:
    guide: NetworkGuide
    cached: _Cached

    def steer(self, logits: torch.Tensor, step: Step) -> None:
        connect = CONNECTIONS[self.guide.kind]
        embedding = self.guide.model.get_input_embeddings()
        embeddings = connect(step.inputs, step.base_logits, embedding)
        value = self.cached(None, step.mask, embeddings)
        add_value_logits(logits, value[:, -1], self.guide.scale)


@dataclass(frozen=True)
class _PairGuiding:
    scale: float
    expert: _Cached
    antiexpert: _Cached

    def steer(self, logits: torch.Tensor, step: Step) -> None:
        value = self.expert(step.inputs, step.mask) - self.antiexpert(step.inputs, step.mask)
        add_value_logits(logits, value[:, -1], self.scale)


class _MappedGuiding:
    def __init__(self, guide: MappedGuide) -> None:
        self._guide = guide

    def steer(self, logits: torch.Tensor, step: Step) -> None:
        readings = [self._guide.reader.read(history) for history in step.histories]
        rows = [i for i, reading in enumerate(readings) if not reading.waiting]
        if not rows:
            return
        longest = max(len(readings[row].ids) for row in rows)
        # Padded on the right: no attention mask is needed to read what lies before.
        ids = [[*readings[row].ids] + [0] * (longest - len(readings[row].ids)) for row in rows]
        last = torch.tensor([len(readings[row].ids) - 1 for row in rows])
        hidden = self._guide.model(input_ids=torch.tensor(ids), use_cache=False).logits
        value = hidden[torch.arange(len(rows)), last]
        at_start = torch.tensor([readings[row].at_start for row in rows])
        columns = self._guide.map.columns
        add_value_logits(
            logits,
            value,
            self._guide.scale,
            torch.tensor(rows),
            columns[at_start.long() * (len(columns) - 1)],
        )
