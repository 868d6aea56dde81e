"""Rows as a network of another vocabulary reads them: the text so far, in the network's own tokens.

Python looks at each such row in every step, which rows of the target's own vocabulary are spared.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from server.worker.blocks import TokensOf
from value_models.store import TOKENIZER_FILES
from value_models.vocabulary.map import map_file
from value_models.vocabulary.reading import Reader


class Readers:
    """Readers by content: networks that differ in their weights alone share one.

    To make one of a vocabulary of 131,072 takes seconds, of which a single call into its tokenizer
    takes most, and decoding waits. So those of networks that have gone are kept for a while.
    """

    KEPT = 4

    def __init__(self) -> None:
        self._readers: dict[str, Reader] = {}

    def load(self, folder: Path, target_fingerprint: str) -> Reader:
        """Return the reader of the folder's map for the tokenizer with this fingerprint.

        Raises:
            VocabularyError: there is no such map, or it is none of this network's tokenizer.
        """
        digest = hashlib.sha256()
        files = [folder / name for name in TOKENIZER_FILES]
        for file in [*files, map_file(folder, target_fingerprint)]:
            if file.is_file():
                digest.update(f"{file.name} {file.stat().st_size} ".encode())
                digest.update(file.read_bytes())
        key = digest.hexdigest()
        reader = self._readers.pop(key, None) or Reader.load(folder, target_fingerprint)
        self._readers[key] = reader  # the newest last
        for oldest in list(self._readers)[: -self.KEPT]:
            del self._readers[oldest]
        return reader


class Translator:
    """What carries one network to a target of another vocabulary."""

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self._reader = reader
        self._columns = reader.map.columns.to(device)

    def follow(self, tokens: TokensOf) -> "TranslatedRow":
        """Begin to read a row."""
        return TranslatedRow(self._reader, tokens)

    def columns(self, rows: "Sequence[TranslatedRow]") -> torch.Tensor:
        """Return `columns` of `value_models.combine.add_value_logits` for these rows."""
        starts = [row.at_start for row in rows]
        if len(self._columns) == 1 or not any(starts):
            return self._columns[0]
        return self._columns[torch.tensor(starts, dtype=torch.int64)]


class TranslatedRow:
    """One row's history in one network's tokens, for as long as the row is in the batch.

    Attributes:
        ids: the history; grows, and is rewritten behind its first `num_stable` ids.
        num_stable, waiting, at_start: see `value_models.vocabulary.reading.Reading`.
        outgrown: the history is longer than the network reads: the row must end.
    """

    def __init__(self, reader: Reader, tokens: TokensOf) -> None:
        self._reader = reader
        self._target_tokens = tokens
        self.outgrown = False
        self._begin()

    def advance(self, length: int, newest: Callable[[], int]) -> int:
        """Read what is new of the row.

        Args:
            length: tokens of the row's history, in the target's vocabulary.
            newest: returns the last of them, which may not have reached the host otherwise.

        Returns:
            How many leading ids are computed at most: those that are as they were before, and never
            all, since the logits behind the last one are wanted.
        """
        if length <= self._num_read:
            self._begin()  # the history was cut short
        new = self._target_tokens(self._num_read, length)
        if self._num_read + len(new) == length - 1:
            new.append(newest())
        assert self._num_read + len(new) == length, "tokens are missing on the host"
        before, rewritable = self.num_stable, self._rewritable
        reading = self._history.extend(new)
        self._num_read = length
        self.ids, self.num_stable, self.waiting, self.at_start = reading
        self._rewritable = list(self.ids[self.num_stable :])
        kept = before
        for old, now in zip(rewritable, self.ids[before:], strict=False):
            if old != now:
                break
            kept += 1
        return min(kept, len(self.ids) - 1)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the network's tokens from `start` to before `stop`."""
        return list(self.ids[start:stop])

    def _begin(self) -> None:
        self._history = self._reader.follow()
        self._num_read = 0
        self.ids: Sequence[int] = ()
        self.num_stable = 0
        self._rewritable: list[int] = []
        self.waiting = self.at_start = False
