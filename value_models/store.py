"""The directory of value networks: which there are, and whether each can be trusted to load.

Everything here reads names, headers, JSON and vocabulary maps. No weight is loaded, nothing is
unpickled and no code from a checkpoint runs, so a folder of unknown origin can be checked safely.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from value_models.manifest import MANIFEST_FILE, NAME_PATTERN, Manifest

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
CONFIG_KEYS = (
    "vocab_size",
    "max_position_embeddings",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SERVABLE_KINDS = ("residual",)


class NetworkError(ValueError):
    """A folder that is no usable value network: which one, what is wrong, and what to do."""


class _Problem(Exception):
    """What is wrong with a folder, before the folder's name is put in front."""


@dataclass(frozen=True)
class NetworkFolder:
    """A value network on disk that passed every check."""

    name: str
    path: Path
    manifest: Manifest
    version: str
    """8 lowercase hex digits over the names and contents of the files that count."""
    vocab_size: int
    """Number of logits, which may be padded beyond the tokenizer's tokens."""
    max_context: int
    """The longest sequence in tokens, from `max_position_embeddings`."""
    num_parameters: int
    """Numbers stored in the checkpoint: tied embeddings count once."""
    num_bytes: int
    """Size of the weight files."""
    kv_bytes_per_token: int
    """Keys and values of one token in all layers, 2 bytes a number (float16, bfloat16); 0 for a
    network without attention."""
    vocabulary_maps: tuple[str, ...]
    """Sorted fingerprints of the other tokenizers whose targets it can steer through a map."""


def check_network(path: str | Path, name: str | None = None) -> NetworkFolder:
    """Check a folder without loading a tensor, and describe it.

    `name` is what clients will call the network; by default the folder's own name.

    Raises:
        NetworkError: a bad name, no folder, no manifest or a bad one, an unreadable or
            remote-code config, pickled weights, missing, truncated or corrupt safetensors or
            vocabulary maps, links out of the folder.
    """
    folder = Path(path).resolve()
    name = check_name(folder.name if name is None else name)
    try:
        return _inspect(folder, name)
    except _Problem as problem:
        raise NetworkError(f"value network {name!r} in {path}: {problem}") from problem.__cause__
    except OSError as error:
        raise NetworkError(
            f"value network {name!r} in {path}: {error.filename or 'a file'} cannot be read "
            f"({error.strerror or error}); check that it exists and its permissions"
        ) from error


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
    """A directory that holds value networks, one folder each, under their names."""

    def __init__(self, directory: str | Path) -> None:
        """Raises NetworkError if there is no such directory."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise NetworkError(
                f"value network directory {self.directory}: there is no such directory"
            )

    def names(self) -> list[str]:
        """Sorted names of the sub-folders that hold a manifest, whether or not they check out."""
        return sorted(
            folder.name
            for folder in self.directory.iterdir()
            if re.fullmatch(NAME_PATTERN, folder.name) and (folder / MANIFEST_FILE).is_file()
        )

    def check(self, name: str) -> NetworkFolder:
        """Check the network of this name.

        Raises:
            NetworkError: as `check_network`; a name can never lead out of the directory.
        """
        return check_network(self.directory / check_name(name), name)


def _inspect(folder: Path, name: str) -> NetworkFolder:
    if not folder.is_dir():
        raise _Problem("there is no such folder; check the path")
    if not (folder / MANIFEST_FILE).is_file():
        raise _Problem(
            f"no {MANIFEST_FILE}; a folder without a manifest is no network "
            "(`trimtab train` writes one)"
        )
    _refuse_unsafe_files(folder)
    manifest = _read_manifest(folder)
    config = _read_config(folder)
    weights = _weight_files(folder)
    vocab_size = _config_size(config, "vocab_size")
    maps = _read_maps(folder, manifest, vocab_size)
    return NetworkFolder(
        name=name,
        path=folder,
        manifest=manifest,
        num_parameters=sum(_count_parameters(file) for file in weights),
        num_bytes=sum(file.stat().st_size for file in weights),
        kv_bytes_per_token=_kv_bytes_per_token(config),
        vocabulary_maps=tuple(sorted(maps)),
        version=_content_version(folder, [*weights, *maps.values()]),
        vocab_size=vocab_size,
        max_context=_config_size(config, "max_position_embeddings"),
    )


def _refuse_unsafe_files(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        shown = file.relative_to(folder)
        if not file.resolve().is_relative_to(folder):
            raise _Problem(f"{shown} is a link out of the folder; copy the file instead")
        if file.suffix.lower() in PICKLED_SUFFIXES:
            raise _Problem(
                f"{shown} looks like pickled weights, which can run code when loaded; "
                "keep only safetensors in a network's folder"
            )


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _Problem(f"{file.name} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise _Problem(f"{file.name} holds no JSON object; restore the file")
    return value


def _read_manifest(folder: Path) -> Manifest:
    fields = _read_json_object(folder / MANIFEST_FILE)
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'content'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        )
        raise _Problem(f"{MANIFEST_FILE} is invalid ({faults}); correct it or train again") from (
            error
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json into transformers' canonical names, refusing code from the checkpoint."""
    for file in (folder / CONFIG_FILE, folder / "tokenizer_config.json"):
        if file.name == CONFIG_FILE and not file.is_file():
            raise _Problem(f"no {CONFIG_FILE}; the checkpoint is incomplete, copy it again")
        if file.is_file() and "auto_map" in _read_json_object(file):
            raise _Problem(
                f"{file.name} asks for code from the checkpoint (auto_map), which is never run; "
                "use a model type that transformers knows"
            )
    # Imported late: transformers takes seconds, and most refusals above need none of it.
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration class validates in its own way
        reason = " ".join(str(error).split())[:200]
        raise _Problem(f"{CONFIG_FILE} cannot be used ({reason}); restore the file") from error
    text_config = config.get_text_config()
    return {key: getattr(text_config, key, None) for key in CONFIG_KEYS}


def _config_size(config: dict[str, Any], key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _Problem(f"{CONFIG_FILE} has no usable {key} ({value!r}); restore the file")
    return value


def _kv_bytes_per_token(config: dict[str, Any]) -> int:
    heads = config["num_attention_heads"] or 0
    kv_heads = config["num_key_value_heads"] or heads
    head_size = config["head_dim"] or (config["hidden_size"] or 0) // max(heads, 1)
    keys_and_values, bytes_per_number = 2, 2
    return int(
        keys_and_values
        * bytes_per_number
        * (config["num_hidden_layers"] or 0)
        * kv_heads
        * head_size
    )


def _read_maps(folder: Path, manifest: Manifest, vocab_size: int) -> dict[str, Path]:
    """Check the vocabulary maps; returns their files by target fingerprint."""
    files = sorted((folder / "vocabulary_maps").glob("*.safetensors"))
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
            raise _Problem(str(error)) from error
        if vocabulary_map.value_fingerprint != manifest.tokenizer_fingerprint:
            raise _Problem(f"{file.name} maps another network's tokenizer; run `trimtab align`")
        if map_file(folder, vocabulary_map.target_fingerprint) != file:
            raise _Problem(
                f"{file.name} is not named for its target; it belongs into "
                f"{map_file(folder, vocabulary_map.target_fingerprint).name}"
            )
        if vocabulary_map.highest_value_id >= vocab_size:
            raise _Problem(f"{file.name} names ids that the network has no logits for")
        maps[vocabulary_map.target_fingerprint] = file
    return maps


def _weight_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise _Problem("no safetensors weights; copy the whole checkpoint folder")
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = _read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _Problem(f"{INDEX_FILE} has no weight_map; restore the file")
        listed = {str(file) for file in weight_map.values()}
        missing = sorted(listed - {file.name for file in found})
        if missing:
            raise _Problem(f"{INDEX_FILE} lists {missing[0]}, which is not there; copy it again")
        _refuse_misplaced_tensors(folder, weight_map)
        found = [file for file in found if file.name in listed]
    elif len(found) > 1:
        raise _Problem(f"{len(found)} safetensors files but no {INDEX_FILE}; copy it too")
    return found


def _refuse_misplaced_tensors(folder: Path, weight_map: dict[str, Any]) -> None:
    for file_name in sorted({str(file) for file in weight_map.values()}):
        shapes = _tensor_shapes(folder / file_name)
        for tensor, listed_file in weight_map.items():
            if listed_file == file_name and tensor not in shapes:
                raise _Problem(f"{file_name} lacks the tensor {tensor} that {INDEX_FILE} lists")


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Read a safetensors header.

    `safe_open` maps the file, parses the header and verifies that the tensors' offsets tile the
    rest of the file exactly, so truncation, trailing bytes and overlaps all raise.
    """
    if not os.access(file, os.R_OK):  # safetensors would say that there is no such file
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    try:
        with safe_open(file, framework="numpy") as tensors:
            shapes = {key: list(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _Problem(
            f"{file.name} is truncated or corrupt ({reason}); copy or train it again"
        ) from error
    if not shapes:
        raise _Problem(f"{file.name} holds no tensors; copy or train it again")
    return shapes


def _count_parameters(file: Path) -> int:
    return sum(math.prod(shape) for shape in _tensor_shapes(file).values())


def _content_version(folder: Path, others: list[Path]) -> str:
    """Hash what decides the network's behaviour; a README beside it changes nothing."""
    fixed = (MANIFEST_FILE, CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES)
    counting = {folder / name for name in fixed if (folder / name).is_file()} | set(others)
    digest = hashlib.sha256()
    for file in sorted(counting):
        with file.open("rb") as content:
            file_digest = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file_digest}\n".encode())
    return digest.hexdigest()[:8]
