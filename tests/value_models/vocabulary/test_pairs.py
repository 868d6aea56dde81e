"""Counting pairs: warping by hand, spans, and the same sums in any number of processes."""

import pytest

from tests.value_models.vocabulary.tokenizers import MORE_TEXT, tokenizer
from value_models.vocabulary.pairs import PairCounter, PairCounts, count_pairs, distance, warp
from value_models.vocabulary.tokens import Vocabulary


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (b"kitten", b"sitting", 3),
        (b"abc", b"abc", 0),
        (b"abc", b"xabcyy", 0.3),
        (b"xabcyy", b"abc", 0.3),
        (b"", b"ab", 0.2),
        (b"flaw", b"lawn", 2),
        (b"abc", b"xyz", 3),
    ],
)
def test_edit_distance(left: bytes, right: bytes, expected: float) -> None:
    assert distance(left, right) == pytest.approx(expected)


def test_warping_pairs_what_stands_for_the_same_text() -> None:
    assert warp((b"hello",), (b"he", b"llo")) == [(0, 0), (0, 1)]
    assert warp((b" in", b"deed"), (b" ", b"indeed")) == [(0, 0), (1, 1)]
    assert warp((b"ab", b"cd", b"ef"), (b"a", b"bcd", b"ef")) == [(0, 0), (1, 1), (2, 2)]


def counts(value: str, target: str, texts: list[str], processes: int = 1) -> PairCounts:
    total = PairCounts()
    sides = Vocabulary.of(tokenizer(value)), Vocabulary.of(tokenizer(target))
    for part in count_pairs(*sides, texts, processes, warping=True):
        total += part
    return total


def test_only_what_differs_is_counted() -> None:
    same = counts("gpt2", "gpt2", [MORE_TEXT])
    assert not same.starts and not same.warped
    assert same.exact == same.seen
    assert same.seen.total() == len(
        tokenizer("gpt2")(MORE_TEXT, add_special_tokens=False)["input_ids"]
    )
    assert (same.num_texts, same.num_lossy) == (1, 0)


def test_pairs_overlap_in_the_text() -> None:
    value, target = (Vocabulary.of(tokenizer(name)) for name in ("byte-level", "tekken"))
    found = counts("byte-level", "tekken", [MORE_TEXT])
    assert found.starts and found.warped
    assert all(0 <= found.exact[i] <= count for i, count in found.seen.items())
    assert found.exact.total() < found.seen.total()
    for target_id, value_id in [*found.starts, *found.warped]:
        assert found.seen[target_id]
        assert target.tokens[target_id] and value.tokens[value_id]


def test_the_number_of_processes_changes_nothing() -> None:
    texts = [MORE_TEXT[start : start + 300] for start in range(0, len(MORE_TEXT), 7)]
    assert counts("qwen", "sentencepiece legacy", texts) == counts(
        "qwen", "sentencepiece legacy", texts, processes=2
    )


def test_text_that_does_not_come_back_is_left_out() -> None:
    counter = PairCounter(*(Vocabulary.of(tokenizer(name)) for name in ("unigram", "gpt2")))
    found = counter.count(["plain words", "\U0001fae8 unknown", ""])
    assert (found.num_texts, found.num_lossy) == (3, 1)
    assert found.seen.total() == len(
        tokenizer("gpt2")("plain words", add_special_tokens=False)["input_ids"]
    )
