"""SIGKILL at any moment: the next start finds the old state or the new one."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import httpx
import psutil
import pytest

from server import run_directory
from server.launch import prepare
from server.lifecycle import state_file
from server.lifecycle.state_file import write_state
from server.settings import ENVIRONMENT_VARIABLE, Settings
from tests.models import make_model, make_network
from tests.server.conftest import SMALL
from tests.server.dying import NAME, PUBLISHED, START, changes, live
from tests.server.generating import complete
from tests.server.operator import Operator
from tests.server.serving import Served, serving
from value_models.publish import publish
from value_models.store import Store, check_network

pytestmark = pytest.mark.alone  # a change is killed before it ends, or it tells nothing

KILLS = 24
LATEST = {"load": 0.06, "publish": 0.03, "unload": 0.006}
"""Seconds after a change began; about as long as it takes."""
PREFIX = {"prompt": "Where was Ana Kovac born?", "max_tokens": 16, "temperature": 0}


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


def start(directory: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Do all that a start does before vLLM's: return what would be loaded, and what is withheld.

    Fails where a start would have anything to say about a network.
    """
    os.environ.pop(ENVIRONMENT_VARIABLE, None)
    flags = ["--value-network-dir", directory / "store", "--state-file", directory / "state.json"]
    flags += ["--dtype", "float32"]  # of another one there may be something to say on this machine
    _, launched = prepare([str(flag) for flag in (directory / "target", *flags)])
    assert launched.run_dir is not None
    try:
        settings = Settings.load()
        assert not settings.unloadable and not launched.notes
        # Copies, which are checked once more: they are what the workers would load.
        networks = {name: check_network(path, name) for name, path in settings.networks.items()}
        return {name: network.version for name, network in networks.items()}, settings.withheld
    finally:
        run_directory.remove(launched.run_dir)


def test_a_server_that_is_killed_while_anything_changes(
    directory: Path, versions: dict[str, str]
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.server.dying"])
    draw = random.Random(4)
    planned = list(itertools.islice(changes(), 1000))
    published = START.published
    interrupted: set[str] = set()
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
        networks, withheld = start(directory)
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


def kill(served: Served) -> None:
    """Kill every process of the server; none has a moment to tidy up."""
    parent = psutil.Process(served.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()  # or the first to die would be noticed by the others
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    served.process.wait()
    psutil.wait_procs(processes)


def run_dir_of(served: Served) -> Path:
    for child in psutil.Process(served.process.pid).children(recursive=True):
        exported = child.environ().get(ENVIRONMENT_VARIABLE)
        if exported is not None and json.loads(exported)["run_dir"]:
            return Path(json.loads(exported)["run_dir"])
    raise AssertionError("no process of the server has settings")


def test_a_real_server_that_is_killed_while_it_loads(
    directory: Path, versions: dict[str, str], tmp_path: Path
) -> None:
    flags = ("--value-network-dir", directory / "store", "--state-file", directory / "state.json")
    (directory / "state.json").unlink(missing_ok=True)
    draw = random.Random(5)
    target = directory / "target"
    sources = ("a", "b")
    with serving(tmp_path / "first", target, *flags) as served:
        run_dir = run_dir_of(served)
        answers = {}
        with httpx.Client(base_url=served.url, timeout=60) as client:
            for source in sources:
                Operator(client).load(NAME, source)
                answers[versions[source]] = complete(client, PREFIX | {"model": NAME}).token_ids
        swap_until_killed(served, sources, draw.uniform(0.5, 1.5))
    assert run_dir.exists()  # nobody was left to remove it

    with serving(tmp_path / "second", target, *flags) as served:
        assert not run_dir.exists()
        with httpx.Client(base_url=served.url, timeout=60) as client:
            operator = Operator(client)
            resident = operator.resident()
            assert set(resident) == {"a", "b", PUBLISHED, NAME}
            (version,) = resident[NAME]
            assert complete(client, PREFIX | {"model": NAME}).token_ids == answers[version]
            info = operator.describe(NAME)
            assert (info["state"], info["load"]) == ("ready", None)
        swap_until_killed(served, sources, draw.uniform(0, 1))
    networks, withheld = start(directory)
    assert networks[NAME] in answers and not withheld


def swap_until_killed(served: Served, sources: tuple[str, ...], seconds: float) -> None:
    """Replace `qa` again and again, and kill the server in the middle of it."""

    def swap() -> None:
        with httpx.Client(base_url=served.url, timeout=60) as client, suppress(httpx.HTTPError):
            for source in itertools.cycle(sources):
                Operator(client).load(NAME, source)

    swapping = threading.Thread(target=swap)
    swapping.start()
    time.sleep(seconds)
    kill(served)
    swapping.join()
