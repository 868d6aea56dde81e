"""The random checkpoints that the benchmark runs: shapes of real use, weights of none."""

import math
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from tests.models import make_model, make_network

VOCAB_SIZE = 8192


class Checkpoints(NamedTuple):
    """A target and the networks beside it: one that guides, one that is just resident."""

    target: Path
    networks: dict[str, Path]
    target_parameters: int
    network_parameters: int  # of one network
    vocab_size: int


def make_checkpoints(folder: Path, dtype: str) -> Checkpoints:
    """Write a target of 105 M parameters and two networks of 5.7 M (5.5 %), all Llama-shaped."""
    common = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "head_dim": 64,
        "dtype": dtype,
    }
    target = make_model(
        folder / "target",
        hidden_size=768,
        intermediate_size=2304,
        layers=12,
        heads=12,
        kv_heads=12,
        **common,
    )
    networks = {
        name: make_network(
            folder / name,
            hidden_size=256,
            intermediate_size=832,
            layers=4,
            heads=4,
            kv_heads=4,
            tie_word_embeddings=True,
            seed=seed,
            **common,
        )
        for seed, name in enumerate(("guiding", "resident"), start=1)
    }
    return Checkpoints(
        target, networks, _parameters(target), _parameters(networks["guiding"]), VOCAB_SIZE
    )


def _parameters(checkpoint: Path) -> int:
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        names = tensors.keys()
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
