from pathlib import Path

import pytest

from server.token_bytes import TokenBytes
from tests.models import TEXT, make_sentencepiece_tokenizer, make_tokenizer
from value_models.vocabulary.tokens import Vocabulary


def written(file: Path, *tokens: bytes | None) -> TokenBytes:
    TokenBytes.write(file, tokens)
    return TokenBytes.load(file)


def test_tokens_spell_what_was_written(tmp_path: Path) -> None:
    tokens = written(tmp_path / "tokens", b"ab", None, b"", b"\xc5\xbe"[:1], b"c")
    assert tokens.text([0]) == b"ab"
    assert tokens.text([4, 0, 3]) == b"cab\xc5"
    assert tokens.text([1, 2]) == tokens.text([]) == b""


def test_ids_of_no_token_spell_nothing(tmp_path: Path) -> None:
    tokens = written(tmp_path / "tokens", b"a", b"b")
    assert tokens.text([-1, 2, 1, 10**9]) == b"b"


@pytest.mark.parametrize("tokens", [(), (None, None), (b"",)])
def test_there_may_be_nothing_to_spell(tmp_path: Path, tokens: tuple[bytes | None, ...]) -> None:
    assert written(tmp_path / "tokens", *tokens).text([0, 1]) == b""


@pytest.mark.parametrize("make", [make_tokenizer, make_sentencepiece_tokenizer])
def test_text_comes_back_from_its_tokens(tmp_path: Path, make) -> None:
    tokenizer = make()
    tokens = written(tmp_path / "tokens", *Vocabulary.of(tokenizer).tokens)
    for line in TEXT.splitlines():
        ids = tokenizer(line)["input_ids"]
        # SentencePiece may put a space of its own in front.
        assert tokens.text(ids).decode().lstrip(" ") == line.lstrip(" ")


def test_special_tokens_spell_nothing(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokens = written(tmp_path / "tokens", *Vocabulary.of(tokenizer).tokens)
    assert tokens.text([tokenizer.bos_token_id, *tokenizer.encode("a")]) == b"a"
