"""A server without an engine, for tests that kill it, and what its next start would find.

What it does on disk is a server's own: lifecycle, state file, leases, copies and publishing are
real. The workers are simulated, and what the stager's child does happens in a thread, since both
die at once when a server is killed.
"""

import asyncio
import itertools
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from server import run_directory
from server.launch import prepare
from server.lifecycle.catalog import Catalog
from server.lifecycle.folders import Folders
from server.lifecycle.leases import Leases
from server.lifecycle.lifecycle import Lifecycle
from server.lifecycle.staging import NetworkFacts, StagedNetwork
from server.settings import ENVIRONMENT_VARIABLE, Settings
from tests.models import make_tokenizer
from tests.server.networks import Engines, Worker
from value_models.manifest import tokenizer_fingerprint
from value_models.publish import publish
from value_models.store import check_network

NAME = "qa"
PUBLISHED = "news"


class State(NamedTuple):
    """What is to be found after a restart."""

    resident: str | None  # the source of what is loaded as `qa`
    withheld: bool
    published: str  # the folder of which `news` in the store is a copy


START = State(None, False, "v1")


class Change(NamedTuple):
    """Something that an operator does, and the state that it leads to from the one before."""

    kind: str
    source: str | None
    to: State


def changes() -> Iterator[Change]:
    """All that is done to a server: each load, replacement, unload and publication, in turn."""
    state = START
    for kind, source in itertools.cycle(
        (
            ("load", "a"),
            ("publish", "v2"),
            ("load", "b"),
            ("load", "a"),
            ("publish", "v1"),
            ("unload", None),
        )
    ):
        if kind == "publish":
            assert source is not None
            state = state._replace(published=source)
        else:
            state = state._replace(resident=source, withheld=kind == "unload")
        yield Change(kind, source, state)


class _InThread:
    """Does what a stager's child does, in a thread of this process."""

    def __init__(self, settings: Settings) -> None:
        self._folders = Folders(settings)

    async def inspect(self, source: str, name: str) -> NetworkFacts:
        return NetworkFacts(**await asyncio.to_thread(self._folders.inspect, source, name))

    async def stage(self, source: str, name: str, max_bytes: int) -> StagedNetwork:
        staged = await asyncio.to_thread(self._folders.stage, source, name, max_bytes)
        return StagedNetwork(**staged)

    async def list(self) -> Any:
        return await asyncio.to_thread(self._folders.list)

    async def remove(self, source: str) -> None:
        await asyncio.to_thread(self._folders.remove, source)

    async def discard(self, folder: Path, weights_only: bool) -> None:
        await asyncio.to_thread(self._folders.discard, str(folder), weights_only)


def live(pipe: Connection, directory: Path) -> None:
    """Be the server, until killed. Sends its run directory, and then the number of each change in
    `changes` before that begins."""
    os.setsid()
    asyncio.run(_live(pipe, directory))


async def _live(pipe: Connection, directory: Path) -> None:
    run_dir = run_directory.create(token_hex(8), 1 << 20)
    settings = Settings(
        networks={},
        key="",
        tokenizer_fingerprint=tokenizer_fingerprint(make_tokenizer()),
        store=directory / "store",
        run_dir=run_dir,
        state_file=directory / "state.json",
    )
    workers = Engines([Worker(total_bytes=1 << 40)])
    stager: Any = _InThread(settings)
    lifecycle = Lifecycle(settings, Catalog(workers.call), Leases(run_dir), stager, ["target"])
    await lifecycle.start()
    pipe.send(str(run_dir))
    for number, change in enumerate(changes()):
        pipe.send(number)
        if change.kind == "publish":
            folder = directory / str(change.source)
            await asyncio.to_thread(publish, folder, directory / "store", PUBLISHED)
        elif change.kind == "load":
            await lifecycle.load(NAME, change.source, "test")
            while (info := await lifecycle.describe(NAME)).load is not None:
                assert info.load is not None and info.load.state == "loading", info
                await asyncio.sleep(0.001)
        else:
            await lifecycle.unload(NAME, remove=False, request_id="test")


def start(target: Path, *flags: object) -> tuple[dict[str, str], tuple[str, ...]]:
    """Do all that a start does before vLLM's: return what would be loaded, and what is withheld.

    Fails where a start would have anything to say about a network.
    """
    os.environ.pop(ENVIRONMENT_VARIABLE, None)
    # Of another number format there may be something to say on this machine.
    _, launched = prepare([str(word) for word in (target, *flags, "--dtype", "float32")])
    assert launched.run_dir is not None
    try:
        settings = Settings.load()
        assert not settings.unloadable and not launched.notes
        # Copies, which are checked once more: they are what the workers would load.
        networks = {name: check_network(path, name) for name, path in settings.networks.items()}
        return {name: network.version for name, network in networks.items()}, settings.withheld
    finally:
        run_directory.remove(launched.run_dir)
