"""Reading a target's history in a network's own tokens.

The target's ids become a stream of bytes and special tokens; chat structure is replaced by the
network's own (`structure`), and each run of text between special tokens is encoded by the
network's tokenizer. `Reader.read` does so for a whole sequence and is the definition.
`TextHistory` grows by a few tokens at a time and gives the same, redoing only the end of the run.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from value_models.manifest import tokenizer_fingerprint
from value_models.vocabulary.map import VocabularyMap, map_file
from value_models.vocabulary.stream import (
    START,
    StreamWriter,
    as_characters,
    is_special,
    next_special,
)
from value_models.vocabulary.structure import Structure
from value_models.vocabulary.text import WORTH_CUTTING, TextTokenizer
from value_models.vocabulary.tokens import VocabularyError, load_tokenizer


class Reading(NamedTuple):
    """A target's history as a network sees it."""

    ids: Sequence[int]
    """In the network's own tokens; never empty: a placeholder (its BOS, EOS or id 0) stands for
    nothing."""
    num_stable: int
    """Leading ids that no further target token can change: a lower bound."""
    waiting: bool
    """The history ends within a character, or within what may become a turn marker: the network
    has no opinion on the next token."""
    at_start: bool
    """`VocabularyMap.columns[-1]` holds for the next token instead of `columns[0]`."""


class Reader:
    """Reads for one network and one target vocabulary. Immutable; shared by all histories."""

    def __init__(self, vocabulary_map: VocabularyMap, tokenizer: Any) -> None:
        """`tokenizer`: the network's Hugging Face fast tokenizer, or its `tokenizers.Tokenizer`."""
        self.map = vocabulary_map
        self.tokens = as_characters(vocabulary_map.tokens)
        self.text = TextTokenizer(tokenizer)
        self.structure = Structure(vocabulary_map.structure)
        self.plain_starts = vocabulary_map.plain_starts

    @classmethod
    def load(cls, network_folder: Path, target_fingerprint: str) -> Reader:
        """Load the map and the tokenizer from a network's folder.

        Raises:
            VocabularyError: there is no map for this target, it is not sound, or it was made for
                another tokenizer than the folder's.
        """
        file = map_file(network_folder, target_fingerprint)
        if not file.is_file():
            raise VocabularyError(
                f"{network_folder} has no map for tokenizer {target_fingerprint[:15]}...; "
                "run `trimtab align`"
            )
        vocabulary_map = VocabularyMap.load(file)
        tokenizer = load_tokenizer(network_folder)
        if vocabulary_map.target_fingerprint != target_fingerprint or (
            vocabulary_map.value_fingerprint != tokenizer_fingerprint(tokenizer)
        ):
            raise VocabularyError(
                f"{file.name} was made for other tokenizers; run `trimtab align` again"
            )
        return cls(vocabulary_map, tokenizer)

    def follow(self) -> TextHistory:
        """Begin a history that grows."""
        return TextHistory(self)

    def read(self, target_ids: Sequence[int]) -> Reading:
        """Read a whole sequence of target ids. Any ids are read, in any order."""
        stream = self.new_stream()
        symbols = START + stream.write(target_ids)
        ids: list[int] = []
        text = role = ""
        first, waiting = True, False
        position = 0
        while position < len(symbols) and not waiting:
            if not is_special(symbols[position]):
                end = next_special(symbols, position)
                decoder = _new_decoder()
                content = symbols[position:end].encode("latin-1")
                text += decoder.decode(content, final=end < len(symbols))
                waiting = _is_within_character(decoder)
                position = end
            elif rule := self.structure.match(symbols, position, role):
                for part in rule.output:
                    if isinstance(part, str):
                        text += part
                        continue
                    ids += [*self.text.encode(text, self.is_spaced(first)).ids, part]
                    text = ""
                    first = first and rule.pattern in self.plain_starts
                role = rule.after or role
                position += len(rule.pattern)
            else:
                waiting = True
        num_stable = len(ids)
        spaced = self.is_spaced(first)
        ids += self.text.encode(text, spaced).ids
        return Reading(
            ids or [self.map.placeholder],
            num_stable,
            waiting,
            not waiting and self.is_shifted(stream.spaced, spaced and not text),
        )

    def new_stream(self) -> StreamWriter:
        """What turns the target's ids into symbols, from the first one on."""
        return StreamWriter(self.tokens, self.map.dummy_space, self.map.prefix)

    def is_spaced(self, first: bool) -> bool:
        """Whether the network's tokenizer puts a dummy space before a run.

        `first`: nothing comes before the run but what the tokenizer itself puts before plain text.
        """
        scheme = self.text.dummy_space
        return scheme == "each" or (scheme == "first" and first)

    def is_shifted(self, target_spaced: bool, value_spaced: bool) -> bool:
        """Whether the columns of a run's start hold, by who would put a dummy space here."""
        if self.map.shift == "strip":
            return target_spaced and not value_spaced
        return self.map.shift == "add" and value_spaced and not target_spaced


class TextHistory:
    """One row's growing history; only the end of the open run of text is ever redone."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._stream = reader.new_stream()
        self._pending = START
        """Symbols that may yet become a longer turn marker."""
        self._decoder = _new_decoder()
        self._ids: list[int] = []
        self._num_stable = 0
        self._text = ""
        """What the ids from `_num_stable` on stand for."""
        self._role = ""
        self._first = True
        self._spaced = reader.is_spaced(first=True)

    def extend(self, target_ids: Sequence[int]) -> Reading:
        """Append the target's next ids, and read all so far.

        The list of ids that comes back is this history's own and changes with the next call.
        """
        symbols = self._pending + self._stream.write(target_ids)
        self._pending = ""
        position = 0
        grown = False
        while position < len(symbols):
            if not is_special(symbols[position]):
                end = next_special(symbols, position)
                self._text += self._decoder.decode(symbols[position:end].encode("latin-1"))
                grown = True
                position = end
                continue
            if _is_within_character(self._decoder):
                self._text += self._decoder.decode(b"", final=True)
                grown = True
            if rule := self._reader.structure.match(symbols, position, self._role):
                for part in rule.output:
                    if isinstance(part, str):
                        self._text += part
                        grown = True
                    else:
                        self._end_run(part, rule.pattern)
                self._role = rule.after or self._role
                position += len(rule.pattern)
            else:
                self._pending = symbols[position:]
                break
        if grown:
            self._encode()
        waiting = bool(self._pending) or _is_within_character(self._decoder)
        empty = not self._text
        return Reading(
            self._ids or [self._reader.map.placeholder],
            self._num_stable,
            waiting,
            not waiting and self._reader.is_shifted(self._stream.spaced, self._spaced and empty),
        )

    def _end_run(self, special_id: int, pattern: str) -> None:
        del self._ids[self._num_stable :]
        self._ids += [*self._reader.text.encode(self._text, self._spaced).ids, special_id]
        self._num_stable = len(self._ids)
        self._text = ""
        self._first = self._first and pattern in self._reader.plain_starts
        self._spaced = self._reader.is_spaced(self._first)

    def _encode(self) -> None:
        del self._ids[self._num_stable :]
        encoding = self._reader.text.encode(self._text, self._spaced)
        self._ids += encoding.ids
        if len(self._text) < WORTH_CUTTING:
            return
        cut = self._reader.text.cut(self._text, encoding, self._spaced)
        if cut:
            self._text = self._text[cut.characters :]
            self._num_stable += cut.tokens
            self._spaced = False


def _new_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _is_within_character(decoder: codecs.IncrementalDecoder) -> bool:
    return bool(decoder.getstate()[0])
