"""Cached, batched decoding against whole sequences, one at a time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models import make_model, make_network
from value_models.combine import add_value_logits, keep_target_in_charge, map_value_logits
from value_models.connection import CONNECTIONS
from value_models.demo.evaluate import WEIGHTS
from value_models.fusion import divergence, solve_weights
from value_models.guided import (
    Guide,
    NetworkGuide,
    Opinion,
    PairGuide,
    combine,
    decode,
    load_guide,
)

PROMPTS = [[11, 300, 45], [20], [7, 8, 9, 10, 400, 32, 77]]
NO_STOP: set[int] = set()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    root: Path = tmp_path_factory.mktemp("models")
    paths = {
        "base": make_model(root / "base", vocab_size=544),
        "network": make_model(root / "network", hidden_size=32, heads=1, seed=1),
        "other": make_model(root / "other", hidden_size=32, heads=1, seed=2),
    }
    return {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in paths.items()
    }


@torch.no_grad()
def whole(models: dict[str, PreTrainedModel], prompt: list[int], guide: Guide) -> list[int]:
    """The definition: everything computed anew for each token."""
    ids = list(prompt)
    for _ in range(12):
        tokens = torch.tensor([ids])
        base_logits = models["base"](tokens).logits
        logits = base_logits[:, -1].clone()
        if isinstance(guide, NetworkGuide):
            embedding = guide.model.get_input_embeddings()
            inputs = CONNECTIONS[guide.kind](tokens, base_logits, embedding)
            value = guide.model(inputs_embeds=inputs).logits
        else:
            assert isinstance(guide, PairGuide)
            value = guide.expert(tokens).logits - guide.antiexpert(tokens).logits
        add_value_logits(logits, value[:, -1], guide.scale)
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_every_kind_of_network(models: dict[str, PreTrainedModel], kind: str) -> None:
    guide = NetworkGuide(models["network"], 0.7, kind)
    expected = [whole(models, prompt, guide) for prompt in PROMPTS]
    assert decode(models["base"], [guide], PROMPTS, 12, NO_STOP) == expected


def test_a_pair(models: dict[str, PreTrainedModel]) -> None:
    guide = PairGuide(models["network"], models["other"], 0.7)
    expected = [whole(models, prompt, guide) for prompt in PROMPTS]
    assert decode(models["base"], [guide], PROMPTS, 12, NO_STOP) == expected


def test_kinds_differ(models: dict[str, PreTrainedModel]) -> None:
    answers = [
        decode(models["base"], [NetworkGuide(models["network"], 1.0, kind)], PROMPTS, 12, NO_STOP)
        for kind in CONNECTIONS
    ]
    assert len({str(answer) for answer in answers}) == len(CONNECTIONS)


def test_scale_zero_and_opposites_leave_the_base_alone(models: dict[str, PreTrainedModel]) -> None:
    alone = decode(models["base"], [], PROMPTS, 12, NO_STOP)
    network = models["network"]
    # The base is padded, and a network excludes what it has no logit for.
    unpadded = [[token for token in row if token < 512] for row in alone]
    assert unpadded == alone
    opposites = [NetworkGuide(network, 1.0), NetworkGuide(network, -1.0)]
    assert decode(models["base"], [NetworkGuide(network, 0.0)], PROMPTS, 12, NO_STOP) == alone
    assert decode(models["base"], opposites, PROMPTS, 12, NO_STOP) == alone


def test_stops_end_a_row_and_are_left_out(models: dict[str, PreTrainedModel]) -> None:
    free = decode(models["base"], [], PROMPTS, 12, NO_STOP)
    stop = free[0][4]
    stopped = decode(models["base"], [], PROMPTS, 12, {stop})
    for row, full in zip(stopped, free, strict=True):
        assert row == (full[: full.index(stop)] if stop in full else full)


def opinions(num_networks: int, generator: torch.Generator) -> list[Opinion]:
    """Of mixed kinds: padded less, padded more, of another vocabulary, steering away."""

    def draw(size: int) -> torch.Tensor:
        return 1.5 * torch.randn(size, generator=generator)

    columns = torch.randint(-1, 12, (25,), generator=generator)
    columns[:4] = torch.arange(4)
    said = [
        Opinion(draw(28), 1.5, draw(30)),
        Opinion(draw(34), -1.2, draw(34)),
        Opinion(draw(12), 2.0, draw(12), columns),
        Opinion(draw(30), 0.7, draw(30)),
    ]
    return said[:num_networks]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("floor", [0.0, 0.01])
@pytest.mark.parametrize("num_networks", [1, 2, 3, 4])
def test_the_definition_agrees_with_what_runs_on_the_device(
    num_networks: int, floor: float, dynamic: bool
) -> None:
    generator = torch.Generator().manual_seed(num_networks)
    for _ in range(8):
        target = 2 * torch.randn(30, generator=generator)
        target[5] = target[29] = -torch.inf
        said = opinions(num_networks, generator)
        restricted, values, distances = target.clone(), [], []
        for opinion in said:
            columns = opinion.columns
            value, missing = map_value_logits(opinion.value[None], 30, columns)
            values.append(value[0])
            if missing is not None:
                restricted[missing] = -torch.inf
            assert opinion.base is not None
            base = opinion.base[: len(opinion.value)]
            distances.append(divergence((base + opinion.value)[None], base[None]))
        weights = torch.tensor([[opinion.scale for opinion in said]])
        stacked = torch.stack(values)[None]
        if dynamic:
            found = solve_weights(restricted[None], stacked, torch.stack(distances, 1), weights)
            weights = found.weights
        guided = restricted[None] + (weights[:, :, None] * stacked).sum(1)
        expected = keep_target_in_charge(guided, target[None], torch.tensor([[floor]]))[0]
        reference = combine(target, said, dynamic=dynamic, floor=floor)
        assert reference.dtype == torch.float64
        torch.testing.assert_close(
            reference.softmax(-1).float(), expected.softmax(-1), atol=2e-4, rtol=0
        )
        assert torch.equal(reference.isneginf(), expected.isneginf())


def test_a_zero_scale_says_nothing() -> None:
    target = torch.randn(5)
    assert torch.equal(combine(target, [Opinion(torch.randn(3), 0.0)]), target.double())


def test_dynamic_fusion_needs_bases() -> None:
    with pytest.raises(ValueError, match="know their base"):
        combine(torch.randn(5), [Opinion(torch.randn(5), 1.0)], dynamic=True)


def test_several_guides_and_dynamic_fusion_decode(models: dict[str, PreTrainedModel]) -> None:
    base, network, other = models["base"], models["network"], models["other"]
    guides = [NetworkGuide(network, 0.7, reference=other), PairGuide(network, other, -0.4)]
    static = decode(base, guides, PROMPTS, 6, NO_STOP)
    dynamic = decode(base, guides, PROMPTS, 6, NO_STOP, dynamic=True)
    assert static != dynamic
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            ids = list(prompt)
            for token in dynamic[row]:
                logits, net, ref = (m(torch.tensor([ids])).logits[0, -1] for m in models.values())
                said = [Opinion(net, 0.7, ref), Opinion(net - ref, -0.4, ref)]
                assert int(combine(logits, said, dynamic=True).argmax()) == token
                ids.append(token)


def test_a_folder_makes_the_guide_of_its_kind() -> None:
    guide = load_guide(WEIGHTS / "networks" / "qa")
    assert isinstance(guide, NetworkGuide)
    assert guide.kind == "residual"
    assert guide.reference is None
    scaled = load_guide(WEIGHTS / "networks" / "qa", scale=-0.5)
    assert isinstance(scaled, NetworkGuide)
    assert scaled.scale == -0.5


@torch.inference_mode()
def test_attention_that_is_capped_is_computed_capped(tmp_path: Path) -> None:
    capped = {"attn_logit_softcapping": 0.01, "query_pre_attn_scalar": 32}
    network = make_network(
        tmp_path / "network", architecture="gemma2", tie_word_embeddings=True, settings=capped
    )
    model = AutoModelForCausalLM.from_pretrained(network, attn_implementation="eager").eval()
    tokens = torch.tensor([PROMPTS[2]])
    guide = load_guide(network)
    assert isinstance(guide, NetworkGuide)
    torch.testing.assert_close(guide.model(tokens).logits, model(tokens).logits)
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(guide.model(tokens).logits, model(tokens).logits, atol=1e-3)
