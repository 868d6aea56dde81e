import json
import os
from pathlib import Path
from typing import Any

import pytest

from server.lifecycle.state_file import (
    CorruptStateFile,
    RememberedNetwork,
    State,
    read_state,
    write_state,
)

STATE = State(
    networks=(RememberedNetwork(name="qa", source="qa-2026-11", version="3f2a91c0"),),
    withheld=("json",),
)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "state.json"
    assert read_state(file) is None
    write_state(file, STATE)
    assert read_state(file) == STATE
    assert json.loads(file.read_text()) == {
        "format_version": 1,
        "networks": [{"name": "qa", "source": "qa-2026-11", "version": "3f2a91c0"}],
        "withheld": ["json"],
    }
    write_state(file, State())
    assert read_state(file) == State()
    assert [entry.name for entry in file.parent.iterdir()] == ["state.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_is_cut_short_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "state.json"
    write_state(file, STATE)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="no space left"):
        write_state(file, State())
    assert read_state(file) == STATE
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_content_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.json"
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        synced_file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        steps.append("directory" if synced_file == tmp_path else "content")
        fsync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        steps.append("name")
        assert read_state(self) == STATE, "it is not all written yet"
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_state(file, STATE)
    assert steps == ["content", "name", "directory"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"format_version": 2}',
        b'{"networks": [{"name": "../qa", "source": "qa", "version": "0"}]}',
        b'{"networks": [{"name": "qa", "source": "/etc", "version": "0"}]}',
        b'{"withheld": ["a/b"]}',
        b'{"unknown": 1}',
    ],
)
def test_what_is_no_state_is_kept_aside(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "state.json"
    file.write_bytes(content)
    with pytest.raises(CorruptStateFile, match=r"state\.json\.corrupt"):
        read_state(file)
    assert (tmp_path / "state.json.corrupt").read_bytes() == content
    assert read_state(file) is None


def test_a_state_that_cannot_be_read_is_not_moved(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.mkdir()
    with pytest.raises(OSError):
        read_state(file)
    assert file.is_dir()
