"""What vLLM finds of what was compiled before; that it runs, `test_exactness` shows."""

from pathlib import Path

import pytest
import torch
import vllm.ir
from torch._inductor import config as inductor
from vllm.compilation import caching
from vllm.config import VllmConfig

from server.worker.compilation import CompiledForwards, whatever_folder
from server.worker.configuration import model_config
from server.worker.trial import Trial
from tests.models import make_model, make_network
from tests.server.worker.alone import (
    engine_config,
    plain_logits,
    process_group,
    residency,
    rows_of,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compilation")
    make_model(root / "target")
    return root


@pytest.fixture(scope="module")
def target(root: Path) -> VllmConfig:
    CompiledForwards()
    return engine_config(root / "target")


def looked_up(config: VllmConfig) -> list[str]:
    factors: list[str] = caching.aot_compile_hash_factors(config)
    return factors


def test_a_network_is_found_in_any_folder_if_it_is_shaped_alike(
    root: Path, target: VllmConfig
) -> None:
    def key(folder: Path) -> list[str]:
        config = model_config(folder, target, translated=False)
        with whatever_folder(config):
            found = looked_up(config)
        assert config.model_config.model == str(folder)
        assert config.model_config.hf_config._name_or_path == str(folder)
        assert looked_up(config) != found
        return found

    first, other = (make_network(root / name, seed=seed) for seed, name in enumerate("ab"))
    deeper = make_network(root / "deeper", layers=4)
    assert key(first) == key(other) != key(deeper)


def test_what_another_cpu_has_compiled_is_not_found(
    target: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, capabilities = looked_up(target), torch.cpu.get_capabilities()
    assert looked_up(target) == here
    wider = capabilities | {"avx512_f": not capabilities.get("avx512_f", False)}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: wider)
    assert looked_up(target) != here


@pytest.mark.parametrize("layers", ["direct", "vllms", "taken"])
def test_kernels_are_called_from_python_only_where_they_must(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    """vLLM's layers take a name, which inductor hands over from Python only: it has to try again
    where they are taken for such as do not."""
    network = make_network(tmp_path / "network")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # vLLM sets it, and leaves it so
    if layers != "direct":
        monkeypatch.setattr("server.worker.model.make_direct", lambda _: layers == "taken")
    tries: list[bool] = []
    run = Trial.logits

    def counted(trial: Trial, eager: bool) -> torch.Tensor:
        if not eager:
            tries.append(inductor.cpp_wrapper)
        return run(trial, eager)

    monkeypatch.setattr(Trial, "logits", counted)
    monkeypatch.setattr("server.worker.trial.bind", lambda *_: None)  # which has it try again
    config = engine_config(root / "target", enforce_eager=False)
    rows = {0: [20, 21, 22], 1: [30, 31]}
    with (
        vllm.ir.enable_torch_wrap(False),  # as in vLLM's CPU worker
        process_group(root),
        residency(root / "target", {"qa": network}, config) as worker,
    ):
        (resident,) = worker.networks()
        model = resident.models["value"]
        assert not model._forward.eager and not inductor.cpp_wrapper
        for _ in range(3):
            found = model.score(rows_of(rows))
            rows = {slot: [*row, 40] for slot, row in rows.items()}
    expected = torch.stack([plain_logits(network, row[:-1])[-1] for row in rows.values()])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert tries == {"direct": [True], "vllms": [False], "taken": [True, False]}[layers]
