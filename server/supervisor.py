"""vLLM's server as a child process: started, announced when it truly serves, stopped cleanly.

vLLM exits with code 0 when its engine dies, so only an exit that was asked for is a clean one.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import IO

import httpx
from pydantic import TypeAdapter
from rich.console import Console

from server import run_directory
from server.launch import MODULE, REPORT_FD, Launched, Refused
from server.settings import STATUS_PATH, cut_off_marker, instance_id

POLL_SECONDS = 0.25
EXIT_SECONDS = 20
"""How much longer than the grace period vLLM may take to exit."""
LOG_LINES = 15


class Supervisor:
    """One vLLM server, from its start to its end."""

    def __init__(self, arguments: list[str], *, verbose: bool, log_file: Path | None) -> None:
        """`arguments` are `server.launch`'s; `verbose` shows vLLM's log instead of filing it."""
        self._arguments = arguments
        self._log = None if verbose else log_file or _new_log_file()
        self._log_is_new = self._log is not None and log_file is None
        self._console = Console(highlight=False, soft_wrap=True)
        self._asked_at: float | None = None
        self._told = False
        self._child: subprocess.Popen[bytes]

    def run(self) -> int:
        """Serve until told to stop. Returns the exit code: 0 clean, 1 failed, 2 refused."""
        started = time.monotonic()
        with self._waiting("Checking the value networks and flags"):
            report = self._start()
        if isinstance(report, Refused):
            print(f"trimtab: {report.refused}", file=sys.stderr)
            self._child.wait()
            if self._log is not None and self._log_is_new:
                self._log.unlink()
            return 2
        if report is None:
            return self._ended(None, ready=False)
        try:
            self._introduce(report)
            with self._waiting("Loading"):
                ready = self._wait_until_ready(report)
            if ready:
                self._announce(report, time.monotonic() - started)
            self._wait(report.shutdown_timeout)
            return self._ended(report, ready)
        finally:
            if report.run_dir is not None:
                run_directory.remove(report.run_dir)

    def _start(self) -> Launched | Refused | None:
        """Start the child and read its report; None if it ended, or was stopped, without one."""
        read_end, write_end = os.pipe()
        output: IO[bytes] | None = self._log.open("ab") if self._log else None
        self._child = subprocess.Popen(
            [sys.executable, "-m", MODULE, *self._arguments],
            env={**os.environ, REPORT_FD: str(write_end)},
            pass_fds=(write_end,),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
        )
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        os.close(write_end)
        if output is not None:
            output.close()
        with os.fdopen(read_end) as pipe:
            report = pipe.read()
        if not report:
            self._wait(0)
            return None
        return TypeAdapter[Launched | Refused](Launched | Refused).validate_json(report)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Ask vLLM to finish what runs and exit; asked again, do not wait.

        A signal may come in the midst of any output, so nothing is said here.
        """
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._child.send_signal(signal.SIGTERM)
        else:
            self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def _wait_until_ready(self, launched: Launched) -> bool:
        """Wait for trimtab's own routes, of this very server; False if it ended before."""
        transport = httpx.HTTPTransport(uds=launched.uds, verify=False)
        instance = instance_id(launched.key)
        with httpx.Client(transport=transport, base_url=launched.url, timeout=5) as client:
            while self._child.poll() is None:
                try:
                    answers = client.get(STATUS_PATH).json().get("instance") == instance
                    if answers and client.get("/health").is_success:
                        return self._asked_at is None
                except (httpx.HTTPError, json.JSONDecodeError, AttributeError):
                    pass  # not yet, or another server on this port
                self._pause(launched.shutdown_timeout)
        return False

    def _wait(self, shutdown_timeout: int) -> None:
        while self._child.poll() is None:
            self._pause(shutdown_timeout)

    def _pause(self, shutdown_timeout: int) -> None:
        """Let some time pass, and end a child that takes too long to stop."""
        time.sleep(POLL_SECONDS)
        if self._asked_at is None:
            return
        if not self._told:
            self._say("Stopping: running requests may finish (again to stop at once)")
            self._told = True
        if time.monotonic() - self._asked_at > shutdown_timeout + EXIT_SECONDS:
            self._kill()

    def _ended(self, launched: Launched | None, ready: bool) -> int:
        """Say how it ended. Returns the exit code."""
        code = self._child.wait()
        cut_off = launched is not None and _take(cut_off_marker(launched.key))
        asked = self._asked_at is not None
        if asked and not cut_off and (code == 0 or not ready) and code != -signal.SIGKILL:
            self._say("Stopped.")
            return 0
        self._kill()  # what a dead server may have left behind
        if asked and cut_off:
            problem = "requests were still running at the end of the grace period"
        elif asked:
            problem = f"vLLM did not stop cleanly (exit code {code})"
        elif ready:
            problem = f"vLLM ended by itself (exit code {code})"
        else:
            problem = f"vLLM could not start (exit code {code})"
        print(f"trimtab: {problem}", file=sys.stderr)
        if self._log is not None and not cut_off:
            lines = self._log.read_text(errors="replace").splitlines()
            print(f"The end of its log, {self._log}:", file=sys.stderr)
            print("\n".join(f"  {line}" for line in telling_lines(lines)), file=sys.stderr)
        return 1

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)

    def _waiting(self, what: str) -> AbstractContextManager[object]:
        return nullcontext() if self._log is None else self._console.status(f"{what} ...")

    def _introduce(self, launched: Launched) -> None:
        self._say(f"Target          {launched.target}")
        for number, network in enumerate(launched.networks.values()):
            self._say(f"{'' if number else 'Value networks':15} {network}")
        if self._log is not None:
            self._say(f"vLLM's log      {self._log}")
        for note in launched.notes:
            self._say(note)
        if not self._console.is_terminal:
            self._say("Loading ...")

    def _announce(self, launched: Launched, seconds: float) -> None:
        where = f"{launched.uds} (a Unix socket)" if launched.uds else launched.url
        model = launched.example_model
        if launched.chats:
            path = "/v1/chat/completions"
            body: dict[str, object] = {
                "model": model,
                "messages": [{"role": "user", "content": launched.example}],
                "temperature": 0,
            }
        else:
            path = "/v1/completions"
            body = {"model": model, "prompt": launched.example, "max_tokens": 64, "temperature": 0}
        socket = f"--unix-socket {shlex.quote(launched.uds)} " if launched.uds else ""
        curl = f"curl {socket}{launched.url}{path} -d {shlex.quote(json.dumps(body))}"
        self._say(f"Ready after {seconds:.0f} s: {where}")
        self._say(f"Models          {', '.join([launched.target, *launched.networks])}")
        self._say(f"Documentation   {launched.url}/docs")
        self._say(f"Try             {curl}")


def telling_lines(log: list[str]) -> list[str]:
    """The lines of a log that tell why it ended: those about errors, or else the last."""
    errors = [line for line in log if "Error" in line and " WARNING " not in line]
    return errors[-LOG_LINES:] or log[-LOG_LINES:]


def _take(marker: Path) -> bool:
    """Whether there was a marker, which is removed."""
    there = marker.exists()
    marker.unlink(missing_ok=True)
    return there


def _new_log_file() -> Path:
    descriptor, path = tempfile.mkstemp(prefix="trimtab-", suffix=".log")
    os.close(descriptor)
    return Path(path)
