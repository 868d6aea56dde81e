"""Networks' attention on a CPU, beside vLLM's own layers and transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.attention import Attention

from server.worker.attention import DirectAttention, make_direct
from server.worker.model import NetworkModel
from tests.models import make_model, make_network
from tests.server.worker.alone import (
    engine_config,
    plain_logits,
    process_group,
    residency,
    rows_of,
)

CONTEXT = 192
GEMMAS = {
    "tie_word_embeddings": True,
    "settings": {"sliding_window": 16, "query_pre_attn_scalar": 32},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"settings": {"sliding_window": 16}},  # of all layers
    "gemma2": GEMMAS,  # of every other layer, and its attention is capped
    "gemma3_text": GEMMAS,  # of every other layer
}


SINKS: dict[str, Any] = {  # which direct attention leaves to vLLM's layers
    "gpt_oss": {
        "settings": {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    }  # of every other layer
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("attention")
    make_model(root / "target", max_position_embeddings=CONTEXT)
    for name, model in (FAMILIES | SINKS).items():
        make_network(root / name, architecture=name, max_position_embeddings=CONTEXT, **model)
    with process_group(root):
        yield root


@contextmanager
def loaded(root: Path, name: str) -> Iterator[NetworkModel]:
    config = engine_config(root / "target", max_model_len=CONTEXT)
    with residency(root / "target", {name: root / name}, config) as worker:
        (network,) = worker.networks()
        yield network.models["value"]


def histories() -> dict[int, list[int]]:
    rng = np.random.default_rng(3)
    return {slot: rng.integers(10, 480, length).tolist() for slot, length in enumerate((7, 40, 90))}


def scores(model: NetworkModel) -> list[torch.Tensor]:
    """What it answers as it reads rows of other lengths, and as it decodes."""
    rows, found = histories(), []
    for token in range(20, 60):
        found.append(model.score(rows_of(rows)))
        rows = {slot: [*row, token] for slot, row in rows.items()}
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_bit_is_that_of_vllms_own_layers(root: Path, name: str) -> None:
    with loaded(root, name) as model:
        assert all(type(layer) is DirectAttention for layer in model._layers.values())
        direct = scores(model)
    with patch("server.worker.model.make_direct", lambda _: False), loaded(root, name) as model:
        assert all(type(layer) is Attention for layer in model._layers.values())
        assert all(map(torch.equal, direct, scores(model)))


@pytest.mark.parametrize("lengths", [(20, 70), (70, 20), (20, 40, 70), (70,)])
@pytest.mark.parametrize("name", FAMILIES | SINKS)
def test_rows_decode_by_what_is_in_their_windows(
    root: Path, name: str, lengths: tuple[int, ...]
) -> None:
    """What vLLM plans for a batch goes wrong at some lengths, if layers differ in their windows."""
    rng = np.random.default_rng(0)
    rows = {slot: rng.integers(10, 480, length).tolist() for slot, length in enumerate(lengths)}
    with loaded(root, name) as model:
        model.score(rows_of(rows))
        for token in (30, 31):
            rows = {slot: [*row, token] for slot, row in rows.items()}
            found = model.score(rows_of(rows))
    expected = torch.stack([plain_logits(root / name, row)[-1] for row in rows.values()])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_reads_as_far_back_as_its_windows_let_it(root: Path, name: str) -> None:
    rows = histories()
    expected = torch.stack([plain_logits(root / name, row)[-1] for row in rows.values()])
    with loaded(root, name) as model:
        found = model.score(rows_of(rows))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("owner", "attribute", "value"),
    [
        ("impl", "sinks", torch.zeros(2)),
        ("layer", "kv_sharing_target_layer_name", "layers.0"),
        ("layer", "kv_cache_dtype", "fp8"),
        ("layer", "query_quant", torch.nn.Identity()),
    ],
)
def test_layers_stay_vllms_where_one_has_more_to_do(
    root: Path, owner: str, attribute: str, value: object
) -> None:
    with patch("server.worker.model.make_direct", lambda _: False), loaded(root, "llama") as model:
        layers = list(model._layers.values())
        special = layers[1] if owner == "layer" else layers[1].impl
        with patch.object(special, attribute, value):
            assert not make_direct(layers)
        assert all(type(layer) is Attention for layer in layers)
        assert make_direct(layers)
        assert all(type(layer) is DirectAttention for layer in layers)


def test_a_network_that_is_freed_keeps_no_kv_cache(root: Path) -> None:
    with loaded(root, "llama") as model:
        layers = list(model._layers.values())
        assert [len(layer.caches) for layer in layers] == [2, 2]
        ours, vllms = layers[1].caches[0].data_ptr(), layers[1].kv_cache.data_ptr()
        assert ours == vllms
    assert [layer.caches for layer in layers] == [(), ()]


def test_a_model_that_claims_fewer_heads_than_its_keys_have_is_refused(root: Path) -> None:
    """vLLM's kernels would read behind the end of what they are given."""
    claims = {"architecture": "gpt_neox", "heads": 2, "kv_heads": 1}  # which knows no groups
    make_network(root / "claims", max_position_embeddings=CONTEXT, **claims)
    with pytest.raises(RuntimeError, match="is invalid for input of size"), loaded(root, "claims"):
        pass
