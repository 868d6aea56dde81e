"""Runs of text: encoded as the tokenizer would, and cut only where the cut holds."""

import json
import random

import pytest

from tests.value_models.vocabulary.tokenizers import MAKERS, random_text, tokenizer
from value_models.vocabulary.text import TextTokenizer

CUTTABLE = [name for name in MAKERS if name not in ("unigram", "unknown pattern")]


@pytest.mark.parametrize("name", MAKERS)
def test_text_is_encoded_as_the_tokenizer_does(name: str) -> None:
    own = tokenizer(name).backend_tokenizer
    text = TextTokenizer(tokenizer(name))
    for seed in range(20):
        run = random_text(random.Random(seed), 30)
        for marker in tokenizer(name).all_special_tokens:
            run = run.replace(marker, "")
        spaced = text.dummy_space != "never"
        assert text.encode(run, spaced).ids == own.encode(run, add_special_tokens=False).ids


@pytest.mark.parametrize("name", CUTTABLE)
def test_a_cut_holds_whatever_follows(name: str) -> None:
    text = TextTokenizer(tokenizer(name))
    cuts = 0
    for seed in range(60):
        chance = random.Random(f"{name} {seed}")
        run, more = random_text(chance, 40), random_text(chance, 10)
        run = run[: chance.randint(30, 200)]
        spaced = chance.random() < 0.5
        encoding = text.encode(run, spaced)
        cut = text.cut(run, encoding, spaced)
        if cut is None:
            continue
        cuts += 1
        kept = encoding.ids[: cut.tokens]
        for end in range(len(more) + 1):
            whole = text.encode(run + more[:end], spaced).ids
            assert whole == kept + text.encode((run + more[:end])[cut.characters :]).ids
    assert cuts > 30


def test_what_may_become_an_added_token_is_not_cut() -> None:
    """Such tokens are found in text before words are, and may be long."""
    text = TextTokenizer(tokenizer("qwen"))
    run, more = "on and on  <a call of a tool of a long na", "me that cuts text> and on"
    cut = text.cut(run, text.encode(run))
    assert cut is None or cut.characters < run.index("  <")
    whole = text.encode(run + more)
    assert "<a call of a tool of a long name that cuts text>" in whole.tokens


@pytest.mark.parametrize("name", ["unigram", "unknown pattern"])
def test_what_no_argument_covers_is_never_cut(name: str) -> None:
    text = TextTokenizer(tokenizer(name))
    run = "plain words that go on and on, " * 20
    assert text.cut(run, text.encode(run)) is None


def test_words_that_look_ahead_are_never_cut() -> None:
    """A pattern is known in full or not at all."""
    for name in ("llama3", "tekken"):
        backend = tokenizer(name).backend_tokenizer
        layout = backend.to_str()
        changed = type(backend).from_str(layout.replace(r"|\\s+(?!\\S)", r"|\\s+(?=\\p{L}+!)"))
        assert changed.to_str() != layout
        text = TextTokenizer(changed)
        run = "plain words that go on and on, " * 20
        assert text.cut(run, text.encode(run)) is None


@pytest.mark.parametrize("name", ["llama3", "sentencepiece legacy", "qwen"])
def test_special_tokens_are_never_found(name: str) -> None:
    text = TextTokenizer(tokenizer(name))
    specials = set(tokenizer(name).all_special_ids)
    for spelled in tokenizer(name).all_special_tokens:
        assert not specials & set(text.encode(f"a {spelled} b{spelled}").ids)


def test_merges_that_lead_to_a_special_token_are_left_out() -> None:
    """As converted SentencePiece models have them: "</" and "s>" make the special token."""
    backend = tokenizer("sentencepiece never").backend_tokenizer
    layout = json.loads(backend.to_str())
    vocabulary = layout["model"]["vocab"]
    for token in ("<", "/", "s", ">", "</", "s>"):
        vocabulary.setdefault(token, len(vocabulary))
    layout["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    backend = type(backend).from_str(json.dumps(layout))
    backend.encode_special_tokens = True
    end = backend.token_to_id("</s>")
    assert end in backend.encode("</s>", add_special_tokens=False).ids
    assert end not in TextTokenizer(backend).encode("</s>").ids
