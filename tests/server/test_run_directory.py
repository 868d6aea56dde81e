import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from server import run_directory

INSTANCE = "0123456789abcdef"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where run directories go: `memory` and `disk`."""
    for name in ("memory", "disk"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(run_directory, "SHARED_MEMORY", tmp_path / "memory")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    return tmp_path


def stale(place: Path, name: str = "trimtab-00000000000000aa") -> Path:
    """The directory of a server that was killed."""
    (place / name / "networks" / "qa@3f2a91c0-1").mkdir(parents=True)
    (place / name / "alive").touch()
    return place / name


def test_it_is_private_and_in_memory(places: Path) -> None:
    directory = run_directory.create(INSTANCE, 1)
    assert directory == places / "memory" / f"trimtab-{INSTANCE}"
    assert sorted(path.name for path in directory.iterdir()) == ["alive", "explain", "networks"]
    assert directory.stat().st_mode & 0o777 == 0o700
    run_directory.remove(directory)
    assert not directory.exists()
    run_directory.remove(directory)


@pytest.mark.parametrize("missing", [True, False])
def test_without_room_in_memory_it_is_on_disk(
    places: Path, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    if missing:
        monkeypatch.setattr(run_directory, "SHARED_MEMORY", places / "none")
    directory = run_directory.create(INSTANCE, 1 if missing else 1 << 60)
    assert directory.parent == places / "disk"
    run_directory.remove(directory)


def test_those_of_dead_servers_are_removed(places: Path) -> None:
    dead = [stale(places / "memory"), stale(places / "disk")]
    (stale(places / "memory", "trimtab-00000000000000bb") / "alive").unlink()
    directory = run_directory.create(INSTANCE, 1)
    assert not any(path.exists() for path in dead)
    assert list((places / "memory").iterdir()) == [directory]
    run_directory.remove(directory)


PROGRAM = """\
import sys, time
from pathlib import Path
from server import run_directory
run_directory.SHARED_MEMORY = Path(sys.argv[1])
print(run_directory.create("00000000000000cc", 1), flush=True)
time.sleep(1000)
"""


def test_that_of_a_running_server_stays_until_it_is_killed(places: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(places / "memory")], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    other = Path(server.stdout.readline().strip())
    run_directory.remove(run_directory.create(INSTANCE, 1))
    assert (other / "networks").is_dir()
    server.kill()
    server.communicate()
    run_directory.remove(run_directory.create(INSTANCE, 1))
    assert not other.exists()


def test_what_is_not_a_servers_is_left_alone(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = places / "memory"
    others = stale(memory)
    (memory / "trimtab-mine").mkdir()
    (memory / "trimtab-00000000000000dd.cut-off").touch()
    (places / "elsewhere").mkdir()
    (memory / "trimtab-00000000000000ee").symlink_to(places / "elsewhere")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    directory = run_directory.create(INSTANCE, 1)
    assert (others / "networks").is_dir()
    assert len(list(memory.iterdir())) == 5
    assert (places / "elsewhere").is_dir()
    run_directory.remove(directory)


def test_nothing_else_is_removed(places: Path) -> None:
    with pytest.raises(ValueError, match="no run directory"):
        run_directory.remove(places / "memory")
    assert (places / "memory").is_dir()


def test_a_directory_that_is_cleaned_away_before_it_is_locked_is_made_again(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    cleaned = []

    def clean(lock: int, how: int) -> None:
        flock(lock, how)
        if not cleaned:
            cleaned.append(True)
            (places / "memory" / f"trimtab-{INSTANCE}" / "alive").unlink()
            (places / "memory" / f"trimtab-{INSTANCE}").rmdir()

    monkeypatch.setattr(fcntl, "flock", clean)
    directory = run_directory.create(INSTANCE, 1)
    assert cleaned and (directory / "networks").is_dir()
    run_directory.remove(directory)
