import json
import sys

import pytest

from value_models.training import TrainingError
from value_models.training.source import as_line, is_dataset_name, read_lines, source_name


def test_lines_are_numbered_and_come_as_they_are(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"b": 2}')
    assert [tuple(line) for line in read_lines(file)] == [
        (f"{file}:1", b'{"a": 1}\n'),
        (f"{file}:2", b"\n"),
        (f"{file}:3", b'{"b": 2}'),
    ]


@pytest.mark.parametrize("name", ["HuggingFaceH4/no_robots", "org/set:train_sft", "a/b:train[:5%]"])
def test_dataset_names(name):
    assert is_dataset_name(name)
    assert source_name(name) == name


def test_what_lies_here_is_a_file_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_dataset_name("org/set")
    (tmp_path / "org").mkdir()
    (tmp_path / "org/set").write_text("")
    assert not is_dataset_name("org/set")
    assert source_name("org/set") == "set"


@pytest.mark.parametrize("path", ["data/train.jsonl", "train.json", "/data/train", "a/b/c"])
def test_paths_are_no_dataset_names(path):
    assert not is_dataset_name(path)
    with pytest.raises(TrainingError, match="cannot be read"):
        list(read_lines(path))


def test_without_the_package_a_dataset_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TrainingError, match="pip install datasets") as caught:
        list(read_lines("org/set"))
    assert "\n" not in str(caught.value)


def test_a_row_keeps_its_conversation_only():
    row = {
        "id": 7,
        "messages": [{"role": "user", "content": "Wo? 🚢", "tool_calls": None}],
        "conversations": None,
        "tools": None,
    }
    assert json.loads(as_line(row)) == {"messages": [{"role": "user", "content": "Wo? 🚢"}]}
    shared = {"conversations": [{"from": "gpt", "value": "x"}], "system": "s", "tools": "[1]"}
    assert json.loads(as_line(shared)) == shared
