"""How vLLM's processes wait for each other on a CPU: asleep, not spinning.

The engine and its workers exchange two messages a step through shared memory. In vLLM 0.32, who
waits for one calls `sched_yield` until it is there, unless the last is a second old: from the first
token to the last, that is. On a CPU, vLLM leaves one core to its engine, its API server and
everybody else, and the engine spins on it. On two cores and Linux 6.18, whoever has work to do in
another session than the server's may then not get to it for seconds: a client that only starts
when others' requests run already, say (`python -m deploy.bench arrivals`).

Here, who waits sleeps between looks, so that the engine needs no core to itself (`server/cpu.py`).
On CUDA vLLM waits as it always does.

Reads vLLM 0.32's `shm_broadcast`. vllm-project/vllm#52814 and #52848 would make these settings.
"""

import os
import time

from server.settings import ENVIRONMENT_VARIABLE

NAP_SECONDS = 50e-6


def wait_asleep() -> None:
    """vLLM's general plugin: runs in each of its processes, before they open their queues."""
    from vllm.platforms import current_platform

    if ENVIRONMENT_VARIABLE not in os.environ or not current_platform.is_cpu():
        return  # not trimtab's server, but one that has trimtab installed beside it; or CUDA

    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = nap


def nap() -> None:
    time.sleep(NAP_SECONDS)
