"""With parsers of vLLM's, one of each of its two families, and with a server that has one."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import httpx
import pytest
from vllm.reasoning import ReasoningParserManager

from server.api.reasoning import Reasoning
from tests.models import make_model, make_network, make_tokenizer
from tests.server.conftest import SMALL
from tests.server.serving import Served, serving

PARSERS = ("deepseek_r1", "qwen3")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = deepcopy(make_tokenizer())
    tokenizer.add_tokens(["<think>", "</think>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


@pytest.fixture(params=PARSERS)
def reasoning(request: pytest.FixtureRequest, tokenizer: Any) -> Reasoning:
    parser = ReasoningParserManager.get_reasoning_parser(request.param)
    end = tokenizer.encode("</think>", add_special_tokens=False)
    return Reasoning(end, partial(parser, tokenizer))


@pytest.mark.parametrize(
    ("prompt", "ended"),
    [
        ("Where was Ana born?<think>", False),
        ("Where was Ana born?<think>She was born", False),
        ("Where was Ana born?<think></think>", True),
        ("Where was Ana born?<think>In Velenje.</think>Ana was", True),
        ("<think>one</think>the first<think>another", False),
    ],
)
def test_a_prompt_has_left_reasoning_behind_or_not(
    reasoning: Reasoning, tokenizer: Any, prompt: str, ended: bool
) -> None:
    assert reasoning.has_ended(tuple(tokenizer.encode(prompt)), None) is ended


def test_a_prompt_of_which_nothing_is_known_is_before_reasoning(tokenizer: Any) -> None:
    parser = ReasoningParserManager.get_reasoning_parser("deepseek_r1")
    reasoning = Reasoning([1], partial(parser, tokenizer))
    assert not reasoning.has_ended(tokenizer.encode("Where was Ana born?"), {})


def test_a_chat_without_reasoning_has_left_it_behind(tokenizer: Any) -> None:
    parser = ReasoningParserManager.get_reasoning_parser("qwen3")
    reasoning = Reasoning([1], partial(parser, tokenizer))
    prompt = tokenizer.encode("Where was Ana born?")
    for thinking in (True, False):
        template = {"chat_template_kwargs": {"enable_thinking": thinking}}
        assert reasoning.has_ended(prompt, template) is not thinking


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
class TestServed:
    """Guidance from `after_reasoning` on."""

    THINK = "<think>"
    END = "</think>"

    @pytest.fixture(scope="class")
    def server(self, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
        directory = tmp_path_factory.mktemp("reasoning")
        make_model(directory / "target", tokenizer=tokenizer)
        network = make_network(directory / "qa", tokenizer=tokenizer, **SMALL, seed=1)
        arguments = ("--value-network", f"qa={network}", "--reasoning-parser", "deepseek_r1")
        with serving(directory, directory / "target", *arguments) as served:
            yield served

    def flags(self, server: Served, path: str, prompt: str, **fields: Any) -> list[bool]:
        """Which tokens of the answer were guided."""
        guidance = {"from": "after_reasoning", "explain": True}
        limit = {"max_output_tokens" if "responses" in path else "max_tokens": 6}
        prompts = {"input" if "responses" in path else "prompt": prompt}
        body = {"model": "qa", "temperature": 0, "value_guidance": guidance}
        response = httpx.post(
            f"{server.url}{path}", json=body | limit | prompts | fields, timeout=None
        )
        assert response.is_success, response.text
        assert response.json()["value_guidance"]["from"] == "after_reasoning"
        (choice,) = response.json()["value_explanation"]
        return [token["guided"] for token in choice["tokens"]]

    def test_it_begins_when_the_answer_has_ended_reasoning(
        self, server: Served, tokenizer: Any, path: str
    ) -> None:
        always = {"logit_bias": {str(tokenizer.convert_tokens_to_ids(self.END)): 100}}
        assert self.flags(server, path, f"Why?{self.THINK}") == [False] * 6
        assert self.flags(server, path, f"Why?{self.THINK}", **always) == [False] + [True] * 5

    def test_it_begins_at_once_where_the_prompt_has(self, server: Served, path: str) -> None:
        assert self.flags(server, path, f"Why?{self.THINK}So.{self.END}") == [True] * 6

    def test_prompts_of_one_request_begin_each_at_its_own_time(
        self, server: Served, path: str
    ) -> None:
        if path != "/v1/completions":
            return
        prompts = [f"Why?{self.THINK}", f"Why?{self.THINK}{self.END}", f"Why?{self.THINK}"]
        body = {
            "model": "qa",
            "prompt": prompts,
            "max_tokens": 3,
            "temperature": 0,
            "value_guidance": {"from": "after_reasoning", "explain": True},
        }
        response = httpx.post(f"{server.url}{path}", json=body, timeout=None).json()
        flags = [[token["guided"] for token in c["tokens"]] for c in response["value_explanation"]]
        assert flags == [[False] * 3, [True] * 3, [False] * 3]
