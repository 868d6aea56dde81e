import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.models import OTHER_TEXT, TEXT, make_model, make_tokenizer
from value_models import checkpoint
from value_models import pair as module
from value_models.manifest import MANIFEST_FILE, tokenizer_fingerprint
from value_models.pair import pair
from value_models.publish import publish
from value_models.snapshot import snapshot
from value_models.store import DirectoryError, NetworkError, NetworkFolder, check_network
from value_models.vocabulary.align import align_vocabularies
from value_models.vocabulary.tokens import Vocabulary

WEIGHTS = "model.safetensors"
KILLS = 20


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one tokenizer, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "chat", hidden_size=64, heads=2)
    make_model(folder / "base", hidden_size=32, heads=1, vocab_size=576, seed=1)
    make_model(folder / "other", hidden_size=32, heads=1, tokenizer=make_tokenizer(OTHER_TEXT))
    (folder / "base" / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "networks" / "proxy"


def make(models: Path, out: Path, **options) -> NetworkFolder:
    return pair(models / "chat", models / "base", out, **options)


def refusal(expert: object, antiexpert: object, out: Path, **options) -> str:
    with pytest.raises(NetworkError) as refused:
        pair(str(expert), str(antiexpert), out, **options)
    assert not out.parent.exists() or not list(out.parent.iterdir())
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_pair_is_a_network(models: Path, out: Path) -> None:
    network = make(models, out, scale=1.5, description="chats")
    assert network == check_network(out)
    manifest = network.manifest
    assert (manifest.kind, manifest.default_scale, manifest.base) == ("contrast", 1.5, "base")
    assert manifest.description == "chats"
    assert manifest.tokenizer_fingerprint == tokenizer_fingerprint(make_tokenizer())
    assert (manifest.training["expert"], manifest.training["antiexpert"]) == ("chat", "base")
    for role, source in (("expert", "chat"), ("antiexpert", "base")):
        assert {file.name for file in (out / role).iterdir()} == {"config.json", WEIGHTS}
        for file in (out / role).iterdir():
            assert file.read_bytes() == (models / source / file.name).read_bytes()
    assert not (out / WEIGHTS).exists()
    assert [entry.name for entry in out.parent.iterdir()] == ["proxy"]


def test_its_tokenizer_is_the_experts_with_the_chat_template(models: Path, out: Path) -> None:
    make(models, out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (out / name).read_bytes() == (models / "chat" / name).read_bytes()
    assert not (out / "generation_config.json").exists()


def test_nothing_of_this_machine_is_written(models: Path, out: Path) -> None:
    make(models, out)
    assert str(models) not in (out / MANIFEST_FILE).read_text()


def test_a_pair_can_be_published_staged_and_mapped(models: Path, out: Path, tmp_path: Path) -> None:
    network = make(models, out)
    (tmp_path / "store").mkdir()
    assert publish(out, tmp_path / "store").version == network.version
    assert snapshot(out, "qa", tmp_path / "run", 1 << 30).version == network.version
    own = Vocabulary.of(make_tokenizer())
    align_vocabularies(own, own, TEXT.splitlines()).save(out)
    assert check_network(out).vocabulary_maps == (own.fingerprint,)


def test_copies_are_independent_of_the_models(models: Path, out: Path, tmp_path: Path) -> None:
    chat = shutil.copytree(models / "chat", tmp_path / "chat")
    version = pair(chat, models / "base", out).version
    (chat / WEIGHTS).write_bytes(b"overwritten")
    assert check_network(out).version == version


def test_links_take_no_disk_and_outlive_the_models(models: Path, out: Path, tmp_path: Path) -> None:
    chat = shutil.copytree(models / "chat", tmp_path / "chat")
    network = pair(chat, models / "base", out, link=True)
    assert (out / "expert" / WEIGHTS).stat().st_ino == (chat / WEIGHTS).stat().st_ino
    assert not (out / "expert" / WEIGHTS).is_symlink()
    assert (out / "tokenizer.json").stat().st_nlink == 1  # people edit these
    shutil.rmtree(chat)
    assert check_network(out) == network


def test_models_of_links_are_followed(models: Path, out: Path, tmp_path: Path) -> None:
    """The hub's cache: a revision's folder holds links to files that are named by content."""
    blobs, revision = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    revision.mkdir(parents=True)
    for file in (models / "chat").iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (revision / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    for link in (False, True):
        network = pair(revision, models / "base", out.with_name(f"p{link}"), link=link)
        copied = network.path / "expert" / WEIGHTS
        blob = blobs / f"blob-{WEIGHTS}"
        assert not copied.is_symlink() and copied.read_bytes() == blob.read_bytes()
        assert os.path.samefile(copied, blob) is link


def test_what_else_a_model_has_is_not_taken(models: Path, out: Path, tmp_path: Path) -> None:
    chat = shutil.copytree(models / "chat", tmp_path / "chat")
    (chat / "pytorch_model.bin").write_bytes(b"\x80")
    (chat / "original").mkdir()
    (chat / "original" / "consolidated.safetensors").write_bytes(b"other")
    assert pair(chat, models / "base", out).num_parameters
    names = {file.name for file in out.rglob("*")}
    assert not names & {"pytorch_model.bin", "original", "generation_config.json"}


def test_all_parts_of_a_sharded_model_are_taken(models: Path, out: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    chat = shutil.copytree(models / "chat", tmp_path / "chat")
    (chat / WEIGHTS).unlink()
    AutoModelForCausalLM.from_pretrained(models / "chat").save_pretrained(
        chat, max_shard_size="200KB"
    )
    shards = {file.name for file in chat.glob("*.safetensors")}
    (chat / "stale.safetensors").write_bytes(b"of an earlier save")
    network = pair(chat, models / "base", out)
    assert {file.name for file in (out / "expert").glob("*.safetensors")} == shards
    assert len(shards) > 1
    assert (
        network.models[0].num_parameters
        == make(models, out.with_name("whole")).models[0].num_parameters
    )


def test_tokenizers_must_be_the_same(models: Path, out: Path) -> None:
    line = refusal(models / "chat", models / "other", out)
    for tokenizer in (make_tokenizer(), make_tokenizer(OTHER_TEXT)):
        assert tokenizer_fingerprint(tokenizer)[:23] in line
    assert "(chat)" in line and "(other)" in line


def test_a_model_has_no_difference_from_itself(models: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(models / "chat")
    assert "difference is 0" in refusal(models / "chat", tmp_path / "again", out)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda model: (model / WEIGHTS).unlink(), "no safetensors weights"),
        (lambda model: (model / "config.json").unlink(), "no config.json"),
        (lambda model: (model / WEIGHTS).write_bytes(b"12345678901"), "truncated or corrupt"),
        (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda model: (model / "tokenizer.json").write_text("{"), "no tokenizer can be loaded"),
        (lambda model: (model / "config.json").write_text('{"auto_map": {}}'), "asks for code"),
    ],
)
@pytest.mark.parametrize("role", ["expert", "antiexpert"])
def test_an_unsound_model_is_refused_and_nothing_is_written(
    models: Path, out: Path, tmp_path: Path, role: str, spoil, named: str
) -> None:
    bad = Path(shutil.copytree(models / "chat", tmp_path / "bad"))
    spoil(bad)
    pairs = {"expert": (bad, models / "base"), "antiexpert": (models / "base", bad)}
    line = refusal(*pairs[role], out)
    assert named in line and line.startswith(f"the {role} {bad}")


def test_pickles_alone_are_no_weights(models: Path, out: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(models / "chat", tmp_path / "bad"))
    (bad / WEIGHTS).rename(bad / "pytorch_model.bin")
    assert "no safetensors weights" in refusal(bad, models / "base", out)


def test_vocabularies_hold_the_tokenizers(models: Path, out: Path, tmp_path: Path) -> None:
    small = make_model(tmp_path / "small", hidden_size=32, heads=1, vocab_size=300)
    line = refusal(models / "chat", small, out)
    assert "antiexpert/: the model has 300 logits" in line and str(out) in line


@pytest.mark.parametrize("there", [Path.mkdir, Path.touch])
def test_what_is_there_already_stays(models: Path, out: Path, there) -> None:
    out.parent.mkdir()
    there(out)
    with pytest.raises(NetworkError, match="already there; remove it or choose another --out"):
        make(models, out)
    assert [entry.name for entry in out.parent.iterdir()] == ["proxy"]
    assert not out.is_dir() or not list(out.iterdir())


def test_of_two_at_once_the_later_is_told_that_the_place_is_taken(
    models: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest = module._write_manifest

    def outrun(*arguments) -> None:
        write_manifest(*arguments)
        monkeypatch.undo()
        make(models, out)

    monkeypatch.setattr(module, "_write_manifest", outrun)
    with pytest.raises(NetworkError, match="already there; remove it or choose another --out"):
        make(models, out)
    assert check_network(out) and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("scale", [8.5, float("nan"), float("inf")])
def test_a_scale_has_a_limit(models: Path, out: Path, scale: float) -> None:
    assert "lies within +-8" in refusal(models / "chat", models / "base", out, scale=scale)


def test_a_network_needs_a_name(models: Path, out: Path) -> None:
    assert "is no name" in refusal(models / "chat", models / "base", out.with_name("a b"))


def test_other_file_systems_cannot_be_linked_to(models: Path, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    out = memory / f"trimtab-test-{os.getpid()}" / "proxy"
    try:
        line = refusal(models / "chat", models / "base", out, link=True)
        assert "another file system" in line and "leave out --link" in line
        assert make(models, out).path == out
    finally:
        shutil.rmtree(out.parent)


def test_a_full_disk_leaves_nothing(
    models: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []

    def copy(source: Path, target: Path) -> None:
        copies.append(target)
        if len(copies) == 4:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(target))
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(checkpoint.shutil, "copyfile", copy)
    with pytest.raises(DirectoryError, match=r"cannot be written \(No space left"):
        make(models, out)
    assert not list(out.parent.iterdir())


def test_what_killed_ones_left_is_removed_and_what_runs_is_not(
    models: Path, out: Path, tmp_path: Path
) -> None:
    dead, younger = out.parent / ".pairing-0123abcd", out.parent / ".pairing-0123abce.new"
    (dead / "expert").mkdir(parents=True)
    younger.mkdir()
    other = out.parent / ".pairing-notes"
    other.mkdir()
    with module._unfinished(out.with_name("slow")) as running:
        make(models, out)
        assert running.is_dir() and not dead.exists() and other.is_dir()
        assert not younger.exists()
    assert not running.exists()


def test_a_folder_that_another_process_took_for_a_dead_ones_is_made_again(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = module.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            module._clean_up(out.parent)
        lock(descriptor, how)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with module._unfinished(out) as folder:
        assert folder.is_dir()
    assert len(calls) == 3  # the first folder's, the other process's, the second folder's


@contextmanager
def pairing(models: Path, out: Path) -> Iterator[None]:
    """A child that makes pairs beside `out`, without end, until it is killed.

    Forked, not started: it would import for seconds.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for number in itertools.count():
                make(models, out.with_name(f"{out.name}-{os.getpid()}-{number}"))
                os.write(write_end, b".")
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        assert os.read(read_end, 1)
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read_end)


def test_killed_at_any_moment_it_is_whole_or_not_there(models: Path, out: Path) -> None:
    version = make(models, out).version
    moments, torn = random.Random(0), 0
    for _ in range(KILLS):
        with pairing(models, out):
            time.sleep(moments.uniform(0, 0.15))
        torn += bool(list(out.parent.glob(".pairing-*")))
    assert torn, "else nothing was tried"
    for folder in out.parent.glob("proxy-*"):
        assert check_network(folder).version == version
    make(models, out.with_name("last"))
    assert not list(out.parent.glob(".*"))


class Hub:
    """`huggingface_hub.snapshot_download`, of models that lie in a folder."""

    def __init__(self, models: Path, cached: set[str]) -> None:
        self.models = models
        self.cached = cached
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, name: str, *, local_files_only: bool, **patterns) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.calls.append((name, local_files_only))
        assert "*.safetensors" in patterns["allow_patterns"]
        assert not [pattern for pattern in patterns["allow_patterns"] if "bin" in pattern]
        folder = self.models / name.partition("/")[2]
        if not folder.is_dir() or (local_files_only and name not in self.cached):
            raise LocalEntryNotFoundError("nothing there")
        return str(folder)


def test_models_of_the_hub_are_found_in_its_cache_first(
    models: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(models, {"org/chat"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    network = pair("org/chat", "org/base", out)
    assert network.manifest.training["expert"] == "org/chat"
    assert hub.calls == [("org/chat", True), ("org/base", True), ("org/base", False)]


def test_a_model_that_is_cached_in_part_is_downloaded(
    models: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `from_pretrained` of its tokenizer leaves it."""
    copies = Path(shutil.copytree(models, tmp_path / "hub"))
    hub = Hub(copies, {"org/chat", "org/base"})
    (copies / "chat" / WEIGHTS).rename(tmp_path / "weights")

    def download(name: str, **options) -> str:
        if not options["local_files_only"]:
            (tmp_path / "weights").rename(copies / "chat" / WEIGHTS)
        return hub(name, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pair("org/chat", "org/base", out)
    assert hub.calls == [("org/chat", True), ("org/chat", False), ("org/base", True)]


def test_a_model_that_is_nowhere_is_refused(
    models: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(models, set()))
    line = refusal("org/none", models / "base", out)
    assert "the expert org/none: there is no such folder, and no such model" in line
    assert "check the path" in refusal(models / "chat", "./none", out)
    assert "check the path" in refusal(models / "chat", "/none", out)
