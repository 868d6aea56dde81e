"""What vLLM is told before it starts on a CPU, where its defaults would not serve."""

import os
import shutil
import sysconfig
from argparse import Namespace
from pathlib import Path

KV_CACHE_GB = 2
RESERVED_FROM = 4
"""From so many physical cores on, one is left to the engine and the API server: they need a part of
one only, but whoever shares a core with them keeps the threads on all others waiting."""
SPINS = 10_000
"""Looks of an OpenMP thread for its next work before it sleeps, a thirtieth of GNU's default: meant
to last between two operations of a forward, and not between two steps."""


def settle_cpu(args: Namespace) -> list[str]:
    """Settle what vLLM starts with, unless the user has. Returns what to say of it."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    if args.kv_cache_memory_bytes is None:
        # vLLM would take most of the machine's memory.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_CACHE_GB))
    workers = args.tensor_parallel_size * args.data_parallel_size
    if workers == 1 and args.kv_transfer_config is None:  # which wants a core of its own
        settle_cores()
    return _settle_compilation(args)


def settle_cores() -> None:
    """Let the worker compute on all cores of a small machine, unless the user decides on cores.

    vLLM leaves one core to its engine and its API server, because the engine spins while it waits.
    trimtab's sleeps (`server/worker/waiting.py`), and two cores decode faster than one. But then
    nobody else finds a core where an OpenMP thread spins for nothing, which GNU's does for
    long: a network that is loaded beside running streams took two to four times as long.
    Intel's OpenMP spins as vLLM tells it to, so there the core stays reserved. For the figures see
    docs/performance.md. On CUDA there is nothing to settle.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or "VLLM_CPU_NUM_OF_RESERVED_CPU" in os.environ:
        return
    preloaded = os.environ.get("LD_PRELOAD", "")
    if "libiomp" in preloaded or "libomp" in preloaded or num_cores() >= RESERVED_FROM:
        return
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def num_cores() -> int:
    """Return how many physical cores this process may use."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    return len({cpu.physical_core for cpu in get_allowed_cpu_list()})


def _settle_compilation(args: Namespace) -> list[str]:
    """Run uncompiled where vLLM could not compile and so not start. Returns what to say of it."""
    compiler = os.environ.get("CXX", "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if args.enforce_eager or (shutil.which(compiler) and headers.exists()):
        return []
    args.enforce_eager = True
    missing = f"{compiler} and " if not shutil.which(compiler) else ""
    return [
        f"Running uncompiled, somewhat slower: compiling needs {missing}Python's headers "
        "(Debian, Ubuntu: apt install g++ python3-dev)"
    ]
