"""The parent of vLLM's server, with a stand-in for that server."""

import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.supervisor import telling_lines

PROGRAM = """\
import sys
from pathlib import Path
import server.supervisor as supervisor
supervisor.MODULE = "tests.server.stand_in"
log = Path(sys.argv[1]) if sys.argv[1] else None
supervisor.EXIT_SECONDS = float(sys.argv[2])
sys.exit(supervisor.Supervisor(sys.argv[3:], verbose=log is None, log_file=log).run())
"""


@contextmanager
def supervised(
    behaviour: str, log: Path | None, exit_seconds: float
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(log or ""), str(exit_seconds), behaviour],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run(
    behaviour: str,
    log: Path | None,
    *,
    stop: signal.Signals | None = None,
    stop_again: signal.Signals | None = None,
    exit_seconds: float = 1000,
) -> tuple[int, str]:
    """Run until it ends, asking it to once it is ready. Returns the exit code and the output."""
    with supervised(behaviour, log, exit_seconds) as process:
        output = ""
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if stop and "Try " in line:
                process.send_signal(stop)
            if stop_again and "Stopping" in line:
                process.send_signal(stop_again)
        return process.wait(), output


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "vllm.log"


def test_it_says_where_it_is_what_it_serves_and_what_to_try(log: Path) -> None:
    code, output = run("well", log, stop=signal.SIGTERM)
    assert code == 0
    url = re.search(r"Ready after \d+ s: (http://127\.0\.0\.1:\d+)", output)
    assert url is not None
    assert "qa@3f2a91c0, residual" in output and str(log) in output
    assert "target, qa" in output
    curl = shlex.split(re.search(r"Try +(curl .*)", output)[1])  # type: ignore[index]
    assert curl[:3] == ["curl", f"{url[1]}/v1/chat/completions", "-d"]
    assert '"model": "qa"' in curl[3] and "Where's Ana?" in curl[3]
    assert log.read_text() == "starting well\n"
    assert "starting well" not in output


def test_vllms_log_is_shown_on_request() -> None:
    code, output = run("well", None, stop=signal.SIGTERM)
    assert code == 0
    assert "starting well" in output


def test_ctrl_c_is_a_clean_stop_too(log: Path) -> None:
    assert run("well", log, stop=signal.SIGINT)[0] == 0


def test_a_refusal_is_one_line(log: Path) -> None:
    assert run("refuse", log) == (2, "trimtab: no such flag\n")


@pytest.mark.parametrize("behaviour", ["crash", "crash-later"])
def test_a_failed_start_shows_the_end_of_the_log(behaviour: str, log: Path) -> None:
    code, output = run(behaviour, log)
    assert code == 1
    assert "could not start" in output and "RuntimeError: no memory left" in output
    assert "Ready" not in output


def test_a_server_that_ends_by_itself_has_failed_even_with_code_0(log: Path) -> None:
    code, output = run("dying", log)
    assert "Ready after" in output
    assert code == 1
    assert "ended by itself (exit code 0)" in output
    left_behind = Path("/proc", log.read_text().split()[-1], "cmdline")
    while left_behind.exists() and left_behind.read_text():
        time.sleep(0.05)


def test_another_server_on_the_port_is_not_taken_for_this_one(log: Path) -> None:
    code, output = run("foreign", log)
    assert code == 1
    assert "Ready" not in output


def test_an_unclean_stop_is_told_by_the_exit_code(log: Path) -> None:
    code, output = run("unclean", log, stop=signal.SIGTERM)
    assert code == 1
    assert "did not stop cleanly (exit code 5)" in output


def test_requests_that_were_cut_off_make_a_stop_unclean(log: Path) -> None:
    code, output = run("cut-off", log, stop=signal.SIGTERM)
    assert code == 1
    assert "still running at the end of the grace period" in output
    assert not list(Path(tempfile.gettempdir()).glob("trimtab-*.cut-off"))


def test_a_server_that_does_not_stop_is_killed(log: Path) -> None:
    code, output = run("stubborn", log, stop=signal.SIGTERM, exit_seconds=1)
    assert code == 1
    assert "did not stop cleanly" in output


def test_asked_twice_it_does_not_wait(log: Path) -> None:
    code, output = run("stubborn", log, stop=signal.SIGINT, stop_again=signal.SIGINT)
    assert code == 1
    assert "did not stop cleanly" in output


@pytest.mark.parametrize("behaviour", ["well", "crash-later"])
def test_however_it_ends_its_directory_is_removed(
    behaviour: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "trimtab-0123456789abcdef"
    (run_dir / "networks" / "qa@3f2a91c0-1").mkdir(parents=True)
    monkeypatch.setenv("RUN_DIR", str(run_dir))
    run(behaviour, log, stop=signal.SIGTERM)
    assert not run_dir.exists()


def test_errors_are_what_tells() -> None:
    noise = [f"INFO {number}" for number in range(100)]
    assert telling_lines([*noise, "ValueError: x", *noise]) == ["ValueError: x"]
    assert telling_lines(noise) == noise[-15:]


def test_what_takes_seconds_to_import_is_left_to_the_child() -> None:
    heavy = "import sys, server.supervisor; print({'torch', 'vllm', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
