from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models import make_model
from value_models.connection import CONNECTIONS
from value_models.training import TrainingError
from value_models.training.models import connect, has_fast_bfloat16, load_base, load_network
from value_models.training.settings import Settings

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path) -> Settings:
    base = make_model(tmp_path / "base", hidden_size=32, heads=1, vocab_size=520)
    return Settings(base=str(base), data=Path("none.jsonl"), out=tmp_path / "tab")


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_a_network_reads_the_base_as_its_kind_says(settings, kind):
    network = load_network(settings).eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    base_logits = torch.randn(1, 4, 512, generator=torch.Generator().manual_seed(0))
    embedding = network.get_input_embeddings()
    expected = network(inputs_embeds=CONNECTIONS[kind](tokens, base_logits, embedding)).logits
    connect(network, kind)
    given = {} if kind == "residual" else {"base_logits": base_logits}
    assert torch.equal(network(input_ids=tokens, **given).logits, expected)


def test_a_cascade_teaches_its_embedding_through_the_base(settings):
    network = load_network(settings)
    connect(network, "cascade")
    with torch.inference_mode():  # as the base's logits come
        base_logits = torch.zeros(1, 4, 520)
    network(input_ids=torch.tensor([[5, 6, 7, 8]]), base_logits=base_logits).logits.sum().backward()
    touched = network.get_input_embeddings().weight.grad.abs().sum(-1) > 0
    assert touched.sum() > 500


def test_from_scratch_takes_the_shape_and_random_weights_of_the_seed(settings):
    start = load_network(settings)
    fresh, again = (load_network(replace(settings, from_scratch=True)) for _ in range(2))
    other = load_network(replace(settings, from_scratch=True, seed=1))
    for name, tensor in fresh.state_dict().items():
        assert tensor.shape == start.state_dict()[name].shape
        assert torch.equal(tensor, again.state_dict()[name])
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(fresh.state_dict()[weight], start.state_dict()[weight])
    assert not torch.equal(fresh.state_dict()[weight], other.state_dict()[weight])


def test_the_base_is_frozen(settings):
    base = load_base(settings, torch.float32, CPU)
    assert not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "options",
    [{"base_quantization": "8bit"}, {"base_quantization": "4bit"}, {"base_device_map": "auto"}],
)
def test_what_needs_a_gpu_says_so(settings, options):
    (option,) = options
    with pytest.raises(TrainingError, match=f"--{option.replace('_', '-')}.*GPU"):
        load_base(replace(settings, **options), torch.float32, CPU)


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bfloat16_is_not_fast(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    assert has_fast_bfloat16() == native


@pytest.mark.parametrize("from_scratch", [False, True])
def test_attention_that_is_capped_is_trained_capped(tmp_path, from_scratch):
    """As it is served: torch's own attention, transformers' default, would leave out the cap."""
    capped = {"attn_logit_softcapping": 0.01, "query_pre_attn_scalar": 32}
    shape = {"architecture": "gemma2", "tie_word_embeddings": True, "settings": capped}
    base = str(make_model(tmp_path / "base", **shape))
    settings = Settings(
        base=base, data=Path("none.jsonl"), out=tmp_path / "tab", from_scratch=from_scratch
    )
    tokens = torch.tensor([[5, 60, 7, 80, 9, 100]])
    for model in (load_network(settings).eval(), load_base(settings, torch.float32, CPU)):
        found = model(tokens).logits
        model.set_attn_implementation("eager")
        assert torch.equal(found, model(tokens).logits)
        model.set_attn_implementation("sdpa")
        assert not torch.allclose(found, model(tokens).logits, atol=1e-3)
