"""The bytes behind a tokenizer's ids.

Two vocabularies meet in bytes: that is all that a token of one has in common with a token of the
other. Known are the two families that language models use: byte-level BPE (GPT-2's table of
characters for bytes; Llama 3, Qwen, Tekken) and SentencePiece-style BPE or Unigram (a "▁" for each
space, "<0xAB>" for bytes without a token of their own; Llama 2, Gemma, Mistral).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from value_models.manifest import tokenizer_fingerprint

DummySpace = Literal["never", "first", "each"]
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SENTENCEPIECE_FILE = re.compile(r"\.model(\.v\d+(m\d+)?)?$")
SPACE_MARK = "▁"
NORMAL_PIECE, UNKNOWN_PIECE, CONTROL_PIECE = 1, 2, 3  # in sentencepiece_model.proto
BPE_MODEL = 2


class VocabularyError(ValueError):
    """A tokenizer, map or corpus that cannot be used: which one, what is wrong, what to do."""


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's ids stand for."""

    fingerprint: str
    """`value_models.manifest.tokenizer_fingerprint`."""
    tokens: tuple[bytes | None, ...]
    """By id; None for special tokens and unused ids."""
    specials: dict[int, str]
    """The special tokens' spelling, by id."""
    byte_tokens: frozenset[int]
    """SentencePiece's tokens for single bytes, with which it spells what has no token."""
    dummy_space: DummySpace
    """Where the tokenizer puts a space of its own: nowhere, at the start of the whole input only
    (Metaspace "first"), or before each run of text behind a special token (legacy Llama)."""
    prefix: tuple[int, ...]
    """The ids that it puts in front of plain text by itself: usually BOS or nothing."""
    bos: int | None
    eos: int | None
    tokenizer: Any
    """The Hugging Face fast tokenizer; its chat template is used when vocabularies are aligned."""

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Read the vocabulary of a loaded Hugging Face fast tokenizer.

        Raises:
            VocabularyError: it is not fast, or of neither family.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise VocabularyError(
                f"{type(tokenizer).__name__} is no fast tokenizer; use one with a tokenizer.json"
            )
        layout = json.loads(backend.to_str())
        added = {entry["id"]: entry for entry in layout["added_tokens"]}
        specials = {i: str(entry["content"]) for i, entry in added.items() if entry["special"]}
        byte_level = _is_byte_level(layout)
        if not byte_level and not _is_sentencepiece(layout):
            raise VocabularyError(
                f"{type(tokenizer).__name__} is neither a byte-level nor a SentencePiece-style "
                "vocabulary; only those can be turned into bytes"
            )
        vocabulary = backend.get_vocab(with_added_tokens=True)
        tokens: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            if token_id in specials:
                continue
            if byte_level:
                tokens[token_id] = token.encode() if token_id in added else _byte_level_token(token)
            else:
                tokens[token_id] = _sentencepiece_token(token)
        prefix = tuple(tokenizer("")["input_ids"])
        # A tokenizer that ends each text with EOS says so here too; that is no prefix.
        if prefix and prefix[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            prefix = prefix[:-1]
        return cls(
            fingerprint=tokenizer_fingerprint(tokenizer),
            tokens=tuple(tokens),
            specials=specials,
            byte_tokens=frozenset(
                token_id
                for token, token_id in vocabulary.items()
                if not byte_level and BYTE_TOKEN.fullmatch(token)
            ),
            dummy_space=dummy_space(layout),
            prefix=prefix,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            tokenizer=tokenizer,
        )


def load_vocabulary(where: str | Path) -> Vocabulary:
    """Load a vocabulary.

    Args:
        where: a folder or hub name that holds a Hugging Face fast tokenizer, or a file of
            mistral_common's: SentencePiece (`tokenizer.model.v3`) or Tekken (`tekken_*.json`).

    Raises:
        VocabularyError: there is none, or it cannot be turned into bytes.
    """
    return Vocabulary.of(load_tokenizer(where))


def load_tokenizer(where: str | Path, revision: str | None = None) -> Any:
    """Load the Hugging Face fast tokenizer that `load_vocabulary` describes.

    Everything that compares a target's tokenizer with a network's loads it here: transformers knows
    several tokenizers for a folder that also holds mistral_common's files, with other fingerprints.

    Raises:
        VocabularyError: there is none.
    """
    path = Path(where)
    try:
        if path.is_file():
            sentencepiece = SENTENCEPIECE_FILE.search(path.name)
            return _from_sentencepiece(path) if sentencepiece else _from_tekken(path)
        return _from_pretrained(where, revision=revision or "main", local_files_only=path.is_dir())
    except VocabularyError:
        raise
    except Exception as error:  # every format fails in its own way
        reason = " ".join(str(error).split())[:200]
        raise VocabularyError(
            f"no tokenizer can be loaded from {where} ({type(error).__name__}: {reason}); name a "
            "model folder, a model on the hub or a tokenizer file"
        ) from error


def _from_pretrained(where: str | Path, **source: Any) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **source)
    if hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer
    # Beside a tekken.json transformers prefers mistral_common's own class, which is not fast.
    if cached_file(where, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **source):
        return AutoTokenizer.from_pretrained(
            where, trust_remote_code=False, mistral_format=False, **source
        )
    tekken = cached_file(
        where, "tekken.json", _raise_exceptions_for_missing_entries=False, **source
    )
    return _from_tekken(Path(tekken)) if tekken else tokenizer


def _from_tekken(file: Path) -> Any:
    from transformers.integrations.mistral import convert_tekken_tokenizer

    return convert_tekken_tokenizer(str(file))


def components(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normalizer, pre-tokenizer or decoder of a tokenizer.json in order."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for key in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(key, ()):
            yield from components(inner)


def dummy_space(layout: dict[str, Any]) -> DummySpace:
    """Say where the tokenizer of this tokenizer.json puts a space of its own."""
    found: DummySpace = "never"
    for part in (*components(layout["normalizer"]), *components(layout["pre_tokenizer"])):
        match part:
            case {"type": "Prepend"} | {"type": "ByteLevel", "add_prefix_space": True}:
                return "each"
            case {"type": "Metaspace", "prepend_scheme": "always"}:
                return "each"
            case {"type": "Metaspace", "prepend_scheme": "first"}:
                found = "first"
    return found


def _is_byte_level(layout: dict[str, Any]) -> bool:
    parts = (*components(layout["pre_tokenizer"]), *components(layout["decoder"]))
    return any(part["type"] == "ByteLevel" for part in parts)


def _is_sentencepiece(layout: dict[str, Any]) -> bool:
    parts = (
        *components(layout["normalizer"]),
        *components(layout["pre_tokenizer"]),
        *components(layout["decoder"]),
    )
    return layout["model"]["type"] in ("BPE", "Unigram") and any(
        part["type"] in ("Metaspace", "ByteFallback")
        or (part["type"] == "Replace" and SPACE_MARK in str(part))
        for part in parts
    )


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 is itself, other bytes are the characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = sorted(set(range(256)) - printable)
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


def _byte_level_token(token: str) -> bytes:
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:  # spelled outside the table, which the decoder then takes literally
        return token.encode()


def _sentencepiece_token(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    if byte:
        return bytes([int(byte[1], 16)])
    return token.replace(SPACE_MARK, " ").encode()


def _from_sentencepiece(file: Path) -> Any:
    """Convert a SentencePiece BPE model as mistral_common uses it: a dummy space before each run.

    Nothing is read from text but text, as there: control tokens have to be put in as ids.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

    proto = SentencePieceExtractor(str(file)).proto
    settings = proto.trainer_spec
    if settings.model_type != BPE_MODEL or not settings.byte_fallback:
        raise VocabularyError(f"{file} is no SentencePiece BPE model with byte fallback")
    if proto.normalizer_spec.precompiled_charsmap:
        raise VocabularyError(f"{file} normalizes text, which would change its bytes")
    pieces = [(piece.piece, piece.type) for piece in proto.pieces]
    vocabulary = {piece: token_id for token_id, (piece, _) in enumerate(pieces)}
    merges = generate_merges(
        vocabulary,
        {piece.piece: piece.score for piece in proto.pieces},
        skip_tokens=[piece for piece, kind in pieces if kind != NORMAL_PIECE],
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token=settings.unk_piece, fuse_unk=True, byte_fallback=True
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(SPACE_MARK))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(piece, normalized=False, special=True)
            for piece, kind in pieces
            if kind in (UNKNOWN_PIECE, CONTROL_PIECE)
        ]
    )
    bos, eos = settings.bos_piece, settings.eos_piece
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=settings.unk_piece,
        clean_up_tokenization_spaces=False,
    )
