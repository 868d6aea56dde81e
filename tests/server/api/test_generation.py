from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from server.api.errors import ApiError
from server.api.generation import CURRENT, GenerationDoor, GuidedRequest
from server.catalog import Catalog
from server.choice import EXTRA_ARG, Choice, ChosenNetwork, seal
from tests.server.networks import Workers, status

KEY = "a key"
FAILURE_TOKEN = 99
QA = ChosenNetwork("qa", "3f2a91c0", 1.0)


class Failed(Exception):
    pass


class Engine:
    """Stands for vLLM's engine: yields what a test has it yield, and notes what it was asked."""

    def __init__(self) -> None:
        self.stop_reasons: list[Any] = [None, 2]
        self.asked: list[Any] = []
        self.aborted = False

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        self.asked.append((prompt, sampling_params, request_id, options))
        try:
            for reason in self.stop_reasons:
                yield SimpleNamespace(outputs=[SimpleNamespace(stop_reason=reason)])
        except GeneratorExit:
            self.aborted = True
            raise


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def workers() -> Workers:
    return Workers([status("qa", max_context=64), status("json", max_context=32)])


@pytest.fixture
async def door(engine: Engine, workers: Workers) -> GenerationDoor:
    catalog = Catalog(workers.call)
    await catalog.attach()
    return GenerationDoor(engine.generate, catalog, KEY, 100, Failed)


def params(sealed: str | None = None, **changes: Any) -> Any:
    extra_args = {"other": 1} | ({EXTRA_ARG: sealed} if sealed else {})
    fields = {
        "max_tokens": 16,
        "min_tokens": 0,
        "prompt_logprobs": None,
        "allowed_token_ids": None,
        "extra_args": extra_args,
    }
    return SimpleNamespace(**fields | changes)


def guided(*networks: ChosenNetwork, **changes: Any) -> Any:
    return params(seal(Choice(networks or (QA,), FAILURE_TOKEN), KEY), **changes)


def tokens(length: int) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": [1] * length}


def as_route(*networks: ChosenNetwork, max_tokens: int | None = None) -> GuidedRequest:
    """What the route notes about a request before it hands it to vLLM."""
    request = GuidedRequest(networks or (QA,), None, max_tokens)
    CURRENT.set(request)
    return request


async def test_unguided_requests_go_straight_through(door: GenerationDoor, engine: Engine) -> None:
    asked = params(extra_args=None)
    outputs = door.generate({"prompt_embeds": ...}, asked, "r", priority=1)
    assert [output async for output in outputs]
    assert engine.asked == [({"prompt_embeds": ...}, asked, "r", {"priority": 1})]


async def test_a_guided_request_gets_its_outputs(door: GenerationDoor, engine: Engine) -> None:
    as_route(max_tokens=16)
    outputs = [output async for output in door.generate(tokens(4), guided(), "r")]
    assert [output.outputs[0].stop_reason for output in outputs] == [None, 2]


@pytest.mark.parametrize("sealed", ["forged", seal(Choice((QA,), FAILURE_TOKEN), "another key")])
def test_a_forged_choice_is_refused_at_once(
    door: GenerationDoor, engine: Engine, sealed: str
) -> None:
    with pytest.raises(ApiError) as refused:
        door.generate(tokens(4), params(sealed), "r")
    assert (refused.value.status, refused.value.param) == (400, "vllm_xargs")
    assert engine.asked == []


def test_what_exceeds_a_networks_context_is_refused_with_both_limits(door: GenerationDoor) -> None:
    request = as_route(max_tokens=30)
    door.generate(tokens(34), guided(max_tokens=30), "r")
    with pytest.raises(ApiError) as refused:
        door.generate(tokens(35), guided(max_tokens=30), "r")
    error = refused.value
    assert (error.status, error.param) == (400, "max_tokens")
    assert "qa@3f2a91c0 reads at most 64 tokens" in error.message
    assert "35 in the prompt and asks for 30 more, 65 in all" in error.message
    assert request.error is error


@pytest.mark.parametrize("allowed", [[FAILURE_TOKEN], [512, 9999], [FAILURE_TOKEN, 512]])
def test_allowed_ids_that_guidance_excludes_are_refused(
    door: GenerationDoor, allowed: list[int]
) -> None:
    as_route()
    with pytest.raises(ApiError, match="below 512"):
        door.generate(tokens(4), guided(allowed_token_ids=allowed), "r")
    door.generate(tokens(4), guided(allowed_token_ids=[*allowed, 5]), "r")


@pytest.mark.parametrize("kind", ["embeds", "multimodal", "enc_dec"])
def test_only_prompts_of_tokens_can_be_guided(door: GenerationDoor, kind: str) -> None:
    as_route()
    with pytest.raises(ApiError, match="value networks read tokens"):
        door.generate(tokens(4) | {"type": kind}, guided(), "r")


def test_vllms_own_cap_counts_as_what_is_asked_for(door: GenerationDoor) -> None:
    as_route(max_tokens=99)
    capped = guided(max_tokens=4)
    door.generate(tokens(60), capped, "r")
    assert capped.max_tokens == 4


def test_the_shortest_context_counts(door: GenerationDoor) -> None:
    both = (QA, ChosenNetwork("json", "3f2a91c0", 1.0))
    as_route(*both, max_tokens=10)
    with pytest.raises(ApiError, match="json@3f2a91c0 reads at most 32 tokens"):
        door.generate(tokens(23), guided(*both, max_tokens=10), "r")


def test_an_open_end_is_what_the_network_can_read(door: GenerationDoor, engine: Engine) -> None:
    as_route(max_tokens=None)
    asked = guided(max_tokens=90)
    door.generate(tokens(10), asked, "r")
    assert asked.max_tokens == 54
    shorter = guided(max_tokens=5)
    door.generate(tokens(10), shorter, "r")
    assert shorter.max_tokens == 5


def test_an_open_end_needs_room_for_one_token(door: GenerationDoor) -> None:
    as_route(max_tokens=None)
    door.generate(tokens(63), guided(max_tokens=37), "r")
    with pytest.raises(ApiError, match="64 in the prompt and asks for 1 more, 65 in all"):
        door.generate(tokens(64), guided(max_tokens=36), "r")


def test_min_tokens_must_fit_too(door: GenerationDoor) -> None:
    as_route(max_tokens=None)
    with pytest.raises(ApiError, match=r"min_tokens is 55.*room for 54"):
        door.generate(tokens(10), guided(max_tokens=90, min_tokens=55), "r")


async def test_what_vllm_shortens_to_the_target_is_not_asked_for(engine: Engine) -> None:
    catalog = Catalog(Workers([status("qa", max_context=100)]).call)
    await catalog.attach()
    door = GenerationDoor(engine.generate, catalog, KEY, 100, Failed)
    as_route(max_tokens=20)
    shortened = guided(max_tokens=10)
    door.generate(tokens(90), shortened, "r")
    assert shortened.max_tokens == 10


@pytest.mark.parametrize(
    "prompt", [{"type": "embeds"}, {"type": "embeds", "prompt_token_ids": [1]}]
)
def test_a_prompt_without_tokens_is_refused(door: GenerationDoor, prompt: dict[str, Any]) -> None:
    as_route()
    with pytest.raises(ApiError, match="embeddings"):
        door.generate(prompt, guided(), "r")


def test_a_prompt_can_be_checked_before_it_is_generated_from(door: GenerationDoor) -> None:
    CURRENT.set(None)
    door.check(tokens(1000))
    as_route(max_tokens=30)
    door.check(tokens(34))
    with pytest.raises(ApiError):
        door.check(tokens(35))


async def test_a_failure_token_becomes_an_error_that_names_the_network(
    door: GenerationDoor, engine: Engine, workers: Workers
) -> None:
    request = as_route(max_tokens=16)
    engine.stop_reasons = [None, FAILURE_TOKEN, None]
    workers.replies = [
        {"networks": [status("qa", state="failed", reason="it threw"), status("json")]}
    ]
    received = []
    with pytest.raises(Failed, match="value network qa@3f2a91c0 has failed: it threw") as failed:
        async for output in door.generate(tokens(4), guided(), "r"):
            received.append(output)
    assert len(received) == 1
    assert engine.aborted, "what is left of the request still runs"
    assert request.error is failed.value


async def test_a_failure_is_an_error_even_when_its_reason_cannot_be_had(
    door: GenerationDoor, engine: Engine, workers: Workers
) -> None:
    as_route(max_tokens=16)
    engine.stop_reasons = [FAILURE_TOKEN]
    workers.replies = [{"error": "no processor"}]
    with pytest.raises(Failed, match=r"qa@3f2a91c0 has failed; .*no processor"):
        async for _ in door.generate(tokens(4), guided(), "r"):
            pass


async def test_another_stop_token_is_no_failure(door: GenerationDoor, engine: Engine) -> None:
    as_route(max_tokens=16)
    engine.stop_reasons = [None, 98]
    assert len([output async for output in door.generate(tokens(4), guided(), "r")]) == 2


async def test_a_client_that_leaves_aborts_the_request(
    door: GenerationDoor, engine: Engine
) -> None:
    as_route(max_tokens=16)
    outputs = door.generate(tokens(4), guided(), "r")
    await anext(outputs)
    await outputs.aclose()
    assert engine.aborted
