import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import TEXT, make_contrast, make_network, make_tokenizer
from value_models import snapshot as module
from value_models.manifest import MANIFEST_FILE
from value_models.snapshot import remove_unfinished, snapshot
from value_models.store import DirectoryError, NetworkError, NoSuchNetwork, Store, check_network
from value_models.vocabulary.align import align_vocabularies
from value_models.vocabulary.tokens import Vocabulary

WEIGHTS = "model.safetensors"
ROOM = 1 << 30


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_network(tmp_path_factory.mktemp("pristine") / "tab")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A network that nobody has touched for long."""
    copy = Path(shutil.copytree(pristine, tmp_path / "store" / "tab"))
    for path in (*copy.rglob("*"), copy):
        os.utime(path, (1e9, 1e9))
    return copy


@pytest.fixture(scope="session")
def pristine_contrast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_contrast(tmp_path_factory.mktemp("pristine") / "proxy", hidden_size=32, heads=1)


@pytest.fixture
def contrast(pristine_contrast: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(pristine_contrast, tmp_path / "store" / "proxy"))
    for path in (*copy.rglob("*"), copy):
        os.utime(path, (1e9, 1e9))
    return copy


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "run" / "networks"


def in_copying(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], file: str) -> None:
    """Have something happen just before a file is copied, once."""
    copy_file = module._copy_file
    pending = [act]

    def copy(opened: int, found: module._File, target: Path, durable: bool) -> None:
        if found.name == file and pending:
            pending.pop()()
        copy_file(opened, found, target, durable)

    monkeypatch.setattr(module, "_copy_file", copy)


def refusal(folder: Path, into: Path, max_bytes: int = ROOM) -> str:
    with pytest.raises(NetworkError) as caught:
        snapshot(folder, "qa", into, max_bytes)
    assert not into.exists() or not list(into.iterdir())
    assert str(into) not in str(caught.value)
    return str(caught.value)


def test_a_snapshot_is_the_same_network(folder: Path, into: Path) -> None:
    own = Vocabulary.of(make_tokenizer())
    align_vocabularies(own, own, TEXT.splitlines()).save(folder)
    (folder / "README.md").write_text("not read by a server")
    source = check_network(folder)
    copy = snapshot(folder, "qa", into, ROOM)
    assert (copy.name, copy.version) == ("qa", source.version)
    assert copy.path.parent == into and copy.path.name.startswith(f"qa@{source.version}-")
    assert check_network(copy.path, "qa") == copy
    assert copy.vocabulary_maps == source.vocabulary_maps != ()
    assert not (copy.path / "README.md").exists()
    assert [path.name for path in into.iterdir()] == [copy.path.name]
    shutil.rmtree(folder)
    assert check_network(copy.path, "qa") == copy


def test_each_snapshot_has_a_folder_of_its_own(folder: Path, into: Path) -> None:
    assert snapshot(folder, "qa", into, ROOM).path != snapshot(folder, "qa", into, ROOM).path


def test_ten_gigabytes_are_refused_before_anything_is_read(
    folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (10 << 30) // 4
    header = b'{"model.embed_tokens.weight":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (
        rows,
        4 * rows,
    )
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * rows)
    monkeypatch.setattr(module, "_copy_file", None)
    assert "more than the 1,073,741,824 that there is room for" in refusal(folder, into, 1 << 30)


def test_sizes_count_together(folder: Path, into: Path) -> None:
    total = sum(file.stat().st_size for file in folder.iterdir())
    assert "that there is room for" in refusal(folder, into, total // 2)
    assert snapshot(folder, "qa", into, total)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"12345678901"), "truncated or corrupt"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"\x80"), "looks like pickled"),
        (lambda folder: (folder / "link").symlink_to("/etc"), "is a link"),
        (lambda folder: os.mkfifo(folder / "pipe"), "neither a file nor a folder"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
)
def test_what_is_not_sound_leaves_nothing(
    folder: Path, into: Path, spoil: Callable[[Path], None], named: str
) -> None:
    spoil(folder)
    line = refusal(folder, into)
    assert named in line and str(folder) in line


@pytest.mark.parametrize("name", ["", "..", "../x", "/x", "a/b", ".x"])
def test_a_name_never_becomes_another_path(folder: Path, into: Path, name: str) -> None:
    with pytest.raises(NetworkError, match="is no name"):
        snapshot(folder, name, into, ROOM)


def test_what_is_not_there(folder: Path, into: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    for path in (folder, folder / "nothing"):
        with pytest.raises(NoSuchNetwork):
            snapshot(path, "qa", into, ROOM)


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json", ".model.safetensors.Xy12"])
def test_a_folder_that_grows_is_refused(folder: Path, into: Path, file: str) -> None:
    """rsync, for one, fills a file that does not count and renames it."""
    begun, stopping = threading.Event(), threading.Event()

    def grow() -> None:
        with (folder / file).open("ab", buffering=0) as growing:
            while not stopping.wait(0.05):
                growing.write(b" ")
                begun.set()

    writer = threading.Thread(target=grow)
    writer.start()
    begun.wait()
    try:
        assert "it is being written; publish it with `trimtab publish`" in refusal(folder, into)
    finally:
        stopping.set()
        writer.join()


def test_a_folder_that_is_copied_into_place_is_refused_until_it_is_whole(
    folder: Path, into: Path
) -> None:
    """As by `cp -r`: each file is there at once, and the folder looks whole before it is."""
    version = check_network(folder).version
    growing = folder.with_name("growing")
    growing.mkdir()
    loadable = (MANIFEST_FILE, "config.json", WEIGHTS)
    parts = sorted((file.name for file in folder.iterdir()), key=lambda name: name not in loadable)

    def copy() -> None:
        for part in parts:
            shutil.copy(folder / part, growing / part)
            time.sleep(0.4)

    copying = threading.Thread(target=copy)
    copying.start()
    refusals = 0
    while True:
        try:
            taken = snapshot(growing, "qa", into, ROOM)
        except NetworkError:
            refusals += 1
        else:
            break
    copying.join()
    assert refusals
    assert taken.version == version


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / WEIGHTS).open("ab").write(b"x"),
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()),
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: shutil.copy(folder / WEIGHTS, folder / "new").replace(folder / WEIGHTS),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "vocab.txt").write_text("new"),
    ],
)
def test_a_file_that_changes_while_it_is_copied_is_refused(
    folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    shutil_copy = shutil.copy
    monkeypatch.setattr(shutil, "copy", lambda *paths: Path(shutil_copy(*paths)))
    in_copying(monkeypatch, lambda: [change(folder)].clear(), WEIGHTS)
    assert "it is being written" in refusal(folder, into)


def test_a_file_that_becomes_a_link_is_not_followed(
    folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def swap() -> None:
        (folder / WEIGHTS).rename(tmp_path / "outside")
        (folder / WEIGHTS).symlink_to(tmp_path / "outside")

    in_copying(monkeypatch, swap, WEIGHTS)
    refusal(folder, into)


def test_a_folder_that_is_replaced_as_a_whole_is_taken_anew(
    folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = make_network(folder.with_name("new"), seed=1)
    version = check_network(new).version

    def publish() -> None:
        folder.rename(folder.with_name(".old"))
        new.rename(folder)
        shutil.rmtree(folder.with_name(".old"))

    in_copying(monkeypatch, publish, WEIGHTS)
    assert snapshot(folder, "qa", into, ROOM).version == version


@pytest.mark.parametrize("left", [(), (MANIFEST_FILE, "config.json")], ids=["nothing", "a part"])
def test_a_folder_that_was_replaced_and_is_being_deleted_is_taken_anew(
    folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...]
) -> None:
    """Its manifest was there a moment ago; what is not there any more must not go unnoticed."""
    new = make_network(folder.with_name("new"), seed=1)
    version = check_network(new).version
    old = folder.with_name(".old")
    listing = module._listing

    def look(root: Path) -> list[module._File]:
        if not old.exists():
            folder.rename(old)
            new.rename(folder)
            for file in [file for file in old.iterdir() if file.name not in left]:
                file.unlink()
        return listing(root)

    monkeypatch.setattr(module, "_listing", look)
    assert snapshot(folder, "qa", into, ROOM).version == version


def test_a_full_disk_is_not_the_networks_fault(folder: Path) -> None:
    with pytest.raises(DirectoryError, match=r"/dev/full.* cannot be written"):
        snapshot(folder, "qa", Path("/dev/full"), ROOM)


def test_no_room_while_it_is_copied(
    folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_open = Path.open

    def full(path: Path, mode: str = "r", *rest: int) -> object:
        to = Path("/dev/full") if mode == "xb" else path
        return path_open(to, mode.replace("x", "w"), *rest)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DirectoryError, match="No space left"):
        snapshot(folder, "qa", into, ROOM)
    assert not list(into.iterdir())


def test_killed_at_any_moment_it_leaves_whole_snapshots_and_rubbish(
    folder: Path, into: Path
) -> None:
    version = check_network(folder).version
    moments = random.Random(0)
    rubbish = whole = 0
    for _ in range(30):
        child = os.fork()  # a new interpreter would import for seconds
        if child == 0:
            try:
                while True:
                    snapshot(folder, "qa", into, ROOM)
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rubbish += len(list(into.glob(".*")))
        remove_unfinished(into)
        assert not list(into.glob(".*"))
        for path in into.glob("*"):
            assert check_network(path, "qa").version == version
            shutil.rmtree(path)
            whole += 1
    assert rubbish and whole


def test_what_others_are_writing_is_not_rubbish(into: Path) -> None:
    mine = into / f".staging-{os.getpid()}-abcd"
    mine.mkdir(parents=True)
    remove_unfinished(into)
    assert mine.exists()


def test_a_store_is_a_source(folder: Path, into: Path) -> None:
    store = Store(folder.parent)
    (store.directory / "alias").symlink_to("tab")
    assert snapshot(store.folder("alias"), "qa", into, ROOM).path.name.startswith("qa@")


def test_a_snapshot_has_all_models(contrast: Path, into: Path) -> None:
    (contrast / "expert" / "README.md").write_text("not read by a server")
    source = check_network(contrast)
    copy = snapshot(contrast, "qa", into, ROOM)
    assert copy.version == source.version
    assert [model.path for model in copy.models] == [copy.path / "expert", copy.path / "antiexpert"]
    assert check_network(copy.path, "qa") == copy
    assert not (copy.path / "expert" / "README.md").exists()
    shutil.rmtree(contrast)
    assert check_network(copy.path, "qa") == copy


def test_models_keep_their_times(contrast: Path, into: Path) -> None:
    copy = snapshot(contrast, "qa", into, ROOM).path
    for folder in (copy, copy / "expert", copy / "antiexpert"):
        assert {path.stat().st_mtime for path in (folder, *folder.iterdir())} == {1e9}


def test_a_model_counts_towards_the_room(contrast: Path, into: Path) -> None:
    total = sum(file.stat().st_size for file in contrast.rglob("*") if file.is_file())
    expert = (contrast / "expert" / WEIGHTS).stat().st_size
    assert "that there is room for" in refusal(contrast, into, total - expert // 2)


def test_a_model_that_is_written_meanwhile_is_refused(
    contrast: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> None:
        with (contrast / "antiexpert" / WEIGHTS).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")

    in_copying(monkeypatch, write, f"expert/{WEIGHTS}")
    assert "being written" in refusal(contrast, into)


def test_a_model_that_becomes_a_link_is_not_followed(
    contrast: Path, into: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")

    def swap() -> None:
        (contrast / "expert").rename(tmp_path / "expert")
        (contrast / "expert").symlink_to(tmp_path / "secret")

    in_copying(monkeypatch, swap, "expert/config.json")
    with pytest.raises(NetworkError):
        snapshot(contrast, "qa", into, ROOM)
    assert not list(into.iterdir())
