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
from server.settings import ENVIRONMENT_VARIABLE

OWN = "GOMP_CPU_AFFINITY"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A zygote; its process id."""
    monkeypatch.setattr(zygote, "IMPORTS", "json")
    monkeypatch.setattr(zygote, "environment", None)
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


def test_a_process_with_the_zygotes_environment_is_forked(started: int) -> None:
    assert zygote.environment is not None
    own = dict.fromkeys((ENVIRONMENT_VARIABLE, "VLLM_API_KEY", "VLLM_SSM_CONV_STATE_LAYOUT"), "SD")
    worker = zygote.environment | own
    with mock.patch.dict(os.environ, worker, clear=True):
        assert told_by(zygote._WorkerContext()) == (started, worker)


@pytest.mark.parametrize("changed", [OWN, "LD_PRELOAD", "SOMETHING"])
def test_one_with_another_is_spawned(started: int, changed: str) -> None:
    assert zygote.environment is not None
    worker = zygote.environment | {changed: "1"}
    with mock.patch.dict(os.environ, worker, clear=True):
        assert told_by(zygote._WorkerContext()) == (os.getpid(), worker)


def test_an_engine_is_forked_though_it_has_no_cores_of_its_own(started: int) -> None:
    assert zygote.environment is not None
    assert zygote.environment[OWN] == "0"
    engine = {n: v for n, v in zygote.environment.items() if n not in zygote.READ_BY_OPENMP}
    with mock.patch.dict(os.environ, engine, clear=True):
        assert told_by(zygote._EngineContext()) == (started, engine)


def test_one_that_is_not_needed_is_ended(started: int) -> None:
    assert zygote.environment is not None
    zygote.stop()
    zygote.stop()
    assert zygote.environment is None
    assert not psutil.pid_exists(started)


def test_starting_one_changes_nothing_here_and_tells_it_no_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMTAB_ADMIN_API_KEY", "sesame")
    monkeypatch.setattr(zygote, "environment", None)
    before = dict(os.environ)
    with mock.patch("multiprocessing.forkserver.ensure_running") as ensure_running:
        zygote.start()
    assert ensure_running.call_count == 1
    assert os.environ == before
    assert zygote.environment is not None
    assert "sesame" not in zygote.environment.values()


def test_cores_that_are_not_for_one_worker_leave_it_to_vllm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setattr(zygote, "environment", None)
    before = dict(os.environ)
    with mock.patch("multiprocessing.forkserver.ensure_running") as ensure_running:
        zygote.start()
    assert ensure_running.call_count == 0
    assert (os.environ, zygote.environment) == (before, None)
    assert logging.root.manager.disable == logging.NOTSET


def test_on_a_device_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(zygote, "environment", None)
    zygote.start()
    assert zygote.environment is None
