"""Which processes are forked from a zygote, and what they find; here it imports next to nothing.

That engine and worker of a real server are forked from one is in `test_cli`.
"""

import logging
import multiprocessing.forkserver
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import psutil
import pytest

from server import zygote
from server.settings import ENVIRONMENT_VARIABLE, KEY_VARIABLES

OWN = "GOMP_CPU_AFFINITY"
where_possible = pytest.mark.skipif(not zygote.is_possible(), reason="servers have none here")


@pytest.fixture(autouse=True)
def none_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "environment", None)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A zygote; its process id."""
    monkeypatch.setattr(zygote, "IMPORTS", "json")
    with mock.patch.dict(os.environ, VLLM_CPU_OMP_THREADS_BIND="0"):
        zygote.start()
        server: Any = multiprocessing.forkserver._forkserver
        yield server._forkserver_pid
        server._stop()


def tell(pipe: Connection) -> None:
    pipe.send((os.getppid(), dict(os.environ), signal.getsignal(signal.SIGTERM)))


def told_by(context: Any) -> tuple[int, dict[str, str]]:
    """Return the parent and the environment of a process that is started."""
    ours, theirs = multiprocessing.Pipe()
    process = context.Process(target=tell, args=(theirs,))
    process.start()
    parent, environment, handler = ours.recv()
    process.join()
    assert (process.exitcode, handler) == (0, signal.SIG_DFL)
    return parent, environment


@where_possible
def test_a_process_with_the_zygotes_environment_is_forked(started: int) -> None:
    assert zygote.environment is not None
    own = dict.fromkeys((ENVIRONMENT_VARIABLE, "VLLM_API_KEY", "VLLM_SSM_CONV_STATE_LAYOUT"), "SD")
    worker = zygote.environment | own
    with mock.patch.dict(os.environ, worker, clear=True):
        assert told_by(zygote._WorkerContext()) == (started, worker)


@where_possible
@pytest.mark.parametrize("changed", [OWN, "LD_PRELOAD", "SOMETHING"])
def test_one_with_another_is_spawned(started: int, changed: str) -> None:
    assert zygote.environment is not None
    worker = zygote.environment | {changed: "1"}
    with mock.patch.dict(os.environ, worker, clear=True):
        assert told_by(zygote._WorkerContext()) == (os.getpid(), worker)


@where_possible
def test_an_engine_is_forked_though_it_has_no_cores_of_its_own(started: int) -> None:
    assert zygote.environment is not None
    assert zygote.environment[OWN] == "0"
    engine = {n: v for n, v in zygote.environment.items() if n not in zygote.READ_BY_OPENMP}
    with mock.patch.dict(os.environ, engine, clear=True):
        assert told_by(zygote._EngineContext()) == (started, engine)


@where_possible
def test_one_that_is_not_needed_is_ended(started: int) -> None:
    assert zygote.environment is not None
    zygote.stop()
    zygote.stop()
    assert zygote.environment is None
    assert not psutil.pid_exists(started)


def times_started() -> int:
    """Start a zygote, but for its process: how many would there be?"""
    before = dict(os.environ)
    with mock.patch("multiprocessing.forkserver.ensure_running") as ensure_running:
        zygote.start()
    assert os.environ == before
    return int(ensure_running.call_count)


@where_possible
def test_it_is_told_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEY_VARIABLES:
        monkeypatch.setenv(name, "sesame")
    assert times_started() == 1
    assert zygote.environment is not None
    assert "sesame" not in zygote.environment.values()


@where_possible
def test_cores_that_are_not_for_one_worker_leave_it_to_vllm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert times_started() == 0
    assert zygote.environment is None
    assert logging.root.manager.disable == logging.NOTSET


def test_on_a_device_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms.current_platform, "is_cpu", lambda: False)
    assert times_started() == 0


def test_where_clients_of_a_fork_server_have_a_key_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zygote.sys, "version_info", (3, 14))
    assert times_started() == 0
