"""The directory of value networks: which there are, and whether each can be trusted to load.

Everything here reads names, headers, JSON, tokenizers and vocabulary maps. No weight is loaded,
nothing is unpickled and no code from a checkpoint runs, so a folder of unknown origin can be
checked safely.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from value_models.manifest import MANIFEST_FILE, NAME_PATTERN, Manifest, tokenizer_fingerprint

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
VOCABULARY_FILES = ("tekken.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
MAP_FOLDER = "vocabulary_maps"
CONFIG_KEYS = (
    "vocab_size",
    "max_position_embeddings",
    "num_hidden_layers",
    "hidden_size",
    "word_embed_proj_dim",  # OPT's embedding may be narrower than its layers
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
LARGEST_JSON = 32 << 20
LARGEST_TOKENIZER = 256 << 20
"""Bytes; the largest vocabularies known have files of a tenth of that."""
LARGEST_NUMBER = 1_000_000
"""transformers makes lists as long as some numbers of a configuration say."""
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|lm_head)\.weight$")
KEYS = re.compile(r"\.self_attn\.k_proj\.weight$")
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d{1,6})\.")
SHARD = re.compile(r"-\d+-of-0*([2-9]|[1-9]\d+)\.safetensors$")
SERVABLE_KINDS = ("residual",)


class NetworkError(ValueError):
    """A folder that is no usable value network: which one, what is wrong, and what to do."""


class NoSuchNetwork(NetworkError):
    """There is no network of that name: no folder, or one without a manifest."""


class DirectoryError(NetworkError):
    """Not a network is at fault, but the directory that holds them: it is not there, full, ..."""


class Problem(Exception):
    """What is wrong with a folder, before the folder's name is put in front; see `naming`."""


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
        file = os.path.basename(os.fsdecode(error.filename or "")) or "a file"
        raise NetworkError(
            f"{subject}: {file} cannot be read ({error.strerror or error}); check that it exists "
            "and its permissions"
        ) from error


@dataclass(frozen=True)
class NetworkFolder:
    """A value network on disk that passed every check."""

    name: str
    path: Path
    manifest: Manifest
    version: str
    """8 lowercase hex digits over the names and contents of the files that count; empty if they
    were not read."""
    vocab_size: int
    """Number of logits, which may be padded beyond the tokenizer's tokens."""
    max_context: int
    """The longest sequence in tokens, from `max_position_embeddings`."""
    num_parameters: int
    """Numbers stored in the checkpoint: tied embeddings count once."""
    num_bytes: int
    """Size of the weight files."""
    kv_shape: tuple[int, int, int]
    """Layers, KV heads and head size: what its KV cache looks like; zeros for a network without
    attention."""
    vocabulary_maps: tuple[str, ...]
    """Sorted fingerprints of the other tokenizers whose targets it can steer through a map."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, 2 bytes a number (float16, bfloat16)."""
        keys_and_values, bytes_per_number = 2, 2
        return keys_and_values * bytes_per_number * math.prod(self.kv_shape)

    def at_version(self, version: str) -> NetworkFolder:
        """Return it with the version that an earlier check has found."""
        return replace(self, version=version)

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
            links. `NoSuchNetwork`: no folder, or no manifest.
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
        NetworkError: it is not, or it cannot be loaded.
    """
    if not any((network.path / file).is_file() for file in VOCABULARY_FILES):
        return
    # Imported late, as transformers below.
    from tokenizers import Tokenizer

    from value_models.vocabulary.tokens import VocabularyError, load_tokenizer

    with naming(network.name, network.path):
        try:
            found = tokenizer_fingerprint(load_tokenizer(network.path))
        except VocabularyError as error:
            raise Problem(str(error)) from error
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


def files_that_count(folder: Path) -> list[str]:
    """Sorted names, relative to the folder, of the files that a server may read."""
    fixed = (MANIFEST_FILE, CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES)
    tensors = [*folder.glob("*.safetensors"), *folder.glob(f"{MAP_FOLDER}/*.safetensors")]
    return sorted(
        {name for name in fixed if (folder / name).is_file()}
        | {file.relative_to(folder).as_posix() for file in tensors}
    )


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
            "(`trimtab train` writes one)"
        )


def _inspect(folder: Path, name: str, with_version: bool) -> NetworkFolder:
    require_network(folder)
    refuse_unsafe_files(folder)
    _refuse_huge_files(folder)
    manifest = _read_manifest(folder)
    config = _read_config(folder)
    weights = _weight_files(folder)
    shapes = [_tensor_shapes(file) for file in weights]
    _refuse_lies(config, {name: shape for part in shapes for name, shape in part.items()})
    vocab_size = _config_size(config, "vocab_size")
    maps = _read_maps(folder, manifest, vocab_size)
    return NetworkFolder(
        name=name,
        path=folder,
        manifest=manifest,
        num_parameters=sum(math.prod(shape) for part in shapes for shape in part.values()),
        num_bytes=sum(file.stat().st_size for file in weights),
        kv_shape=_kv_shape(config),
        vocabulary_maps=tuple(sorted(maps)),
        version=_content_version(folder, [*weights, *maps.values()]) if with_version else "",
        vocab_size=vocab_size,
        max_context=_config_size(config, "max_position_embeddings"),
    )


def _refuse_huge_files(folder: Path) -> None:
    """Raise `Problem` for files that are read as a whole and are too large for that."""
    for name in files_that_count(folder):
        is_weights = name.endswith(".safetensors") and not name.startswith(MAP_FOLDER)
        is_json = name in (MANIFEST_FILE, CONFIG_FILE, INDEX_FILE, "tokenizer_config.json")
        largest = LARGEST_JSON if is_json else LARGEST_TOKENIZER
        size = (folder / name).stat().st_size
        if not is_weights and size > largest:
            raise Problem(
                f"{name} has {size:,} bytes, more than any network's ({largest:,}); restore it"
            )


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Problem(f"{file.name} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise Problem(f"{file.name} holds no JSON object; restore the file")
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
        raise Problem(f"{MANIFEST_FILE} is invalid ({faults}); correct it or train again") from (
            error
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json into transformers' canonical names, refusing code from the checkpoint."""
    for file in (folder / CONFIG_FILE, folder / "tokenizer_config.json"):
        if file.name == CONFIG_FILE and not file.is_file():
            raise Problem(f"no {CONFIG_FILE}; the checkpoint is incomplete, copy it again")
        if file.is_file() and "auto_map" in _read_json_object(file):
            raise Problem(
                f"{file.name} asks for code from the checkpoint (auto_map), which is never run; "
                "use a model type that transformers knows"
            )
    _refuse_huge_numbers(_read_json_object(folder / CONFIG_FILE))
    # Imported late: transformers takes seconds, and most refusals above need none of it.
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration class validates in its own way
        reason = " ".join(str(error).split())[:200]
        raise Problem(f"{CONFIG_FILE} cannot be used ({reason}); restore the file") from error
    text_config = config.get_text_config()
    return {key: getattr(text_config, key, None) for key in CONFIG_KEYS}


def _refuse_huge_numbers(config: object, key: str = "") -> None:
    """Raise `Problem` for a count of layers, labels, ... that no model has."""
    if isinstance(config, dict):
        for inner, value in config.items():
            _refuse_huge_numbers(value, str(inner))
    elif key.startswith(("num_", "n_")) and isinstance(config, int) and config > LARGEST_NUMBER:
        raise Problem(f"{CONFIG_FILE} has no usable {key} ({config}); restore the file")


def _config_size(config: dict[str, Any], key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise Problem(f"{CONFIG_FILE} has no usable {key} ({value!r}); restore the file")
    return value


def _refuse_lies(config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Raise `Problem` where the weights' shapes belie the configuration.

    Memory is promised by the configuration's numbers. The names are those that transformers gives
    in most architectures; weights of other names are left to the loader.
    """

    def refuse(key: str, claimed: int, tensor: str, found: str) -> None:
        raise Problem(
            f"{CONFIG_FILE} says {key} {claimed:,}, but the weights have {found} ({tensor}); "
            "restore the file"
        )

    vocab_size = config["vocab_size"]
    width = config["word_embed_proj_dim"] or config["hidden_size"]
    layers, kv_heads, head_size = _kv_shape(config)
    keys = {}
    last_layer, last_tensor = -1, ""
    for tensor, shape in shapes.items():
        if EMBEDDING.search(tensor) and len(shape) == 2:
            if isinstance(vocab_size, int) and shape[0] != vocab_size:
                refuse("vocab_size", vocab_size, tensor, f"{shape[0]:,} rows")
            if isinstance(width, int) and shape[1] != width:
                refuse("hidden_size", width, tensor, f"{shape[1]:,} columns")
        if KEYS.search(tensor) and len(shape) == 2:
            keys[shape[0]] = tensor
        layer = LAYER.search(tensor)
        if layer and int(layer[1]) > last_layer:
            last_layer, last_tensor = int(layer[1]), tensor
    if keys and kv_heads * head_size not in keys:  # layers may differ in this
        found = " or ".join(f"{rows:,}" for rows in sorted(keys))
        refuse("KV heads * head size", kv_heads * head_size, min(keys.values()), f"{found} rows")
    if last_layer >= 0 and layers > last_layer + 1:
        refuse("num_hidden_layers", layers, last_tensor, f"{last_layer + 1:,}")


def _kv_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    if not config["num_attention_heads"]:
        return 0, 0, 0
    heads = _config_size(config, "num_attention_heads")
    kv_heads = (
        _config_size(config, "num_key_value_heads") if config["num_key_value_heads"] else heads
    )
    if config["head_dim"]:
        head_size = _config_size(config, "head_dim")
    else:
        head_size = _config_size(config, "hidden_size") // heads
    return _config_size(config, "num_hidden_layers"), kv_heads, head_size


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


def _weight_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise Problem("no safetensors weights; copy the whole checkpoint folder")
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = _read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Problem(f"{INDEX_FILE} has no weight_map; restore the file")
        listed = {str(file) for file in weight_map.values()}
        missing = sorted(listed - {file.name for file in found})
        if missing:
            raise Problem(f"{INDEX_FILE} lists {missing[0]}, which is not there; copy it again")
        _refuse_misplaced_tensors(folder, weight_map)
        found = [file for file in found if file.name in listed]
    elif len(found) > 1:
        raise Problem(f"{len(found)} safetensors files but no {INDEX_FILE}; copy it too")
    elif SHARD.search(found[0].name):
        raise Problem(f"{found[0].name} is one of several, but no {INDEX_FILE}; copy them too")
    return found


def _refuse_misplaced_tensors(folder: Path, weight_map: dict[str, Any]) -> None:
    for file_name in sorted({str(file) for file in weight_map.values()}):
        shapes = _tensor_shapes(folder / file_name)
        for tensor, listed_file in weight_map.items():
            if listed_file == file_name and tensor not in shapes:
                raise Problem(f"{file_name} lacks the tensor {tensor} that {INDEX_FILE} lists")


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
        raise Problem(
            f"{file.name} is truncated or corrupt ({reason}); copy or train it again"
        ) from error
    if not shapes:
        raise Problem(f"{file.name} holds no tensors; copy or train it again")
    return shapes


def _content_version(folder: Path, others: Iterable[Path]) -> str:
    """Hash what decides the network's behaviour; a README beside it changes nothing."""
    fixed = (MANIFEST_FILE, CONFIG_FILE, INDEX_FILE, *TOKENIZER_FILES)
    counting = {folder / name for name in fixed if (folder / name).is_file()} | set(others)
    digest = hashlib.sha256()
    for file in sorted(counting):
        with file.open("rb") as content:
            file_digest = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file_digest}\n".encode())
    return digest.hexdigest()[:8]
