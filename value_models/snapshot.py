"""Private copies of networks: what is checked is what is loaded, whatever happens to the store.

A folder that is being written is refused: its files must not change while they are copied, nor in
the second before. So a folder that `cp -r` is filling is never taken, nor one half replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

from value_models.checkpoint import Problem
from value_models.store import (
    MAP_FOLDER,
    MODEL_FOLDERS,
    DirectoryError,
    NetworkError,
    NetworkFolder,
    check_name,
    check_network,
    files_that_count,
    naming,
    refuse_unsafe_files,
    require_network,
)

CHUNK_BYTES = 1 << 20
SETTLE_SECONDS = 1.0
"""`cp -r` opens a file right after it has closed the one before."""
ATTEMPTS = 3
UNFINISHED = re.compile(r"\.staging-(\d+)-[0-9a-f]+")


class _File(NamedTuple):
    """One file of a folder that is held open; equal as long as nobody writes to it."""

    name: str  # relative to the folder
    inode: int
    size: int
    modified: int  # ns
    changed: int  # ns


class _Changed(Exception):
    """A folder is not what it was when it was opened."""


def snapshot(folder: Path, name: str, into: Path, max_bytes: int) -> NetworkFolder:
    """Copy the files that count into a new folder `<into>/<name>@<version>-<hex>`, and check it.

    The copy appears under that name when it is complete and sound, or not at all.

    Args:
        folder: of the network; see `Store.folder`.
        name: what clients will call the network.
        into: a directory on this machine; made if it is not there.
        max_bytes: refuse larger networks before anything is read.

    Raises:
        NetworkError: as `check_network`; too large; being written.
        DirectoryError: `into` cannot be written.
    """
    check_name(name)
    scratch = into / f".staging-{os.getpid()}-{token_hex(4)}"
    try:
        copy_network(folder, name, scratch, max_bytes)
        checked = check_copy(scratch, name, folder)
        path = into / f"{name}@{checked.version}-{token_hex(4)}"
        with _writing(into):
            scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return checked.moved(path)


def check_copy(copy: Path, name: str, folder: Path) -> NetworkFolder:
    """`check_network`, with words about the folder that was copied."""
    try:
        return check_network(copy, name)
    except NetworkError as error:
        raise type(error)(str(error).replace(str(copy), str(folder))) from error.__cause__


def remove_unfinished(directory: Path) -> None:
    """Remove what processes that were killed in `snapshot` have left in `into`."""
    for entry in directory.glob(".staging-*"):
        match = UNFINISHED.fullmatch(entry.name)
        if match and not Path("/proc", match[1]).exists():
            shutil.rmtree(entry, ignore_errors=True)


def copy_network(
    folder: Path, name: str, copy: Path, max_bytes: int | None, *, durable: bool = False
) -> None:
    """Copy the files that count, with their times, into the new folder `copy`.

    Args:
        max_bytes: refuse larger networks before anything is read.
        durable: have all of it on disk before returning.

    Raises:
        NetworkError, DirectoryError: as `snapshot`; `copy` may then hold a part.
    """
    for _ in range(ATTEMPTS):
        with naming(name, folder), _opened(folder) as opened:
            try:
                return _copy(opened, folder, copy, max_bytes, durable)
            except (Problem, _Changed, FileNotFoundError) as error:
                shutil.rmtree(copy, ignore_errors=True)
                if _is_still(opened, folder):
                    if isinstance(error, Problem):
                        raise
                    raise Problem(
                        "it is being written; publish it with `trimtab publish`, or rename it "
                        "into place when it is complete"
                    ) from None
        # Another folder has taken its place as a whole.
    with naming(name, folder):
        raise Problem("it is replaced again and again; try later")


def _copy(opened: int, folder: Path, copy: Path, max_bytes: int | None, durable: bool) -> None:
    root = Path(f"/proc/self/fd/{opened}")  # the very folder, wherever it is moved meanwhile
    require_network(root)
    refuse_unsafe_files(root)
    before = _listing(root)
    if not _is_still(opened, folder):
        raise _Changed  # who has replaced it may be deleting it: files may be missing already
    counting = files_that_count(root)
    files = [file for file in before if file.name in counting]
    total = sum(file.size for file in files)
    if max_bytes is not None and total > max_bytes:
        raise Problem(
            f"its files have {total:,} bytes, more than the {max_bytes:,} that there is room for"
        )
    if max(file.modified for file in before) > time.time_ns() - int(SETTLE_SECONDS * 1e9):
        time.sleep(SETTLE_SECONDS)
        if _listing(root) != before:
            raise _Changed
    for file in before:
        target = copy / file.name
        if file.name in counting:
            with _writing(copy):
                target.parent.mkdir(parents=True, exist_ok=True)
            _copy_file(opened, file, target, durable)
    if _listing(root) != before:
        raise _Changed
    for directory in (*(copy / name for name in (MAP_FOLDER, *MODEL_FOLDERS)), copy):
        if directory.is_dir():
            with _writing(copy):
                modified = (root / directory.relative_to(copy)).stat().st_mtime_ns
                os.utime(directory, ns=(modified, modified))
                if durable:
                    sync_directory(directory)


def _copy_file(opened: int, file: _File, target: Path, durable: bool) -> None:
    # In chunks, not by sendfile or copy_file_range, which stay in the kernel for a whole file.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    chunk = memoryview(bytearray(CHUNK_BYTES))
    copied = 0
    with ExitStack() as files:
        source = files.enter_context(open(os.open(file.name, flags, dir_fd=opened), "rb", 0))
        if os.fstat(source.fileno()).st_ino != file.inode:
            raise _Changed
        with _writing(target):
            out = files.enter_context(target.open("xb", 0))
        while count := source.readinto(chunk):
            copied += count
            if copied > file.size:
                raise _Changed
            written = 0
            with _writing(target):
                while written < count:  # all but the last piece that a full disk takes
                    written += out.write(chunk[written:count])
        with _writing(target):
            os.utime(out.fileno(), ns=(file.modified, file.modified))
            if durable:
                os.fsync(out.fileno())
    if copied != file.size:
        raise _Changed


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on disk: a crash of the machine cannot bring old ones back."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listing(root: Path) -> list[_File]:
    """All files and folders, not only those that count: rsync fills one that does not, and
    renames it."""
    paths = [root, *sorted(root.rglob("*"))]
    return [
        _File(
            path.relative_to(root).as_posix(),
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
        for path in paths
        for status in [path.stat() if path == root else path.lstat()]
    ]


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    if not folder.is_dir():
        require_network(folder)
    descriptor = os.open(folder.resolve(), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_still(opened: int, folder: Path) -> bool:
    """Whether the folder that was opened is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(opened), folder.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DirectoryError(f"{place} cannot be written ({error.strerror or error})") from error
