"""`trimtab serve` as a test starts it: a real server on a free port, in its own process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from server.settings import ENVIRONMENT_VARIABLE

TARGET = "target"
FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--seed", "0")


@dataclass
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[str]
    output: Path
    log: Path

    @property
    def references(self) -> dict[str, str]:
        """name -> name@version of each value network."""
        networks = httpx.get(f"{self.url}/health/value_networks").json()["networks"]
        return {reference.partition("@")[0]: reference for reference in networks}

    @property
    def run_dir(self) -> Path:
        """Where the server keeps its own files, such as copies of networks."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            exported = child.environ().get(ENVIRONMENT_VARIABLE)
            if exported is not None and json.loads(exported)["run_dir"]:
                return Path(json.loads(exported)["run_dir"])
        raise AssertionError("no process of the server has settings")

    def stop(self) -> int:
        """Ask it to stop, as a container runtime would. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


def trimtab(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "server.cli", *map(str, arguments)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(
    directory: Path,
    target: Path,
    *arguments: object,
    flags: Sequence[str] = FLAGS,
    environment: dict[str, str] | None = None,
) -> Iterator[Served]:
    """Start a server, wait until it says that it is ready, and end it with the test.

    What it remembers over a restart is in `directory`, too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    output, log = directory / "output.txt", directory / "vllm.log"
    command = trimtab("serve", target, "--served-model-name", TARGET, "--port", port, *flags)
    with output.open("w") as file:
        process = subprocess.Popen(
            [*command, "--log-file", str(log), *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "XDG_STATE_HOME": str(directory),
                **(environment or {}),
            },
        )
    served = Served(f"http://127.0.0.1:{port}", process, output, log)
    try:
        while "Ready after" not in output.read_text():
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)
        yield served
    finally:
        if process.poll() is None:
            served.stop()
