"""Putting networks into a store and taking them out, as servers and killers see it: at once.

A network is copied to a name that no server sees, checked there, and renamed. Whoever is killed in
the midst leaves the old folder or the new one, and rubbish that the next one removes. A lock in the
store keeps publishers apart.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from value_models.manifest import MANIFEST_FILE
from value_models.snapshot import check_copy, copy_network, sync_directory
from value_models.store import (
    DirectoryError,
    NetworkError,
    NetworkFolder,
    NoSuchNetwork,
    Store,
    check_name,
    check_network,
)

LOCK_FILE = ".lock"
LOCK_SECONDS = 30.0
RUBBISH = re.compile(r"\.(publishing|removing)-[0-9a-f]{8}")
REPLACED = re.compile(r"\.replaced-[0-9a-f]{8}-(.+)")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def publish(
    folder: str | Path, store: str | Path, name: str | None = None, *, replace: bool = True
) -> NetworkFolder:
    """Put a network into a store; servers load it whole or not at all.

    Args:
        folder: of the network. What a server does not read is left out.
        store: the directory of value networks.
        name: of its folder in the store; by default the folder's own.
        replace: take the place of the network that has this name. Requests that use the old one
            are not touched: servers hold copies.

    Raises:
        NetworkError: the network is not sound; the name is taken.
        DirectoryError: the store is not there, cannot be written, or is locked.
    """
    folder = Path(folder).resolve()
    name = check_name(folder.name if name is None else name)
    directory = Store(store).directory
    check_network(folder, name, with_version=False)
    entry = directory / name
    with _writing(directory), _locked(directory):
        _refuse_taken(entry, replace)
        scratch = directory / f".publishing-{token_hex(4)}"
        try:
            copy_network(folder, name, scratch, None, durable=True)
            network = check_copy(scratch, name, folder)
            _refuse_taken(entry, replace)  # the lock does not keep `cp` out
            if os.path.lexists(entry):
                _exchange(scratch, entry)
            else:
                scratch.rename(entry)
            sync_directory(directory)
        finally:
            _delete(scratch)
    return network.moved(entry)


def remove(store: str | Path, name: str) -> None:
    """Delete a network from a store. A link is removed, not what it leads to.

    Raises:
        NoSuchNetwork: there is none of this name.
        NetworkError: it is no name.
        DirectoryError: the store is not there, cannot be written, or is locked.
    """
    directory = Store(store).directory
    entry = directory / check_name(name)
    with _writing(directory), _locked(directory):
        if not (entry / MANIFEST_FILE).is_file():
            raise NoSuchNetwork(f"value network {name!r} in {entry}: there is no such network")
        rubbish = directory / f".removing-{token_hex(4)}"
        entry.rename(rubbish)
        sync_directory(directory)
        _delete(rubbish)


def _refuse_taken(entry: Path, replace: bool) -> None:
    if not os.path.lexists(entry):
        return
    if not replace:
        raise NetworkError(f"value network {entry.name!r} in {entry}: it is there already")
    if not (entry / MANIFEST_FILE).is_file():
        raise NetworkError(
            f"value network {entry.name!r} in {entry}: something is there that is no network; "
            "move it away"
        )


def _exchange(new: Path, old: Path) -> None:
    """Swap two names in one step; where the file system cannot, in three."""
    RENAME_EXCHANGE, AT_FDCWD = 2, -100
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        failed = renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE)
        if not failed:
            return
        if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(old))
    # Killed between the first two, the next publisher puts the old one back (`_clean_up`).
    replaced = old.with_name(f".replaced-{token_hex(4)}-{old.name}")
    old.rename(replaced)
    new.rename(old)
    replaced.rename(new)


def _clean_up(directory: Path) -> None:
    """Remove what publishers that were killed have left. Only under the lock."""
    for entry in directory.iterdir():
        replaced = REPLACED.fullmatch(entry.name)
        if replaced and not os.path.lexists(directory / replaced[1]):
            entry.rename(directory / replaced[1])
        elif replaced or RUBBISH.fullmatch(entry.name):
            _delete(entry)


def _delete(entry: Path) -> None:
    if entry.is_symlink():
        entry.unlink()
    else:
        shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other publishers out, then clean up after those that were killed."""
    with open(os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666), "rb", 0) as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DirectoryError(
                        f"{directory} is being written by another process; try again"
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break  # nobody can tell what is rubbish
            else:
                _clean_up(directory)
                break
        yield


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DirectoryError(
            f"value network directory {directory}: it cannot be written ({error.strerror or error})"
        ) from error
