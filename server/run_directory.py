"""The directory that one server's processes share while it runs: `trimtab-<instance>`.

| name | what it is |
| --- | --- |
| `alive` | locked by the launched process for its life |
| `networks/` | snapshots of value networks: `<name>@<version>-<hex>` |
| `token-bytes` | what the target's tokens spell: `server.token_bytes` |
| `explain/` | what guidance did to running requests that asked, a file each |
| `epoch`, `lock`, `building`, `process-*` | how API processes agree: `server.lifecycle.leases` |

It lies in memory where there is room, so that a decoding step never waits for a disk. The parent of
the server removes it; what a killed parent leaves is removed when the next server starts.
"""

import fcntl
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

ALIVE = "alive"
NETWORKS = "networks"
TOKEN_BYTES = "token-bytes"
EXPLAIN = "explain"
NAME = re.compile(r"trimtab-[0-9a-f]{16}")
SHARED_MEMORY = Path("/dev/shm")

_locks: dict[Path, int] = {}
"""Descriptors that keep `alive` locked until this process ends."""


def create(instance: str, num_bytes: int) -> Path:
    """Make the run directory of this process, and remove those of servers that are no more.

    Args:
        instance: of the server; see `server.settings.instance_id`.
        num_bytes: how much it must be able to hold to lie in memory.

    Raises:
        OSError: it cannot be made.
    """
    places = _places()
    for place in places:
        _remove_stale(place)
    directory = _place_with_room(places, num_bytes) / f"trimtab-{instance}"
    while True:
        directory.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(directory / ALIVE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            continue  # another server took it for a stale one, before it was locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_there(directory / ALIVE, lock):
            break
        os.close(lock)
    _locks[directory] = lock
    for name in (NETWORKS, EXPLAIN):
        (directory / name).mkdir(mode=0o700)
    return directory


def remove(directory: Path) -> None:
    """Remove a run directory, and nothing else. Nothing happens if it is gone."""
    if not NAME.fullmatch(directory.name):
        raise ValueError(f"{directory} is no run directory")
    shutil.rmtree(directory, ignore_errors=True)
    lock = _locks.pop(directory, None)
    if lock is not None:
        os.close(lock)


def _places() -> list[Path]:
    writable = [SHARED_MEMORY] if os.access(SHARED_MEMORY, os.W_OK | os.X_OK) else []
    return [*writable, Path(tempfile.gettempdir())]


def _place_with_room(places: list[Path], num_bytes: int) -> Path:
    """The first place with room, or else the last, which is on disk."""
    roomy = (place for place in places if shutil.disk_usage(place).free >= num_bytes)
    return next(roomy, places[-1])


def _remove_stale(place: Path) -> None:
    for directory in place.glob("trimtab-*"):
        try:
            status = directory.lstat()
            if (
                not NAME.fullmatch(directory.name)
                or not stat.S_ISDIR(status.st_mode)
                or status.st_uid != os.getuid()
            ):
                continue
            lock = os.open(directory / ALIVE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            continue  # gone already, or not to be touched
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its server lives
        else:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)


def _is_there(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
