"""What the API processes of one server tell each other: who still needs which version.

They share the server's run directory (`Settings.run_dir`), and in it:

- `lock` and `building`: what only one task of one of them has at a time, as a `flock`;
- `epoch`: a counter, odd while such a change is made. Whoever finds it even and new asks the
  workers what they hold now;
- `process-<pid>-<hex>`: one for each API process, locked for as long as that lives. It holds the
  last epoch that the process has acted upon, and how many leases it holds on each version.

A version that is draining is in use until every living process has seen that it is, and holds no
lease on it. The kernel frees the locks of a process that dies, however it dies.
"""

import asyncio
import fcntl
import mmap
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from copy import copy
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex

CHANGES = "lock"
"""The lock for changes of what the workers hold, each of them short."""
BUILDING = "building"
"""The lock for building a network, which takes a share of every step of the workers."""
LOCK_POLL_SECONDS = 0.01
NUM_SLOTS = 1023
"""Versions that one process can hold leases on at a time."""
PROCESS_BYTES = 8 * (1 + 2 * NUM_SLOTS)


class Lease:
    """One request's hold on versions; counted once, however many parts of the request share it."""

    def __init__(self, leases: "Leases", references: tuple[str, ...]) -> None:
        self._hold: _Hold | None = _Hold(leases, references)
        self._hold.enter()

    def share(self) -> "Lease":
        """Return a lease of its own for another part of the request; this one is not released."""
        assert self._hold is not None
        shared = copy(self)
        self._hold.enter()
        return shared

    @property
    def released(self) -> bool:
        return self._hold is None

    def release(self) -> None:
        """Give it up; again, it does nothing."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.leave()


class _Hold:
    """What the leases of one request have in common."""

    def __init__(self, leases: "Leases", references: tuple[str, ...]) -> None:
        self._leases = leases
        self._references = references
        self._sharers = 0

    def enter(self) -> None:
        self._sharers += 1
        if self._sharers == 1:
            self._count(+1)

    def leave(self) -> None:
        self._sharers -= 1
        if not self._sharers:
            self._count(-1)

    def _count(self, change: int) -> None:
        for reference in self._references:
            self._leases._count(reference, change)


class Leases:
    """One API process among those of its server.

    Attributes:
        owner: the process' name, by which others find out whether it lives.
    """

    def __init__(self, run_dir: Path) -> None:
        """Join the processes that share `run_dir`. Raises `OSError`."""
        self._run_dir = run_dir
        self._epoch = _map_words(run_dir / "epoch", os.O_CREAT, 8)
        self.owner = f"process-{os.getpid()}-{token_hex(4)}"
        # Not by its own name before it is locked: it would look like a dead process' file.
        unlocked = run_dir / f".{self.owner}"
        self._alive = _open(unlocked, os.O_CREAT | os.O_EXCL)
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._words = _map_words(unlocked, 0, PROCESS_BYTES)
        unlocked.rename(run_dir / self.owner)
        self._slots: dict[str, int] = {}

    @property
    def epoch(self) -> int:
        """Grows with every change; odd while one is made."""
        return self._epoch[0]

    @property
    def seen(self) -> int:
        """The last epoch that this process has acted upon."""
        return self._words[0]

    def see(self, epoch: int) -> None:
        """Declare that this process takes no new lease on what was draining in `epoch`."""
        self._words[0] = max(epoch, self.seen)

    @property
    def outdated(self) -> bool:
        """Whether something has changed that this process has not seen."""
        epoch = self.epoch
        return epoch % 2 == 0 and epoch != self.seen

    def take(self, references: Iterable[str]) -> Lease:
        """Hold versions, each `name@version`.

        It must be taken in the turn of the event loop in which the catalog named the versions.
        """
        return Lease(self, tuple(references))

    def count(self, reference: str) -> int:
        """Return how many leases living processes hold on a version."""
        key = _key(reference)
        return sum(_count_in(words, key) for words in self._living())

    def drained(self, reference: str, epoch: int) -> bool:
        """Whether nobody needs a version, which was draining in `epoch`, any more."""
        key = _key(reference)
        return all(words[0] >= epoch and not _count_in(words, key) for words in self._living())

    def lives(self, owner: str) -> bool:
        """Whether the process that calls itself `owner` is still there."""
        with _probing(self._run_dir / Path(owner).name) as alive:
            return alive

    @asynccontextmanager
    async def locked(self, name: str) -> AsyncIterator[None]:
        """Hold a lock that only one task of one of the processes has at a time.

        However its holder ends, the kernel frees it as the file is closed; waiting tasks own
        nothing that another one could lose.
        """
        descriptor = _open(self._run_dir / name, os.O_CREAT)
        try:
            while not _try_lock(descriptor, fcntl.LOCK_EX):
                await asyncio.sleep(LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def announcing(self) -> Iterator[int]:
        """Announce, at the end, that what the workers hold has changed; needs the lock `CHANGES`.

        Yields the epoch that it will be.
        """
        # Odd now: who began the last change died in the midst of it, and nobody has heard of it.
        self._epoch[0] += 1 + self.epoch % 2
        try:
            yield self.epoch + 1
        finally:
            self._epoch[0] += 1

    def announce_for_the_dead(self) -> None:
        """Announce a change whose maker died before it could; does nothing if it lives."""
        if self.epoch % 2 == 0:
            return
        descriptor = _open(self._run_dir / CHANGES, os.O_CREAT)
        try:
            if _try_lock(descriptor, fcntl.LOCK_EX) and self.epoch % 2:
                self._epoch[0] += 1
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Leave, as the process does when it ends."""
        (self._run_dir / self.owner).unlink(missing_ok=True)
        os.close(self._alive)

    def _count(self, reference: str, change: int) -> None:
        slot = self._slots.get(reference)
        if slot is None:
            slot = self._slots[reference] = self._free_slot()
            self._words[slot] = _key(reference)
        self._words[slot + 1] += change
        if not self._words[slot + 1]:
            del self._slots[reference]

    def _free_slot(self) -> int:
        taken = set(self._slots.values())
        return next(slot for slot in range(1, len(self._words), 2) if slot not in taken)

    def _living(self) -> Iterator[memoryview]:
        """Yield what each living process declares; remove the files of others."""
        for file in self._run_dir.glob("process-*"):
            with _probing(file) as alive, suppress(FileNotFoundError):
                if not alive:
                    file.unlink()
                    continue
                yield self._words if file.name == self.owner else _map_words(file, 0, PROCESS_BYTES)


def _key(reference: str) -> int:
    return int.from_bytes(blake2b(reference.encode(), digest_size=8).digest(), "little")


def _count_in(words: memoryview, key: int) -> int:
    total = 0
    for slot in range(1, len(words), 2):
        if not words[slot]:  # slots are taken in order: there is nothing behind
            break
        if words[slot] == key:
            total += words[slot + 1]
    return total


def _open(file: Path, flags: int) -> int:
    return os.open(file, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)


def _map_words(file: Path, flags: int, num_bytes: int) -> memoryview:
    """Map a file that processes share, as unsigned words: each is read and written as a whole."""
    descriptor = _open(file, flags)
    try:
        if os.fstat(descriptor).st_size < num_bytes:
            os.ftruncate(descriptor, num_bytes)
        return memoryview(mmap.mmap(descriptor, num_bytes)).cast("Q")
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _probing(file: Path) -> Iterator[bool]:
    """Say whether the process that `file` is of lives: it holds the lock."""
    try:
        descriptor = _open(file, 0)
    except FileNotFoundError:
        yield False
        return
    try:
        # Shared: two that probe at once must not take each other for the owner.
        yield not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)
