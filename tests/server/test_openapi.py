"""Schemathesis over the whole OpenAPI description of the running server.

Its requests come from the description alone, within it and against it, the same each time. As most
of vLLM's fields refuse most values, most bodies are sound ones with a few fields of the generated.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import requests
import schemathesis
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.core.transport import Response

from tests.models import make_network
from tests.server.conftest import SMALL
from tests.server.serving import TARGET, Served

EXAMPLES = {GenerationMode.POSITIVE: 20, GenerationMode.NEGATIVE: 10}
"""Requests for each operation."""
MANAGED = "fuzzed"
"""The network that the requests may load and unload."""
ANSWER_SECONDS = 30
"""A request that is not answered by then never will be: all are made to end soon."""

MESSAGES = [{"role": "user", "content": "Where was Ana Kovac born?"}]
SOUND: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], "max_tokens": 4},
    "/v1/completions": {"prompt": "The quick", "max_tokens": 4},
    "/v1/responses": {"input": "The quick", "max_output_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"prompt": "The quick"},
    "/detokenize": {"tokens": [10, 20]},
    "/generative_scoring": {"query": "a", "items": ["b"], "label_token_ids": [10, 11]},
    "/v1/systemone": {"state": "a", "questions": {}},
    "/invocations": {"messages": MESSAGES, "max_tokens": 4},
}
OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
REPETITIONS = ("n", "best_of")


@pytest.fixture
def managed(server: Served, checkpoints: Path) -> Iterator[None]:
    """A network in the store that is gone again after the test."""
    folder = make_network(checkpoints / "networks" / MANAGED, **SMALL, seed=99)
    yield
    httpx.delete(f"{server.url}/admin/value_networks/{MANAGED}")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.usefixtures("managed")
def test_no_request_gets_an_undocumented_5xx(server: Served) -> None:
    before = guided_answer(server)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    failures: dict[str, str] = {}
    num_sent = 0
    with requests.Session() as session:
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode, examples in EXAMPLES.items():

                @hypothesis.seed(4)
                @hypothesis.settings(
                    max_examples=examples,
                    deadline=None,
                    database=None,
                    phases=[hypothesis.Phase.generate],
                    suppress_health_check=list(hypothesis.HealthCheck),
                )
                @hypothesis.given(operation.as_strategy(generation_mode=mode))
                def send(case: Case) -> None:
                    nonlocal num_sent
                    settle(case)
                    num_sent += 1
                    if failure := failure_of(case, session):
                        failures.setdefault(f"{case.operation.label}: {failure}", curl(case))

                try:
                    send()
                except Unsatisfiable:
                    # Nothing can be wrong with a request that has no parts.
                    assert mode is GenerationMode.NEGATIVE
    assert not failures, "\n\n".join(f"{failure}\n{how}" for failure, how in failures.items())
    assert num_sent > 300
    assert guided_answer(server) == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": [-5]}, "stop_token_ids"),
        ({"background": None}, None),
        ({"truncation": None}, None),
    ],
)
def test_a_stream_that_vllm_breaks_off_ends_with_the_reason(
    client: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    body = SOUND["/v1/responses"] | {"model": TARGET, "stream": True} | fields
    with client.stream("POST", "/v1/responses", json=body) as response:
        events = [
            json.loads(line.removeprefix("data: "))
            for line in response.iter_lines()
            if line.startswith("data: {")
        ]
    if events[-1]["type"] == "error":
        error = events[-1]["error"]
        assert (error["code"], error["param"]) == (400, param)
        assert events[-1]["sequence_number"] == len(events) - 1
    else:  # a later vLLM may take them
        assert events[-1]["type"] == "response.completed"


def test_values_that_vllm_stumbles_over_are_refused(client: httpx.Client) -> None:
    empty = {"type": "message", "id": "", "role": "assistant", "status": "completed", "content": []}
    body = SOUND["/v1/responses"] | {"model": TARGET, "input": [empty, empty]}
    response = client.post("/v1/responses", json=body)
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def settle(case: Case) -> None:
    """Make a request that names what is there, often, and ends soon, always."""
    draw = random.Random(hashlib.sha256(repr((case.path_parameters, case.body)).encode()).digest())
    for name in ("name", "reference"):
        if name in case.path_parameters and draw.random() < 0.5:
            case.path_parameters[name] = MANAGED
    if case.path == "/invocations":  # described without its body
        case.body, case.media_type = {}, "application/json"
    body = case.body
    if not isinstance(body, dict):
        return
    if case.path in SOUND:
        if draw.random() < 0.8:
            kept = draw.sample(sorted(body, key=str), min(len(body), draw.choice((0, 1, 1, 2, 3))))
            if "value_guidance" in body and draw.random() < 0.3:
                kept.append("value_guidance")
            fields = {name: body[name] for name in kept}
            body.clear()
            body.update(SOUND[case.path] | fields)
            if draw.random() < 0.4:
                body["stream"] = True
        if draw.random() < 0.9:
            body["model"] = draw.choice((TARGET, TARGET, "qa"))
    guidance = body.get("value_guidance")
    if isinstance(guidance, dict) and draw.random() < 0.7:
        # Names out of nowhere are refused before the settings are read.
        names = draw.sample(("qa", "json", "short"), draw.choice((1, 2)))
        guidance["networks"] = [
            {"name": name, "scale": draw.choice((None, -1, 2))} for name in names
        ]
        body["model"] = TARGET
    limits = {limit: SOUND.get(case.path, {}).get(limit) for limit in OUTPUT_LIMITS}
    for limit, sound in limits.items():
        if sound is not None and not isinstance(body.get(limit), int):
            body[limit] = sound  # its absence would mean as much as fits
        elif isinstance(body.get(limit), int):
            body[limit] = min(body[limit], 4)
    for name in REPETITIONS:
        if isinstance(body.get(name), int):
            body[name] = min(body[name], 2)


def failure_of(case: Case, session: requests.Session) -> str | None:
    """Send a request, and say what the server did that it must not do."""
    try:
        response = case.call(session=session, timeout=ANSWER_SECONDS)
    except requests.RequestException as error:
        return f"no answer: {type(error).__name__}"
    status = response.status_code
    documented = str(status) in case.operation.definition.raw["responses"]
    if status >= 500 and not (status in (503, 507) and documented):
        return f"{status} {response.text[:200]}"
    for code in codes_in_stream(response):
        if code >= 500:
            return f"{code} within a stream: {response.text[-300:]}"
    return None


def codes_in_stream(response: Response) -> Iterator[int]:
    """The codes of the errors that a stream of events reports."""
    for line in response.text.splitlines():
        if line.startswith("data: {") and '"error"' in line:
            error = json.loads(line.removeprefix("data: ")).get("error")
            if isinstance(error, dict) and isinstance(error.get("code"), int):
                yield error["code"]


def curl(case: Case) -> str:
    return str(case.as_curl_command())[:2000]


def guided_answer(server: Served) -> Any:
    fields = {"model": "qa", "prompt": "The quick", "temperature": 0, "max_tokens": 12}
    response = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=None)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]
