"""What vLLM finds of what was compiled before; that it runs, `test_exactness` shows."""

from pathlib import Path

import pytest
import torch
from vllm.compilation import caching
from vllm.config import VllmConfig

from server.worker.compilation import CompiledForwards, whatever_folder
from server.worker.configuration import model_config
from tests.models import make_model, make_network
from tests.server.worker.alone import engine_config


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
