import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from server.lifecycle import staging
from server.lifecycle.staging import Stager, StagingError
from server.settings import Settings
from tests.server.lifecycle.conftest import settings_of
from value_models.store import NetworkError, NoSuchNetwork, check_network

ROOM = 1 << 30
in_one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stager(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stager]:
    directory = tmp_path_factory.mktemp("stager")
    shutil.copytree(pristine, directory / "store")
    stager = Stager(settings_of(directory))
    stager.start()
    yield stager
    await stager.close()


def pid_of(stager: Stager) -> int:
    assert stager._child is not None
    return stager._child._process.pid


def staged_by(stager: Stager) -> list[Path]:
    assert stager._settings.run_dir is not None
    return list((stager._settings.run_dir / "networks").iterdir())


async def until_replaced(stager: Stager, pid: int) -> None:
    while stager._child is None or pid_of(stager) == pid:
        await asyncio.sleep(0.01)


@in_one_loop
async def test_a_child_does_it(stager: Stager) -> None:
    assert await stager.list() == ["mapped", "qa"]
    facts = await stager.inspect("qa", "answers")
    staged = await stager.stage("qa", "answers", ROOM)
    assert facts.model_dump().items() <= staged.model_dump().items()
    assert check_network(staged.folder, "answers").version == staged.version
    await stager.discard(staged.folder, weights_only=False)
    assert not staged_by(stager)


@in_one_loop
async def test_many_may_ask_at_once(stager: Stager) -> None:
    answers = await asyncio.gather(
        stager.list(),
        stager.inspect("qa", "a"),
        stager.inspect("mapped", "b"),
        stager.inspect("none", "c"),
        *(stager.stage("qa", f"d{i}", ROOM) for i in range(3)),
        return_exceptions=True,
    )
    assert [answers[1].name, answers[2].name] == ["a", "b"]
    assert isinstance(answers[3], NoSuchNetwork)
    assert [staged.name for staged in answers[4:]] == ["d0", "d1", "d2"]
    for staged in answers[4:]:
        await stager.discard(staged.folder, weights_only=False)


@in_one_loop
@pytest.mark.parametrize("name", ["", "..", "../store/qa", "/qa", ".qa", "qa/../qa", "a\0b", "q\n"])
async def test_what_is_no_name_goes_nowhere(
    stager: Stager, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stager, "_ask", None)
    for asking in (
        stager.inspect(name, "qa"),
        stager.inspect("qa", name),
        stager.stage(name, "qa", ROOM),
        stager.stage("qa", name, ROOM),
        stager.remove(name),
    ):
        with pytest.raises(NetworkError, match="is no name"):
            await asking


@in_one_loop
async def test_refusals_keep_their_kind(stager: Stager, tmp_path: Path) -> None:
    with pytest.raises(NoSuchNetwork, match="no such folder"):
        await stager.stage("none", "none", ROOM)
    with pytest.raises(NetworkError, match="that there is room for"):
        await stager.stage("qa", "qa", 1000)
    with pytest.raises(NoSuchNetwork):
        await stager.remove("none")
    with pytest.raises(StagingError, match="is no snapshot"):
        await stager.discard(tmp_path, weights_only=False)
    store = stager._settings.store
    assert store is not None
    store.rename(store.with_name("moved"))
    for asking in (stager.list(), stager.inspect("qa", "qa"), stager.stage("qa", "qa", ROOM)):
        with pytest.raises(StagingError, match="no such directory"):
            await asking
    with pytest.raises(NetworkError, match="no such directory"):
        await stager.remove("qa")
    store.with_name("moved").rename(store)
    assert await stager.list() == ["mapped", "qa"]


@in_one_loop
async def test_nobody_wants_what_a_cancelled_caller_had_staged(stager: Stager) -> None:
    staging_it = asyncio.ensure_future(stager.stage("qa", "unwanted", ROOM))
    await asyncio.sleep(0)
    staging_it.cancel()
    with pytest.raises(asyncio.CancelledError):
        await staging_it
    while stager._unowned:
        await asyncio.sleep(0.01)
    assert not staged_by(stager)


@in_one_loop
async def test_the_child_is_humble_and_has_no_keys(stager: Stager) -> None:
    await stager.inspect("qa", "qa")
    process = Path("/proc", str(pid_of(stager)))
    environment = (process / "environ").read_bytes()
    assert b"secret key" not in environment and b"secret digest" not in environment
    priorities = [
        os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in (process / "task").iterdir()
    ]
    assert min(priorities) >= 10 and max(priorities) == 19


@in_one_loop
async def test_a_server_is_ready_once_loads_have_what_they_import(tmp_path: Path) -> None:
    stager = Stager(settings_of(tmp_path))
    stager.start()
    await stager.ready()
    assert "tokenizers" in Path("/proc", str(pid_of(stager)), "maps").read_text()
    await stager.close()


@in_one_loop
async def test_a_child_may_be_there_before_its_stager(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    staging.start_early(settings)
    assert staging._early is not None
    pid = staging._early.pid
    stager, other = Stager(settings), Stager(settings)
    stager.start()
    other.start()
    assert pid_of(stager) == pid != pid_of(other)
    (tmp_path / "store").mkdir()
    assert await stager.list() == []
    await stager.close()
    await other.close()


@in_one_loop
async def test_an_early_child_that_has_ended_is_replaced(tmp_path: Path) -> None:
    staging.start_early(settings_of(tmp_path))
    assert staging._early is not None
    early = staging._early.pid
    staging._early.kill()
    staging._early.wait()
    stager = Stager(settings_of(tmp_path / "anew"))
    stager.start()
    assert pid_of(stager) != early
    await stager.ready()
    assert "tokenizers" in Path("/proc", str(pid_of(stager)), "maps").read_text()
    await stager.close()


@in_one_loop
async def test_a_child_that_ends_early_keeps_no_server_from_its_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stager = Stager(settings_of(tmp_path))
    stager.start()
    os.kill(pid_of(stager), signal.SIGKILL)
    await asyncio.wait_for(stager.ready(), staging.IMPORT_SECONDS / 2)
    assert stager._child is None and "not ready yet" not in caplog.text
    await stager.close()


@in_one_loop
async def test_a_child_that_takes_long_keeps_no_server_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(staging, "IMPORT_SECONDS", 0.01)
    stager = Stager(settings_of(tmp_path))
    stager.start()
    await stager.ready()
    assert "not ready yet" in caplog.text
    await stager.close()


@in_one_loop
async def test_a_child_that_dies_costs_one_request_and_is_replaced(stager: Stager) -> None:
    await stager.inspect("qa", "qa")
    pid = pid_of(stager)
    asking = asyncio.ensure_future(stager.stage("qa", "qa", ROOM))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StagingError, match="signal 9"):
        await asking
    await until_replaced(stager, pid)
    staged = await stager.stage("qa", "qa", ROOM)
    assert staged_by(stager) == [staged.folder]
    await stager.discard(staged.folder, weights_only=False)


@in_one_loop
async def test_a_child_that_hangs_is_replaced(
    stager: Stager, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stager.inspect("qa", "qa")
    pid = pid_of(stager)
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(staging, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(StagingError, match="did not answer"):
        await stager.list()
    monkeypatch.undo()
    await until_replaced(stager, pid)
    assert await stager.list() == ["mapped", "qa"]


async def test_a_child_that_cannot_start_is_told_and_not_started_over_and_over(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "MODULE", "server.no_such_module")
    stager = Stager(settings)
    stager.start()
    for _ in range(2):
        with pytest.raises(StagingError, match="exit code 1"):
            await stager.list()
        assert stager._child is None
    await stager.close()


async def test_closing_ends_the_child_and_what_waits_for_it(settings: Settings) -> None:
    stager = Stager(settings)
    stager.start()
    pid = pid_of(stager)
    asking = asyncio.ensure_future(stager.inspect("qa", "qa"))
    await asyncio.sleep(0)
    await stager.close()
    with pytest.raises(StagingError):
        await asking
    with pytest.raises(StagingError, match="stopping"):
        await stager.list()
    assert stager._child is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


PARENT = """\
import asyncio, sys
from pathlib import Path
from server.settings import Settings
from server.lifecycle.staging import Stager

async def main():
    store, run = map(Path, sys.argv[1:])
    stager = Stager(
        Settings(networks={}, key="", tokenizer_fingerprint="", store=store, run_dir=run)
    )
    stager.start()
    await stager.list()
    print(stager._child._process.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_a_child_ends_with_its_parent(settings: Settings) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(settings.store), str(settings.run_dir)],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    child = Path("/proc", parent.stdout.readline().decode().strip(), "cmdline")
    assert b"server.lifecycle.folders" in child.read_bytes()
    parent.kill()
    parent.communicate()
    while child.exists() and child.read_bytes():  # empty: dead, but not waited for
        time.sleep(0.05)
