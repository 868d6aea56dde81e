"""The file that remembers which networks of the store are resident, over a restart.

It is replaced as a whole: killed at whatever moment, a server leaves the old state or the new.
"""

import os
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from value_models.manifest import NAME_PATTERN

Name = Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$")]


class CorruptStateFile(ValueError):
    """The file holds no state; it was moved aside. The message says where it is."""


class RememberedNetwork(BaseModel):
    """A network that was resident."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    source: Name = Field(description="its folder in the store")
    version: str = Field(description="what was resident; the store may hold another one now")


class State(BaseModel):
    """What a restart restores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    networks: tuple[RememberedNetwork, ...] = ()
    withheld: tuple[Name, ...] = Field(
        default=(), description="unloaded by an operator: not loaded on demand until a PUT"
    )


def read_state(file: Path) -> State | None:
    """Return the state in `file`; None if there is no such file.

    Raises:
        CorruptStateFile: it holds no state. It is kept beside, as `<name>.corrupt`.
        OSError: it cannot be read.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return State.model_validate_json(content)
    except ValidationError as error:
        kept = file.with_name(f"{file.name}.corrupt")
        file.replace(kept)
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, fault["loc"])) or "content"
        raise CorruptStateFile(
            f"the state file {file} is not usable ({where}: {fault['msg']}); it is now {kept}, and "
            "the server starts as if there were none"
        ) from error


def write_state(file: Path, state: State) -> None:
    """Replace the content of `file`, which is on disk when this returns. Raises `OSError`."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.{token_hex(4)}")
    try:
        with new.open("x") as content:
            content.write(state.model_dump_json(indent=2) + "\n")
            content.flush()
            os.fsync(content.fileno())
        new.replace(file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync_directory(file.parent)


def _sync_directory(directory: Path) -> None:
    """Without it a crash of the machine could bring the old name back."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
