"""Tokens of the device on the host, however long they take to get there."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from server.worker import mirror
from server.worker.mirror import MirroredHistory, TokenCopy, TokenMirror


class SlowCopy(TokenCopy):
    """One that arrives when a test says so, or when somebody waits for it."""

    under_way: "list[SlowCopy]"

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__(tokens)
        self.arrived = self.was_awaited = False
        self.under_way.append(self)

    @property
    def has_arrived(self) -> bool:
        return self.arrived

    def wait(self) -> np.ndarray:
        self.was_awaited = not self.arrived
        return super().wait()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[SlowCopy]:
    """All copies that have been begun."""
    SlowCopy.under_way = []
    monkeypatch.setattr(mirror, "TokenCopy", SlowCopy)
    return SlowCopy.under_way


Follow = Callable[[dict[int, tuple[int, int]]], None]


def step_of(mirror: TokenMirror) -> Follow:
    """Return a step: slot -> length of its history, and the token that ends it."""

    def follow(rows: dict[int, tuple[int, int]]) -> None:
        lengths = np.array([length for length, _ in rows.values()], dtype=np.int32)
        # In front of them, one that belongs to a row without guidance.
        tokens = torch.tensor([99, *(token for _, token in rows.values())], dtype=torch.int32)
        mirror.follow(tokens, np.arange(1, len(tokens)), np.array(list(rows)), lengths)

    return follow


def test_tokens_are_known_when_they_have_arrived(copies: list[SlowCopy]) -> None:
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(2, [10, 11])
    history = MirroredHistory(mirror, 2, 2)
    step({2: (2, 11)})  # what the prompt ends with
    step({2: (3, 12)})
    step({2: (4, 13)})
    assert history.tokens(0, 4) == [10, 11]
    copies[0].arrived = copies[1].arrived = True
    assert history.tokens(0, 4) == [10, 11, 12]
    assert history.tokens(1, 2) == [11]
    assert not any(copy.was_awaited for copy in copies)


def test_who_waits_waits_for_no_more_than_is_asked_for(copies: list[SlowCopy]) -> None:
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(0, [10])
    history = MirroredHistory(mirror, 0, 1)
    for length, token in ((2, 11), (3, 12), (4, 13)):
        step({0: (length, token)})
    assert history.awaited(0, 3) == [10, 11, 12]
    assert [copy.was_awaited for copy in copies] == [True, True, False]
    assert history.awaited(0, 9) == [10, 11, 12, 13]  # nothing more is on its way


def test_a_prompt_in_chunks_is_known_from_the_start(copies: list[SlowCopy]) -> None:
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(1, list(range(10, 18)))
    history = MirroredHistory(mirror, 1, 8)
    step({1: (3, 12)})
    step({1: (8, 17)})
    step({1: (9, 18)})
    for copy in copies:
        copy.arrived = True
    assert history.tokens(0, 9) == list(range(10, 19))


def test_what_arrives_late_is_not_the_next_tenants(copies: list[SlowCopy]) -> None:
    """The lengths are made to fit, so that only the tenant tells."""
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(0, [10])
    mirror.open(3, [20, 21])
    step({0: (2, 11), 3: (3, 22)})
    mirror.open(0, [30])
    copies[0].arrived = True
    assert MirroredHistory(mirror, 0, 1).tokens(0, 2) == [30]
    assert MirroredHistory(mirror, 3, 2).tokens(0, 3) == [20, 21, 22]


def test_a_gap_is_never_read_over(copies: list[SlowCopy]) -> None:
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(0, [10])
    step({0: (3, 12)})
    copies[0].arrived = True
    assert MirroredHistory(mirror, 0, 1).tokens(0, 3) == [10]


def test_steps_that_have_arrived_are_not_kept(copies: list[SlowCopy]) -> None:
    """Also where nobody reads for long."""
    mirror = TokenMirror(4, 16)
    step = step_of(mirror)
    mirror.open(0, [10])
    for length in range(2, 12):
        step({0: (length, length)})
        copies[-1].arrived = True
    assert len(mirror._steps) == 1


def test_a_device_without_events_copies_at_once() -> None:
    mirror = TokenMirror(1, 4)
    mirror.open(0, [7])
    step_of(mirror)({0: (2, 8)})
    assert MirroredHistory(mirror, 0, 1).tokens(0, 4) == [7, 8]
