import ctypes
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.models import make_contrast, make_network
from value_models import publish as module
from value_models.manifest import MANIFEST_FILE
from value_models.publish import publish, remove
from value_models.snapshot import snapshot
from value_models.store import DirectoryError, NetworkError, NoSuchNetwork, Store, check_network

KILLS = 40


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    for seed, name in enumerate(("old", "new")):
        folder = make_network(directory / name, seed=seed)
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (1e9, 1e9))
    return directory


@pytest.fixture
def old(pristine: Path) -> Path:
    return pristine / "old"


@pytest.fixture
def new(pristine: Path) -> Path:
    return pristine / "new"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def entries(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir() if path.name != module.LOCK_FILE)


def test_a_published_network_is_there_and_sound(old: Path, store: Path) -> None:
    published = publish(old, store, "qa")
    assert (published.name, published.path) == ("qa", store / "qa")
    assert published.version == check_network(old).version
    assert Store(store).check("qa") == published
    assert entries(store) == ["qa"]
    assert publish(old, store).path == store / "old"


def test_what_a_server_does_not_read_is_left_out(old: Path, store: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(old, tmp_path / "trained"))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.safetensors").write_bytes(b"much")
    published = publish(folder, store)
    assert published.version == check_network(old).version
    assert not (store / "trained" / "checkpoints").exists()


def test_all_models_of_a_network_are_published(store: Path, tmp_path: Path) -> None:
    folder = make_contrast(tmp_path / "proxy", hidden_size=32, heads=1)
    published = publish(folder, store)
    assert published == Store(store).check("proxy")
    assert published.version == check_network(folder).version
    assert published.models[0].path == store / "proxy" / "expert"
    (folder / "antiexpert" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(NetworkError, match=r"antiexpert/: model.safetensors is truncated"):
        publish(folder, store)
    assert Store(store).check("proxy") == published


def test_all_models_are_on_disk_before_the_network_is_there(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_contrast(tmp_path / "proxy", hidden_size=32, heads=1)
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert not (store / "proxy").exists() or synced[-1] == str(store)

    monkeypatch.setattr(os, "fsync", fsync)
    publish(folder, store)
    ends = {"expert", "antiexpert", "expert/model.safetensors", "antiexpert/config.json"}
    assert all(any(path.endswith(f"/{end}") for path in synced) for end in ends)


def test_others_may_read_what_is_published(old: Path, store: Path) -> None:
    publish(old, store, "qa")
    umask = os.umask(0)
    os.umask(umask)
    for path in ((store / "qa"), *(store / "qa").iterdir()):
        wanted = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == wanted & ~umask


def test_what_is_published_can_be_loaded_at_once(old: Path, store: Path, tmp_path: Path) -> None:
    """Its files keep their times, so that nobody takes it for one that is being written."""
    published = publish(old, store, "qa")
    before = time.monotonic()
    assert snapshot(published.path, "qa", tmp_path / "run", 1 << 30).version == published.version
    newest = max(path.stat().st_mtime for path in (store / "qa", *(store / "qa").iterdir()))
    assert newest == 1e9 < before + 1e9


def test_a_network_is_replaced(old: Path, new: Path, store: Path) -> None:
    publish(old, store, "qa")
    with (store / "qa" / "config.json").open() as reading:
        assert publish(new, store, "qa").version == check_network(new).version
        assert json.load(reading)["vocab_size"]
    assert Store(store).check("qa").version == check_network(new).version
    assert entries(store) == ["qa"]


def test_a_network_is_not_replaced_unasked(old: Path, new: Path, store: Path) -> None:
    publish(old, store, "qa", replace=False)
    with pytest.raises(NetworkError, match="there already"):
        publish(new, store, "qa", replace=False)
    assert Store(store).check("qa").version == check_network(old).version


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_is_no_network_is_not_replaced(old: Path, store: Path, make) -> None:
    make(store / "qa")
    with pytest.raises(NetworkError, match="something is there that is no network"):
        publish(old, store, "qa")
    assert entries(store) == ["qa"]


def test_a_link_is_replaced_and_not_what_it_leads_to(old: Path, new: Path, store: Path) -> None:
    publish(old, store, "qa-1")
    (store / "qa").symlink_to("qa-1")
    publish(new, store, "qa")
    assert Store(store).check("qa").version == check_network(new).version
    assert Store(store).check("qa-1").version == check_network(old).version
    assert entries(store) == ["qa", "qa-1"]


def test_an_unsound_network_changes_nothing(old: Path, store: Path, tmp_path: Path) -> None:
    publish(old, store, "qa")
    bad = Path(shutil.copytree(old, tmp_path / "bad"))
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(NetworkError, match="truncated") as caught:
        publish(bad, store, "qa")
    assert str(bad) in str(caught.value)
    (bad / "model.safetensors").unlink()
    with pytest.raises(NetworkError):
        publish(bad, store, "qa")
    assert entries(store) == ["qa"]
    assert Store(store).check("qa").version == check_network(old).version


@pytest.mark.parametrize("name", ["", "..", "../qa", "/qa", ".qa", "a/b", ".publishing-12345678"])
def test_names_cannot_lead_out_of_the_store(old: Path, store: Path, name: str) -> None:
    with pytest.raises(NetworkError, match="is no name"):
        publish(old, store, name)
    with pytest.raises(NetworkError, match="is no name"):
        remove(store, name)


def test_no_store(old: Path, tmp_path: Path) -> None:
    for act in (lambda: publish(old, tmp_path / "none"), lambda: remove(tmp_path / "none", "qa")):
        with pytest.raises(DirectoryError, match="no such directory"):
            act()


@pytest.mark.parametrize("denied", ["open", "mkdir", "rename"])
def test_a_store_that_cannot_be_written_is_not_changed(
    old: Path, new: Path, store: Path, monkeypatch: pytest.MonkeyPatch, denied: str
) -> None:
    """As on a read-only file system, which permissions are not for root."""
    publish(old, store, "qa")

    def deny(path: object, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(module.os if denied == "open" else Path, denied, deny)
    if denied == "rename":
        monkeypatch.setattr(module, "_exchange", deny)
    with pytest.raises(DirectoryError, match="Read-only file system"):
        publish(new, store, "qa")
    if denied != "mkdir":
        with pytest.raises(DirectoryError, match="Read-only file system"):
            remove(store, "qa")
    monkeypatch.undo()
    assert entries(store) == ["qa"]
    assert Store(store).check("qa").version == check_network(old).version


def test_a_network_is_removed(old: Path, store: Path) -> None:
    publish(old, store, "qa")
    remove(store, "qa")
    assert entries(store) == []
    with pytest.raises(NoSuchNetwork):
        remove(store, "qa")


def test_only_networks_are_removed(store: Path) -> None:
    (store / "notes").mkdir()
    with pytest.raises(NoSuchNetwork):
        remove(store, "notes")
    assert entries(store) == ["notes"]


def test_of_a_link_only_the_link_is_removed(old: Path, store: Path, tmp_path: Path) -> None:
    outside = Path(shutil.copytree(old, tmp_path / "outside"))
    (store / "qa").symlink_to(outside)
    remove(store, "qa")
    assert entries(store) == []
    assert check_network(outside)


def test_rubbish_is_removed_by_the_next(old: Path, store: Path) -> None:
    shutil.copytree(old, store / ".publishing-0123abcd")
    (store / ".removing-0123abcd").mkdir()
    (store / ".mine").mkdir()
    publish(old, store, "qa")
    assert entries(store) == [".mine", "qa"]


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot swap two names, as NFS."""

    class Library:
        def renameat2(self, *_: object) -> int:
            ctypes.set_errno(22)
            return -1

    monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: Library())


@pytest.mark.usefixtures("without_exchange")
def test_where_names_cannot_be_swapped_they_are_changed_in_turn(
    old: Path, new: Path, store: Path
) -> None:
    publish(old, store, "qa")
    publish(new, store, "qa")
    assert Store(store).check("qa").version == check_network(new).version
    assert entries(store) == ["qa"]


@pytest.mark.usefixtures("without_exchange")
def test_killed_between_two_names_the_old_one_comes_back(
    old: Path, new: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(old, store, "qa")
    rename = Path.rename

    def die(path: Path, to: Path) -> Path:
        if path.name.startswith(".publishing-"):
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        publish(new, store, "qa")
    monkeypatch.setattr(Path, "rename", rename)
    assert Store(store).names() == []
    publish(new, store, "other")
    assert Store(store).check("qa").version == check_network(old).version


def test_publishers_take_turns(old: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / ".publishing-0123abcd").mkdir()  # of the one that holds the lock
    with (store / module.LOCK_FILE).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
        for act in (lambda: publish(old, store, "qa"), lambda: remove(store, "qa")):
            with pytest.raises(DirectoryError, match="being written by another process"):
                act()
        assert entries(store) == [".publishing-0123abcd"]
        monkeypatch.setattr(module, "LOCK_SECONDS", 60)
        waiting = threading.Thread(target=publish, args=(old, store, "qa"))
        waiting.start()
        fcntl.flock(other, fcntl.LOCK_UN)
        waiting.join()
    assert entries(store) == ["qa"]


def test_a_file_system_without_locks_will_do(
    old: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", unknown)
    (store / ".publishing-0123abcd").mkdir()  # perhaps of somebody who is at it
    publish(old, store, "qa")
    assert entries(store) == [".publishing-0123abcd", "qa"]


@contextmanager
def publishing(store: Path, *folders: Path) -> Iterator[int]:
    """A child that publishes the folders in turn, without end, until it is killed.

    Forked, not started: it would import for seconds. Yields its process id once it is at it.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for folder in itertools.cycle(folders):
                publish(folder, store, "qa")
                os.write(write_end, b".")
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        assert os.read(read_end, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read_end)


def test_killed_at_any_moment_the_store_holds_the_old_or_the_new(
    old: Path, new: Path, store: Path
) -> None:
    versions = {check_network(folder).version for folder in (old, new)}
    publish(old, store, "qa")
    moments = random.Random(0)
    found, rubbish = set(), 0
    for _ in range(KILLS):
        with publishing(store, new, old):
            time.sleep(moments.uniform(0, 0.15))
        assert Store(store).names() == ["qa"]
        found.add(Store(store).check("qa").version)
        rubbish += len(entries(store)) > 1
    assert found == versions
    assert rubbish
    publish(new, store, "qa")
    assert entries(store) == ["qa"]


def test_readers_never_see_a_half(old: Path, new: Path, store: Path, tmp_path: Path) -> None:
    """Neither a check nor a snapshot, while one publishes as fast as it can."""
    versions = {check_network(folder).version for folder in (old, new)}
    publish(old, store, "qa")
    seen = set()
    with publishing(store, new, old):
        for _ in range(40):
            assert Store(store).names() == ["qa"]
            Store(store).check("qa", with_version=False)
            taken = snapshot(Store(store).folder("qa"), "qa", tmp_path / "run", 1 << 30)
            seen.add(taken.version)
            shutil.rmtree(taken.path)
    assert seen == versions


def test_the_manifest_decides_what_is_a_network(old: Path, store: Path) -> None:
    publish(old, store, "qa")
    (store / "qa" / MANIFEST_FILE).unlink()
    with pytest.raises(NoSuchNetwork):
        remove(store, "qa")
    assert entries(store) == ["qa"]
