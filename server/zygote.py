"""How the engine and its worker start on a CPU: forked from a process that has imported vLLM.

Importing vLLM takes seconds, and a server of vLLM does it three times in a row: in the API server,
in the engine that this spawns, and in the worker that the engine spawns. On CUDA vLLM forks
instead. On a CPU it must spawn: OpenMP, which a worker computes with, reads from the environment
how many threads it has and where they run, once, as it is loaded.

The *zygote* is loaded with the environment that a worker would be spawned with, and imports vLLM
while the API server does (`server.zygote_imports`). It computes nothing, and has no thread but what
libraries keep that know of forks, so what is forked from it is sound. It is for servers of one
worker and one API process: of several workers each has cores of its own, and of several API
processes an engine is told, as it is loaded, where their metrics are. What after all would be
spawned with another environment than the zygote's is spawned.

Reads vLLM 0.32's `CpuPlatform.check_and_update_config`, `OMPProcessManager`,
`CoreEngineProcManager` and `WorkerProc`, and Python's `multiprocessing.forkserver`.
"""

import logging
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.popen_spawn_posix
import multiprocessing.spawn
import multiprocessing.util
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from server.cpu import settle_cores
from server.settings import ENVIRONMENT_VARIABLE, KEY_VARIABLES

log = logging.getLogger("vllm.trimtab")
"""vLLM's, as it is set up in each of its processes."""

IMPORTS = "server.zygote_imports"
READ_WHEN_USED = {
    ENVIRONMENT_VARIABLE,
    *KEY_VARIABLES,
    "DO_NOT_TRACK",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_NO_USAGE_STATS",
    "VLLM_PLUGINS",
    "VLLM_SSM_CONV_STATE_LAYOUT",  # set where the CPU has bfloat16
}
"""Variables that no import looks at; a forked process gets its own."""
SET_BY_IMPORTS = {
    "AITER_SITUV2_A4W4",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "LD_LIBRARY_PATH",
}
"""Variables that imports set, in the zygote as in every process."""
READ_BY_OPENMP = {"OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY"} | {
    f"KMP_{name}" for name in ("AFFINITY", "BLOCKTIME", "TPAUSE")
}
"""Variables that vLLM sets for a worker, and not for the engine, which computes nothing."""

environment: dict[str, str] | None = None
"""What the zygote was loaded with; None if this process knows none."""


def is_possible() -> bool:
    """Whether servers have one here: on a CPU.

    From Python 3.14 on they do not: clients of its fork server have a key, which what is forked
    from it, as the engine is, does not know.
    """
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and sys.version_info < (3, 14)


def start() -> None:
    """Start the zygote of this process, if it is possible; it is of use from `use` on.

    It ends with the thread that calls this.
    """
    global environment
    if not is_possible():
        return
    # In Python 3.11.0 anybody could connect, and run code.
    multiprocessing.util.abstract_sockets_supported = False  # type: ignore[misc]
    before = dict(os.environ)
    try:
        with _environment_of_a_worker():
            multiprocessing.set_forkserver_preload([IMPORTS])
            multiprocessing.forkserver.ensure_running()
            environment = dict(os.environ)
    except (AssertionError, ValueError, OSError) as error:
        # What the user says of cores may be for several workers. If it is wrong, vLLM will say so.
        log.info("There is no zygote: %s", error)
    finally:
        os.environ.clear()
        os.environ.update(before)


def use() -> None:
    """Have vLLM fork from the zygote what it would spawn in this process, if there is one."""
    if environment is None:
        return
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    utils.get_mp_context = _EngineContext
    multiproc_executor.get_mp_context = _WorkerContext


def stop() -> None:
    """End the zygote, if there is one: nothing will be forked from it."""
    global environment
    if environment is None:
        return
    environment = None
    server: Any = multiprocessing.forkserver._forkserver
    os.kill(server._forkserver_pid, signal.SIGKILL)  # it may be in the midst of its imports
    server._stop()


class _Process(multiprocessing.context.ForkServerProcess):
    """A process that is forked from the zygote if it would be spawned with the same environment."""

    own: dict[str, str]
    """Its environment."""
    cores: set[int]
    """Those that it would inherit."""
    _start_method = "spawn"  # what it starts itself is spawned, as if it were
    _unread = READ_WHEN_USED | SET_BY_IMPORTS

    @staticmethod
    def _Popen(process: Any) -> Any:
        process.own = dict(os.environ)
        process.cores = os.sched_getaffinity(0)
        if process._differs():
            return multiprocessing.popen_spawn_posix.Popen(process)
        return multiprocessing.context.ForkServerProcess._Popen(process)

    def _differs(self) -> bool:
        """Whether the zygote would not do."""
        assert environment is not None
        names = {name for name, _ in environment.items() ^ self.own.items()} - self._unread
        if names:
            log.info(
                "%s is spawned: the zygote has another %s", self.name, ", ".join(sorted(names))
            )
        executable = os.fsdecode(multiprocessing.spawn.get_executable())  # another for NUMA's sake
        return bool(names) or executable != sys.executable

    def run(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(self.own)
        if environment is not None:  # then it is forked: for its own children there is a zygote
            server: Any = multiprocessing.forkserver._forkserver
            server.ensure_running = lambda: None  # python/cpython#86354: it would start another one
            use()
        super().run()


class _Engine(_Process):
    _unread = _Process._unread | READ_BY_OPENMP

    def run(self) -> None:
        os.sched_setaffinity(0, self.cores)  # OpenMP has bound it to a worker's first core
        super().run()


class _WorkerContext(multiprocessing.context.ForkServerContext):
    Process = _Process


class _EngineContext(multiprocessing.context.ForkServerContext):
    Process = _Engine


@contextmanager
def _environment_of_a_worker() -> Iterator[None]:
    """Set what vLLM would spawn a server's only worker with, but for what is read only later.

    Whether it was right is seen when a worker starts.

    Raises:
        AssertionError, ValueError: the cores that the user gives to workers are not for one.
    """
    from vllm.platforms.cpu import get_max_threads
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    for name in READ_WHEN_USED:
        os.environ.pop(name, None)
    settle_cores()
    if libraries := _preloaded():
        os.environ["LD_PRELOAD"] = libraries
    os.environ |= {
        "LOCAL_WORLD_SIZE": "1",
        "NUMEXPR_MAX_THREADS": str(get_max_threads()),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    alone = SimpleNamespace(local_world_size=1, data_parallel_rank_local=None, _api_process_count=1)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the engine will say the same
    try:
        openmp = OMPProcessManager(SimpleNamespace(parallel_config=alone, kv_transfer_config=None))
    finally:
        logging.disable(disabled)
    with openmp.configure_omp_envs(rank=0, local_rank=0):
        yield


def _preloaded() -> str:
    """Return vLLM's LD_PRELOAD: with its own allocator and the OpenMP that torch brings."""
    import torch
    import vllm

    given = os.environ.get("LD_PRELOAD", "")
    beside = Path(torch.__file__).parent
    libraries = [given] if given else []
    if not any(name in given for name in ("libomp", "libgomp", "libiomp")):
        found = [*beside.parent.glob("torch.libs/libgomp*.so*"), *beside.glob("lib/libgomp*.so*")]
        libraries += map(str, found[:1])
    if "libtcmalloc" not in given:
        own = Path(vllm.__file__).parent / "libs"
        found = [*own.glob("libtcmalloc_minimal*.so*"), *own.glob("libtcmalloc.so*")]
        libraries[:0] = map(str, found[:1])
    return ":".join(libraries)
