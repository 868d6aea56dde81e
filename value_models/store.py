"""The directory of value networks: which there are, and whether each can be trusted to load.

Everything here reads names, headers, JSON, tokenizers and vocabulary maps. No weight is loaded,
nothing is unpickled and no code from a checkpoint runs, so a folder of unknown origin can be
checked safely.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from pydantic import ValidationError

from value_models.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    Problem,
    read_checkpoint,
    read_json_object,
    refuse_unsafe_configuration,
)
from value_models.manifest import MANIFEST_FILE, NAME_PATTERN, Manifest, tokenizer_fingerprint

MAP_FOLDER = "vocabulary_maps"
JSON_FILES = (MANIFEST_FILE, CONFIG_FILE, INDEX_FILE, "tokenizer_config.json")
LARGEST_JSON = 32 << 20
LARGEST_TOKENIZER = 256 << 20
"""Bytes; the largest vocabularies known have files of a tenth of that."""
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SERVABLE_KINDS = ("residual", "contrast")

Role = Literal["value", "expert", "antiexpert", "reference"]
"""What a model is for in its network: its logits are the value logits; the two of a contrast
network, whose difference is; the base that a residual network was trained against."""
MODEL_FOLDERS: tuple[Role, ...] = tuple(role for role in get_args(Role) if role != "value")
"""Names of the sub-folders that hold a model, each named for the model's role."""


class NetworkError(ValueError):
    """A folder that is no usable value network: which one, what is wrong, and what to do."""


class NoSuchNetwork(NetworkError):
    """There is no network of that name: no folder, or one without a manifest."""


class DirectoryError(NetworkError):
    """Not a network is at fault, but the directory that holds them: it is not there, full, ..."""


class Missing(Problem):
    """Nothing is there that could be wrong."""


@contextmanager
def naming(name: str, path: str | Path) -> Iterator[None]:
    """Turn a `Problem`, or a file that cannot be read, into a `NetworkError` of that network."""
    subject = f"value network {name!r} in {path}"
    try:
        yield
    except Missing as problem:
        raise NoSuchNetwork(f"{subject}: {problem}") from problem.__cause__
    except Problem as problem:
        raise NetworkError(f"{subject}: {problem}") from problem.__cause__
    except OSError as error:
        file = _shown(os.fsdecode(error.filename or ""), path) or "a file"
        raise NetworkError(
            f"{subject}: {file} cannot be read ({error.strerror or error}); check that it exists "
            "and its permissions"
        ) from error


def _shown(file: str, folder: str | Path) -> str:
    """How a file is called in a message about a folder."""
    inside = os.path.relpath(file, os.path.realpath(folder)) if file else ""
    return os.path.basename(file) if inside.startswith("..") else inside


@dataclass(frozen=True)
class ModelFolder:
    """One model of a network on disk, which passed every check."""

    role: Role
    path: Path
    """The network's folder for "value", else its sub-folder that is named for the role."""
    vocab_size: int
    """Number of logits, which may be padded beyond the tokenizer's tokens."""
    max_context: int
    """The longest sequence in tokens, from `max_position_embeddings`."""
    num_parameters: int
    """Numbers stored in the checkpoint: tied embeddings count once."""
    num_bytes: int
    """Size of the weight files."""
    kv_shape: tuple[int, int, int]
    """Layers, KV heads and head size: what its KV cache looks like; zeros for a model without
    attention."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, 2 bytes a number (float16, bfloat16)."""
        keys_and_values, bytes_per_number = 2, 2
        return keys_and_values * bytes_per_number * math.prod(self.kv_shape)


@dataclass(frozen=True)
class NetworkFolder:
    """A value network on disk that passed every check."""

    name: str
    path: Path
    manifest: Manifest
    version: str
    """8 lowercase hex digits over the names and contents of the files that count; empty if they
    were not read."""
    models: tuple[ModelFolder, ...]
    """By role: value; value and reference; or expert and antiexpert."""
    vocabulary_maps: tuple[str, ...]
    """Sorted fingerprints of the other tokenizers whose targets it can steer through a map."""

    @property
    def vocab_size(self) -> int:
        """Number of value logits: ids that both models of a contrast network have."""
        return min(model.vocab_size for model in self.models if model.role != "reference")

    @property
    def max_context(self) -> int:
        """The longest sequence in tokens that all of its models can read."""
        return min(model.max_context for model in self.models)

    @property
    def num_parameters(self) -> int:
        """Numbers stored in the checkpoints of all its models."""
        return sum(model.num_parameters for model in self.models)

    @property
    def num_bytes(self) -> int:
        """Size of all weight files."""
        return sum(model.num_bytes for model in self.models)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all models, 2 bytes a number (float16, bfloat16)."""
        return sum(model.kv_bytes_per_token for model in self.models)

    @property
    def knows_base(self) -> bool:
        """Whether it can say how far it moves a base, which dynamic fusion needs."""
        return self.manifest.kind == "contrast" or self.manifest.reference

    def at_version(self, version: str) -> NetworkFolder:
        """Return it with the version that an earlier check has found."""
        return replace(self, version=version)

    def moved(self, path: Path) -> NetworkFolder:
        """Return it as it is when its folder has been renamed."""
        models = (replace(model, path=model_path(path, model.role)) for model in self.models)
        return replace(self, path=path, models=tuple(models))

    def named(self, name: str) -> NetworkFolder:
        """Return it under the name that clients will use."""
        return replace(self, name=name)


def check_network(
    path: str | Path, name: str | None = None, *, with_version: bool = True
) -> NetworkFolder:
    """Check a folder without loading a tensor, and describe it.

    Args:
        name: what clients will call the network; by default the folder's own name.
        with_version: leave nothing out. Without, what takes time is: the weights are not read for
            the version, and the tokenizer is not loaded (`check_tokenizer`).

    Raises:
        NetworkError: a bad name, no folder, no manifest or a bad one, an unreadable or
            remote-code config, one that the weights belie, another tokenizer than the manifest
            names, pickled weights, missing, truncated or corrupt safetensors or vocabulary maps,
            links, a model too many or too few. `NoSuchNetwork`: no folder, or no manifest.
    """
    folder = Path(os.path.realpath(path))
    name = check_name(folder.name if name is None else name)
    with naming(name, path):
        network = _inspect(folder, name, with_version)
    if with_version:
        check_tokenizer(network)
    return network


def check_tokenizer(network: NetworkFolder) -> None:
    """Check that the tokenizer in the folder, if it has one, is the one that the manifest names.

    Raises:
        NetworkError: it is not, it cannot be loaded, or one of several models lacks logits for it.
    """
    if not any((network.path / file).is_file() for file in VOCABULARY_FILES):
        return
    # Imported late, as transformers below.
    from tokenizers import Tokenizer

    from value_models.vocabulary.tokens import VocabularyError, load_tokenizer

    with naming(network.name, network.path):
        try:
            tokenizer = load_tokenizer(network.path)
        except VocabularyError as error:
            raise Problem(str(error)) from error
        found = tokenizer_fingerprint(tokenizer)
        named = network.manifest.tokenizer_fingerprint
        file = network.path / "tokenizer.json"
        if found != named and file.is_file():
            # For some model types transformers adds tokens that the file does not have.
            found = tokenizer_fingerprint(Tokenizer.from_file(str(file)))
        if found != named:
            raise Problem(
                f"{MANIFEST_FILE} names the tokenizer {named[:15]}..., but the one in the folder "
                f"is {found[:15]}...; put back the tokenizer that the network was trained with"
            )
        if len(network.models) > 1:
            _refuse_small_vocabularies(network.models, max(tokenizer.get_vocab().values()))


def check_name(name: str) -> str:
    """Return `name` if it is a network's name, which is also always safe as a file name.

    Raises:
        NetworkError: it is not.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise NetworkError(
            f"{name!r} is no name for a value network: use 1 to 64 letters, digits, '.', '_' or "
            "'-', the first one a letter or digit"
        )
    return name


def check_fits(
    network: NetworkFolder,
    target_fingerprint: str,
    servable: Collection[str] = SERVABLE_KINDS,
) -> None:
    """Check that a network can steer the target whose tokenizer has this fingerprint.

    Raises:
        NetworkError: it was made for another tokenizer and has no map for this one, or is of a
            kind that cannot be served.
    """
    subject = f"value network {network.name!r} in {network.path}"
    manifest = network.manifest
    if manifest.kind not in servable:
        raise NetworkError(
            f"{subject}: kind {manifest.kind!r} cannot be served yet; "
            f"kinds that can: {', '.join(servable)}"
        )
    if target_fingerprint not in (manifest.tokenizer_fingerprint, *network.vocabulary_maps):
        raise NetworkError(
            f"{subject}: made for another tokenizer than the target's "
            f"({manifest.tokenizer_fingerprint[:15]}..., the target's is "
            f"{target_fingerprint[:15]}...); use a network of the target's family, or build a map "
            f"with `trimtab align --value {network.path} --target TARGET --corpus FILES`"
        )


class Store:
    """A directory that holds value networks, one folder each, under their names.

    Names that begin with a dot are not networks: they are being published or removed.
    """

    def __init__(self, directory: str | Path) -> None:
        """Raises DirectoryError if there is no such directory."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise DirectoryError(
                f"value network directory {self.directory}: there is no such directory"
            )

    def names(self) -> list[str]:
        """Sorted names of the sub-folders that hold a manifest, whether or not they check out.

        Raises:
            DirectoryError: the directory cannot be read.
        """
        try:
            entries = os.listdir(self.directory)
        except OSError as error:
            raise DirectoryError(
                f"value network directory {self.directory}: it cannot be read ({error.strerror})"
            ) from error
        return sorted(
            name
            for name in entries
            if re.fullmatch(NAME_PATTERN, name)
            and self._leads_to(name) is not None
            and os.path.isfile(self.directory / name / MANIFEST_FILE)
        )

    def folder(self, name: str) -> Path:
        """Return where a network lies; a name never leads out of the directory.

        Raises:
            NetworkError: it is no name, or a link that leads out of the directory.
            NoSuchNetwork: there is nothing.
            DirectoryError: the directory is gone.
        """
        check_name(name)
        Store(self.directory)
        entry = self.directory / name
        with naming(name, entry):
            if not os.path.lexists(entry):
                raise Missing("there is no such folder; check the name")
            folder = self._leads_to(name)
            if folder is None:
                raise Problem("it is a link out of the directory; copy the folder instead")
        return folder

    def _leads_to(self, name: str) -> Path | None:
        """Where an entry really is; None if that is not in the directory."""
        # `Path.resolve` raises where links lead in a circle.
        folder = Path(os.path.realpath(self.directory / name))
        return folder if folder.is_relative_to(os.path.realpath(self.directory)) else None

    def check(self, name: str, *, with_version: bool = True) -> NetworkFolder:
        """Check the network of this name. Raises what `folder` and `check_network` do."""
        while True:
            folder = self.folder(name)
            with naming(name, folder):
                before = folder.stat()
            try:
                return check_network(folder, name, with_version=with_version)
            except NetworkError:
                # Published anew meanwhile, a folder is emptied under the eyes of its readers.
                if not folder.exists() or os.path.samestat(before, folder.stat()):
                    raise


def model_path(folder: Path, role: Role) -> Path:
    """Return where a network's folder holds the model of this role."""
    return folder if role == "value" else folder / role


def files_that_count(folder: Path) -> list[str]:
    """Sorted names, relative to the folder, of the files that a server may read."""
    fixed = {folder / name for name in (MANIFEST_FILE, *TOKENIZER_FILES)}
    tensors = set(folder.glob(f"{MAP_FOLDER}/*.safetensors"))
    for role in get_args(Role):
        model = model_path(folder, role)
        fixed |= {model / CONFIG_FILE, model / INDEX_FILE}
        tensors |= set(model.glob("*.safetensors"))
    counting = {file for file in fixed if file.is_file()} | tensors
    return sorted(file.relative_to(folder).as_posix() for file in counting)


def refuse_unsafe_files(folder: Path) -> None:
    """Raise `Problem` for links, pickles and what is no file, wherever in the folder."""

    def fail(error: OSError) -> None:
        raise error

    for directory, folders, files in os.walk(folder, onerror=fail):
        for name in sorted([*folders, *files]):
            file = Path(directory, name)
            shown = file.relative_to(folder)
            mode = file.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise Problem(f"{shown} is a link; copy the file instead")
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise Problem(f"{shown} is neither a file nor a folder; remove it")
            if file.suffix.lower() in PICKLED_SUFFIXES:
                raise Problem(
                    f"{shown} looks like pickled weights, which can run code when loaded; "
                    "keep only safetensors in a network's folder"
                )


def require_network(folder: Path) -> None:
    """Raise `Missing` if there is no folder, or no manifest in it."""
    if not folder.is_dir():
        raise Missing("there is no such folder; check the path")
    if not (folder / MANIFEST_FILE).is_file():
        raise Missing(
            f"no {MANIFEST_FILE}; a folder without a manifest is no network "
            "(`trimtab train` and `trimtab pair` write one)"
        )


def _inspect(folder: Path, name: str, with_version: bool) -> NetworkFolder:
    require_network(folder)
    refuse_unsafe_files(folder)
    _refuse_huge_files(folder)
    manifest = _read_manifest(folder)
    _refuse_misplaced_models(folder, manifest)
    refuse_unsafe_configuration(folder)  # of the tokenizer, where no model lies beside it
    models: list[ModelFolder] = []
    weights: list[Path] = []
    for role in _roles(manifest):
        model = model_path(folder, role)
        with _about(role):
            found = read_checkpoint(model)
        models.append(
            ModelFolder(
                role=role,
                path=model,
                vocab_size=found.vocab_size,
                max_context=found.max_context,
                num_parameters=found.num_parameters,
                num_bytes=found.num_bytes,
                kv_shape=found.kv_shape,
            )
        )
        weights += found.weights
    network = NetworkFolder(name, folder, manifest, "", tuple(models), ())
    maps = _read_maps(folder, manifest, network.vocab_size)
    return replace(
        network,
        version=_content_version(network, [*weights, *maps.values()]) if with_version else "",
        vocabulary_maps=tuple(sorted(maps)),
    )


def _roles(manifest: Manifest) -> tuple[Role, ...]:
    if manifest.kind == "contrast":
        return "expert", "antiexpert"
    return ("value", "reference") if manifest.reference else ("value",)


@contextmanager
def _about(role: Role) -> Iterator[None]:
    """Have a `Problem` say in which of a network's models it is."""
    try:
        yield
    except Problem as problem:
        if role == "value":
            raise
        raise Problem(f"{role}/: {problem}") from problem.__cause__


def _refuse_misplaced_models(folder: Path, manifest: Manifest) -> None:
    """Raise `Problem` for a model that is missing, or that a network of this kind does not have."""
    roles = _roles(manifest)
    for role in MODEL_FOLDERS:
        there = (folder / role).is_dir()
        if role in roles and not there:
            raise Problem(
                f"no folder {role}/, which a network of kind {manifest.kind!r} "
                f"{'with a reference ' if manifest.reference else ''}has; copy it again, or make "
                f"it with `trimtab {'pair' if manifest.kind == 'contrast' else 'train'}`"
            )
        if there and role not in roles:
            advice = (
                f'name it in {MANIFEST_FILE} ("reference": true) or remove it'
                if role == "reference" and manifest.kind == "residual"
                else "remove it"
            )
            raise Problem(
                f"there is a folder {role}/, which {MANIFEST_FILE} (kind {manifest.kind!r}) "
                f"does not name; {advice}"
            )
    stray = sorted(folder.glob("*.safetensors"))
    if "value" not in roles and stray:
        raise Problem(
            f"{stray[0].name} lies beside {MANIFEST_FILE}, but the weights of a network of kind "
            f"{manifest.kind!r} lie in {' and '.join(f'{role}/' for role in roles)}; move it there"
        )


def _refuse_small_vocabularies(models: Iterable[ModelFolder], highest_id: int) -> None:
    """Raise `Problem` if a model lacks a logit for one of the tokenizer's tokens."""
    for model in models:
        if highest_id >= model.vocab_size:
            where = MANIFEST_FILE if model.role == "value" else f"{model.role}/"
            raise Problem(
                f"{where}: the model has {model.vocab_size:,} logits, but the tokenizer's tokens "
                f"go up to {highest_id:,}; use models of that tokenizer"
            )


def _refuse_huge_files(folder: Path) -> None:
    """Raise `Problem` for files that are read as a whole and are too large for that."""
    for name in files_that_count(folder):
        is_weights = name.endswith(".safetensors") and not name.startswith(MAP_FOLDER)
        is_json = os.path.basename(name) in JSON_FILES
        largest = LARGEST_JSON if is_json else LARGEST_TOKENIZER
        size = (folder / name).stat().st_size
        if not is_weights and size > largest:
            raise Problem(
                f"{name} has {size:,} bytes, more than any network's ({largest:,}); restore it"
            )


def _read_manifest(folder: Path) -> Manifest:
    fields = read_json_object(folder / MANIFEST_FILE)
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'content'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        )
        raise Problem(f"{MANIFEST_FILE} is invalid ({faults}); correct it or train again") from (
            error
        )


def _read_maps(folder: Path, manifest: Manifest, vocab_size: int) -> dict[str, Path]:
    """Check the vocabulary maps; returns their files by target fingerprint."""
    files = sorted((folder / MAP_FOLDER).glob("*.safetensors"))
    if not files:
        return {}
    # Imported late, as transformers below: it brings torch, and most networks have no map.
    from value_models.vocabulary.map import VocabularyMap, map_file
    from value_models.vocabulary.tokens import VocabularyError

    maps = {}
    for file in files:
        try:
            vocabulary_map = VocabularyMap.load(file)
        except VocabularyError as error:
            raise Problem(str(error)) from error
        if vocabulary_map.value_fingerprint != manifest.tokenizer_fingerprint:
            raise Problem(f"{file.name} maps another network's tokenizer; run `trimtab align`")
        if map_file(folder, vocabulary_map.target_fingerprint) != file:
            raise Problem(
                f"{file.name} is not named for its target; it belongs into "
                f"{map_file(folder, vocabulary_map.target_fingerprint).name}"
            )
        if vocabulary_map.highest_value_id >= vocab_size:
            raise Problem(f"{file.name} names ids that the network has no logits for")
        maps[vocabulary_map.target_fingerprint] = file
    return maps


def _content_version(network: NetworkFolder, others: Iterable[Path]) -> str:
    """Hash what decides the network's behaviour; a README beside it changes nothing."""
    folder = network.path
    fixed = {folder / name for name in (MANIFEST_FILE, *TOKENIZER_FILES)}
    for place in {folder, *(model.path for model in network.models)}:
        fixed |= {place / CONFIG_FILE, place / INDEX_FILE}
    digest = hashlib.sha256()
    for file in sorted({file for file in fixed if file.is_file()} | set(others)):
        with file.open("rb") as content:
            file_digest = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file_digest}\n".encode())
    return digest.hexdigest()[:8]
