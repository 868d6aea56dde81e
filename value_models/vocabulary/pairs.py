"""Which tokens of two vocabularies stand for the same text, counted over a corpus.

Both vocabularies cut the same text; wherever both have a boundary, the token of the target that
begins there is paired with the network's token that begins there: it is what the network would say
where the target says its own. Between common boundaries lie spans of a few tokens, and most often
of one on each side, of equal bytes.

The published way (Lu et al., NAACL 2025, arXiv 2410.21027) pairs all tokens of a span instead, by
dynamic time warping under edit distance, a tenth of it where one token contains the other. It is
here to be compared with: cut at common boundaries first, which changes little and is much faster.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from value_models.vocabulary.text import TextTokenizer
from value_models.vocabulary.tokens import Vocabulary

CONTAINED_COST = 0.1
LONGEST_SPAN = 64
"""Tokens on one side beyond which a span says too little to be worth its warping."""
TEXTS_PER_TASK = 64

Tokens = tuple[int, ...]
Span = tuple[Tokens, Tokens]
Item = TypeVar("Item")


@dataclass
class PairCounts:
    """What a corpus says about two vocabularies. Sums of integers: any order gives the same."""

    starts: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(target id, value id) -> how often one began where the other did, without ending there."""
    warped: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(target id, value id) -> how often they were aligned by warping, exact pairs left out."""
    seen: Counter[int] = field(default_factory=Counter)
    """Target id -> how often it occurred."""
    exact: Counter[int] = field(default_factory=Counter)
    """Target id -> how often a token of equal bytes stood in the same place."""
    num_texts: int = 0
    num_bytes: int = 0
    num_lossy: int = 0
    """Texts that one of the tokenizers does not give back byte for byte; they are left out."""

    def __iadd__(self, other: PairCounts) -> PairCounts:
        self.starts.update(other.starts)
        self.warped.update(other.warped)
        self.seen.update(other.seen)
        self.exact.update(other.exact)
        self.num_texts += other.num_texts
        self.num_bytes += other.num_bytes
        self.num_lossy += other.num_lossy
        return self


class PairCounter:
    """Counts aligned pairs of tokens; small enough to be sent to other processes."""

    def __init__(self, value: Vocabulary, target: Vocabulary, warping: bool = False) -> None:
        """`warping`: count by dynamic time warping too."""
        self._warping = warping
        self._sides = [
            (TextTokenizer(side.tokenizer), side.tokens, _lengths(side.tokens))
            for side in (value, target)
        ]

    def count(self, texts: Iterable[str]) -> PairCounts:
        """Count over texts that are read one by one, without special tokens."""
        counts = PairCounts()
        spans: Counter[Span] = Counter()
        for text in texts:
            # Many tokenizers do so themselves; both have to read the same bytes.
            text = normalize("NFC", text)
            counts.num_texts += 1
            content = text.encode("utf-8", "replace")
            counts.num_bytes += len(content)
            (value_ids, value_ends), (target_ids, target_ends) = sides = self._encode(text)
            if any(not len(ends) or ends[-1] != len(content) for _, ends in sides) or any(
                b"".join(tokens[i] or b"" for i in ids) != content
                for (ids, _), (_, tokens, _) in zip(sides, self._sides, strict=True)
            ):
                counts.num_lossy += bool(content)
                continue
            counts.seen.update(target_ids)
            spans.update(_cut(value_ids, value_ends, target_ids, target_ends))
        counts.exact.update(counts.seen)
        value_tokens, target_tokens = self._sides[0][1], self._sides[1][1]
        for (value_span, target_span), count in spans.items():
            counts.starts[target_span[0], value_span[0]] += count
            for target_id in target_span:
                counts.exact[target_id] -= count
            if not self._warping or max(len(value_span), len(target_span)) > LONGEST_SPAN:
                continue
            path = warp(
                tuple(value_tokens[i] or b"" for i in value_span),
                tuple(target_tokens[i] or b"" for i in target_span),
            )
            for value_index, target_index in path:
                counts.warped[target_span[target_index], value_span[value_index]] += count
        return counts

    def _encode(self, text: str) -> list[tuple[list[int], npt.NDArray[np.int64]]]:
        encoded = []
        for tokenizer, _, lengths in self._sides:
            ids = tokenizer.encode(text).ids
            encoded.append((ids, np.cumsum(lengths[ids])))
        return encoded


def count_pairs(
    value: Vocabulary,
    target: Vocabulary,
    texts: Iterable[str],
    processes: int,
    warping: bool = False,
) -> Iterator[PairCounts]:
    """Count over a corpus, in several processes; yields counts to be summed, in no fixed parts."""
    counter = PairCounter(value, target, warping)
    tasks = _batches(texts, TEXTS_PER_TASK)
    if processes == 1:
        yield from map(counter.count, tasks)
        return
    # Spawned, not forked: the tokenizers' own threads do not survive a fork.
    with ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_set_counter, initargs=(counter,)
    ) as pool:
        running: deque[Future[PairCounts]] = deque()
        for task in tasks:
            running.append(pool.submit(_count, task))
            if len(running) > 2 * processes:  # a large corpus is never in memory whole
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def warp(value: tuple[bytes, ...], target: tuple[bytes, ...]) -> list[tuple[int, int]]:
    """Align two short token sequences; returns pairs of indices along the cheapest path.

    Of paths that cost the same, the one that advances on both sides first wins.
    """
    best = np.full((len(value) + 1, len(target) + 1), np.inf)
    best[0, 0] = 0
    for row, left in enumerate(value, start=1):
        for column, right in enumerate(target, start=1):
            best[row, column] = distance(left, right) + min(
                best[row - 1, column - 1], best[row - 1, column], best[row, column - 1]
            )
    row, column = len(value), len(target)
    path = []
    while row:
        path.append((row - 1, column - 1))
        steps = ((row - 1, column - 1), (row - 1, column), (row, column - 1))
        row, column = min(steps, key=lambda step: best[step])
    return path[::-1]


@lru_cache(maxsize=1 << 18)
def distance(left: bytes, right: bytes) -> float:
    """Edit distance in bytes; a tenth of it where one contains the other."""
    if len(left) > len(right):
        left, right = right, left
    if left in right:
        return CONTAINED_COST * (len(right) - len(left))
    row = list(range(len(right) + 1))
    for above, byte in enumerate(left, start=1):
        diagonal, row[0] = row[0], above
        for column, other in enumerate(right, start=1):
            diagonal, row[column] = (
                row[column],
                min(diagonal + (byte != other), row[column] + 1, row[column - 1] + 1),
            )
    return float(row[-1])


def _cut(
    value_ids: list[int],
    value_ends: npt.NDArray[np.int64],
    target_ids: list[int],
    target_ends: npt.NDArray[np.int64],
) -> Iterator[Span]:
    """Yield the spans between common boundaries, but those of one token each."""
    common = np.intersect1d(value_ends, target_ends)
    value_cuts = np.searchsorted(value_ends, common, side="right")
    target_cuts = np.searchsorted(target_ends, common, side="right")
    several = (np.diff(value_cuts, prepend=0) > 1) | (np.diff(target_cuts, prepend=0) > 1)
    for span in np.flatnonzero(several).tolist():
        begin = span - 1
        yield (
            tuple(value_ids[value_cuts[begin] if span else 0 : value_cuts[span]]),
            tuple(target_ids[target_cuts[begin] if span else 0 : target_cuts[span]]),
        )


def _lengths(tokens: tuple[bytes | None, ...]) -> npt.NDArray[np.int64]:
    return np.array([len(token or b"") for token in tokens], dtype=np.int64)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


_counter: PairCounter


def _set_counter(counter: PairCounter) -> None:
    global _counter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _counter = counter


def _count(texts: list[str]) -> PairCounts:
    return _counter.count(texts)
