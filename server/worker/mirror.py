"""The tokens of guided rows on the host, where the runner keeps them on the device.

vLLM's V2 runner samples, and puts what it sampled into the next step, without the host ever
reading it. What the host wants to know of a row comes from two sides: the tokens that the request
is computed from come in the call that adds it, and each one generated comes by a copy that is
begun in the step that has it as input, and read some steps later.

What is known then depends on the steps so far and on nothing else, least of all on how long a copy
took: the ranks of a tensor-parallel group share blocks by the tokens that they know, and must all
share the same ones, or their forwards would differ.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

UNDER_WAY = 2
"""Copies that are not read unless somebody waits: vLLM runs one step while it puts together the
next, so those before them have arrived."""


class TokenCopy:
    """Tokens on their way from the device to the host."""

    def __init__(self, tokens: torch.Tensor) -> None:
        """Begin to copy `tokens`, which nobody changes any more."""
        self._tokens = tokens.to("cpu", non_blocking=True)  # into pinned memory
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> np.ndarray:
        """Return the tokens, as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.numpy()


class _Step(NamedTuple):
    """What one step adds to the histories of some rows: a token each."""

    copy: TokenCopy
    rows: np.ndarray  # int [num_rows], where in the copy their tokens are
    slots: np.ndarray  # int [num_rows]
    lengths: np.ndarray  # int [num_rows], of the history that the token ends
    tenants: np.ndarray  # int [num_rows], who had the slot then


class TokenMirror:
    """The token histories of all slots, as far as they have reached the host."""

    def __init__(self, max_rows: int, max_length: int) -> None:
        # The kernel hands zeros out a page at a time: what is not used takes no memory.
        self._tokens = np.zeros((max_rows, max_length), dtype=np.int32)
        self._known = np.zeros(max_rows, dtype=np.int32)
        self._tenants = np.zeros(max_rows, dtype=np.int64)
        self._steps: deque[_Step] = deque()

    def open(self, slot: int, tokens: Sequence[int]) -> None:
        """Begin a slot's history anew, with these tokens."""
        self._tenants[slot] += 1
        self._known[slot] = 0
        self._tokens[slot, : len(tokens)] = tokens
        self._known[slot] = len(tokens)

    def follow(
        self, tokens: torch.Tensor, rows: np.ndarray, slots: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Take note of a step, without waiting for it.

        Args:
            tokens: int `[num_tokens]` on the device; not changed any more.
            rows: int `[num_rows]`, where in `tokens` the newest token of each row is.
            slots: int `[num_rows]`.
            lengths: int `[num_rows]`, of each row's history, its newest token included.
        """
        tenants = self._tenants[slots]
        self._steps.append(_Step(TokenCopy(tokens), rows, slots, lengths, tenants))
        while len(self._steps) > UNDER_WAY:
            self._take(self._steps.popleft())

    def tokens(self, slot: int, start: int, stop: int) -> list[int]:
        """Return a slot's tokens from `start` to before `stop`, as far as they are known."""
        return self._read(slot, start, stop)

    def awaited(self, slot: int, start: int, stop: int) -> list[int]:
        """Return the same, but wait for those that are on their way."""
        while self._known[slot] < stop and self._steps:
            self._take(self._steps.popleft())
        return self._read(slot, start, stop)

    def _read(self, slot: int, start: int, stop: int) -> list[int]:
        return self._tokens[slot, start : min(stop, int(self._known[slot]))].tolist()

    def _take(self, step: _Step) -> None:
        places = step.lengths - 1
        # Prompts are known already, and a slot may be another request's by now.
        new = (self._known[step.slots] == places) & (self._tenants[step.slots] == step.tenants)
        slots = step.slots[new]
        self._tokens[slots, places[new]] = step.copy.wait()[step.rows[new]]
        self._known[slots] += 1


class MirroredHistory:
    """A history that is read in the mirror, for as long as its row has the slot."""

    def __init__(self, mirror: TokenMirror, slot: int, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self._mirror = mirror
        self._slot = slot

    def tokens(self, start: int, stop: int) -> list[int]:
        return self._mirror.tokens(self._slot, start, stop)

    def awaited(self, start: int, stop: int) -> list[int]:
        return self._mirror.awaited(self._slot, start, stop)
