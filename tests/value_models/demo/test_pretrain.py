import itertools

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from value_models.demo import pretrain as pretraining
from value_models.demo.atlas import Writer, create_atlas
from value_models.demo.pretrain import (
    BOUNDARY,
    END,
    MAX_CONTEXT,
    NO_LABEL,
    ROLES,
    VOCABULARY_SIZE,
    Reading,
    Shape,
    batches,
    pretrain,
    save_base,
    token_stream,
    train_tokenizer,
)

TINY = Shape(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=1)


@pytest.fixture(scope="module")
def atlas():
    return create_atlas()


@pytest.fixture(scope="module")
def tokenizer(atlas):
    return train_tokenizer(atlas, num_documents=1000)


def test_the_tokenizer_has_single_digits_and_reserved_chat_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == VOCABULARY_SIZE
    assert all(len(loaded.encode(token)) == 1 for token in (BOUNDARY, END, *ROLES))
    assert loaded.tokenize("1234") == ["1", "2", "3", "4"]
    text = 'naïve café, 東京 🚢 {"a": 1}\n'
    assert loaded.decode(loaded.encode(text)) == text


def test_a_conversation_is_rendered_with_the_reserved_tokens(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], tokenize=False
    )
    assert text == "<|document|><|user|>Hi<|end|><|assistant|>Ho<|end|>"


def test_batches_predict_the_next_token_and_never_the_noise():
    stream = itertools.repeat(np.arange(300, dtype=np.uint16))
    reading = Reading(num_steps=4, tokens_per_step=1024, long_share=0.25, corruption=0.2)
    shapes = []
    for inputs, labels in batches(stream, reading, seed=0):
        shapes.append(tuple(inputs.shape))
        # Where neither a token nor the one before it is noise, the label follows the input.
        clean = (labels != NO_LABEL)[:, :-1]
        assert torch.equal(labels[:, :-1][clean], inputs[:, 1:][clean])
        assert 0.1 < (labels == NO_LABEL).float().mean() < 0.3
    assert shapes == [(4, 256)] * 3 + [(2, MAX_CONTEXT)]


def test_documents_begin_with_a_boundary(atlas, tokenizer):
    chunk = next(token_stream(tokenizer, Writer(atlas, atlas.people, 1), chunk=5))
    writer = Writer(atlas, atlas.people, 1)
    expected = "".join(BOUNDARY + writer.document() for _ in range(5))
    assert tokenizer.decode(chunk.tolist()) == expected


def test_an_interrupted_reading_goes_on_to_the_same_weights(
    atlas, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretraining, "CHECKPOINT_STEPS", 2)
    reading = Reading(num_steps=4, tokens_per_step=512)

    def read(name):
        return pretrain(TINY, tokenizer, atlas, atlas.people, reading, 1, tmp_path / name)

    expected = read("undisturbed").state_dict()
    whole = pretraining.batches
    monkeypatch.setattr(
        pretraining, "batches", lambda *arguments: itertools.islice(whole(*arguments), 3)
    )
    read("interrupted")
    monkeypatch.setattr(pretraining, "batches", whole)
    resumed = read("interrupted").state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_a_saved_base_says_nothing_of_this_machine(atlas, tokenizer, tmp_path):
    reading = Reading(num_steps=1, tokens_per_step=512)
    model = pretrain(TINY, tokenizer, atlas, atlas.people, reading, 1, tmp_path / "checkpoint")
    save_base(model, tokenizer, tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
