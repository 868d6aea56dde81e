"""A network's tokenizer for runs of plain text, and where a growing run can be cut for good."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from value_models.vocabulary.tokens import SPACE_MARK, components, dummy_space

KEPT_CHARACTERS = 24
KEPT_WORDS = 2
WORTH_CUTTING = 48
"""Characters from which on a cut is looked for: retokenizing fewer costs less than finding one."""

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARKED = r"[^\r\n\p{L}\p{N}]?"
_LOCAL_PATTERNS = frozenset(
    "|".join(alternatives)
    for words in (
        (rf"(?i:{_CONTRACTIONS})", rf"{_MARKED}\p{{L}}+"),  # GPT-4, Llama 3, Qwen
        (f"{_MARKED}{_UPPER}*{_LOWER}+", f"{_MARKED}{_UPPER}+{_LOWER}*"),  # Tekken
        (  # GPT-4o
            f"{_MARKED}{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?",
            f"{_MARKED}{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?",
        ),
    )
    for digits in (r"\p{N}", r"\p{N}{1,3}")
    for newlines in (r"[\r\n]*", r"[\r\n/]*")
    for alternatives in [
        (*words, digits, rf" ?[^\s\p{{L}}\p{{N}}]+{newlines}", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
    ]
) | {_CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}  # GPT-2


class Cut(NamedTuple):
    """Where a growing run can be cut: whatever follows, what lies before stays as it is."""

    characters: int
    tokens: int


class TextTokenizer:
    """Encodes runs of plain text as a network's tokenizer would.

    Text that spells a special token stays text, and no special token is added. A run is *spaced*
    if the tokenizer would put its dummy space before it.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a Hugging Face fast tokenizer, or the `tokenizers.Tokenizer` inside."""
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        layout = json.loads(backend.to_str())
        _keep_to_text(layout)
        self.dummy_space = dummy_space(layout)
        self._spaced = self._plain = _load(layout)
        if self.dummy_space != "never":
            _remove_dummy_space(layout)
            self._plain = _load(layout)
        self._margin = max((len(token["content"]) for token in _found_in_text(layout)), default=0)
        self._by_words = _is_local_by_words(layout, self.dummy_space)
        self._joined = (
            _joined_characters(layout)
            if _is_local_by_characters(layout, self.dummy_space)
            else None
        )
        self._composes = any(part["type"] == "NFC" for part in components(layout["normalizer"]))

    def encode(self, text: str, spaced: bool = False) -> Encoding:
        """Encode a run, or what stands behind a cut of one (never `spaced`)."""
        tokenizer = self._spaced if spaced else self._plain
        return tokenizer.encode(text, add_special_tokens=False)

    def cut(self, text: str, encoding: Encoding, spaced: bool = False) -> Cut | None:
        """Find the last place where a run that may still grow can be cut, if there is one.

        Two arguments make a cut sound, whatever text follows; tokenizers that neither covers are
        never cut, and their runs are encoded whole each time.

        *Between characters*, for BPE over whole text (SentencePiece): no token holds the two
        characters beside the cut next to each other, so no merge can ever cross it, and merges on
        one side do not see the other.

        *Between words*, where a regular expression of a known form splits text before BPE: it
        matches from left to right without looking back, so what follows a boundary does not
        depend on what precedes it. It looks ahead no further than the end of a run of letters,
        digits, spaces or other characters, and a few characters more; a boundary with two words
        behind it is out of that reach.
        """
        if self._joined is not None:
            spaces = text.replace(SPACE_MARK, " ")
            for end in range(len(text) - 1, 0, -1):
                if spaces[end - 1 : end + 1] not in self._joined:
                    return Cut(end, len(self.encode(text[:end], spaced).ids))
        elif self._by_words:
            words = 0
            settled = len(text) - self._margin
            for start, end, first in _words_backwards(encoding):
                if words >= KEPT_WORDS and len(text) - end >= KEPT_CHARACTERS:
                    break
                words += end <= settled and any(map(str.isalnum, text[start:end]))
                if (
                    words >= KEPT_WORDS
                    and 0 < start <= len(text) - KEPT_CHARACTERS
                    and (not self._composes or _stays_apart(text[start]))
                ):
                    return Cut(start, first)
        return None


def _words_backwards(encoding: Encoding) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, index of the first token) of each pre-token, the last one first."""
    words, offsets = encoding.word_ids, encoding.offsets
    last = len(words) - 1
    for index in range(last, -1, -1):
        if index == 0 or words[index - 1] != words[index]:
            yield offsets[index][0], offsets[last][1], index
            last = index - 1


def _stays_apart(character: str) -> bool:
    """Whether NFC never joins a character to what stands before it.

    It joins marks and the vowels and final consonants of decomposed Hangul. Beyond the scripts
    known here the answer is no, which is always safe.
    """
    return (
        ord(character) < 0xD7A4
        and not 0x1100 <= ord(character) <= 0x11FF
        and not unicodedata.category(character).startswith("M")
    )


def _load(layout: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _keep_to_text(layout: dict[str, Any]) -> None:
    """Make a tokenizer.json that never finds special tokens, and adds, cuts and pads nothing.

    `encode_special_tokens` alone is not enough: special tokens are entries of the model's
    vocabulary too, and merges may lead to them. So they are renamed to what no merge makes.
    """
    layout.update(post_processor=None, truncation=None, padding=None)
    names = {
        token["content"]: f"\ufffe{token['id']}\uffff"
        for token in layout["added_tokens"]
        if token["special"]
    }
    for token in layout["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = layout["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        return
    model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if not names.keys() & {left, right, left + right}
        ]


def _remove_dummy_space(layout: dict[str, Any]) -> None:
    for part in components(layout["pre_tokenizer"]):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    normalizer = layout["normalizer"]
    if normalizer is not None:
        kept = [part for part in components(normalizer) if part["type"] != "Prepend"]
        layout["normalizer"] = {"type": "Sequence", "normalizers": kept}


def _found_in_text(layout: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens that are not special: they are found in text before anything else happens."""
    return [token for token in layout["added_tokens"] if not token["special"]]


def _is_simple_bpe(layout: dict[str, Any], scheme: str) -> bool:
    model = layout["model"]
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in _found_in_text(layout)
        )
        # Such a token would begin a piece of text, with a dummy space of its own.
        and (scheme != "each" or not _found_in_text(layout))
    )


def _is_local_by_words(layout: dict[str, Any], scheme: str) -> bool:
    if not _is_simple_bpe(layout, scheme):
        return False
    if any(part["type"] != "NFC" for part in components(layout["normalizer"])):
        return False
    match list(components(layout["pre_tokenizer"])):
        case [{"type": "ByteLevel", "use_regex": True}]:
            return True
        case [{"type": "Digits"}, {"type": "ByteLevel", "use_regex": True}]:
            return scheme == "never"
        case [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "use_regex": False},
        ]:
            return scheme == "never" and pattern in _LOCAL_PATTERNS
    return False


def _is_local_by_characters(layout: dict[str, Any], scheme: str) -> bool:
    model = layout["model"]
    if not _is_simple_bpe(layout, scheme) or model.get("ignore_merges"):
        return False
    for part in components(layout["normalizer"]):
        match part:
            case {"type": "Prepend", "prepend": mark} if mark == SPACE_MARK:
                continue
            case {"type": "Replace", "pattern": {"String": " "}, "content": mark} if (
                mark == SPACE_MARK
            ):
                continue
        return False
    for part in components(layout["pre_tokenizer"]):
        match part:
            case {"type": "Metaspace", "replacement": mark} if mark == SPACE_MARK:
                continue
            case {"type": "Split", "pattern": {"String": character}} if len(character) == 1:
                continue
        return False
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    # Unknown characters side by side may become one token; with byte fallback there are none.
    return bool(model["byte_fallback"]) and (
        byte_tokens <= model["vocab"].keys()
        and not any(byte_tokens & {left, right} for left, right in model["merges"])
    )


def _joined_characters(layout: dict[str, Any]) -> frozenset[str]:
    """All pairs of characters that stand next to each other in some token."""
    tokens = (*layout["model"]["vocab"], *(token["content"] for token in layout["added_tokens"]))
    return frozenset(
        left + right for token in tokens for left, right in pairwise(token.replace(SPACE_MARK, " "))
    )
