"""Tokens of the device on the host, at the same step however long they take to get there."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from server.worker import mirror
from server.worker.mirror import UNDER_WAY, MirroredHistory, TokenCopy, TokenMirror


class WatchedCopy(TokenCopy):
    """One that a test sees being read, which waits for it if it must."""

    begun: "list[WatchedCopy]"

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__(tokens)
        self.was_read = False
        self.begun.append(self)

    def wait(self) -> np.ndarray:
        self.was_read = True
        return super().wait()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[WatchedCopy]:
    """All copies that have been begun."""
    WatchedCopy.begun = []
    monkeypatch.setattr(mirror, "TokenCopy", WatchedCopy)
    return WatchedCopy.begun


Follow = Callable[[dict[int, tuple[int, int]]], None]


def step_of(mirror: TokenMirror) -> Follow:
    """Return a step: slot -> length of its history, and the token that ends it."""

    def follow(rows: dict[int, tuple[int, int]]) -> None:
        lengths = np.array([length for length, _ in rows.values()], dtype=np.int32)
        # In front of them, one that belongs to a row without guidance.
        tokens = torch.tensor([99, *(token for _, token in rows.values())], dtype=torch.int32)
        mirror.follow(tokens, np.arange(1, len(tokens)), np.array(list(rows)), lengths)

    return follow


def test_tokens_are_known_some_steps_later(copies: list[WatchedCopy]) -> None:
    """Whenever they arrive: what tensor-parallel ranks know must not depend on that."""
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(2, [10, 11])
    history = MirroredHistory(mirror, 2, 2)
    known = []
    for length, token in ((2, 11), (3, 12), (4, 13), (5, 14), (6, 15)):
        step({2: (length, token)})
        known.append(history.tokens(0, length))
    prompt = [10, 11]
    assert known == [prompt, prompt, prompt, [*prompt, 12], [*prompt, 12, 13]]
    assert history.tokens(1, 2) == [11]
    assert [copy.was_read for copy in copies] == [True] * 3 + [False] * UNDER_WAY


def test_who_waits_waits_for_no_more_than_is_asked_for(copies: list[WatchedCopy]) -> None:
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(0, [10])
    history = MirroredHistory(mirror, 0, 1)
    for length, token in ((2, 11), (3, 12), (4, 13)):
        step({0: (length, token)})
    assert history.awaited(0, 3) == [10, 11, 12]
    assert [copy.was_read for copy in copies] == [True, True, False]
    assert history.awaited(0, 9) == [10, 11, 12, 13]  # nothing more is on its way


def test_a_prompt_in_chunks_is_known_from_the_start(copies: list[WatchedCopy]) -> None:
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(1, list(range(10, 18)))
    history = MirroredHistory(mirror, 1, 8)
    step({1: (3, 12)})
    step({1: (8, 17)})
    step({1: (9, 18)})
    assert history.awaited(0, 9) == list(range(10, 19))


def test_what_arrives_late_is_not_the_next_tenants(copies: list[WatchedCopy]) -> None:
    """The lengths are made to fit, so that only the tenant tells."""
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(0, [10])
    mirror.open(3, [20, 21])
    step({0: (2, 11), 3: (3, 22)})
    mirror.open(0, [30])
    assert MirroredHistory(mirror, 0, 1).awaited(0, 2) == [30]
    assert MirroredHistory(mirror, 3, 2).awaited(0, 3) == [20, 21, 22]


def test_a_gap_is_never_read_over(copies: list[WatchedCopy]) -> None:
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(0, [10])
    step({0: (3, 12)})
    assert MirroredHistory(mirror, 0, 1).awaited(0, 3) == [10]


def test_steps_are_not_kept(copies: list[WatchedCopy]) -> None:
    """Also where nobody reads for long."""
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(0, [10])
    for length in range(2, 12):
        step({0: (length, length)})
    assert len(mirror._steps) == UNDER_WAY


def test_a_device_without_events_copies_at_once() -> None:
    mirror = TokenMirror(1, 4)
    mirror.open(0, [7])
    step_of(mirror)({0: (2, 8)})
    assert MirroredHistory(mirror, 0, 1).awaited(0, 4) == [7, 8]
