"""vLLM's own message queues, between two processes that wait as trimtab's do."""

import itertools
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import pytest
import vllm.platforms
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

from server.settings import ENVIRONMENT_VARIABLE
from server.worker.waiting import NAP_SECONDS, wait_asleep

PAUSES = [0.0, NAP_SECONDS / 2, NAP_SECONDS, 2 * NAP_SECONDS, 0.01]
IDLE = 1.2
"""Seconds; after one without a message, vLLM stops looking and waits to be notified."""


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test replaces is as before after it."""
    for name in ("sched_yield", "SHM_READER_RECHECK_INTERVAL_MS"):
        monkeypatch.setattr(shm_broadcast, name, getattr(shm_broadcast, name))
    monkeypatch.setattr(os, "sched_yield", os.sched_yield)


def echo(handle: object, pipe: Connection) -> None:
    """Answer each message after the pause that it names, until it is negative."""
    wait_asleep()
    forbid_spinning()
    reader, writer = MessageQueue.create_from_handle(handle, 0), MessageQueue(1, 1)
    pipe.send(writer.export_handle())
    reader.wait_until_ready()
    writer.wait_until_ready()
    while (pause := reader.dequeue(timeout=60)) >= 0:
        time.sleep(pause)
        writer.enqueue(pause)


def forbid_spinning() -> None:
    def spin() -> None:
        raise AssertionError("spins")

    os.sched_yield = spin
    # vLLM looks again by itself after seconds: here not, so that a lost notification shows.
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = 10**7


def test_messages_arrive_whatever_the_pauses_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "{}")
    wait_asleep()
    forbid_spinning()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    writer = MessageQueue(1, 1)
    process = context.Process(target=echo, args=(writer.export_handle(), theirs), daemon=True)
    process.start()
    reader = MessageQueue.create_from_handle(pipe.recv(), 0)
    writer.wait_until_ready()
    reader.wait_until_ready()
    pairs = [*10 * [*itertools.product(PAUSES, PAUSES)], (IDLE, 0.0), (0.0, IDLE), (IDLE, IDLE)]
    for ours, pause in pairs:
        writer.enqueue(pause)
        time.sleep(ours)
        assert reader.dequeue(timeout=60) == pause
    writer.enqueue(-1.0)
    process.join()
    assert process.exitcode == 0


def test_vllm_beside_an_installed_trimtab_waits_as_it_always_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = shm_broadcast.sched_yield
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    wait_asleep()
    assert shm_broadcast.sched_yield is before


def test_on_a_device_vllm_waits_as_it_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shm_broadcast.sched_yield
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "{}")
    monkeypatch.setattr(vllm.platforms.current_platform, "is_cpu", lambda: False)
    wait_asleep()
    assert shm_broadcast.sched_yield is before
