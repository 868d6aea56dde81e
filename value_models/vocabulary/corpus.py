"""Text from files, in pieces of a few thousand characters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from value_models.vocabulary.tokens import VocabularyError

PIECE_CHARACTERS = 4096


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """Read plain text, and the contents of conversations from `.jsonl` files.

    Plain text comes in pieces of whole lines. A line of a `.jsonl` file is an object with
    `messages` (OpenAI) or `conversations` (ShareGPT), or with `text`. Bytes that are no UTF-8 are
    replaced.

    Raises:
        VocabularyError: a file cannot be read; a line of a `.jsonl` file is none of these.
    """
    for file in files:
        try:
            with Path(file).open(encoding="utf-8", errors="replace", newline="") as lines:
                if Path(file).suffix == ".jsonl":
                    for number, line in enumerate(lines, start=1):
                        for text in _contents(line, f"{file}:{number}"):
                            # JSON can spell halves of characters, which no tokenizer reads.
                            yield from _pieces([text.encode(errors="replace").decode()])
                else:
                    yield from _pieces(lines)
        except OSError as error:
            raise VocabularyError(
                f"corpus file {file} cannot be read ({error.strerror or error})"
            ) from error


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    piece = ""
    for line in lines:
        piece += line
        while len(piece) >= 2 * PIECE_CHARACTERS:  # a file may be one long line
            yield piece[:PIECE_CHARACTERS]
            piece = piece[PIECE_CHARACTERS:]
        if len(piece) >= PIECE_CHARACTERS:
            yield piece
            piece = ""
    if piece:
        yield piece


def _contents(line: str, place: str) -> Iterator[str]:
    if not line.strip():
        return
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"{place}: not valid JSON ({error})") from error
    match record:
        case {"text": str(text)}:
            yield text
        case {"messages": [*turns]} | {"conversations": [*turns]}:
            for turn in turns:
                match turn:
                    case {"content": str(text)} | {"value": str(text)}:
                        yield text
        case _:
            raise VocabularyError(f"{place}: neither messages, conversations nor text")
