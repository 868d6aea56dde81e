"""Which kernel multiplies the small weights of networks on a CPU."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm.ir
from vllm.compilation import caching
from vllm.model_executor.layers import utils

from server.worker import small_weights
from server.worker.compilation import load_what_was_compiled
from server.worker.model import NetworkModel
from server.worker.small_weights import quickly_multiplied
from tests.models import make_model, make_network
from tests.server.worker.alone import engine_config, process_group, residency, rows_of

bfloat16_here = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no bfloat16 instructions"
)

WITH_KERNEL = SimpleNamespace(weight_packed_linear=None)
"""vLLM's operations on a CPU; not all of its builds have this one."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("small")
    make_model(root / "target")
    make_network(root / "network")
    make_network(root / "biased", architecture="qwen2")
    with process_group(root):
        yield root


def kernels_of(model: NetworkModel) -> set[bool]:
    """Return whether the kernels of its layers take packed weights, which oneDNN's do not show."""
    layers = [m for m in model._model.modules() if getattr(m, "cpu_linear", None) is not None]
    assert layers
    return {"packed_weight" in layer.cpu_linear.__code__.co_freevars for layer in layers}


def answers(root: Path, name: str, dtype: str, eager: bool) -> tuple[torch.Tensor, set[bool]]:
    """Return what the network says of rows that it reads, then decodes, and its kernels."""
    config = engine_config(root / "target", dtype=dtype, enforce_eager=eager)
    found = []
    with (
        vllm.ir.enable_torch_wrap(False),  # as in vLLM's CPU worker
        residency(root / "target", {name: root / name}, config) as worker,
    ):
        (network,) = worker.networks()
        model = network.models["value"]
        assert eager or not model._forward.eager
        for count in (1, 3, 8):
            rows = {slot: [10 + slot, *range(20, 25 + 7 * slot)] for slot in range(count)}
            for token in (30, 31):
                found.append(model.score(rows_of(rows)).float())
                rows = {slot: [*row, token] for slot, row in rows.items()}
            for slot in rows:
                model.release(slot)
        return torch.cat(found), kernels_of(model)


@bfloat16_here
@pytest.mark.parametrize(("name", "eager"), [("network", True), ("biased", False)])
def test_it_comes_to_the_same(
    root: Path, name: str, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, kernels = answers(root, name, "bfloat16", eager)
    assert kernels == {True}
    monkeypatch.setattr(small_weights, "MAX_BYTES", 0)
    others, kernels = answers(root, name, "bfloat16", eager)
    assert kernels == {torch.cpu._is_amx_tile_supported()}  # with AMX, vLLM chooses it by itself
    expected, _ = answers(root, name, "float32", eager=True)
    # Both are as far from float32 as rounding takes them.
    assert 0.8 < (found - expected).norm() / (others - expected).norm() < 1.25


def test_float32_is_left_to_vllm(root: Path) -> None:
    _, kernels = answers(root, "network", "float32", eager=True)
    assert kernels == {False}


@pytest.mark.parametrize(
    ("n", "k", "dtype", "pays"),
    [
        (1024, 512, torch.bfloat16, True),
        (1024, 544, torch.bfloat16, False),  # more than 1 MiB
        (1016, 512, torch.bfloat16, False),
        (1024, 496, torch.bfloat16, False),
        (512, 512, torch.float32, False),
        (512, 512, torch.float16, False),
    ],
)
def test_small_weights_of_whole_tiles_are_given_to_it(
    monkeypatch: pytest.MonkeyPatch, n: int, k: int, dtype: torch.dtype, pays: bool
) -> None:
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops, "_C", WITH_KERNEL)
    with quickly_multiplied():
        assert utils.check_cpu_sgl_kernel(n, k, dtype) == pays


@pytest.mark.parametrize(
    ("has_bfloat16", "build"), [(False, WITH_KERNEL), (True, SimpleNamespace())]
)
def test_it_takes_the_instructions_and_a_build_with_the_kernel(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, build: SimpleNamespace
) -> None:
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.ops, "_C", build)
    with quickly_multiplied():
        assert not utils.check_cpu_sgl_kernel(512, 512, torch.bfloat16)


def test_what_vllm_would_give_to_it_is_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: True)
    with quickly_multiplied():
        assert utils.check_cpu_sgl_kernel(1 << 20, 1 << 20, torch.float32)


def test_vllms_choice_is_back_afterwards() -> None:
    choose = utils.check_cpu_sgl_kernel
    with pytest.raises(ZeroDivisionError), quickly_multiplied():
        assert utils.check_cpu_sgl_kernel is not choose
        raise ZeroDivisionError
    assert utils.check_cpu_sgl_kernel is choose


def test_what_was_compiled_for_other_kernels_is_not_found(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_what_was_compiled()
    config = engine_config(root / "target")
    before = caching.aot_compile_hash_factors(config)
    assert caching.aot_compile_hash_factors(config) == before
    monkeypatch.setattr(small_weights, "MAX_BYTES", 0)
    assert caching.aot_compile_hash_factors(config) != before
