"""A map's file: what is written comes back, and what is hostile does not."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.value_models.vocabulary.test_reading import make_map, turn_rules
from tests.value_models.vocabulary.tokenizers import tokenizer
from value_models.vocabulary.map import METADATA_KEY, VocabularyMap, map_file
from value_models.vocabulary.tokens import Vocabulary, VocabularyError


@pytest.fixture
def made() -> VocabularyMap:
    there, here = Vocabulary.of(tokenizer("qwen")), Vocabulary.of(tokenizer("byte-level"))
    made = make_map(there, here, *turn_rules(there, here), shift="strip", report={"texts": 3})
    columns = torch.arange(2 * len(there.tokens)).reshape(2, -1) % len(here.tokens) - 1
    return dataclasses.replace(made, columns=columns)


def test_a_map_comes_back_as_it_was(made, tmp_path) -> None:
    file = made.save(tmp_path)
    assert file == map_file(tmp_path, made.target_fingerprint)
    assert file.name == made.target_fingerprint[7:23] + ".safetensors"
    loaded = VocabularyMap.load(file)
    assert torch.equal(loaded.columns, made.columns)
    assert loaded.columns.dtype == torch.int64
    for field in dataclasses.fields(made):
        if field.name != "columns":
            assert getattr(loaded, field.name) == getattr(made, field.name)


def test_the_same_map_is_the_same_file(made, tmp_path) -> None:
    content = made.save(tmp_path).read_bytes()
    assert made.save(tmp_path).read_bytes() == content
    assert [file.name for file in tmp_path.rglob("*.*")] == [made.save(tmp_path).name]


def test_a_folder_that_cannot_be_written(made, tmp_path) -> None:
    (tmp_path / "vocabulary_maps").write_text("in the way")
    with pytest.raises(VocabularyError, match="cannot be written"):
        made.save(tmp_path)


def refusal(file) -> str:
    with pytest.raises(VocabularyError) as caught:
        VocabularyMap.load(file)
    line = str(caught.value)
    assert file.name in line and "\n" not in line
    return line


def rewrite(file, tensors=None, **header) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        fields = json.loads(content.metadata()[METADATA_KEY])
    for name, value in header.items():
        fields[name] = value
        if value is ...:
            del fields[name]
    save_file(load_file(file) | (tensors or {}), file, {METADATA_KEY: json.dumps(fields)})


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_file(made, tmp_path, kept) -> None:
    file = made.save(tmp_path)
    file.write_bytes(file.read_bytes()[:kept])
    refusal(file)


@pytest.mark.parametrize("content", [b"\x80\x04.", b"PK\x03\x04", b"{}", b"\xff" * 64])
def test_another_format(made, tmp_path, content) -> None:
    file = made.save(tmp_path)
    file.write_bytes(content)
    refusal(file)


def test_safetensors_that_are_no_map(made, tmp_path) -> None:
    file = made.save(tmp_path)
    save_file(load_file(file), file)
    assert METADATA_KEY in refusal(file)
    for text in ("{", "[]", "null", "[" * 100_000):
        save_file(load_file(made.save(tmp_path)), file, {METADATA_KEY: text})
        refusal(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", 2),
        ("surprise", 1),
        ("target_fingerprint", "sha256:0"),
        ("target_fingerprint", ...),
        ("num_value_ids", 0),
        ("num_value_ids", 1 << 40),
        ("placeholder", -1),
        ("placeholder", 511_999),
        ("value_prefix", [511_999]),
        ("prefix", [0] * 1000),
        ("prefix", [5]),
        ("prefix", [511_999]),
        ("dummy_space", "often"),
        ("shift", "none"),
        ("shift", "sideways"),
        ("rules", [[[], [1], "", ""]]),
        ("rules", [[["text first"], [1], "", ""]]),
        ("rules", [[[-1, -1], [1], "", ""]]),
        ("rules", [[[5], [1], "", ""]]),
        ("rules", [[[511_999], [1], "", ""]]),
        ("rules", [[[0], [511_999], "", ""]]),
        ("rules", [[[0], [-1], "", ""]]),
        ("rules", [[[0], [1.5], "", ""]]),
        ("rules", [[[0], ["\ud800"], "", ""]]),
        ("rules", [[[0, "\u6771"], [1], "", ""]]),
        ("rules", [[[0], [1], "", ""]] * 2),
        ("rules", [[[0, "x" * (1 << 21)], [1], "", ""]]),
        ("rules", [[[0], [1], "r" * 1000, ""]]),
        ("rules", [[[0], [1]]]),
    ],
)
def test_a_bad_header(made, tmp_path, field, value) -> None:
    file = made.save(tmp_path)
    rewrite(file, **{field: value})
    refusal(file)


@pytest.mark.parametrize(
    "tensors",
    [
        {"columns": torch.zeros(1, 5, dtype=torch.int32)},
        {"columns": torch.zeros(0, 0, dtype=torch.int32)},
        {"token_lengths": torch.zeros(0, dtype=torch.int32)},
        {"token_bytes": torch.zeros(3, dtype=torch.uint8)},
        {"token_bytes": torch.zeros(3, 3, dtype=torch.uint8)},
        {"extra": torch.zeros(1)},
    ],
)
def test_bad_tensors(made, tmp_path, tensors) -> None:
    file = made.save(tmp_path)
    rewrite(file, tensors)
    refusal(file)


@pytest.mark.parametrize("column", [-2, 1 << 20])
def test_columns_out_of_range(made, tmp_path, column) -> None:
    file = made.save(tmp_path)
    columns = load_file(file)["columns"]
    columns[1, 7] = column
    rewrite(file, {"columns": columns})
    assert "columns" in refusal(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_columns_of_another_type(made, tmp_path, dtype) -> None:
    file = made.save(tmp_path)
    rewrite(file, {"columns": load_file(file)["columns"].to(dtype)})
    refusal(file)


def test_lengths_that_disagree_with_the_bytes(made, tmp_path) -> None:
    file = made.save(tmp_path)
    lengths = load_file(file)["token_lengths"]
    for index, change in ((9, 1), (9, -50), (9, 1 << 30)):
        changed = lengths.clone()
        changed[index] += change
        rewrite(file, {"token_lengths": changed})
        refusal(file)


def test_a_missing_tensor(made, tmp_path) -> None:
    file = made.save(tmp_path)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    tensors = load_file(file)
    del tensors["token_bytes"]
    save_file(tensors, file, metadata)
    assert "token_bytes" in refusal(file)
