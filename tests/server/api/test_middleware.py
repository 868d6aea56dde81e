import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from server.api.middleware import LEASES, RequestGate, Traffic
from server.lifecycle.leases import Leases
from tests.server.networks import catalog_of, status

GUIDED = "/v1/chat/completions"
OTHER = "/v1/messages"
LIMIT = 1000
HELD = "qa@3f2a91c0"
CURLS_OWN = {"content-type": "application/x-www-form-urlencoded"}


class Server:
    """An application that echoes bodies behind the gate."""

    def __init__(self, catalog: Any, leases: Leases) -> None:
        self.traffic = Traffic()
        self.leases = leases
        app = Starlette(
            routes=[Route(path, self._echo, methods=["POST"]) for path in (GUIDED, OTHER)]
        )
        gate = RequestGate(
            app,
            guided_paths=[GUIDED],
            offers=lambda name: name in catalog,
            traffic=self.traffic,
            max_body_bytes=LIMIT,
        )
        transport = httpx.ASGITransport(gate)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def _echo(self, request: Request) -> Response:
        body = (await request.body()).decode()
        content_type = request.headers["content-type"]
        running = self.traffic.running
        request.scope[LEASES].append(self.leases.take([HELD]))
        if "fail" in request.query_params:
            raise RuntimeError("it failed")
        if "stream" in request.query_params:
            return StreamingResponse(self._stream())
        return JSONResponse({"body": body, "type": content_type, "running": running})

    async def _stream(self) -> AsyncIterator[str]:
        for _ in range(2):
            yield f"{self.leases.count(HELD)} "

    async def post(self, path: str, **options: Any) -> httpx.Response:
        return await self._client.post(path, **options)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    leases = Leases(tmp_path)
    yield Server(await catalog_of(status("qa")), leases)
    leases.close()


HIDDEN = r'{"value\u005fguidance": "qa", "model": "target", "x": '


@pytest.mark.parametrize(
    "body",
    [
        '{"value_guidance": "qa"}'.encode("utf-16"),
        (HIDDEN + r'"\ud800"}').encode(),
        (HIDDEN + "[" * 300 + "]" * 300 + "}").encode(),
    ],
)
async def test_nothing_that_vllm_can_read_hides_from_the_gate(server: Server, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert_refused(await server.post(OTHER, content=body, headers=headers), 400, "value_guidance")


def assert_refused(response: httpx.Response, code: int, param: str | None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (code, code, param)
    assert set(error) == {"message", "type", "param", "code"}


async def test_a_body_passes_unchanged(server: Server) -> None:
    response = await server.post(GUIDED, json={"model": "qa", "value_guidance": "qa"})
    assert json.loads(response.json()["body"]) == {"model": "qa", "value_guidance": "qa"}


@pytest.mark.parametrize("path", [GUIDED, OTHER])
async def test_a_declared_length_beyond_the_limit_is_refused(server: Server, path: str) -> None:
    assert_refused(await server.post(path, content=b" " * (LIMIT + 1)), 413, None)


@pytest.mark.parametrize("path", [GUIDED, OTHER])
async def test_streamed_bytes_are_counted(server: Server, path: str) -> None:
    async def chunks() -> Any:
        for _ in range(LIMIT):
            yield b"  "

    assert_refused(await server.post(path, content=chunks()), 413, None)


async def test_a_body_of_just_the_limit_passes(server: Server) -> None:
    body = json.dumps({"a": "x" * (LIMIT - 9)}).encode()
    assert len(body) == LIMIT
    headers = {"content-type": "application/json"}
    assert (await server.post(GUIDED, content=body, headers=headers)).is_success


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/xml", "multipart/form-data; boundary=x", ""]
)
async def test_other_content_types_are_refused(server: Server, content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    assert_refused(await server.post(GUIDED, content="{}", headers=headers), 415, "content-type")


async def test_json_may_name_its_charset(server: Server) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await server.post(GUIDED, content="{}", headers=headers)).is_success


async def test_json_that_curl_calls_a_form_is_json(server: Server) -> None:
    response = await server.post(GUIDED, content=' {"model": "qa"}', headers=CURLS_OWN)
    assert response.json()["body"] == ' {"model": "qa"}'
    assert response.json()["type"] == "application/json"


async def test_a_real_form_is_refused(server: Server) -> None:
    assert_refused(await server.post(GUIDED, data={"model": "qa"}), 415, "content-type")


async def test_a_form_from_a_web_page_is_refused(server: Server) -> None:
    headers = {**CURLS_OWN, "origin": "http://elsewhere.example"}
    assert_refused(await server.post(GUIDED, content="{}", headers=headers), 415, "content-type")


def malformed() -> Iterator[str | bytes]:
    yield from ("", "{", '{"a": }', '{"a": 1} x', b'{"a": "\xff"}', '{"a": "\\ud800"}')
    yield '{"a": ' + "[" * 400 + "]" * 400 + "}"


@pytest.mark.parametrize("body", malformed())
async def test_malformed_json_is_refused(server: Server, body: str | bytes) -> None:
    headers = {"content-type": "application/json"}
    assert_refused(await server.post(GUIDED, content=body, headers=headers), 400, None)


async def test_numbers_that_json_lacks_reach_the_field_that_refuses_them(server: Server) -> None:
    headers = {"content-type": "application/json"}
    body = '{"scale": NaN, "seed": ' + "9" * 500 + "}"
    assert (await server.post(GUIDED, content=body, headers=headers)).is_success


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"value_guidance": "qa"}, "value_guidance"),
        ({"value_guidance": {"networks": []}}, "value_guidance"),
        ({"value_guidance": False}, "value_guidance"),
        ({"model": "qa"}, "model"),
        ({"model": "qa@3f2a91c0"}, "model"),
        ({"model": "qa@feedbeef"}, "model"),
        ({"vllm_xargs": {"trimtab": "forged"}}, "vllm_xargs"),
    ],
)
async def test_other_endpoints_refuse_guidance(
    server: Server, fields: dict[str, Any], param: str
) -> None:
    response = await server.post(OTHER, json={"messages": [], **fields})
    assert_refused(response, 400, param)
    if param != "vllm_xargs":
        assert GUIDED in response.json()["error"]["message"]


async def test_other_endpoints_refuse_guidance_in_a_form(server: Server) -> None:
    response = await server.post(OTHER, data={"value_guidance": "qa", "file": "..."})
    assert_refused(response, 400, "value_guidance")


@pytest.mark.parametrize(
    "body",
    ['{"model": "target", "value_guidance": null}', '{"model": 5}', "[]", "no json", '{"a": NaN}'],
)
async def test_other_endpoints_get_everything_else(server: Server, body: str) -> None:
    response = await server.post(OTHER, content=body, headers={"content-type": "application/json"})
    assert response.json()["body"] == body


async def test_running_requests_are_counted(server: Server) -> None:
    assert (await server.post(GUIDED, json={})).json()["running"] == 1
    assert server.traffic.running == 0
    await server.post(GUIDED, content="{")
    assert server.traffic.running == 0


async def test_leases_last_as_long_as_the_answer(server: Server) -> None:
    streamed = await server.post(f"{GUIDED}?stream", json={})
    assert streamed.text == "1 1 "
    assert server.leases.count(HELD) == 0
    with pytest.raises(RuntimeError, match="it failed"):
        await server.post(f"{GUIDED}?fail", json={})
    assert server.leases.count(HELD) == 0


async def test_a_client_that_leaves_holds_no_lease(server: Server) -> None:
    reading = asyncio.Event()

    async def forever() -> AsyncIterator[str]:
        yield "first"
        reading.set()
        await asyncio.Event().wait()

    server._stream = forever  # type: ignore[method-assign]
    answer = asyncio.create_task(server.post(f"{GUIDED}?stream", json={}))
    await reading.wait()
    assert server.leases.count(HELD) == 1
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert server.leases.count(HELD) == 0


async def test_a_server_that_shuts_down_is_unavailable(server: Server) -> None:
    server.traffic.closing = True
    assert_refused(await server.post(GUIDED, json={}), 503, None)
