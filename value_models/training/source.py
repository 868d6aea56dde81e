"""Where demonstrations come from: a JSONL file, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from value_models.training import TrainingError

COLUMNS = ("messages", "conversations")
DATASET_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(:(?P<split>\S+))?")


class Line(NamedTuple):
    """One conversation as JSON."""

    where: str  # "file:number", to be named in errors
    content: bytes


def is_dataset_name(data: Path | str) -> bool:
    """Whether `data` can only be `org/name[:split]` on the hub: it is no path of a JSONL file."""
    return (
        isinstance(data, str)
        and not Path(data).exists()
        and Path(data).suffix not in (".json", ".jsonl")
        and DATASET_NAME.fullmatch(data) is not None
    )


def source_name(data: Path | str) -> str:
    """What the manifest calls it: of a file only its own name, which says nothing of a machine."""
    return str(data) if is_dataset_name(data) else Path(data).name


def read_lines(data: Path | str) -> Iterator[Line]:
    """Read one conversation after the other; a file is never in memory as a whole.

    Raises:
        TrainingError: there is no such file, no such dataset, or no package to read it with.
    """
    if is_dataset_name(data):
        yield from _read_dataset(str(data))
        return
    try:
        with Path(data).open("rb") as file:
            for number, content in enumerate(file, start=1):
                yield Line(f"{data}:{number}", content)
    except OSError as error:
        raise TrainingError(f"{data}: cannot be read ({error.strerror})") from error


def as_line(row: Mapping[str, Any]) -> bytes:
    """A dataset's row as JSON: its conversation, without the columns that lie beside it.

    Fields that other rows have come as None, and are left out.
    """
    kept = {name: row[name] for name in (*COLUMNS, "system", "tools") if row.get(name)}
    if "messages" in kept:
        kept.pop("conversations", None)
    return json.dumps(_without_none(kept), ensure_ascii=False).encode() + b"\n"


def _read_dataset(data: str) -> Iterator[Line]:
    try:
        import datasets
    except ImportError as error:
        raise TrainingError(
            f"{data} is no file here, and to read it from the Hugging Face hub needs the package "
            "datasets: pip install datasets"
        ) from error
    match = DATASET_NAME.fullmatch(data)
    assert match is not None
    split = match["split"] or "train"
    try:
        rows = datasets.load_dataset(match["name"], split=split)
    except Exception as error:  # each builder and the hub's client fail in their own ways
        raise TrainingError(
            f"{data}: cannot be loaded ({' '.join(str(error).split())[:300]})"
        ) from error
    if not set(COLUMNS) & set(rows.column_names):
        raise TrainingError(
            f"{data}: no column {' or '.join(COLUMNS)}; it has {', '.join(rows.column_names)}"
        )
    for number, row in enumerate(rows, start=1):
        yield Line(f"{data}, row {number}", as_line(row))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_none(one) for one in value]
    return value
