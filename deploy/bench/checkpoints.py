"""The random checkpoints that the benchmark runs: shapes of real use, weights of none."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from tests.models import (
    make_contrast,
    make_mapped_network,
    make_model,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)

VOCAB_SIZE = 8192


class Checkpoints(NamedTuple):
    """A target and the networks beside it.

    One guides, one ("mapped") does so from another vocabulary, one is just resident.
    """

    target: Path
    networks: dict[str, Path]
    target_parameters: int
    network_parameters: int  # of one network
    vocab_size: int


def make_checkpoints(folder: Path, dtype: str) -> Checkpoints:
    """Write a target of 105 M parameters and three networks of 5.7 M (5.5 %), all Llama-shaped."""
    target, small = _make_target(folder, dtype), _small(dtype)
    networks = {
        name: make_network(folder / name, seed=seed, **small)
        for seed, name in enumerate(("guiding", "resident"), start=1)
    }
    networks["mapped"] = make_mapped_network(
        folder / "mapped",
        make_tokenizer(),
        tokenizer=make_sentencepiece_tokenizer(),
        seed=3,
        **small,
    )
    return Checkpoints(
        target, networks, num_parameters(target), num_parameters(networks["guiding"]), VOCAB_SIZE
    )


def make_combining_checkpoints(folder: Path, dtype: str) -> tuple[Path, dict[str, Path]]:
    """Write the same target, and beside it two residual networks and a pair of that size."""
    small = _small(dtype)
    networks = {
        "first": make_network(folder / "first", seed=1, **small),
        "second": make_network(folder / "second", seed=2, **small),
        "pair": make_contrast(folder / "pair", seed=3, **small),
    }
    return _make_target(folder, dtype), networks


def _make_target(folder: Path, dtype: str) -> Path:
    return make_model(
        folder / "target",
        hidden_size=768,
        intermediate_size=2304,
        layers=12,
        heads=12,
        kv_heads=12,
        **_common(dtype),
    )


def _common(dtype: str) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "head_dim": 64,
        "dtype": dtype,
    }


def _small(dtype: str) -> dict[str, Any]:
    """The shape of a network."""
    return _common(dtype) | {
        "hidden_size": 256,
        "intermediate_size": 832,
        "layers": 4,
        "heads": 4,
        "kv_heads": 4,
        "tie_word_embeddings": True,
    }


def num_parameters(checkpoint: Path) -> int:
    """Count the parameters in a checkpoint's file."""
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        names = tensors.keys()
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
