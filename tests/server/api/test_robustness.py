"""The middleware in front of handlers that fail in every way, without an engine."""

import json
import logging
from collections.abc import AsyncIterator, Callable
from types import FunctionType
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from server.api.robustness import Unbreakable

READER = "vllm.entrypoints.openai.responses.utils"
ENGINE = "vllm.v1.engine.async_llm"


class Foreseen(Exception):
    """An error for which the application has a handler, as vLLM has for its own."""

    parameter = "stop"


def within(module: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` as if it stood in `module`."""
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__, {**function.__globals__, "__name__": module}, function.__name__
    )


def stumble(error: type[Exception]) -> None:
    raise error("out of range")


def client_of(route: Callable[..., Any]) -> httpx.AsyncClient:
    async def answer(_request: Request, error: Exception) -> Response:
        return JSONResponse({"error": {"message": str(error)}}, status_code=400)

    app = Starlette(
        routes=[Route("/", route, methods=["POST"])], exception_handlers={Foreseen: answer}
    )
    app.add_middleware(Unbreakable, client_errors=(Foreseen, ValueError))
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def post(route: Callable[..., Any]) -> httpx.Response:
    async with client_of(route) as client:
        return await client.post("/")


def failing(module: str, error: type[Exception]) -> Callable[..., Any]:
    read = within(module, stumble)

    async def route(_request: Request) -> Response:
        read(error)
        return Response()

    return route


@pytest.mark.parametrize("error", [IndexError, KeyError, AttributeError, ZeroDivisionError])
async def test_a_stumble_over_the_request_is_a_400(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    response = await post(failing(READER, error))
    fields = response.json()["error"]
    assert (response.status_code, fields["code"]) == (400, 400)
    assert fields["type"] == "BadRequestError" and "out of range" in fields["message"]
    assert caplog.records[0].exc_info is not None  # the operator can tell whose fault it was


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (ENGINE, IndexError),
        ("server.api.routes", IndexError),
        ("vllm.entrypointsx", IndexError),
        (READER, RuntimeError),
        (READER, OSError),
    ],
)
async def test_a_fault_of_the_server_stays_one(module: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await post(failing(module, error))


async def test_a_reader_behind_the_engine_is_not_blamed() -> None:
    engine = within(ENGINE, stumble)

    def read(error: type[Exception]) -> None:
        engine(error)

    async def route(_request: Request) -> Response:
        FunctionType(read.__code__, {"__name__": READER}, "read", closure=read.__closure__)(
            KeyError
        )
        return Response()

    with pytest.raises(KeyError):
        await post(route)


def streaming(error: Exception, media_type: str = "text/event-stream") -> Callable[..., Any]:
    async def route(_request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            yield "event: created\ndata: {}\n\n"
            yield "event: in_progress\ndata: {}\n\n"
            raise error

        return StreamingResponse(events(), media_type=media_type)

    return route


def last_event(response: httpx.Response) -> dict[str, Any]:
    *others, last = response.text.strip().split("\n\n")
    assert len(others) == 2
    name, _, data = last.partition("\n")
    assert name == "event: error"
    fields: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert (fields["type"], fields["sequence_number"]) == ("error", 2)
    return fields["error"]


@pytest.mark.parametrize(
    ("error", "param"), [(Foreseen("no such token"), "stop"), (ValueError("no such token"), None)]
)
async def test_a_stream_that_is_refused_says_why(error: Exception, param: str | None) -> None:
    response = await post(streaming(error))
    assert response.status_code == 200
    assert last_event(response) == {
        "message": "no such token",
        "type": "BadRequestError",
        "param": param,
        "code": 400,
    }


@pytest.mark.parametrize("error", [OSError("/secret/path"), KeyError("/secret/path")])
async def test_a_stream_that_fails_ends_without_the_servers_secrets(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    response = await post(streaming(error))
    fields = last_event(response)
    assert (fields["code"], fields["type"]) == (500, "InternalServerError")
    assert "secret" not in response.text and "/secret/path" in caplog.text


@pytest.mark.parametrize("error", [OSError("broken"), KeyError("broken")])
async def test_a_stream_of_something_else_gets_no_event(error: Exception) -> None:
    with pytest.raises(type(error)):
        await post(streaming(error, "application/octet-stream"))


async def test_what_the_target_cannot_do_is_a_400() -> None:
    async def route(_request: Request) -> Response:
        body = {"error": {"message": "The model does not support this", "code": 501}}
        return JSONResponse(body, status_code=501, headers={"x-request-id": "7"})

    response = await post(route)
    assert (response.status_code, response.headers["x-request-id"]) == (400, "7")
    assert response.json()["error"] == {
        "message": "The model does not support this",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }


async def test_a_501_of_any_other_shape_is_a_400_too() -> None:
    async def route(_request: Request) -> Response:
        return Response("no", status_code=501)

    response = await post(route)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the target cannot do this"


@pytest.mark.parametrize("status", [200, 404, 500, 503, 507])
async def test_any_other_answer_passes_unchanged(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def route(_request: Request) -> Response:
        return Response("as it is", status_code=status, headers={"x-a": "b"})

    with caplog.at_level(logging.DEBUG, "trimtab"):
        response = await post(route)
    assert (response.status_code, response.text) == (status, "as it is")
    assert response.headers["x-a"] == "b" and not caplog.records
