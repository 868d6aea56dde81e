"""How an API process has networks' folders read: by a child process, at low priority.

Reading, hashing, checking and copying take seconds, and whatever a folder holds must not harm the
server. A folder that crashes the child costs that one request, and the child is replaced.

What the child does is in `server.lifecycle.folders`. What it imports takes seconds, so where there
is one API process it is started before the engine, which takes longer (`start_early`).
"""

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from server.settings import ENVIRONMENT_VARIABLE, KEY_VARIABLES, Settings
from value_models.store import NetworkError, NoSuchNetwork, Role, check_name

log = logging.getLogger("trimtab")

MODULE = "server.lifecycle.folders"
PATIENCE_SECONDS = 300.0
"""How long any request may take before the child is taken to hang, beside what it copies."""
IMPORT_SECONDS = 60.0
"""How long a server's start waits for the child's imports, which take seconds."""
BYTES_PER_SECOND = 2e6
"""What copying is always faster than, on a machine that is busy."""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
READY = 0
"""The id of the child's first line: it has imported what it needs."""


class StagingError(RuntimeError):
    """Not the network is at fault: the child died, the store cannot be read, there is no room."""


class ModelFacts(BaseModel):
    """What decides the memory that one model of a network takes."""

    role: Role
    num_parameters: int
    kv_shape: tuple[int, int, int]
    """Layers, KV heads, head size."""
    vocab_size: int
    max_context: int


class NetworkFacts(BaseModel):
    """What a checked folder of the store says about its network."""

    name: str
    source: str
    kind: str
    scale: float
    vocab_size: int
    max_context: int
    num_bytes: int
    """Size of all weight files."""
    models: tuple[ModelFacts, ...]
    mapped: bool
    """It has another vocabulary than the target, and a sound map to the target's."""


class StagedNetwork(NetworkFacts):
    """A network that was copied into the run directory."""

    version: str
    folder: Path


class Stager:
    """Asks a child process of this one; to be used from one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._child: _Child | None = None
        self._closed = False
        self._unowned: set[asyncio.Future[Any]] = set()

    def start(self) -> None:
        """Start the child, which then imports what it needs. Only within a running event loop."""
        self._child = _Child(_take_early() or _spawn(self._settings), self._replace)

    async def ready(self) -> None:
        """Wait until the child has imported what loads need, or has ended, if there is a store.

        Beside decoding that keeps all cores busy, it would take longer than a load may last.
        """
        if self._child is None or self._settings.store is None:
            return
        try:
            await asyncio.wait_for(self._child.settled.wait(), IMPORT_SECONDS)
        except TimeoutError:
            log.warning("the process that reads networks' folders is not ready yet")

    async def inspect(self, source: str, name: str) -> NetworkFacts:
        """Check a folder of the store, all but the contents of its weights.

        Args:
            source: name of the folder.
            name: what clients will call the network.

        Raises:
            NetworkError: it cannot be served; `NoSuchNetwork` if there is none.
            StagingError: the store cannot be read, or the child failed.
        """
        check_name(source)
        check_name(name)
        return NetworkFacts(**await self._ask("inspect", source=source, name=name))

    async def stage(self, source: str, name: str, max_bytes: int) -> StagedNetwork:
        """Check a folder of the store as a whole, and copy it into the run directory.

        If the caller is cancelled, the copy is deleted.

        Args:
            source: name of the folder.
            name: what clients will call the network.
            max_bytes: refuse a network with larger files before anything is read.

        Raises:
            NetworkError, StagingError: as `inspect`.
        """
        check_name(source)
        check_name(name)
        staging = asyncio.ensure_future(
            self._ask("stage", source=source, name=name, max_bytes=max_bytes)
        )
        try:
            return StagedNetwork(**await asyncio.shield(staging))
        except asyncio.CancelledError:
            self._later(self._discard_unowned(staging))
            raise

    async def list(self) -> list[str]:
        """Return the names of the networks in the store now. Raises `StagingError`."""
        try:
            names: list[str] = await self._ask("list")
        except NetworkError as error:
            raise StagingError(str(error)) from None
        return names

    async def remove(self, source: str) -> None:
        """Delete a network from the store.

        Raises:
            NetworkError: the store cannot be written; `NoSuchNetwork` if there is none.
            StagingError: the child failed.
        """
        check_name(source)
        await self._ask("remove", source=source)

    async def discard(self, folder: Path, weights_only: bool) -> None:
        """Delete a snapshot, or only its weights: maps and tokenizer are still read.

        Raises:
            StagingError: that is no snapshot, or the child failed.
        """
        await self._ask("discard", folder=str(folder), weights_only=weights_only)

    async def close(self) -> None:
        """End the child."""
        self._closed = True
        for task in list(self._unowned):
            task.cancel()
        if self._child is not None:
            self._child.kill()

    async def _ask(self, method: str, **arguments: Any) -> Any:
        if self._closed:
            raise StagingError("the server is stopping")
        if self._child is None:
            self.start()
        assert self._child is not None
        patience = PATIENCE_SECONDS + arguments.get("max_bytes", 0) / BYTES_PER_SECOND
        answer = await self._child.ask({"method": method, **arguments}, patience)
        if "result" in answer:
            return answer["result"]
        raise _REFUSALS[answer["refused"]](answer["because"])

    async def _discard_unowned(self, staging: "asyncio.Future[Any]") -> None:
        with suppress(NetworkError, StagingError):
            staged = StagedNetwork(**await staging)
            await self.discard(staged.folder, weights_only=False)

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._unowned.add(task)
        task.add_done_callback(self._unowned.discard)

    def _replace(self, child: "_Child") -> None:
        """A child has ended: start the next one, unless it would end in the same way."""
        if self._child is child:
            self._child = None
            if child.has_answered and not self._closed:
                self.start()


class _Child:
    """One child process and the answers that it owes.

    Attributes:
        has_answered: anything, so what it has imported is sound.
        settled: it has imported what it needs, or has ended.
    """

    def __init__(
        self, process: "subprocess.Popen[bytes]", ended: Callable[["_Child"], None]
    ) -> None:
        self.has_answered = False
        self.settled = asyncio.Event()
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._next_id = READY + 1
        self._owed: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reason = ""
        self._process = process
        # Neither event loop has pipes that can be opened without waiting.
        threading.Thread(target=self._listen, daemon=True, name="staging").start()

    async def ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        """Return the child's answer. Raises `StagingError` if there will be none."""
        identity, self._next_id = self._next_id, self._next_id + 1
        owed = self._owed[identity] = self._loop.create_future()
        line = json.dumps({"id": identity, **request}) + "\n"
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then `_listen` ends too, and says why
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        try:
            return await asyncio.wait_for(owed, patience)
        except TimeoutError:
            self._reason = f"it did not answer for {patience:.0f} s"
            self.kill()
            raise StagingError(f"a network's folder cannot be read: {self._reason}") from None
        finally:
            self._owed.pop(identity, None)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    def _listen(self) -> None:
        """In a thread: pass each line on to the event loop."""
        assert self._process.stdout is not None
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            for line in self._process.stdout:
                self._loop.call_soon_threadsafe(self._hear, line)
            code = self._process.wait()
            self._loop.call_soon_threadsafe(self._give_up, code)

    def _hear(self, line: bytes) -> None:
        try:
            answer = json.loads(line)
            identity = answer["id"]
        except (ValueError, KeyError, TypeError):
            self._reason = "it made no sense"
            return self.kill()
        self.has_answered = True
        if identity == READY:
            self.settled.set()
        owed = self._owed.get(identity)
        if owed is not None and not owed.done():
            owed.set_result(answer)

    def _give_up(self, code: int) -> None:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        reason = self._reason or how
        for owed in self._owed.values():
            if not owed.done():
                owed.set_exception(
                    StagingError(f"the process that reads networks' folders ended ({reason})")
                )
        self.settled.set()
        self._ended(self)


_REFUSALS: dict[str, Callable[[str], Exception]] = {
    "network": NetworkError,
    "missing": NoSuchNetwork,
    "staging": StagingError,
}

_early: "subprocess.Popen[bytes] | None" = None


def start_early(settings: Settings) -> None:
    """Start the child of this process's first `Stager` before there is an event loop."""
    global _early
    _early = _spawn(settings)


def _take_early() -> "subprocess.Popen[bytes] | None":
    global _early
    process, _early = _early, None
    # It is the first to go when memory is short, which it may be while an engine starts.
    return process if process is not None and process.poll() is None else None


def _spawn(settings: Settings) -> "subprocess.Popen[bytes]":
    own = Settings(
        networks={},
        key="",
        tokenizer_fingerprint=settings.tokenizer_fingerprint,
        store=settings.store,
        run_dir=settings.run_dir,
    )
    inherited = {name: value for name, value in os.environ.items() if name not in KEY_VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-m", MODULE],
        env=inherited | ONE_THREAD | {ENVIRONMENT_VARIABLE: own.model_dump_json()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
