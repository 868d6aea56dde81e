"""SIGKILL at any moment: the next start finds the old state or the new one.

Of a whole server, with its engine: `test_restart`.
"""

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from server.lifecycle import state_file
from server.lifecycle.state_file import write_state
from server.settings import ENVIRONMENT_VARIABLE
from tests.models import make_model, make_network
from tests.server.conftest import SMALL
from tests.server.dying import NAME, PUBLISHED, START, changes, live, start
from value_models.publish import publish
from value_models.store import Store, check_network

pytestmark = pytest.mark.alone  # a change is killed before it ends, or it tells nothing

KILLS = 24
LATEST = {"load": 0.06, "publish": 0.03, "unload": 0.006}
"""Seconds after a change began; about as long as it takes."""


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Undo what is set for the processes that vLLM would start."""
    with mock.patch.dict(os.environ):
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a store with `a`, `b` and `news`, and two versions of `news` to be published."""
    directory = tmp_path_factory.mktemp("killed")
    make_model(directory / "target", vocab_size=544)
    for seed, name in enumerate(("store/a", "store/b", "v1", "v2")):
        make_network(directory / name, **SMALL, seed=seed)
    publish(directory / "v1", directory / "store", PUBLISHED)
    return directory


@pytest.fixture(scope="module")
def versions(directory: Path) -> dict[str, str]:
    folders = {"a": "store/a", "b": "store/b", "v1": "v1", "v2": "v2"}
    return {name: check_network(directory / folder).version for name, folder in folders.items()}


def test_a_server_that_is_killed_while_anything_changes(
    directory: Path, versions: dict[str, str]
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.server.dying"])
    draw = random.Random(4)
    planned = list(itertools.islice(changes(), 1000))
    published = START.published
    interrupted: set[str] = set()
    flags = ("--value-network-dir", directory / "store", "--state-file", directory / "state.json")
    for kill in range(KILLS):
        write_state(directory / "state.json", state_file.State())  # nothing is loaded
        pipe, theirs = context.Pipe(duplex=False)
        process = context.Process(target=live, args=(theirs, directory))
        process.start()
        theirs.close()
        run_dir = Path(pipe.recv())
        began = 0
        while began < kill % 6:
            began = pipe.recv()
        time.sleep(draw.uniform(0, LATEST[planned[began].kind]))
        assert process.pid is not None and process.is_alive()
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        with suppress(EOFError):
            while True:
                began = pipe.recv()

        interrupted.add(planned[began].kind)
        old, new = [START, *(change.to for change in planned)][began : began + 2]
        if all(change.kind != "publish" for change in planned[:began]):
            old = old._replace(published=published)
        if all(change.kind != "publish" for change in planned[: began + 1]):
            new = new._replace(published=published)
        networks, withheld = start(directory / "target", *flags)
        found = [
            state
            for state in (old, new)
            if networks == ({NAME: versions[state.resident]} if state.resident else {})
            and withheld == ((NAME,) if state.withheld else ())
            and store_version(directory) == versions[state.published]
        ]
        assert found, f"{networks}, {withheld}: neither {old} nor {new}"
        assert not run_dir.exists()
        published = found[0].published
    assert {"load", "publish"} <= interrupted  # an unload is over in no time

    # What was being published is no network, and is tidied up by the next who publishes.
    assert Store(directory / "store").names() == ["a", "b", PUBLISHED]
    publish(directory / "v1", directory / "store", PUBLISHED)
    left = {entry.name for entry in (directory / "store").iterdir() if entry.is_dir()}
    assert left == {"a", "b", PUBLISHED}


def store_version(directory: Path) -> str:
    return Store(directory / "store").check(PUBLISHED).version
