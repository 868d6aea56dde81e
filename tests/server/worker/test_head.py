"""LM heads that are called directly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from server.worker.head import direct_head
from server.worker.model import NetworkModel
from tests.models import make_model, make_network
from tests.server.worker.alone import (
    engine_config,
    plain_logits,
    process_group,
    residency,
    rows_of,
)

ONLY_MULTIPLIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "padded": {"vocab_size": 544},  # vLLM makes it 576
    "qwen3": {"architecture": "qwen3", "tie_word_embeddings": True},
}
DOES_MORE: dict[str, dict[str, Any]] = {
    "capped": {
        "architecture": "gemma2",
        "tie_word_embeddings": True,
        "settings": {"query_pre_attn_scalar": 32},
    },
    "scaled": {"architecture": "granite", "settings": {"logits_scaling": 8.0}},
}
MADE = ONLY_MULTIPLIES | DOES_MORE


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("head")
    make_model(root / "target")
    for name, options in MADE.items():
        make_network(root / name, **options)
    with process_group(root):
        yield root


@contextmanager
def loaded(root: Path, name: str, dtype: str = "float32") -> Iterator[NetworkModel]:
    config = engine_config(root / "target", dtype=dtype)
    with residency(root / "target", {name: root / name}, config) as worker:
        (network,) = worker.networks()
        yield network.models["value"]


def states(model: NetworkModel, num_rows: int) -> torch.Tensor:
    config = model.config.model_config
    return torch.randn(num_rows, config.get_hidden_size(), dtype=config.dtype)


def is_direct(model: NetworkModel) -> bool:
    return "direct_head" in model._forward.head.__qualname__


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ONLY_MULTIPLIES)
def test_a_head_that_only_multiplies_is_called_directly(root: Path, name: str, dtype: str) -> None:
    with loaded(root, name, dtype) as model:
        for num_rows in (1, 3, 40):
            hidden = states(model, num_rows)
            expected = model._model.compute_logits(hidden)
            with patch.object(LogitsProcessor, "forward", None):  # is not asked
                assert torch.equal(model._forward.head(hidden), expected)
            assert expected.shape == (num_rows, model.vocab_size)


@pytest.mark.parametrize("name", DOES_MORE)
def test_a_head_that_does_more_is_vllms(root: Path, name: str) -> None:
    with loaded(root, name) as model:
        assert not is_direct(model)
        rows = {0: [10, 11, 12], 1: [20, 21, 22, 23]}
        expected = torch.stack([plain_logits(root / name, row)[-1] for row in rows.values()])
        torch.testing.assert_close(model.score(rows_of(rows)), expected, atol=2e-3, rtol=1e-3)


def test_models_that_make_logits_in_another_way_are_asked_for_them(root: Path) -> None:
    with loaded(root, "llama") as network:
        hidden, compute = states(network, 3), network._model.compute_logits
        modules = list(network._model.modules())

        def head_of(compute_logits: Any) -> Any:
            model = SimpleNamespace(modules=lambda: modules, compute_logits=compute_logits)
            return direct_head(model, hidden)  # type: ignore[arg-type]

        assert head_of(compute) is not None
        assert head_of(lambda hidden: compute(hidden) + 0) is None
        assert head_of(lambda hidden: compute(hidden + 0)) is None
        assert head_of(lambda hidden: (compute(hidden), compute(hidden))[0]) is None
        assert head_of(lambda hidden: hidden) is None
        assert not any(module._forward_hooks for module in modules)


def test_a_head_whose_answer_is_off_is_vllms(root: Path) -> None:
    with loaded(root, "llama") as network:
        layer, hidden = network._model.lm_head, states(network, 3)
        multiply = layer.cpu_linear
        calls = iter((1, 1, 2))  # for vLLM, to see the shape, and to see whether it is the same
        layer.cpu_linear = lambda *given: multiply(*given) * next(calls)
        assert direct_head(network._model, hidden) is None


def test_a_network_that_is_freed_holds_no_head(root: Path) -> None:
    with loaded(root, "llama") as model:
        assert is_direct(model)
    assert not is_direct(model)
