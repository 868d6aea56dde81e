"""A model's checkpoint, as Hugging Face lays it out: found, checked and copied without loading it.

Configuration and headers are read: no weight is loaded, nothing is unpickled and no code from the
checkpoint runs.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

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
LARGEST_NUMBER = 1_000_000
"""transformers makes lists as long as some numbers of a configuration say."""
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|lm_head)\.weight$")
KEYS = re.compile(r"\.self_attn\.k_proj\.weight$")
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d{1,6})\.")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SHARD = re.compile(r"-\d+-of-0*([2-9]|[1-9]\d+)\.safetensors$")


class Problem(Exception):
    """What is wrong with a folder; who knows its name puts that in front."""


class Checkpoint(NamedTuple):
    """What headers and configuration say of a model."""

    vocab_size: int
    """Number of logits, which may be padded beyond the tokenizer's tokens."""
    max_context: int
    """The longest sequence in tokens, from `max_position_embeddings`."""
    num_parameters: int
    """Numbers stored: tied embeddings count once."""
    num_bytes: int
    """Size of the weight files."""
    kv_shape: tuple[int, int, int]
    """Layers, KV heads and head size: what its KV cache looks like; zeros for a model without
    attention."""
    weights: tuple[Path, ...]
    """The files that hold them."""


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a model's configuration and weights, and describe it.

    Raises:
        Problem: an unreadable or remote-code configuration, or one that the weights belie; missing,
            truncated or corrupt safetensors.
    """
    config = _read_config(folder)
    weights = _weight_files(folder)
    shapes = [_tensor_shapes(file) for file in weights]
    _refuse_lies(config, {name: shape for part in shapes for name, shape in part.items()})
    return Checkpoint(
        vocab_size=_config_size(config, "vocab_size"),
        max_context=_config_size(config, "max_position_embeddings"),
        num_parameters=sum(math.prod(shape) for part in shapes for shape in part.values()),
        num_bytes=sum(file.stat().st_size for file in weights),
        kv_shape=_kv_shape(config),
        weights=tuple(weights),
    )


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object. Raises `Problem` if it does not."""
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Problem(f"{file.name} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise Problem(f"{file.name} holds no JSON object; restore the file")
    return value


def find_checkpoint(model: str | Path) -> Path:
    """Return the folder of a model: one on this machine, or one of the Hugging Face hub's cache,
    where what a server needs is downloaded unless it is there whole.

    Raises:
        Problem: there is none.
    """
    if os.path.isdir(model):
        return Path(model)
    if not HUB_NAME.fullmatch(str(model)):
        raise Problem("there is no such folder; check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def download(local: bool) -> Path:
        folder = snapshot_download(
            str(model),
            allow_patterns=["*.safetensors", INDEX_FILE, CONFIG_FILE, *TOKENIZER_FILES],
            # The same weights once more, in other formats.
            ignore_patterns=["*/*", "consolidated*"],
            local_files_only=local,
        )
        return Path(folder)

    with suppress(LocalEntryNotFoundError, HFValidationError, Problem):
        folder = download(local=True)
        read_checkpoint(folder)
        if any((folder / file).is_file() for file in VOCABULARY_FILES):
            return folder
    try:
        return download(local=False)
    except (HFValidationError, OSError) as error:  # of the hub, of the network, of the disk
        reason = " ".join(str(error).split())[:200]
        raise Problem(
            "there is no such folder, and no such model can be had from the Hugging Face hub "
            f"({reason})"
        ) from error


def copy_checkpoint(folder: Path, copy: Path, *, link: bool = False) -> None:
    """Put what a server needs of a sound model, all but its tokenizer, into a new folder, and have
    it on disk. Links are followed.

    Args:
        link: make hard links to the weights.

    Raises:
        Problem: weights cannot be linked.
        OSError: something cannot be read or written.
    """
    copy.mkdir()
    for name in (CONFIG_FILE, INDEX_FILE):
        if (folder / name).is_file():
            copy_file(folder / name, copy / name)
    for file in _weight_files(folder):
        if link:
            _link(file, copy / file.name)
        else:
            copy_file(file, copy / file.name)


def copy_file(file: Path, copy: Path) -> None:
    """Copy a file's content, and have it on disk."""
    shutil.copyfile(file, copy)
    with copy.open("rb") as written:
        os.fsync(written.fileno())


def _link(file: Path, link: Path) -> None:
    try:
        os.link(os.path.realpath(file), link)
    except OSError as error:
        why = "that is another file system" if error.errno == errno.EXDEV else error.strerror
        raise Problem(f"{file.name} cannot be linked from there ({why})") from error


def refuse_unsafe_configuration(folder: Path) -> None:
    """Raise `Problem` for what transformers must not read, from the files that there are: a request
    for code from the checkpoint, counts that no model has."""
    for file in (folder / CONFIG_FILE, folder / "tokenizer_config.json"):
        if file.is_file() and "auto_map" in read_json_object(file):
            raise Problem(
                f"{file.name} asks for code from the checkpoint (auto_map), which is never run; "
                "use a model type that transformers knows"
            )
    if (folder / CONFIG_FILE).is_file():
        _refuse_huge_numbers(read_json_object(folder / CONFIG_FILE))


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json into transformers' canonical names, refusing code from the checkpoint."""
    if not (folder / CONFIG_FILE).is_file():
        raise Problem(f"no {CONFIG_FILE}; the checkpoint is incomplete, copy it again")
    refuse_unsafe_configuration(folder)
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


def _weight_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise Problem("no safetensors weights; copy the whole checkpoint folder")
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
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
