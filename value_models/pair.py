"""Contrast networks from two checkpoints, without training: `trimtab pair`.

What a model has learnt beyond another is the difference of their logits (proxy tuning, arXiv
2401.08565). Nothing is loaded: two checkpoints are put side by side under a manifest.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Literal, NamedTuple

from value_models.checkpoint import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    Problem,
    copy_checkpoint,
    copy_file,
    find_checkpoint,
    read_checkpoint,
)
from value_models.manifest import MANIFEST_FILE, SCALE_LIMIT, Manifest, tokenizer_fingerprint
from value_models.snapshot import check_copy, sync_directory
from value_models.store import (
    DirectoryError,
    NetworkError,
    NetworkFolder,
    check_name,
    model_path,
)
from value_models.vocabulary.tokens import VocabularyError, load_tokenizer

DESCRIPTION = """\
Make a value network out of two models of one tokenizer, without training: what the expert's logits
have beyond the anti-expert's. Any instruction-tuned model and its own base are such a pair.

Both are copied into DIR, whole or not at all. With --link, weights are hard links to the files of
the two models: they take no more disk, but are the same files, so none must be changed in place.
"""
METHOD = "difference of two models' logits, without training (arXiv 2401.08565)"
UNFINISHED = re.compile(r"\.pairing-[0-9a-f]{8}(\.new)?")


class Source(NamedTuple):
    """One of the two models, as it was given and as it was found."""

    role: Literal["expert", "antiexpert"]
    folder: Path
    name: str  # for people: on the hub, or of its folder
    fingerprint: str  # of its tokenizer


def pair(
    expert: str | Path,
    antiexpert: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    description: str = "",
    link: bool = False,
) -> NetworkFolder:
    """Write a contrast network of two models; it appears whole or not at all.

    Args:
        expert: a model's folder, or its name on the Hugging Face hub; links in it are followed. The
            network takes its tokenizer, which has the chat template.
        antiexpert: as `expert`, and of the same tokenizer.
        out: the folder to write; nothing is there yet.
        scale: the factor on the network's logits where a request names none.
        description: for people to read.
        link: make hard links to the weights instead of copies. No file of either model must be
            changed in place afterwards; to delete or to replace them is safe.

    Raises:
        NetworkError: `out` is taken, a model is not there or not sound, the two are the same or
            have different tokenizers, links are not possible.
        DirectoryError: `out` cannot be written.
    """
    out = Path(os.path.abspath(out))
    name = check_name(out.name)
    _refuse_taken(out)
    if not abs(scale) <= SCALE_LIMIT:
        raise NetworkError(f"scale {scale}: a scale lies within +-{SCALE_LIMIT:g}")
    sources = (_find("expert", expert), _find("antiexpert", antiexpert))
    _refuse_unlike(*sources)
    try:
        with _unfinished(out) as scratch:
            for source in sources:
                _take(source, model_path(scratch, source.role), link)
            # Which tokenizer transformers makes of the files depends on the model's type, too.
            for file in (CONFIG_FILE, *TOKENIZER_FILES):
                if (sources[0].folder / file).is_file():
                    copy_file(sources[0].folder / file, scratch / file)
            _write_manifest(scratch, sources, scale, description)
            network = check_copy(scratch, name, out)
            for folder in (*(model.path for model in network.models), scratch):
                sync_directory(folder)
            try:
                scratch.rename(out)
            except OSError:
                _refuse_taken(out)  # by another process meanwhile
                raise
            sync_directory(out.parent)
    except OSError as error:
        raise DirectoryError(f"{out} cannot be written ({error.strerror or error})") from error
    return network.moved(out)


def _refuse_taken(out: Path) -> None:
    if os.path.lexists(out):
        raise NetworkError(f"{out} is already there; remove it or choose another --out")


def _find(role: Literal["expert", "antiexpert"], model: str | Path) -> Source:
    """Check one of the two models, all but the contents of its weights."""
    subject = f"the {role} {model}"
    name = Path(model).resolve().name if os.path.isdir(model) else str(model)
    try:
        folder = find_checkpoint(model)
        read_checkpoint(folder)
        if not any((folder / file).is_file() for file in VOCABULARY_FILES):
            raise Problem("it has no tokenizer; copy that into its folder, too")
        fingerprint = tokenizer_fingerprint(load_tokenizer(folder))
    except (Problem, VocabularyError) as error:
        raise NetworkError(f"{subject}: {error}") from error
    except OSError as error:
        raise NetworkError(
            f"{subject}: {error.filename} cannot be read ({error.strerror})"
        ) from error
    return Source(role, folder, name, fingerprint)


def _refuse_unlike(expert: Source, antiexpert: Source) -> None:
    if os.path.samefile(expert.folder, antiexpert.folder):
        raise NetworkError(
            f"{expert.name} is given as expert and as anti-expert, whose difference is 0; give the "
            "model that the expert was made from as --antiexpert"
        )
    if expert.fingerprint != antiexpert.fingerprint:
        raise NetworkError(
            f"the expert's tokenizer is {expert.fingerprint[:23]}... ({expert.name}), the "
            f"anti-expert's is {antiexpert.fingerprint[:23]}... ({antiexpert.name}): the same ids "
            "mean other tokens, so their logits have no difference; use two models of one tokenizer"
        )


def _take(source: Source, folder: Path, link: bool) -> None:
    try:
        copy_checkpoint(source.folder, folder, link=link)
    except Problem as error:
        advice = "; leave out --link, so that weights are copied" if link else ""
        raise NetworkError(f"the {source.role} {source.name}: {error}{advice}") from error


def _write_manifest(
    folder: Path, sources: tuple[Source, Source], scale: float, description: str
) -> None:
    expert, antiexpert = sources
    manifest = Manifest(
        format_version=1,
        kind="contrast",
        tokenizer_fingerprint=expert.fingerprint,
        base=antiexpert.name,
        default_scale=scale,
        description=description,
        training={
            "method": METHOD,
            **{source.role: source.name for source in sources},
        },
    )
    file = folder / MANIFEST_FILE
    with file.open("w", encoding="utf-8") as out:
        out.write(manifest.model_dump_json(indent=2) + "\n")
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which is removed unless it has been renamed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(out.parent)
    scratch = out.with_name(f".pairing-{token_hex(4)}")
    lock = None
    while lock is None:
        lock = _new_locked(scratch)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _new_locked(folder: Path) -> int | None:
    """Make a folder and lock it; None: another process took it for a dead one's meanwhile.

    It has another name until it is locked, so that nobody takes one with files for a dead one's.
    """
    unlocked = folder.with_name(f"{folder.name}.new")
    unlocked.mkdir()
    lock = None
    try:
        lock = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # no locks on this file system; then nothing is cleaned up either
            fcntl.flock(lock, fcntl.LOCK_EX)
        unlocked.rename(folder)
        return lock
    except FileNotFoundError:
        if lock is not None:
            os.close(lock)
        return None


def _clean_up(directory: Path) -> None:
    """Remove what processes that were killed have left: locked are only those that live."""
    for entry in directory.glob(".pairing-*"):
        if not UNFINISHED.fullmatch(entry.name):
            continue
        with suppress(OSError):
            lock = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry, ignore_errors=True)
            finally:
                os.close(lock)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    model = "a folder, or a name on the Hugging Face hub"
    add("--expert", required=True, metavar="MODEL", help=f"the model that has learnt more: {model}")
    add("--antiexpert", required=True, metavar="MODEL", help="the one it was made from, likewise")
    add("--out", required=True, type=Path, metavar="DIR", help="network folder to write")
    add(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="factor on its logits in requests that name none, -8 to 8 (default: 1)",
    )
    add("--description", default="", help="what the network does, for people")
    add(
        "--link",
        action="store_true",
        help="make hard links to the weights instead of copies: no extra disk, but their files "
        "must not be changed in place (to delete or to replace them is safe), and they keep "
        "owner and mode",
    )
