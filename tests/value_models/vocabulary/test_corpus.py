"""Text from files, and what is no text."""

import json

import pytest

from value_models.vocabulary.corpus import PIECE_CHARACTERS, read_texts
from value_models.vocabulary.tokens import VocabularyError


def test_plain_text_comes_in_pieces_of_whole_lines(tmp_path) -> None:
    file = tmp_path / "a.txt"
    text = "".join(f"line {number}: 東京\r\n" for number in range(2000)) + "x" * 20_000
    file.write_bytes(text.encode() + b"\xff")
    pieces = list(read_texts([file]))
    assert "".join(pieces) == text + "\ufffd"
    assert all(len(piece) <= 2 * PIECE_CHARACTERS for piece in pieces)
    assert pieces[0].endswith("\n") and len(pieces) > 3


def test_conversations_come_as_their_contents(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    records = [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": None}]},
        {"conversations": [{"from": "human", "value": "Where?"}]},
        {"text": "There."},
    ]
    file.write_text("\n\n".join(map(json.dumps, records)))
    assert list(read_texts([file])) == ["Who?", "Where?", "There."]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"messages": 1}', "[" * 100_000])
def test_a_bad_line_is_named(tmp_path, line) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(VocabularyError) as caught:
        list(read_texts([file]))
    assert f"{file}:2:" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    for file in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(VocabularyError, match="cannot be read"):
            list(read_texts([file]))


def test_halves_of_characters_are_replaced(tmp_path) -> None:
    file = tmp_path / "halves.jsonl"
    file.write_text('{"text": "a\\ud800b"}\n')
    assert list(read_texts([file])) == ["a?b"]
