"""Guidance begins and ends where the request says, however the tokens come."""

import random

import pytest

from server.choice import Choice
from server.token_bytes import TokenBytes
from server.worker.controls import Control

TOKENS = [b"a", b"b", b"ab", b"\n", b"\n\n", "é".encode()[:1], "é".encode()[1:], None]
"""What the ids 0 to 7 spell; 7 is a special token."""


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> TokenBytes:
    file = tmp_path_factory.mktemp("run") / "token-bytes"
    TokenBytes.write(file, TOKENS)
    return TokenBytes.load(file)


def control(spelling: TokenBytes, **settings: object) -> Control:
    return Control(Choice((), 9, **settings), spelling)


def guided(control: Control, tokens: list[int], pace: int = 1) -> list[bool]:
    """Which of the tokens are guided, when so many come between two looks."""
    found = []
    for length in range(0, len(tokens) + 1, pace):
        active = control.advance(length, lambda start, length=length: tokens[start:length])
        found.append(active)
    return found


def test_ends_after_so_many_tokens(spelling: TokenBytes) -> None:
    assert guided(control(spelling, until_tokens=2), [0] * 4) == [True, True, False, False, False]


def test_counting_needs_no_tokens(spelling: TokenBytes) -> None:
    def unread(start: int) -> list[int]:
        raise AssertionError("the tokens were asked for")

    counting = control(spelling, until_tokens=2)
    assert [counting.advance(n, unread) for n in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("text", "tokens", "last"),
    [
        ("\n\n", [0, 3, 3, 0], 3),  # in two tokens
        ("\n\n", [0, 4, 0], 2),  # in one
        ("b\n", [2, 4, 0], 2),  # from within one token into the next
        ("é", [5, 6, 0], 2),  # a character in two halves
        ("aab", [0, 0, 2, 1, 0], 3),  # what looked like the beginning was not
        ("\n\n", [3, 7, 3, 0], 3),  # a special token spells nothing
    ],
)
def test_ends_with_the_token_that_completes_a_text(
    spelling: TokenBytes, text: str, tokens: list[int], last: int
) -> None:
    expected = [n < last for n in range(len(tokens) + 1)]
    assert guided(control(spelling, until_text=text), tokens) == expected


def test_begins_behind_a_sequence_of_tokens(spelling: TokenBytes) -> None:
    tokens = [3, 0, 0, 1, 0, 0]
    found = guided(control(spelling, after=(0, 1)), tokens)
    assert found == [False] * 4 + [True] * 3


def test_counts_and_reads_from_where_guidance_begins(spelling: TokenBytes) -> None:
    tokens = [3, 3, 7, 0, 0, 3, 3]
    counted = guided(control(spelling, after=(7,), until_tokens=2), tokens)
    assert counted == [False] * 3 + [True] * 2 + [False] * 3
    read = guided(control(spelling, after=(7,), until_text="\n\n"), tokens)
    assert read == [False] * 3 + [True] * 4 + [False]


def test_whatever_comes_first_ends_it(spelling: TokenBytes) -> None:
    both = {"until_tokens": 3, "until_text": "b"}
    assert guided(control(spelling, **both), [0, 1, 0]) == [True, True, False, False]
    assert guided(control(spelling, **both), [0, 0, 0]) == [True, True, True, False]


def test_a_row_that_comes_back_is_where_it_was(spelling: TokenBytes) -> None:
    """Many tokens at once, as after preemption, or fewer than before."""
    rng = random.Random(1)
    for _ in range(200):
        tokens = [rng.randrange(len(TOKENS)) for _ in range(12)]
        settings = {"after": (7,)} if rng.random() < 0.5 else {}
        settings |= {"until_tokens": 5} if rng.random() < 0.5 else {"until_text": "ab"}
        slow, fast = control(spelling, **settings), control(spelling, **settings)
        guided(slow, tokens)
        for length in (7, 12, 3, 12):
            fast.advance(length, lambda start, so_far=tokens[:length]: so_far[start:])
        assert (fast.active, fast.ended) == (slow.active, slow.ended)
