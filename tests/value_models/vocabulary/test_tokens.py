"""The bytes behind ids, for each known family, against the tokenizers' own encoding."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.value_models.vocabulary.tokenizers import MAKERS, MORE_TEXT, mistral_file, tokenizer
from value_models.manifest import tokenizer_fingerprint
from value_models.vocabulary.tokens import Vocabulary, VocabularyError, load_vocabulary

TEXT = MORE_TEXT + "  <|im_end|> </s> <0x41> \U0001fae8 \x00\u200b"


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("qwen", "unigram")])
def test_tokens_spell_the_text(name: str) -> None:
    vocabulary = Vocabulary.of(tokenizer(name))
    ids = vocabulary.tokenizer("x" + TEXT.replace("<|im_end|>", "").replace("</s>", ""))[
        "input_ids"
    ]
    assert ids[: len(vocabulary.prefix)] == list(vocabulary.prefix)
    spelled = b"".join(vocabulary.tokens[i] for i in ids[len(vocabulary.prefix) :])
    dummy = b" " if vocabulary.dummy_space != "never" else b""
    text = "x" + TEXT.replace("<|im_end|>", "").replace("</s>", "")
    assert spelled == dummy + text.encode()


def test_every_id_is_a_token_or_special() -> None:
    for name in MAKERS:
        vocabulary = Vocabulary.of(tokenizer(name))
        assert len(vocabulary.tokens) == len(vocabulary.tokenizer)
        specials = {i for i, token in enumerate(vocabulary.tokens) if token is None}
        assert specials == set(vocabulary.specials)
        assert vocabulary.fingerprint == tokenizer_fingerprint(vocabulary.tokenizer)


def test_added_tokens_that_are_not_special_are_text() -> None:
    vocabulary = Vocabulary.of(tokenizer("qwen"))
    assert b"<tool_call>" in vocabulary.tokens
    assert "<tool_call>" not in vocabulary.specials.values()


@pytest.mark.parametrize(
    ("name", "dummy_space"),
    [
        ("llama3", "never"),
        ("gpt2 with a prefix space", "each"),
        ("sentencepiece legacy", "each"),
        ("sentencepiece always", "each"),
        ("sentencepiece first", "first"),
        ("sentencepiece never", "never"),
    ],
)
def test_dummy_spaces(name: str, dummy_space: str) -> None:
    assert Vocabulary.of(tokenizer(name)).dummy_space == dummy_space


def test_byte_tokens_are_told_from_tokens_of_one_byte() -> None:
    vocabulary = Vocabulary.of(tokenizer("sentencepiece first"))
    byte = vocabulary.tokenizer.convert_tokens_to_ids("<0x41>")
    letter = vocabulary.tokenizer.convert_tokens_to_ids("A")
    assert vocabulary.tokens[byte] == vocabulary.tokens[letter] == b"A"
    assert len(vocabulary.byte_tokens) == 256
    assert byte in vocabulary.byte_tokens and letter not in vocabulary.byte_tokens


def test_an_eos_that_ends_each_text_is_no_prefix() -> None:
    layout = json.loads(tokenizer("gpt2").backend_tokenizer.to_str())
    layout["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    ending = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(layout)), eos_token="<|endoftext|>"
    )
    assert ending("")["input_ids"] == [0]
    assert Vocabulary.of(ending).prefix == ()


def test_another_family_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(VocabularyError, match="neither a byte-level nor a SentencePiece-style"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"vocab": 1}', "\x00\xff"])
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, content) -> None:
    file = tmp_path / "tekken.json"
    folder = tmp_path / "folder"
    folder.mkdir()
    for where in (file, tmp_path / "tokenizer.model.v3", folder):
        if content is not None and where is not folder:
            where.write_text(content)
        with pytest.raises(VocabularyError) as caught:
            load_vocabulary(where)
        assert str(where) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_folder_is_loaded(tmp_path) -> None:
    tokenizer("llama3").save_pretrained(tmp_path)
    loaded = load_vocabulary(tmp_path)
    assert loaded.fingerprint == Vocabulary.of(tokenizer("llama3")).fingerprint
    assert loaded.tokens == Vocabulary.of(tokenizer("llama3")).tokens


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3", "tekken_240911.json"],
)
def test_mistral_files_encode_as_mistral_common_does(name: str) -> None:
    file = mistral_file(name)
    if file is None:
        pytest.skip("mistral_common is not installed")
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    theirs = Tekkenizer.from_file(file) if name.endswith("json") else SentencePieceTokenizer(file)
    vocabulary = load_vocabulary(file)
    ours = vocabulary.tokenizer.backend_tokenizer
    ours.encode_special_tokens = True
    for text in (
        TEXT.replace("</s>", ""),
        "       -> indented",
        "Ana  Kovač\n\n\t東京 🚢👩‍👩‍👧",
        "a" * 70,
    ):
        ids = theirs.encode(text, bos=False, eos=False)
        assert ours.encode(text, add_special_tokens=False).ids == ids
        spelled = b"".join(vocabulary.tokens[i] for i in ids)
        assert spelled == (b"" if vocabulary.dummy_space == "never" else b" ") + text.encode()
    assert [vocabulary.specials[i] for i in vocabulary.prefix] in (["<s>"], [])
    assert (vocabulary.bos, vocabulary.eos) == (theirs.bos_id, theirs.eos_id)


@pytest.mark.parametrize("with_tokenizer_json", [True, False])
def test_a_folder_of_mistrals_has_the_fingerprint_of_its_tekken_file(
    tmp_path, with_tokenizer_json: bool
) -> None:
    """transformers would take mistral_common's own class there, which has another vocabulary."""
    file = mistral_file("tekken_240911.json")
    if file is None or not file.is_file():
        pytest.skip("mistral_common is not installed")
    vocabulary = load_vocabulary(file)
    if with_tokenizer_json:
        vocabulary.tokenizer.save_pretrained(tmp_path)
    shutil.copy(file, tmp_path / "tekken.json")
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_vocabulary(tmp_path).fingerprint == vocabulary.fingerprint
