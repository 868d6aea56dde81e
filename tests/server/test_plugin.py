from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State
from vllm.config.reasoning import ReasoningConfig

from server.plugin import _decode, _reasoning, _reserved_names
from tests.models import make_sentencepiece_tokenizer, make_tokenizer


def engine_client(config: ReasoningConfig | None) -> Any:
    tokenizer = deepcopy(make_tokenizer())
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    vllm_config = SimpleNamespace(reasoning_config=config)
    return SimpleNamespace(vllm_config=vllm_config, get_tokenizer=lambda: tokenizer)


def reasoning_config(parser: str, end: list[int] | None) -> ReasoningConfig:
    config = ReasoningConfig(reasoning_parser=parser)
    config._natural_reasoning_end_token_ids = end
    return config


def test_reasoning_is_as_vllms_parser_has_it() -> None:
    client = engine_client(reasoning_config("deepseek_r1", [513]))
    tokenizer = client.get_tokenizer()
    reasoning = _reasoning(client)
    assert reasoning is not None
    assert reasoning.end == (513,)
    assert reasoning.has_ended(tokenizer.encode("<think>so</think>"), None)
    assert not reasoning.has_ended(tokenizer.encode("<think>so"), None)


@pytest.mark.parametrize(
    "config", [None, reasoning_config("deepseek_r1", None), reasoning_config("", [513])]
)
def test_without_a_parser_or_its_tokens_nothing_is_known_of_reasoning(
    config: ReasoningConfig | None,
) -> None:
    assert _reasoning(engine_client(config)) is None


def test_tokens_are_spelled_with_the_spaces_before_them() -> None:
    for tokenizer in (make_tokenizer(), make_sentencepiece_tokenizer()):
        decode = _decode(tokenizer)
        token_ids = tokenizer.encode("The quick brown", add_special_tokens=False)
        assert "".join(map(decode, token_ids)).strip() == "The quick brown"
    assert decode(len(tokenizer) + 100) == "", "a row of a padded vocabulary"


def test_names_of_the_target_and_of_its_adapters_are_no_networks() -> None:
    paths = [SimpleNamespace(name="target"), SimpleNamespace(name="alias")]
    models = SimpleNamespace(base_model_paths=paths, lora_requests={"style": object()})
    names = _reserved_names(State({"openai_serving_models": models}))
    assert names == ("target", "alias", "style")
