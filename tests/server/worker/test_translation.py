"""A row as a network of another vocabulary reads it, apart from any engine."""

from collections.abc import Sequence
from typing import Any

import pytest

from server.worker.translation import TranslatedRow
from value_models.vocabulary.reading import Reading


class Pairs:
    """Stands for `Reader`: a token of the network is two of the target's, or the last one alone.

    The token that ends the history can change, as long as it is alone. Behind a 9 it waits.
    """

    def follow(self) -> "Pairs":
        history = Pairs()
        history.read = []
        return history

    def extend(self, token_ids: Sequence[int]) -> Reading:
        self.read += token_ids
        pairs = [self.read[i : i + 2] for i in range(0, len(self.read), 2)]
        ids = [100 + 10 * pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
        return Reading(ids, len(self.read) // 2, self.read[-1] == 9, len(self.read) == 1)


class Row:
    """A row of the batch, whose tokens are those that the host knows."""

    def __init__(self, *known: int) -> None:
        self.known = list(known)
        reader: Any = Pairs()
        self.translated = TranslatedRow(reader, lambda start, stop: self.known[start:stop])

    def advance(self, length: int | None = None) -> int:
        return self.translated.advance(length or len(self.known), self.newest)

    def newest(self) -> int:
        raise AssertionError("the device need not be asked")


def test_what_is_rewritten_is_computed_again() -> None:
    row = Row(1, 2, 3)
    assert row.advance() == 0
    assert row.translated.tokens(0, 9) == [112, 3]
    row.known.append(4)
    assert row.advance() == 1
    assert row.translated.tokens(0, 9) == [112, 134]
    assert row.translated.tokens(1, 2) == [134]
    row.known.append(5)
    assert row.advance() == 2, "nothing before the new token has changed"
    assert row.translated.num_stable == 2


def test_the_last_token_is_always_computed() -> None:
    row = Row(1, 2)
    row.translated._reader = Constant()
    row.translated._begin()
    assert row.advance() == 0
    row.known.append(3)
    assert row.advance() == 2, "the logits behind the last of three are wanted"


class Constant(Pairs):
    """Reads the same three tokens whatever comes."""

    def follow(self) -> "Constant":
        return Constant()

    def extend(self, token_ids: Sequence[int]) -> Reading:
        return Reading([7, 8, 9], 1, False, False)


def test_a_token_that_only_the_device_knows_is_fetched() -> None:
    row = Row(1, 2, 3)
    row.advance()
    assert row.translated.advance(4, lambda: 6) == 1
    assert row.translated.tokens(0, 9) == [112, 136]
    row.known += [6, 7]  # by the next step the host has both
    assert row.advance() == 2
    assert row.translated.tokens(0, 9) == [112, 136, 7]


def test_more_missing_tokens_are_an_error() -> None:
    row = Row(1, 2, 3)
    with pytest.raises(AssertionError, match="missing on the host"):
        row.translated.advance(5, lambda: 6)


@pytest.mark.parametrize("known", [[1, 2, 3], [1, 2, 3, 7, 5]])
def test_a_history_that_was_cut_short_is_read_anew(known: list[int]) -> None:
    row = Row(1, 2, 3, 4, 5)
    row.advance()
    row.known = known
    assert row.advance() == 0
    assert row.translated.tokens(0, 9) == Pairs().follow().extend(known).ids


def test_it_says_when_it_waits_and_when_a_run_of_text_begins() -> None:
    row = Row(1)
    row.advance()
    assert row.translated.at_start and not row.translated.waiting
    row.known.append(9)
    row.advance()
    assert row.translated.waiting and not row.translated.at_start
