"""The random checkpoints that the benchmark runs: shapes of real use, weights of none."""

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import (
    make_contrast,
    make_mapped_network,
    make_model,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)

WEIGHTS = "model.safetensors"
VOCAB_SIZE = 8192
POSITIONS = 512
DTYPES = ("bfloat16", "float32")

Shape = dict[str, Any]
"""What `tests.models.make_model` takes."""

TARGET: Shape = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "layers": 12,
    "heads": 12,
    "kv_heads": 12,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
}
"""105 M parameters."""
NETWORK: Shape = {
    "hidden_size": 256,
    "intermediate_size": 832,
    "layers": 4,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": True,
}
"""5.7 M parameters."""
LARGE_TARGET: Shape = {
    "architecture": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "layers": 28,
    "heads": 28,
    "kv_heads": 4,
    "head_dim": 128,
    "vocab_size": 152064,
    "max_position_embeddings": 4096,
}
"""As Qwen2.5-7B, but with fewer positions: vLLM keeps room for one whole context."""
LARGE_NETWORK: Shape = {
    "architecture": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "layers": 24,
    "heads": 14,
    "kv_heads": 2,
    "head_dim": 64,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""As Qwen2.5-0.5B."""
MIDDLE_TARGET: Shape = {
    "architecture": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "layers": 28,
    "heads": 12,
    "kv_heads": 2,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""As Qwen2.5-1.5B, but with fewer positions."""
MIDDLE_NETWORK: Shape = {
    "architecture": "qwen2",
    "hidden_size": 448,
    "intermediate_size": 1472,
    "layers": 6,
    "heads": 7,
    "kv_heads": 7,
    "head_dim": 64,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""85 M parameters, 5.5 % of `MIDDLE_TARGET`'s: 68 M are the vocabulary's."""


class Models(NamedTuple):
    """A target and the networks beside it, by their shapes."""

    target: Shape
    network: Shape
    value_memory_gb: float  # GiB, for eight networks in bfloat16 and their KV caches


SMALL = "105m"
MODELS = {
    SMALL: Models(TARGET, NETWORK, 2.0),
    "1.5b": Models(MIDDLE_TARGET, MIDDLE_NETWORK, 4.0),
    "7b": Models(LARGE_TARGET, LARGE_NETWORK, 12.0),
}
"""By the target's parameters. The weights of all targets but the small one are made up by vLLM."""
WIDTHS = {
    0.01: (96, 2, 32),
    0.02: (128, 4, 64),
    0.055: (256, 4, 64),
    0.1: (320, 6, 64),
    0.2: (448, 7, 64),
    0.3: (512, 8, 64),
}
"""Share of the target's parameters -> hidden size, layers and head size of such a network."""


class Checkpoints(NamedTuple):
    """A target and the networks beside it."""

    target: Path
    networks: dict[str, Path]
    dtype: str

    @property
    def engine_options(self) -> dict[str, Any]:
        """What vLLM must be told to load the target; by itself it makes bfloat16 of float32."""
        dummy = {} if self.has_weights else {"load_format": "dummy"}
        return {"dtype": self.dtype, **dummy}

    @property
    def has_weights(self) -> bool:
        """Whether the target has any of its own."""
        return (self.target / WEIGHTS).exists()

    def share(self, network: str) -> float:
        """The parameters of a network for each of the target."""
        return num_parameters(self.networks[network]) / num_parameters(self.target)

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {
            "dtype": self.dtype,
            "target_parameters": num_parameters(self.target),
            "target_weights": "random" if self.has_weights else "made up by vLLM",
            "networks": len(self.networks),
            "network_parameters": sorted(set(map(num_parameters, self.networks.values()))),
            "vocab_size": AutoConfig.from_pretrained(self.target).vocab_size,
        }


def make_target(folder: Path, dtype: str, positions: int = POSITIONS) -> Path:
    """Write the target of 105 M parameters."""
    return make_model(folder / "target", **TARGET, max_position_embeddings=positions, dtype=dtype)


def make_networks(
    folder: Path, names: Iterable[str], dtype: str, positions: int = POSITIONS
) -> dict[str, Path]:
    """Write networks of 5.7 M parameters (5.5 %), of different weights."""
    return {
        name: make_network(
            folder / name, seed=seed, **NETWORK, max_position_embeddings=positions, dtype=dtype
        )
        for seed, name in enumerate(names, start=1)
    }


def make_checkpoints(
    folder: Path, dtype: str, names: Iterable[str], positions: int = POSITIONS
) -> Checkpoints:
    """Write the target of 105 M parameters, and networks of 5.7 M of these names."""
    target = make_target(folder, dtype, positions)
    return Checkpoints(target, make_networks(folder, names, dtype, positions), dtype)


def make_checkpoints_of(size: str, folder: Path, dtype: str, names: Iterable[str]) -> Checkpoints:
    """Write the target of this size, a key of `MODELS`, and networks of these names."""
    if size == SMALL:
        return make_checkpoints(folder, dtype, names)
    models = MODELS[size]
    return make_dummy_checkpoints(folder, dtype, names, models.target, models.network)


def make_mapped(folder: Path, dtype: str) -> Path:
    """Write a network of 5.7 M parameters that reads another vocabulary than the target."""
    return make_mapped_network(
        folder / "mapped",
        make_tokenizer(),
        tokenizer=make_sentencepiece_tokenizer(),
        seed=1000,
        **NETWORK,
        max_position_embeddings=2 * POSITIONS,  # of prompts at random it has twice the tokens
        dtype=dtype,
    )


def make_pair(folder: Path, dtype: str) -> Path:
    """Write a contrast network of two models of 5.7 M parameters."""
    return make_contrast(folder / "pair", seed=2000, **NETWORK, dtype=dtype)


def make_dummy_checkpoints(
    folder: Path,
    dtype: str,
    names: Iterable[str],
    target: Shape,
    network: Shape,
) -> Checkpoints:
    """Write a target whose weights vLLM makes up, and networks with weights of their own."""
    return Checkpoints(
        make_model(folder / "target", **target, dtype=dtype, with_weights=False),
        {
            name: make_network(folder / name, seed=seed, **network, dtype=dtype)
            for seed, name in enumerate(names, start=1)
        },
        dtype,
    )


def make_sized_networks(
    folder: Path,
    shares: Iterable[float],
    dtype: str,
    target_parameters: int,
    positions: int = POSITIONS,
) -> dict[str, Path]:
    """Write a network of each of these shares of the target's parameters; keys of `WIDTHS`.

    Returns:
        Folders by names like "5.5-percent".
    """
    return {
        f"{100 * share:g}-percent": make_network(
            folder / f"share-{share:g}",
            seed=seed,
            **shape_of(share, target_parameters),
            max_position_embeddings=positions,
            dtype=dtype,
        )
        for seed, share in enumerate(shares, start=1)
    }


def shape_of(share: float, target_parameters: int) -> Shape:
    """Return the shape of a network with about this share of the target's parameters.

    The widths are chosen by hand, to be those of a plausible model; what is left goes into the
    MLPs.
    """
    hidden, layers, head_dim = WIDTHS[share]
    per_layer = (share * target_parameters - VOCAB_SIZE * hidden) / layers - 4 * hidden**2
    return NETWORK | {
        "hidden_size": hidden,
        "intermediate_size": 32 * round(per_layer / (3 * hidden) / 32),
        "layers": layers,
        "heads": hidden // head_dim,
        "kv_heads": hidden // head_dim,
        "head_dim": head_dim,
    }


@functools.cache
def num_parameters(checkpoint: Path) -> int:
    """Count the parameters of a checkpoint, those of its models in sub-folders included."""
    files = sorted(checkpoint.rglob(WEIGHTS))
    if files:
        return sum(map(_num_stored, files))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    return sum(parameter.numel() for parameter in model.parameters())


def _num_stored(file: Path) -> int:
    with safe_open(file, "pt") as tensors:
        names = tensors.keys()
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
