"""OpenAI's endpoints on a real engine, as clients that no one here wrote see them."""

import asyncio
import json
import math
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.run_directory import SHARED_MEMORY
from tests.models import make_contrast
from tests.server.conftest import BROKEN, SMALL
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
EXPLAIN: dict[str, Any] = {"value_guidance": {"explain": True}}
FIELD = "value_guidance"
NETWORKS = "value_guidance.networks"
FIVE = [{"name": name} for name in ("qa", "json", "short", "broken-chat", "broken-stream")]
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


def spelled(tokens: list[dict[str, Any]]) -> str:
    """The text that explained tokens are: special ones are no text."""
    return "".join(t["token"] for t in tokens if not re.fullmatch(r"<\|\w+\|>", t["token"]))


def without_broken_characters(text: str) -> str:
    """A token, or an answer's end, may be a part of a character."""
    return text.replace("\N{REPLACEMENT CHARACTER}", "")


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


def run_directory(client: httpx.Client) -> Path:
    """The server's."""
    instance = client.get("/health/value_networks").json()["instance"]
    places = (SHARED_MEMORY, Path(tempfile.gettempdir()))
    (found,) = [p for place in places if (p := place / f"trimtab-{instance}").exists()]
    return found


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
            ({"value_guidance": {"networks": [{"name": "qa"}] * 2}}, 400, NETWORKS),
            ({"value_guidance": {"networks": FIVE}}, 400, NETWORKS),
            ({"model": "qa", "value_guidance": "json"}, 400, "value_guidance"),
            ({"value_guidance": {"name": "qa"}}, 400, "value_guidance.name"),
            ({"value_guidance": {"combine": "dynamic"}}, 400, NETWORKS),
            ({"model": "qa", "value_guidance": {"combine": "dynamic"}}, 400, f"{FIELD}.combine"),
            ({"model": "qa", "value_guidance": {"combine": "max"}}, 400, f"{FIELD}.combine"),
            (
                {"model": "qa", "value_guidance": {"until": {"tokens": 0}}},
                400,
                f"{FIELD}.until.tokens",
            ),
            ({"model": "qa", "value_guidance": {"from": "after_reasoning"}}, 400, f"{FIELD}.from"),
            (
                {"model": "qa", "value_guidance": {"min_target_prob": 1}},
                400,
                f"{FIELD}.min_target_prob",
            ),
            ({"value_guidance": {"networks": [], "explain": True}}, 400, f"{FIELD}.explain"),
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
        ],
    )
    def test_what_cannot_be_guided_is_refused(
        self, client: httpx.Client, path: str, fields: dict[str, Any], param: str
    ) -> None:
        assert error(post(client, path, model="qa", **fields))["param"] == param
        assert post(client, path, **fields).is_success


class TestScoring:
    """Log-probabilities of given text, under guidance."""

    def generated(
        self, client: httpx.Client, model: str
    ) -> tuple[list[int], list[int], list[float]]:
        """A prompt, an answer to it, and the log-probabilities of the answer's tokens."""
        fields = {"model": model, "return_token_ids": True, "logprobs": 0, "temperature": 1}
        choice = answer(client, COMPLETIONS, **fields)["choices"][0]
        return choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"]["token_logprobs"]

    @pytest.mark.parametrize("model", [TARGET, "qa", "json"])
    def test_given_text_scores_as_it_did_when_it_was_generated(
        self, client: httpx.Client, model: str
    ) -> None:
        prompt, token_ids, logprobs = self.generated(client, model)
        text = {"model": model, "prompt": prompt + token_ids}
        scored = answer(client, COMPLETIONS, **text, prompt_logprobs=0, max_tokens=1)["choices"][0]
        scores = scored["prompt_logprobs"][len(prompt) :]
        found = [score[str(t)]["logprob"] for score, t in zip(scores, token_ids, strict=True)]
        assert found == pytest.approx(logprobs, abs=1e-4)
        for max_tokens in (0, 1):
            echo = {"echo": True, "logprobs": 1, "max_tokens": max_tokens}
            echoed = answer(client, COMPLETIONS, **text, **echo)["choices"][0]["logprobs"]
            end = len(prompt) + len(token_ids)
            assert len(echoed["token_logprobs"]) == end + max_tokens
            assert echoed["token_logprobs"][0] is None
            assert echoed["token_logprobs"][len(prompt) : end] == pytest.approx(logprobs, abs=1e-4)

    def test_a_stream_can_echo_scores_too(self, client: httpx.Client) -> None:
        fields = {"model": "qa", "echo": True, "logprobs": 0}
        whole = answer(client, COMPLETIONS, **fields)["choices"][0]["logprobs"]
        chunks = events_of(post(client, COMPLETIONS, **fields, stream=True))
        scores = [s for c in chunks for s in c["choices"][0]["logprobs"]["token_logprobs"]]
        assert scores[1:] == pytest.approx(whole["token_logprobs"][1:], abs=1e-4)

    def test_chats_have_prompts_too(self, client: httpx.Client) -> None:
        scores = {
            model: answer(client, CHAT, model=model, prompt_logprobs=0)["prompt_logprobs"]
            for model in (TARGET, "qa")
        }
        assert len(scores["qa"]) == len(scores[TARGET])
        assert scores["qa"][1:] != scores[TARGET][1:]

    def test_several_prompts_are_each_scored(self, client: httpx.Client) -> None:
        prompts = ["Who wrote the salt road?", "The quick brown"]
        fields = {"model": "qa", "echo": True, "logprobs": 0, "max_tokens": 0}
        together = answer(client, COMPLETIONS, **fields, prompt=prompts)["choices"]
        for prompt, choice in zip(prompts, together, strict=True):
            alone = answer(client, COMPLETIONS, **fields, prompt=prompt)["choices"][0]["logprobs"]
            scores = choice["logprobs"]["token_logprobs"]
            assert scores[1:] == pytest.approx(alone["token_logprobs"][1:], abs=1e-4)

    @pytest.mark.parametrize(
        ("scoring", "param"),
        [({"prompt_logprobs": 0}, "prompt_logprobs"), ({"echo": True, "logprobs": 0}, "echo")],
    )
    def test_a_part_of_the_answer_is_no_text_to_score(
        self, client: httpx.Client, scoring: dict[str, Any], param: str
    ) -> None:
        until = {"value_guidance": {"until": {"tokens": 3}}}
        refused = error(post(client, COMPLETIONS, model="qa", **until, **scoring))
        assert (refused["code"], refused["param"]) == (400, param)

    def test_an_echo_of_a_chat_is_no_score(self, client: httpx.Client) -> None:
        messages = [*MESSAGES, {"role": "assistant", "content": "Ana"}]
        last = {"messages": messages, "add_generation_prompt": False, "echo": True}
        until = {"value_guidance": {"until": {"tokens": 3}}}
        assert answer(client, CHAT, model="qa", **last, **until)["prompt_logprobs"] is None

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_network_that_fails_gives_no_scores(self, client: httpx.Client, stream: bool) -> None:
        name = f"broken-scores-{'stream' if stream else 'whole'}"
        fields = {"model": name, "echo": True, "logprobs": 0, "max_tokens": 1, "stream": stream}
        response = post(client, COMPLETIONS, **fields)
        failure = events_of(response)[0]["error"] if stream else error(response)
        assert failure["code"] == 500
        assert f"{name}@" in failure["message"]


@pytest.mark.parametrize("path", INPUTS)
class TestSettings:
    """How networks are combined, and for how long."""

    def guided_flags(self, client: httpx.Client, path: str, **settings: Any) -> list[bool]:
        guidance = {"explain": True, **settings}
        fields = answer(client, path, model="qa", value_guidance=guidance)
        (choice,) = fields["value_explanation"]
        return [token["guided"] for token in choice["tokens"]]

    def test_several_networks_steer_together(self, client: httpx.Client, path: str) -> None:
        both = {"networks": [{"name": "qa", "scale": 0.5}, {"name": "json", "scale": 0.5}]}
        texts = {
            text_of(answer(client, path, value_guidance=guidance))
            for guidance in (both, {"networks": both["networks"][:1]}, {"networks": []})
        }
        assert len(texts) == 3

    def test_the_answer_repeats_the_request(
        self, client: httpx.Client, path: str, server: Served
    ) -> None:
        settings = {"until": {"tokens": 5, "stop": "\n"}, "min_target_prob": 0.001}
        first = answer(client, path, model="qa", value_guidance=settings)
        entry = {"name": server.references["qa"], "scale": 0.5}
        assert first["value_guidance"] == {"networks": [entry], **settings}
        again = answer(client, path, value_guidance=first["value_guidance"])
        assert again["value_guidance"] == first["value_guidance"]
        assert text_of(again) == text_of(first)

    def test_guidance_ends_after_so_many_tokens(self, client: httpx.Client, path: str) -> None:
        assert self.guided_flags(client, path) == [True] * 12
        flags = self.guided_flags(client, path, until={"tokens": 5})
        assert flags == [True] * 5 + [False] * 7

    def test_guidance_ends_at_a_text(self, client: httpx.Client, path: str) -> None:
        explained = answer(client, path, model="qa", value_guidance={"explain": True})
        tokens = [token["token"] for token in explained["value_explanation"][0]["tokens"]]
        new = [i for i in range(2, 12) if tokens[i] not in "".join(tokens[:i])]
        index = next(i for i in new if tokens[i].isascii())
        text = tokens[index]
        for until in (text, {"stop": text}, {"stop": text, "tokens": 99}):
            flags = self.guided_flags(client, path, until=until)
            assert flags == [True] * (index + 1) + [False] * (11 - index)

    def test_the_target_stays_in_charge(self, client: httpx.Client, path: str) -> None:
        guidance = {"min_target_prob": 0.2, "explain": True}
        fields = answer(client, path, model="qa", value_guidance=guidance)
        tokens = fields["value_explanation"][0]["tokens"]
        for token in tokens:
            target = {top["token_id"]: top["probability"] for top in token["target_top"]}
            first = token["target_top"][0]["token_id"]
            for top in token["guided_top"]:
                before = target.get(top["token_id"], 0.0)
                if before < 0.2 and top["token_id"] != first and before:
                    assert top["probability"] <= before * (1 + 1e-4)


@pytest.mark.parametrize("path", INPUTS)
class TestExplanations:
    """What guidance did to each token."""

    def test_the_answer_says_it_and_is_the_same(
        self, client: httpx.Client, path: str, server: Served
    ) -> None:
        plain = answer(client, path, model="qa")
        fields = answer(client, path, model="qa", **EXPLAIN)
        assert text_of(fields) == text_of(plain)
        assert "value_explanation" not in plain
        ((index, tokens),) = [(e["index"], e["tokens"]) for e in fields["value_explanation"]]
        assert index == 0
        told = without_broken_characters(spelled(tokens))
        assert told == without_broken_characters(text_of(plain))
        for token in tokens:
            top = token["guided_top"][0]
            assert (top["token_id"], top["probability"]) == (
                token["token_id"],
                pytest.approx(token["probability"]),
            )
            assert token["target_top"][0]["probability"] >= token["target_probability"] - 1e-6
            assert token["kl"] > 0 and token["guided"] and not token["grammar"]
            (network,) = token["networks"]
            assert (network["name"], network["weight"]) == (server.references["qa"], 0.5)

    def test_a_stream_says_the_same_piece_by_piece(self, client: httpx.Client, path: str) -> None:
        whole = answer(client, path, model="qa", **EXPLAIN)["value_explanation"]
        events = events_of(post(client, path, model="qa", stream=True, **EXPLAIN))
        pieces = [entry for event in events for entry in event.get("value_explanation", [])]
        assert len(pieces) > 1
        tokens = [token for piece in pieces for token in piece["tokens"]]
        assert {piece["index"] for piece in pieces} == {0}
        assert [t["token_id"] for t in tokens] == [t["token_id"] for t in whole[0]["tokens"]]
        assert [t["kl"] for t in tokens] == pytest.approx(
            [t["kl"] for t in whole[0]["tokens"]], abs=1e-4
        )
        told = without_broken_characters(spelled(tokens))
        assert told == without_broken_characters(streamed_text(events))

    def test_nothing_is_left_behind(self, client: httpx.Client, path: str) -> None:
        with client.stream(
            "POST", path, json=INPUTS[path] | {"model": "qa", "stream": True} | EXPLAIN
        ) as response:
            next(response.iter_lines())  # and leave
        with suppress(httpx.TimeoutException):
            long = {"ignore_eos": True, LIMITS[path]: 400}
            client.post(path, json=INPUTS[path] | {"model": "qa"} | EXPLAIN | long, timeout=0.5)
        post(client, path, model="qa", **EXPLAIN)
        post(client, path, model="short", **EXPLAIN, **{LIMITS[path]: 60})  # refused
        folder = run_directory(client) / "explain"
        deadline = time.monotonic() + 10
        while list(folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)  # the client that has left is noticed a little later
        assert list(folder.iterdir()) == []


class TestExplanationsOfSeveral:
    def test_choices_are_told_apart(self, client: httpx.Client) -> None:
        fields = {
            "model": "qa",
            "prompt": ["Who wrote", "The quick brown"],
            "n": 2,
            "temperature": 1,
            "seed": 7,
            "return_token_ids": True,
            "value_guidance": {"explain": True},
        }
        whole = answer(client, COMPLETIONS, **fields)
        told = {
            entry["index"]: [token["token_id"] for token in entry["tokens"]]
            for entry in whole["value_explanation"]
        }
        assert told == {choice["index"]: choice["token_ids"] for choice in whole["choices"]}
        assert len(told) == 4
        streamed: dict[int, list[int]] = {}
        for event in events_of(post(client, COMPLETIONS, stream=True, **fields)):
            for entry in event.get("value_explanation", []):
                ids = [token["token_id"] for token in entry["tokens"]]
                streamed.setdefault(entry["index"], []).extend(ids)
        assert streamed == told

    def test_a_grammar_is_mentioned(self, client: httpx.Client) -> None:
        fields = {"structured_outputs": {"choice": ["Velenje", "Ljubljana"]}, "model": "qa"}
        explained = answer(client, CHAT, **fields, value_guidance={"explain": True})
        tokens = explained["value_explanation"][0]["tokens"]
        assert all(token["grammar"] for token in tokens)

    def test_probabilities_are_those_of_the_log_probabilities(self, client: httpx.Client) -> None:
        fields = {"logprobs": 2, "value_guidance": {"explain": True}}
        explained = answer(client, COMPLETIONS, model="qa", **fields)
        logprobs = explained["choices"][0]["logprobs"]
        tokens = explained["value_explanation"][0]["tokens"]
        assert [math.log(token["probability"]) for token in tokens] == pytest.approx(
            logprobs["token_logprobs"], abs=1e-4
        )
        assert [token["token"] for token in tokens] == logprobs["tokens"]

    @pytest.mark.parametrize(
        ("path", "fields", "param"),
        [
            (CHAT, {"include_reasoning": False}, "include_reasoning"),
            (COMPLETIONS, {"echo": True, "max_tokens": 0}, "max_tokens"),
            (CHAT, {"use_beam_search": True, "n": 2}, "use_beam_search"),
        ],
    )
    def test_what_cannot_be_explained_is_refused(
        self, client: httpx.Client, path: str, fields: dict[str, Any], param: str
    ) -> None:
        explained = {"model": "qa", "value_guidance": {"explain": True}}
        assert error(post(client, path, **explained, **fields))["param"] == param


class TestDynamicFusion:
    """Networks that know how far they moved from their base."""

    @pytest.fixture(scope="class", autouse=True)
    def pair(self, checkpoints: Path) -> None:
        """In the store: it is loaded with the first request."""
        folder = checkpoints / "networks" / "pair"
        if not folder.exists():
            make_contrast(folder.with_name(".pair"), **SMALL, seed=21)
            folder.with_name(".pair").rename(folder)

    def test_weights_are_solved_for_and_bounded(self, client: httpx.Client) -> None:
        for bound, sign in ((None, 1), (0.125, 1), (-2, -1)):
            entry = {"name": "pair"} | ({} if bound is None else {"scale": bound})
            guidance = {"networks": [entry], "combine": "dynamic", "explain": True}
            fields = answer(client, COMPLETIONS, value_guidance=guidance)
            limit = abs(2.0 if bound is None else bound)
            assert fields["value_guidance"]["networks"][0]["scale"] == sign * limit
            for token in fields["value_explanation"][0]["tokens"]:
                weight, distance = token["networks"][0]["weight"], token["distance"]
                assert 0 <= sign * weight <= limit
                assert distance["solved"] == (abs(distance["wanted"] - distance["reached"]) <= 1e-3)
                assert distance["solved"] or abs(weight) == pytest.approx(limit)
                # The target alone may choose among tokens of which the network knows nothing.
                assert token["kl"] == pytest.approx(distance["reached"], abs=0.01)

    def test_others_are_refused_with_what_to_do(self, client: httpx.Client) -> None:
        networks = [{"name": "pair"}, {"name": "qa"}]
        guidance = {"networks": networks, "combine": "dynamic"}
        refused = error(post(client, COMPLETIONS, value_guidance=guidance))
        assert (refused["code"], refused["param"]) == (400, "value_guidance.combine")
        assert "qa@" in refused["message"] and "pair@" not in refused["message"]


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
            assert {"$ref": "#/components/schemas/Guidance"} in branches
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
