"""Rows for the models: examples padded into a batch, one a row or packed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from value_models.training import TrainingError
from value_models.training.data import IGNORED, Example, Examples

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right into one batch: int64 tensors `[rows, longest]`."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        longest = max(len(example.input_ids) for example in examples)
        shape = (len(examples), longest)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            input_ids[row, :length] = torch.tensor(example.input_ids)
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.tensor(example.labels)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class PackCollator:
    """Lays several examples one after the other into each row: int64 tensors `[rows, longest]`.

    Positions begin at 0 in each example, and there is no attention mask: from that, transformers
    masks attention block by block, so that no example sees another. Padding is a block of its own.
    """

    pad_token_id: int

    def __call__(self, packs: Sequence[Sequence[Example]]) -> Batch:
        longest = max(sum(len(example.input_ids) for example in pack) for pack in packs)
        shape = (len(packs), longest)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, pack in enumerate(packs):
            start = 0
            for example in pack:
                end = start + len(example.input_ids)
                input_ids[row, start:end] = torch.tensor(example.input_ids)
                position_ids[row, start:end] = torch.arange(end - start)
                # The token before an example's first is another example's: nothing predicts it.
                labels[row, start + 1 : end] = torch.tensor(example.labels[1:])
                start = end
            position_ids[row, start:] = torch.arange(longest - start)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


class Packs(Sequence[list[Example]]):
    """Examples packed into rows of at most `max_length` tokens, long ones first, always into the
    row that has most room left."""

    def __init__(self, examples: Examples, max_length: int) -> None:
        self._examples = examples
        self._rows: list[list[int]] = []
        room: list[tuple[int, int]] = []  # a heap of (-tokens left, row)
        for index in sorted(range(len(examples)), key=examples.num_tokens, reverse=True):
            length = examples.num_tokens(index)
            if room and -room[0][0] >= length:
                left, row = room[0]
                self._rows[row].append(index)
                heapq.heapreplace(room, (left + length, row))
            else:
                heapq.heappush(room, (length - max_length, len(self._rows)))
                self._rows.append([index])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> list[Example]:  # type: ignore[override]  # slices are not needed
        return [self._examples[index] for index in self._rows[row]]


@torch.no_grad()
def check_separation(model: PreTrainedModel) -> None:
    """Make sure that a model keeps packed examples apart.

    Recurrent models, and others without transformers' common attention masks, read a row as one.

    Raises:
        TrainingError: what an example says changes the logits of the one behind it.
    """
    model.eval()
    first, other, second = [1, 2, 3], [4, 5, 6], [7, 8, 9]
    logits = model(
        input_ids=torch.tensor([first + second, other + second], device=model.device),
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=model.device),
        use_cache=False,
    ).logits[:, len(first) :]
    if not torch.allclose(logits[0], logits[1]):
        raise TrainingError(
            f"models of type {model.config.model_type} cannot keep packed conversations apart; "
            "train without --packing"
        )
