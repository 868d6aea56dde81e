"""Start-up time and memory of servers, and the time to load one more network.

vLLM's server at its defaults, and `trimtab serve` with 1, 8 and 64 networks in its store, each
started anew in every round, one at a time: seconds until /health answers, the memory of its worker
process then, and seconds for one network more to be loaded over the management API. The first round
compiles and is not kept.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from deploy.bench.arguments import add_dtype, add_rounds, within
from deploy.bench.checkpoints import make_checkpoints
from deploy.bench.report import Answer, Cell, Table, rounded, say
from deploy.bench.rounds import PLAIN, Rounds, median, ratio, runs_of, take_turns
from tests.server.operator import Operator
from tests.server.serving import free_port, trimtab

CASE = "start"
LATE = "late"
"""The network that is loaded when the server runs."""
POLL_SECONDS = 0.05
MIB = 2**20


class Started(NamedTuple):
    """What was seen of one server."""

    seconds: float
    rss: int  # bytes, of the worker process
    pss: int  # the same, with what processes share divided among them
    weights: int | None = None  # of all networks, as trimtab reports it
    kv_cache: int | None = None
    load_seconds: float | None = None  # of one network more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 3)
    parser.add_argument(
        "--networks",
        type=within(1),
        nargs="+",
        default=[1, 8, 64],
        help="in the store at the start (1 8 64)",
    )
    add_dtype(parser)


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    names = [f"network-{number}" for number in range(max(arguments.networks))]
    checkpoints = make_checkpoints(folder, arguments.dtype, [*names, LATE])
    target, flags = checkpoints.target, ("--dtype", arguments.dtype)
    counts = {f"trimtab, networks: {count}": count for count in arguments.networks}

    def measure(name: str, case: str, number: int) -> Started:
        place = folder / "server"
        place.mkdir()
        try:
            if name == PLAIN:
                return start_plain(target, flags, place)
            stored = {network: checkpoints.networks[network] for network in names[: counts[name]]}
            return start_trimtab(target, stored, checkpoints.networks[LATE], flags, place)
        finally:
            shutil.rmtree(place)

    rounds = take_turns([CASE], [PLAIN, *counts], arguments.rounds, measure)
    return Answer(
        tables=make_tables(rounds, list(counts)),
        models=checkpoints.describe(),
        runs=runs_of(
            rounds,
            seconds=lambda started: started.seconds,
            load_seconds=lambda started: started.load_seconds,
            pss=lambda started: started.pss,
        ),
    )


def start_plain(target: Path, flags: Sequence[str], place: Path) -> Started:
    with running(plain_server(target), flags, place) as (_, seconds, process):
        return Started(seconds, *memory_of(process))


def plain_server(target: Path) -> list[str]:
    """Return the command of vLLM's own server, to `running`."""
    # The command `vllm` looks for a package of that name, which its CPU build is not.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target)]


def start_trimtab(
    target: Path, stored: dict[str, Path], late: Path, flags: Sequence[str], place: Path
) -> Started:
    store = place / "store"
    for name, network in stored.items():
        shutil.copytree(network, store / name, copy_function=os.link)
    command = trimtab("serve", target, "--value-network-dir", store)
    command += ["--state-file", str(place / "state.json")]
    with running(command, flags, place) as (url, seconds, process):
        rss, pss = memory_of(process)
        with httpx.Client(base_url=url, timeout=120) as client:
            operator = Operator(client)
            overview = operator.overview()
            if len(overview["data"]) != len(stored):
                raise RuntimeError(f"not all networks are there: {overview['data']}")
            shutil.copytree(late, store / LATE, copy_function=os.link)
            start = time.perf_counter()
            operator.load(LATE)
            load_seconds = time.perf_counter() - start
        memory = overview["memory"]
    return Started(
        seconds, rss, pss, memory["weights_bytes"], memory["kv_cache_bytes"], load_seconds
    )


@contextlib.contextmanager
def running(
    command: list[str], flags: Sequence[str], place: Path
) -> Iterator[tuple[str, float, psutil.Process]]:
    """Run a server until it is ready. Yields its address, the seconds that it took, and itself.

    Raises:
        RuntimeError: it ended instead.
    """
    port, log = free_port(), place / "server.log"
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    start = time.perf_counter()
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, *flags, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        # One client: to make another at each look takes time from the server.
        with httpx.Client(base_url=url, timeout=5) as client:
            while not is_ready(client):
                if server.poll() is not None:
                    raise RuntimeError(f"the server ended:\n{log.read_text()[-3000:]}")
                time.sleep(POLL_SECONDS)
        yield url, time.perf_counter() - start, psutil.Process(server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def is_ready(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").is_success
    return False


def memory_of(server: psutil.Process) -> tuple[int, int]:
    """Return RSS and PSS, in bytes, of the process that holds the models: the largest."""
    found = [process.memory_full_info() for process in server.children(recursive=True)]
    largest = max(found, key=lambda memory: memory.rss)
    return largest.rss, largest.pss


def make_tables(rounds: Rounds[str, Started], names: list[str]) -> list[Table]:
    (found,) = rounds.values()

    def row(name: str) -> dict[str, Cell]:
        def of(value: Callable[[Started], float | None]) -> float | None:
            known = [{name: m[name]} for m in found if value(m[name]) is not None]
            return rounded(median(known, name, lambda started: value(started) or 0.0))

        def mib(value: Callable[[Started], Any]) -> float | None:
            return of(lambda started: None if value(started) is None else value(started) / MIB)

        return {
            "": name,
            "seconds to ready": of(lambda started: started.seconds),
            "against plain": rounded(ratio(found, name, PLAIN, lambda started: started.seconds)),
            "seconds to load one more": of(lambda started: started.load_seconds),
            "worker RSS, MiB": mib(lambda started: started.rss),
            "worker PSS, MiB": mib(lambda started: started.pss),
            "networks' weights, MiB": mib(lambda started: started.weights),
            "networks' KV cache, MiB": mib(lambda started: started.kv_cache),
        }

    return [
        Table("Starting a server, and its memory when ready", [row(n) for n in [PLAIN, *names]])
    ]
