"""OpenAI's endpoints on a real engine, as clients that no one here wrote see them."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import BROKEN
from tests.server.serving import TARGET, Served

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = [{"role": "user", "content": "Where was Ana Kovac born?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}
INPUTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "temperature": 0, "max_tokens": 12},
    COMPLETIONS: {"prompt": "Where was Ana Kovac born?", "temperature": 0, "max_tokens": 12},
    RESPONSES: {"input": "Where was Ana Kovac born?", "temperature": 0, "max_output_tokens": 12},
}
LIMITS = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens"}

pytestmark = pytest.mark.usefixtures("server")


def text_of(answer: dict[str, Any]) -> str:
    """The text in any endpoint's answer."""
    if "output" in answer:
        return str(answer["output"][0]["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def streamed_text(events: list[dict[str, Any]]) -> str:
    if "type" in events[0]:
        return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(c["delta"].get("content") or "" if "delta" in c else c["text"] for c in choices)


def post(client: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    return client.post(path, json=INPUTS[path] | {"model": TARGET} | fields)


def answer(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = post(client, path, **fields)
    assert response.is_success, response.text
    fields = response.json()
    assert isinstance(fields, dict)
    return fields


def error(response: httpx.Response) -> dict[str, Any]:
    fields = response.json()["error"]
    assert set(fields) == {"message", "type", "param", "code"}
    assert fields["code"] == response.status_code
    assert isinstance(fields, dict)
    return fields


@pytest.mark.parametrize("path", INPUTS)
class TestEveryEndpoint:
    def test_a_network_is_chosen_by_model_or_by_value_guidance(
        self, client: httpx.Client, path: str
    ) -> None:
        plain = text_of(answer(client, path))
        by_model = text_of(answer(client, path, model="qa"))
        assert by_model != plain
        assert by_model == text_of(answer(client, path, value_guidance="qa"))
        assert by_model == text_of(answer(client, path, model=None, value_guidance="qa"))
        entry = {"name": "qa", "scale": 0.5}  # its default
        assert by_model == text_of(answer(client, path, value_guidance={"networks": [entry]}))
        entry["scale"] = -0.5
        assert by_model != text_of(answer(client, path, value_guidance={"networks": [entry]}))
        assert by_model != text_of(answer(client, path, model="json"))

    def test_the_answer_names_what_was_used(
        self, client: httpx.Client, path: str, server: Served
    ) -> None:
        reference = server.references["qa"]
        by_model = post(client, path, model="qa")
        assert by_model.headers["x-value-networks"] == f"{reference};scale=0.5"
        assert by_model.json()["model"] == "qa"
        assert by_model.json()["value_guidance"] == {
            "networks": [{"name": reference, "scale": 0.5}]
        }

        by_field = post(client, path, value_guidance={"networks": [{"name": "qa", "scale": 0.8}]})
        assert by_field.headers["x-value-networks"] == f"{reference};scale=0.8"
        assert by_field.json()["model"] == TARGET

        again = post(client, path, value_guidance=by_field.json()["value_guidance"])
        assert text_of(again.json()) == text_of(by_field.json())
        assert answer(client, path, model=reference)["model"] == reference

    def test_an_unguided_answer_is_vllms_own(self, client: httpx.Client, path: str) -> None:
        response = post(client, path)
        assert "x-value-networks" not in response.headers
        assert "value_guidance" not in response.json()
        assert text_of(response.json()) == text_of(answer(client, path, value_guidance=None))
        nothing: dict[str, Any] = {"networks": []}
        assert text_of(response.json()) == text_of(answer(client, path, value_guidance=nothing))

    def test_a_zero_scale_is_exactly_unguided_but_named(
        self, client: httpx.Client, path: str, server: Served
    ) -> None:
        zero = {"networks": [{"name": "qa", "scale": 0}]}
        for fields in ({"value_guidance": zero}, {"model": "qa", "value_guidance": zero}):
            response = post(client, path, **fields)
            assert text_of(response.json()) == text_of(answer(client, path))
            assert response.headers["x-value-networks"] == f"{server.references['qa']};scale=0.0"

    def test_a_stream_says_the_same(self, client: httpx.Client, path: str, server: Served) -> None:
        response = post(client, path, model="qa", stream=True)
        assert response.headers["x-value-networks"] == f"{server.references['qa']};scale=0.5"
        events = events_of(response)
        assert streamed_text(events) == text_of(answer(client, path, model="qa"))
        carriers = [event.get("response", event) for event in events]
        assert {carrier["model"] for carrier in carriers if "model" in carrier} == {"qa"}

    def test_names_and_limits_are_checked(self, client: httpx.Client, path: str) -> None:
        cases: list[tuple[dict[str, Any], int, str]] = [
            ({"value_guidance": "guard"}, 404, "value_guidance"),
            ({"value_guidance": "qa@00000000"}, 404, "value_guidance"),
            ({"model": "qa@00000000"}, 404, "model"),
            ({"model": "guard"}, 404, "model"),
            ({"value_guidance": {"networks": [{"name": "qa"}] * 2}}, 400, "value_guidance"),
            (
                {"value_guidance": {"networks": [{"name": "qa"}, {"name": "json"}]}},
                400,
                "value_guidance",
            ),
            ({"model": "qa", "value_guidance": "json"}, 400, "value_guidance"),
            ({"value_guidance": {"name": "qa"}}, 400, "value_guidance.networks"),
            (
                {"value_guidance": {"networks": [{"name": "qa", "scale": 9}]}},
                400,
                "value_guidance.networks.0.scale",
            ),
            ({"vllm_xargs": {"trimtab": "forged"}}, 400, "vllm_xargs"),
        ]
        for fields, status, param in cases:
            for stream in (False, True):
                refused = error(post(client, path, stream=stream, **fields))
                assert (refused["code"], refused["param"]) == (status, param), fields

    def test_an_unknown_model_is_told_what_there_is(self, client: httpx.Client, path: str) -> None:
        for fields in ({"model": "guard"}, {"value_guidance": "guard"}):
            message = error(post(client, path, **fields))["message"]
            assert "qa" in message and "json" in message

    @pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
    def test_json_literals_beyond_json_are_no_scale(
        self, client: httpx.Client, path: str, literal: str
    ) -> None:
        guidance = f'{{"networks": [{{"name": "qa", "scale": {literal}}}]}}'
        body = json.dumps(INPUTS[path])[:-1] + f', "value_guidance": {guidance}}}'
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert error(response)["param"] == "value_guidance.networks.0.scale"

    def test_what_exceeds_a_networks_context_is_refused(
        self, client: httpx.Client, path: str
    ) -> None:
        for stream in (False, True):
            response = post(client, path, model="short", stream=stream, **{LIMITS[path]: 60})
            refused = error(response)
            assert (refused["code"], refused["param"]) == (400, LIMITS[path])
            assert "reads at most 64 tokens" in refused["message"]
            assert "asks for 60 more" in refused["message"]
        assert answer(client, path, **{LIMITS[path]: 60})

    def test_an_open_end_is_what_fits(self, client: httpx.Client, path: str) -> None:
        fields = INPUTS[path] | {"model": "short", "ignore_eos": True, LIMITS[path]: None}
        response = client.post(path, json=fields)
        assert response.is_success, response.text
        expected = 16 + 14 if path == COMPLETIONS else 64  # completions end after 16 by default
        assert response.json()["usage"]["total_tokens"] <= expected

    def test_curl_needs_no_content_type(self, path: str, server: Served) -> None:
        if shutil.which("curl") is None:
            pytest.skip("no curl here")
        body = json.dumps(INPUTS[path] | {"model": "qa"})
        command = ["curl", "-s", f"{server.url}{path}", "-d", body]
        fields = json.loads(subprocess.check_output(command))
        assert fields["model"] == "qa"

    def test_bodies_that_are_no_usable_json_are_refused(
        self, client: httpx.Client, path: str
    ) -> None:
        as_json = {"content-type": "application/json"}
        assert error(client.post(path, content="{", headers=as_json))["code"] == 400
        assert error(client.post(path, content="[]", headers=as_json))["code"] == 400
        for value in (2**64, 10**30):
            refused = error(post(client, path, model="qa", top_k=value))
            assert (refused["code"], refused["param"]) == (400, "top_k")
        assert error(post(client, path, model="qa", structured_outputs="x"))["code"] == 400
        deep = '{"input": ' + "[" * 100_000 + "]" * 100_000 + "}"
        assert error(client.post(path, content=deep, headers=as_json))["code"] == 400
        big = json.dumps(INPUTS[path] | {"user": "x" * (9 << 20)})
        assert error(client.post(path, content=big, headers=as_json))["code"] == 413
        as_text = {"content-type": "text/plain"}
        assert error(client.post(path, content="{}", headers=as_text))["code"] == 415


class TestParameters:
    """vLLM's and OpenAI's parameters keep working on guided requests."""

    def test_n_with_seeds(self, client: httpx.Client) -> None:
        fields = {"model": "qa", "n": 3, "temperature": 1, "seed": 7}
        choices = answer(client, CHAT, **fields)["choices"]
        assert len({choice["message"]["content"] for choice in choices}) == 3
        assert choices == answer(client, CHAT, **fields)["choices"]

    def test_several_prompts_are_each_guided(self, client: httpx.Client) -> None:
        prompts = ["Who wrote", "The quick brown"]
        together = answer(client, COMPLETIONS, model="qa", prompt=prompts)["choices"]
        for prompt, choice in zip(prompts, together, strict=True):
            alone = text_of(answer(client, COMPLETIONS, model="qa", prompt=prompt))
            assert choice["text"] == alone
            assert alone != text_of(answer(client, COMPLETIONS, prompt=prompt))

    def test_stop_and_logit_bias(self, client: httpx.Client) -> None:
        text = text_of(answer(client, COMPLETIONS, model="qa"))
        stop = text[len(text) // 2]
        choice = answer(client, COMPLETIONS, model="qa", stop=[stop])["choices"][0]
        assert choice["stop_reason"] == stop
        assert choice["text"] == text[: text.index(stop)]
        biased = answer(client, COMPLETIONS, model="qa", logit_bias={"30": 100}, logprobs=1)
        assert len(set(biased["choices"][0]["logprobs"]["tokens"])) == 1

    def test_logprobs_are_of_the_guided_distribution(self, client: httpx.Client) -> None:
        fields = {"logprobs": True, "top_logprobs": 5, "max_tokens": 1}
        first = {
            model: answer(client, CHAT, model=model, **fields)["choices"][0]["logprobs"]["content"][
                0
            ]
            for model in (TARGET, "qa")
        }
        assert first["qa"]["top_logprobs"][0]["token"] == first["qa"]["token"]  # greedy
        assert first["qa"]["top_logprobs"] != first[TARGET]["top_logprobs"]

    def test_structured_outputs(self, client: httpx.Client) -> None:
        choice = {"structured_outputs": {"choice": ["Velenje", "Ljubljana"]}}
        assert text_of(answer(client, CHAT, model="qa", **choice)) in ("Velenje", "Ljubljana")
        schema = {
            "type": "object",
            "properties": {"born": {"enum": ["Velenje"]}},
            "required": ["born"],
            "additionalProperties": False,
        }
        response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        text = text_of(
            answer(client, CHAT, model="qa", response_format=response_format, max_tokens=60)
        )
        assert json.loads(text) == {"born": "Velenje"}

    def test_usage_in_streams(self, client: httpx.Client) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        last = events_of(post(client, CHAT, model="qa", **options))[-1]
        assert (last["model"], last["choices"]) == ("qa", [])
        assert last["usage"]["completion_tokens"] == 12

    def test_echo_is_of_text_alone(self, client: httpx.Client) -> None:
        prompt = INPUTS[COMPLETIONS]["prompt"]
        guided = text_of(answer(client, COMPLETIONS, model="qa"))
        assert text_of(answer(client, COMPLETIONS, model="qa", echo=True)) == prompt + guided

    def test_a_guided_response_in_the_background_is_refused(self, client: httpx.Client) -> None:
        response = post(client, RESPONSES, model="qa", background=True)
        assert error(response)["param"] == "background"

    @pytest.mark.parametrize(
        ("path", "limit", "stray"),
        [
            (RESPONSES, "max_output_tokens", {"max_tokens": 1}),
            (CHAT, "max_tokens", {"max_output_tokens": "x"}),
        ],
    )
    def test_a_limit_that_the_endpoint_does_not_know_means_nothing(
        self, client: httpx.Client, path: str, limit: str, stray: dict[str, Any]
    ) -> None:
        refused = error(post(client, path, model="short", **{limit: 60}, **stray))
        assert (refused["code"], refused["param"]) == (400, limit)

    @pytest.mark.parametrize(
        ("path", "fields", "param"),
        [
            (CHAT, {"use_beam_search": True, "n": 2}, "use_beam_search"),
            (COMPLETIONS, {"use_beam_search": True, "n": 2}, "use_beam_search"),
            (CHAT, {"prompt_logprobs": 1}, "prompt_logprobs"),
            (COMPLETIONS, {"prompt_logprobs": 0}, "prompt_logprobs"),
            (COMPLETIONS, {"echo": True, "logprobs": 1}, "echo"),
        ],
    )
    def test_what_cannot_be_guided_is_refused(
        self, client: httpx.Client, path: str, fields: dict[str, Any], param: str
    ) -> None:
        assert error(post(client, path, model="qa", **fields))["param"] == param
        assert post(client, path, **fields).is_success


class TestOtherEndpoints:
    """No text is ever unguided in silence."""

    def test_every_generation_endpoint_refuses_guidance(self, client: httpx.Client) -> None:
        paths = client.get("/openapi.json").json()["paths"]
        others = [path for path in paths if "post" in paths[path] and path not in INPUTS]
        assert {"/v1/chat/completions/batch", "/v1/messages", "/invocations"} <= set(others)
        for path in others:
            path = path.replace("{response_id}", "resp_1")
            for fields, param in (
                ({"value_guidance": "qa"}, "value_guidance"),
                ({"model": "qa"}, "model"),
                ({"vllm_xargs": {"trimtab": "forged"}}, "vllm_xargs"),
            ):
                body = {"messages": MESSAGES, "prompt": "x", "max_tokens": 4, **fields}
                assert error(client.post(path, json=body))["param"] == param, path

    def test_they_serve_the_target_as_before(self, client: httpx.Client) -> None:
        body = {"model": TARGET, "messages": [MESSAGES], "max_tokens": 4}
        assert client.post("/v1/chat/completions/batch", json=body).is_success
        body = {"model": TARGET, "messages": MESSAGES, "max_tokens": 4}
        assert client.post("/v1/messages", json=body).is_success


class TestDescriptions:
    def test_models_lists_networks_with_their_parent(
        self, client: httpx.Client, server: Served
    ) -> None:
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert cards[TARGET]["parent"] is None
        assert cards["qa"]["parent"] == TARGET
        assert cards["qa"]["root"] == server.references["qa"]
        assert (cards["qa"]["max_model_len"], cards["short"]["max_model_len"]) == (512, 64)

    def test_openapi_types_the_field(self, client: httpx.Client) -> None:
        description = client.get("/openapi.json").json()
        for path in INPUTS:
            body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            model = description["components"]["schemas"][body["schema"]["$ref"].split("/")[-1]]
            branches = model["properties"]["value_guidance"]["anyOf"]
            assert {"$ref": "#/components/schemas/GuidingNetworks"} in branches
        assert "GuidingNetwork" in description["components"]["schemas"]
        assert client.get("/docs").is_success


class TestOpenAIClient:
    @pytest.fixture
    def openai_client(self, server: Served) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client

    def test_sync(self, openai_client: openai.OpenAI) -> None:
        assert "qa" in [model.id for model in openai_client.models.list()]
        chat: Any = {"messages": MESSAGES, **GREEDY}
        completion = openai_client.chat.completions.create(model="qa", **chat)
        text = completion.choices[0].message.content
        assert text and completion.model == "qa"
        chunks = list(openai_client.chat.completions.create(model="qa", stream=True, **chat))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        by_field = openai_client.chat.completions.create(
            model=TARGET, extra_body={"value_guidance": "qa"}, **chat
        )
        assert by_field.choices[0].message.content == text

    def test_responses(self, openai_client: openai.OpenAI) -> None:
        asked: Any = {"model": "qa", "input": "Where?", "temperature": 0, "max_output_tokens": 8}
        response = openai_client.responses.create(**asked)
        assert response.model == "qa" and response.output_text
        with openai_client.responses.stream(**asked) as stream:
            assert stream.get_final_response().output_text == response.output_text

    async def test_async(self, server: Served) -> None:
        chat: Any = {"messages": MESSAGES, **GREEDY}
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model=m, **chat) for m in ("qa", "json") * 4)
            )
            texts = [answer.choices[0].message.content for answer in answers]
            assert texts == texts[:2] * 4 and texts[0] != texts[1]
            stream = await client.chat.completions.create(model="qa", stream=True, **chat)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(pieces) == texts[0]

    def test_errors(self, openai_client: openai.OpenAI) -> None:
        chat: Any = {"messages": MESSAGES, **GREEDY}
        with pytest.raises(openai.NotFoundError, match="no version '00000000'"):
            openai_client.chat.completions.create(model="qa@00000000", **chat)
        with pytest.raises(openai.BadRequestError, match="contradict"):
            openai_client.chat.completions.create(
                model="qa", extra_body={"value_guidance": "json"}, **chat
            )


class TestFailingNetworks:
    """Networks whose weights turn non-finite; each fails once, and is then known to have."""

    def test_a_failure_is_an_error_that_names_the_network(self, client: httpx.Client) -> None:
        failed = error(post(client, CHAT, model="broken-chat"))
        assert failed["code"] == 500
        assert "broken-chat@" in failed["message"] and "not finite" in failed["message"]
        later = error(post(client, CHAT, value_guidance="broken-chat"))
        assert later["code"] == 503
        assert "broken-chat@" in later["message"] and "not finite" in later["message"]
        listed = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert "broken-chat" not in listed and "qa" in listed

    @pytest.mark.parametrize(
        ("path", "model"),
        [
            (CHAT, "broken-stream"),
            (COMPLETIONS, "broken-completion"),
            (RESPONSES, "broken-response"),
        ],
    )
    def test_in_a_stream_it_is_an_error_event(
        self, client: httpx.Client, path: str, model: str
    ) -> None:
        response = post(client, path, model=model, stream=True)
        assert response.status_code == 200
        failures = [event["error"] for event in events_of(response) if "error" in event]
        assert [failure["code"] for failure in failures] == [500]
        assert f"{model}@" in failures[0]["message"]

    def test_no_parameter_keeps_a_failed_request_going(self, client: httpx.Client) -> None:
        parameters = {
            "structured_outputs": {"regex": "[a-z]{40}"},
            "min_tokens": 20,
            "ignore_eos": True,
            "logit_bias": {"30": 100},
            "logprobs": True,
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "max_tokens": 30,
        }
        failed = error(post(client, CHAT, model="broken-grammar", **parameters))
        assert failed["code"] == 500
        assert "broken-grammar@" in failed["message"]

    def test_others_finish_undisturbed(self, client: httpx.Client, server: Served) -> None:
        alone = {model: text_of(answer(client, CHAT, model=model)) for model in (TARGET, "qa")}

        async def together() -> list[httpx.Response]:
            models = [TARGET, "qa", "broken-n", TARGET, "qa"]
            async with httpx.AsyncClient(base_url=server.url, timeout=None) as many:
                bodies = [
                    INPUTS[CHAT] | {"model": model, "n": 2, "temperature": 0.5, "seed": 1}
                    if model == "broken-n"
                    else INPUTS[CHAT] | {"model": model}
                    for model in models
                ]
                return await asyncio.gather(*(many.post(CHAT, json=body) for body in bodies))

        *others, failed = sorted(asyncio.run(together()), key=lambda r: r.status_code)
        assert failed.status_code == 500
        texts = {(r.json()["model"], text_of(r.json())) for r in others}
        assert texts == set(alone.items())

    def test_the_failure_token_ends_nothing_else(self, client: httpx.Client) -> None:
        for model in ("qa", "json", "short"):
            choice = answer(client, CHAT, model=model, max_tokens=40)["choices"][0]
            assert choice["stop_reason"] is None

    def test_the_server_lives(self, client: httpx.Client) -> None:
        assert client.get("/health").is_success
        networks = client.get("/health/value_networks").json()["networks"]
        states = {reference.partition("@")[0]: state for reference, state in networks.items()}
        assert {name for name, state in states.items() if state == "failed"} == set(BROKEN)
