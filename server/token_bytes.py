"""What each of the target's tokens spells, in a file that workers map into memory.

A worker that ends guidance at a text has to read what is generated. To load a tokenizer there
would take seconds of decoding; the command line, which has one, writes this file.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


class TokenBytes:
    """The bytes of each token id; special tokens and unused ids spell nothing."""

    def __init__(self, ends: np.ndarray, spelling: np.ndarray) -> None:
        """
        Args:
            ends: int64 `[num_tokens]`, where each token's bytes end; they begin where those of the
                token before end.
            spelling: uint8 `[num_bytes]`, of all tokens one after the other.
        """
        self._ends = ends
        self._spelling = spelling

    @staticmethod
    def write(file: Path, tokens: Sequence[bytes | None]) -> None:
        """Write `value_models.vocabulary.tokens.Vocabulary.tokens`."""
        ends = np.cumsum([len(token or b"") for token in tokens], dtype="<i8")
        with file.open("wb") as out:
            out.write(np.array([len(tokens)], dtype="<i8").tobytes())
            out.write(ends.tobytes())
            out.write(b"".join(token or b"" for token in tokens))

    @classmethod
    def load(cls, file: Path) -> "TokenBytes":
        """Map what `write` wrote."""
        (num_tokens,) = np.fromfile(file, dtype="<i8", count=1).tolist()
        ends = np.memmap(file, dtype="<i8", mode="r", offset=8, shape=(num_tokens,))
        if not len(ends) or not ends[-1]:
            return cls(ends, np.zeros(0, dtype=np.uint8))
        return cls(ends, np.memmap(file, dtype=np.uint8, mode="r", offset=8 + ends.nbytes))

    def text(self, token_ids: Iterable[int]) -> bytes:
        """Return what these ids spell; ids that no tokenizer has spell nothing."""
        parts = []
        for token_id in token_ids:
            if 0 <= token_id < len(self._ends):
                start = int(self._ends[token_id - 1]) if token_id else 0
                parts.append(self._spelling[start : int(self._ends[token_id])].tobytes())
        return b"".join(parts)
