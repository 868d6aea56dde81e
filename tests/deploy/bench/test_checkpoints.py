from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deploy.bench.checkpoints import (
    LARGE_NETWORK,
    LARGE_TARGET,
    MIDDLE_NETWORK,
    MIDDLE_TARGET,
    MODELS,
    NETWORK,
    TARGET,
    WIDTHS,
    Checkpoints,
    Models,
    Shape,
    make_checkpoints_of,
    make_dummy_checkpoints,
    make_sized_networks,
    num_parameters,
    shape_of,
)
from tests.models import make_model
from value_models.store import check_name, check_network

TOY: Shape = {
    "architecture": "qwen2",
    "hidden_size": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 32,
    "vocab_size": 600,
}
SMALLER: Shape = TOY | {"layers": 1, "vocab_size": 576, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("toy")
    return make_dummy_checkpoints(folder, "bfloat16", ["guiding"], TOY, SMALLER)


def parameters_of(shape: Shape, folder: Path) -> int:
    return num_parameters(make_model(folder, **shape, with_weights=False))


@pytest.mark.parametrize(
    ("shape", "millions"),
    [
        (TARGET, 105),
        (NETWORK, 5.7),
        (MIDDLE_TARGET, 1544),
        (MIDDLE_NETWORK, 84.9),
        (LARGE_TARGET, 7616),
        (LARGE_NETWORK, 494),
    ],
)
def test_shapes_have_the_parameters_that_they_are_named_for(
    tmp_path: Path, shape: Shape, millions: float
) -> None:
    assert parameters_of(shape, tmp_path) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("share", WIDTHS)
def test_a_networks_size_is_what_was_asked_for(tmp_path: Path, share: float) -> None:
    target = parameters_of(TARGET, tmp_path / "target")
    shape = shape_of(share, target)
    assert shape["heads"] * shape["head_dim"] == shape["hidden_size"]
    assert shape["intermediate_size"] >= 2 * shape["hidden_size"]
    found = parameters_of(shape, tmp_path / "network")
    assert found / target == pytest.approx(share, rel=0.03)


def test_a_dummy_target_is_a_configuration_and_a_tokenizer(toy: Checkpoints) -> None:
    assert not list(toy.target.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(toy.target)
    assert (config.architectures, config.dtype) == (["Qwen2ForCausalLM"], torch.bfloat16)
    assert (toy.target / "tokenizer.json").exists()
    assert toy.engine_options == {"dtype": "bfloat16", "load_format": "dummy"}


def test_each_size_is_a_target_and_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "1.5b", Models(TOY, SMALLER, 1.0))
    made = make_checkpoints_of("1.5b", tmp_path, "bfloat16", ["guiding", "resident"])
    assert (list(made.networks), made.has_weights) == (["guiding", "resident"], False)
    sizes = [
        parameters_of(shape, tmp_path / name) for name, shape in {"a": TOY, "b": SMALLER}.items()
    ]
    assert [num_parameters(made.target), num_parameters(made.networks["guiding"])] == sizes


def test_parameters_are_counted_with_weights_and_without(toy: Checkpoints) -> None:
    for folder in (toy.target, toy.networks["guiding"]):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        assert num_parameters(folder) == sum(p.numel() for p in model.parameters())
    described = toy.describe()
    assert described["target_parameters"] > described["network_parameters"][0] > 0
    assert (
        toy.share("guiding") == described["network_parameters"][0] / described["target_parameters"]
    )
    assert (described["networks"], described["vocab_size"]) == (1, 600)


def test_networks_of_several_sizes_can_be_served(tmp_path: Path) -> None:
    networks = make_sized_networks(tmp_path, (0.01, 0.055), "float32", 104_000_000)
    assert list(networks) == ["1-percent", "5.5-percent"]
    for name, folder in networks.items():
        assert check_name(name) == name
        assert check_network(folder).num_parameters > 1e6
