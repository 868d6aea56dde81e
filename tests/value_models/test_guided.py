"""Cached, batched decoding against whole sequences, one at a time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models import make_model
from value_models.combine import add_value_logits
from value_models.connection import CONNECTIONS
from value_models.guided import Guide, NetworkGuide, PairGuide, decode

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
