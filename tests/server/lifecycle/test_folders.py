"""What the child of `server.lifecycle.staging` does, without a process of its own."""

import shutil
from pathlib import Path

import pytest

from server.lifecycle.folders import Folders
from server.settings import Settings
from tests.models import (
    OTHER_TEXT,
    make_contrast,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)
from tests.server.conftest import SMALL
from value_models.manifest import MANIFEST_FILE
from value_models.store import DirectoryError, NetworkError, NoSuchNetwork, check_network

ROOM = 1 << 30


@pytest.fixture
def folders(settings: Settings) -> Folders:
    return Folders(settings)


def test_facts_are_those_of_the_folder(folders: Folders, store: Path) -> None:
    network = check_network(store / "qa")
    facts = folders.inspect("qa", "answers")
    assert (facts["name"], facts["source"], facts["scale"]) == ("answers", "qa", 0.5)
    (model,) = facts["models"]
    assert (model["role"], model["num_parameters"]) == ("value", network.num_parameters)
    assert tuple(model["kv_shape"]) == network.models[0].kv_shape
    assert (model["vocab_size"], model["max_context"]) == (facts["vocab_size"], 512)
    assert not facts["mapped"] and folders.inspect("mapped", "mapped")["mapped"]


def test_facts_tell_what_each_model_needs(folders: Folders, store: Path) -> None:
    make_contrast(store / "proxy", **SMALL, antiexpert={"layers": 2, "vocab_size": 544})
    network = check_network(store / "proxy")
    facts = folders.inspect("proxy", "proxy")
    assert (facts["kind"], facts["vocab_size"]) == ("contrast", network.vocab_size)
    assert facts["num_bytes"] == network.num_bytes
    assert [model["role"] for model in facts["models"]] == ["expert", "antiexpert"]
    for told, model in zip(facts["models"], network.models, strict=True):
        assert told == {
            "role": model.role,
            "num_parameters": model.num_parameters,
            "kv_shape": model.kv_shape,
            "vocab_size": model.vocab_size,
            "max_context": model.max_context,
        }
    staged = folders.stage("proxy", "proxy", ROOM)
    assert staged["models"] == facts["models"]


def test_weights_of_all_models_are_discarded(folders: Folders, store: Path) -> None:
    make_contrast(store / "proxy", **SMALL)
    folder = Path(folders.stage("proxy", "proxy", ROOM)["folder"])
    assert len(list(folder.rglob("*.safetensors"))) == 2
    folders.discard(str(folder), weights_only=True)
    assert not list(folder.rglob("*.safetensors"))
    assert (folder / "expert" / "config.json").exists() and (folder / "tokenizer.json").exists()


def test_a_snapshot_is_staged_and_discarded(folders: Folders, store: Path, snapshots: Path) -> None:
    staged = folders.stage("mapped", "answers", ROOM)
    folder = Path(staged["folder"])
    assert folder.parent == snapshots
    assert check_network(folder, "answers").version == staged["version"]
    assert staged["version"] == check_network(store / "mapped").version
    folders.discard(str(folder), weights_only=True)
    assert not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists() and list(folder.glob("vocabulary_maps/*"))
    for _ in range(2):
        folders.discard(str(folder), weights_only=False)
        assert not list(snapshots.iterdir())


@pytest.mark.parametrize("folder", ["run", "run/networks", "run/networks/../x", "store/qa"])
def test_only_snapshots_are_discarded(folders: Folders, tmp_path: Path, folder: str) -> None:
    # Nothing outside of the test's own folder: a broken check would delete it.
    (tmp_path / "run" / "x").mkdir()
    with pytest.raises(DirectoryError, match="is no snapshot"):
        folders.discard(f"{tmp_path}/{folder}", weights_only=False)
    assert (tmp_path / folder).is_dir()


def spoil_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def link_out(folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)


def link_weights(folder: Path) -> None:
    outside = folder.parent.parent / "outside"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def make_other(folder: Path) -> None:
    shutil.rmtree(folder)
    make_network(folder, **SMALL, tokenizer=make_tokenizer(OTHER_TEXT, 400))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_weights, "truncated or corrupt"),
        (lambda folder: (folder / "extra.bin").write_bytes(b"\x80"), "looks like pickled"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("{}"), "format_version"),
        (link_out, "link out of the directory"),
        (link_weights, "is a link"),
        (make_other, "trimtab align"),
        (lambda folder: make_tokenizer(OTHER_TEXT).save_pretrained(folder), "put back the tok"),
    ],
)
@pytest.mark.parametrize("method", ["inspect", "stage"])
def test_wrong_input_is_refused_and_changes_nothing(
    folders: Folders, store: Path, snapshots: Path, spoil, named: str, method: str
) -> None:
    spoil(store / "qa")
    arguments = {"source": "qa", "name": "qa"} | ({"max_bytes": ROOM} if method == "stage" else {})
    with pytest.raises(NetworkError, match=named):
        getattr(folders, method)(**arguments)
    assert not list(snapshots.iterdir())


def test_a_map_that_its_own_tokenizer_belies_is_refused(
    folders: Folders, store: Path, snapshots: Path
) -> None:
    make_sentencepiece_tokenizer(size=400).save_pretrained(store / "mapped")
    with pytest.raises(NetworkError):
        folders.inspect("mapped", "mapped")
    with pytest.raises(NetworkError):
        folders.stage("mapped", "mapped", ROOM)
    assert not list(snapshots.iterdir())


def test_the_store_is_read_anew_each_time(folders: Folders, store: Path) -> None:
    assert folders.list() == ["mapped", "qa"]
    shutil.copytree(store / "qa", store / "new")
    (store / ".publishing-1").mkdir()
    assert folders.list() == ["mapped", "new", "qa"]
    folders.remove("new")
    assert folders.list() == ["mapped", "qa"]
    with pytest.raises(NoSuchNetwork):
        folders.remove("new")


def test_what_an_earlier_child_left_is_removed(settings: Settings, snapshots: Path) -> None:
    (snapshots / ".staging-4194999-0a").mkdir()  # no process has this number
    Folders(settings)
    assert not list(snapshots.iterdir())


@pytest.mark.parametrize(
    ("error", "method", "kind"),
    [
        (NetworkError("x"), "stage", "network"),
        (NoSuchNetwork("x"), "stage", "missing"),
        (DirectoryError("x"), "stage", "staging"),
        (DirectoryError("x"), "list", "staging"),
        (DirectoryError("x"), "remove", "network"),
        (OSError("x"), "stage", "staging"),
        (MemoryError(), "stage", "staging"),
    ],
)
def test_whatever_goes_wrong_is_an_answer(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, error: Exception, method: str, kind: str
) -> None:
    def fail(_: Folders) -> None:
        raise error

    monkeypatch.setattr(Folders, method, fail)
    answer = folders.answer({"id": 7, "method": method})
    assert (answer["id"], answer["refused"]) == (7, kind)
