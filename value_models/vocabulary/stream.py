"""A history as a stream of symbols: the bytes of text, and special tokens.

A stream is a `str`, so that searching and comparing are the standard library's business: a byte is
the character of that number, a special token with id `i` is character `256 + i`, and `START`
stands before everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from value_models.vocabulary.tokens import DummySpace

NUM_BYTES = 256
START = chr(0x10FFFF)
UNKNOWN_SPECIAL = chr(0x10FFFE)
_SPECIAL = re.compile("[\u0100-\U0010ffff]")


def special(token_id: int) -> str:
    """The symbol of a special token. Ids out of any vocabulary share one."""
    symbol = NUM_BYTES + token_id
    return chr(symbol) if NUM_BYTES <= symbol < ord(UNKNOWN_SPECIAL) else UNKNOWN_SPECIAL


def special_id(symbol: str) -> int:
    """The id of a special token's symbol."""
    return ord(symbol) - NUM_BYTES


def is_special(symbol: str) -> bool:
    """Whether a symbol is a special token or the start, and no byte."""
    return ord(symbol) >= NUM_BYTES


def next_special(stream: str, position: int = 0) -> int:
    """Where the next special symbol stands; the stream's length if there is none."""
    found = _SPECIAL.search(stream, position)
    return found.start() if found else len(stream)


class StreamWriter:
    """Turns ids into symbols, less the dummy spaces that their tokenizer puts in."""

    def __init__(
        self, tokens: Sequence[str | None], dummy_space: DummySpace, prefix: Iterable[int]
    ) -> None:
        """
        Args:
            tokens: by id: the token's bytes, one character each; None: special or unused.
            dummy_space: where the tokenizer puts a space of its own.
            prefix: special tokens behind which text still counts as the start of the input.
        """
        self._tokens = tokens
        self._dummy_space = dummy_space
        self._prefix = list(prefix)
        self.spaced = dummy_space != "never"
        """The next token begins a run before which the tokenizer would put its dummy space."""

    def write(self, ids: Iterable[int]) -> str:
        """Return the symbols of the next ids."""
        symbols = []
        for token_id in ids:
            token = self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None
            if token is None:
                symbols.append(special(token_id))
                self.spaced = self._dummy_space == "each" or (
                    self._dummy_space == "first" and self._is_prefix(token_id)
                )
            elif self.spaced and token:
                symbols.append(token.removeprefix(" "))
                self.spaced = False
                self._prefix.clear()
            else:
                symbols.append(token)
        return "".join(symbols)

    def _is_prefix(self, token_id: int) -> bool:
        if self._prefix and self._prefix[0] == token_id:
            del self._prefix[0]
            return True
        self._prefix.clear()
        return False


def as_characters(tokens: Iterable[bytes | None]) -> list[str | None]:
    """Spell tokens as `StreamWriter` wants them."""
    return [None if token is None else token.decode("latin-1") for token in tokens]
