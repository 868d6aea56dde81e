"""What becomes of a request that the handlers behind stumble over.

vLLM turns the errors it foresees into answers. What it does not foresee ends in a 500 that blames
the server for a client's values, or, once a stream has begun, in a connection that breaks off.
"""

import json
import logging
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, bad_request

logger = logging.getLogger("trimtab")

STUMBLES = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError)
"""What code raises that took a value for something else. vLLM itself answers a 400 to `ValueError`
and `TypeError`."""
READERS = ("vllm.entrypoints", "vllm.inputs", "vllm.parser", "vllm.renderers", "vllm.tool_parsers")
"""Packages that read requests; a stumble anywhere else is the server's own fault."""
OWN = ("vllm", "server")


class Unbreakable:
    """Answers where vLLM would break off, or would blame itself for a client's values.

    - A stumble over the request, before anything is sent, is a 400. It is logged with its
      traceback, since that it was the client's values is a conclusion from where it happened.
    - An error within a stream of events is one more event, after which the stream ends properly.
    - A 501, for what the target cannot do, becomes a 400: clients such as OpenAI's send whatever
      got a 5xx again, and again.

    Anything else passes as it is: a fault of the server stays a 500.
    """

    def __init__(self, app: ASGIApp, *, client_errors: tuple[type[Exception], ...]) -> None:
        """`client_errors`: what says within a stream that the request was at fault."""
        self.app = app
        self.client_errors = client_errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        answer = _Answer(send)
        try:
            await self.app(scope, receive, answer.send)
        except ClientDisconnect:
            raise
        except STUMBLES as error:
            if answer.started:
                await self._end_stream(scope, answer, error)
            elif _while_reading(error):
                logger.exception("request_unusable path=%s", scope["path"])
                refusal = bad_request(f"a field of the request is of an unusable value: {error}")
                await refusal.response()(scope, receive, send)
            else:
                raise
        except Exception as error:
            if not answer.started:
                raise
            await self._end_stream(scope, answer, error)

    async def _end_stream(self, scope: Scope, answer: "_Answer", error: Exception) -> None:
        """End a stream of events with `error`, or raise it again where that is not possible."""
        if not answer.is_event_stream or answer.ended:
            raise error
        # Starlette wraps what its handlers could have answered, had nothing been sent.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(cause, self.client_errors):
            logger.warning("stream_refused path=%s reason=%r", scope["path"], str(cause))
            failure = bad_request(str(cause), getattr(cause, "parameter", None))
        else:
            logger.error("stream_failed path=%s", scope["path"], exc_info=cause)
            failure = ApiError(
                HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says why"
            )
        await answer.end_with(failure)


class _Answer:
    """The messages of one response, and how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: Message | None = None
        self._body = b""
        self._events = 0
        self.started = False
        self.ended = False
        self.is_event_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            media_type = Headers(raw=message.get("headers", [])).get("content-type", "")
            self.is_event_stream = media_type.startswith("text/event-stream")
            if message["status"] == HTTPStatus.NOT_IMPLEMENTED:
                self._held = message
                return
        elif message["type"] == "http.response.body":
            self._events += bool(message.get("body"))
            self.ended = not message.get("more_body", False)
            if self._held is not None:
                self._body += message.get("body", b"")
                if self.ended:
                    await self._send_as_bad_request(self._held)
                return
        await self._send(message)

    async def end_with(self, failure: ApiError) -> None:
        """Send a last event, in the shape that streams of responses and of messages share."""
        fields = {"type": "error", "sequence_number": self._events, **failure.body()}
        event = f"event: error\ndata: {json.dumps(fields)}\n\n"
        await self._send({"type": "http.response.body", "body": event.encode()})

    async def _send_as_bad_request(self, start: MutableMapping[str, Any]) -> None:
        try:
            message = json.loads(self._body)["error"]["message"]
        except (LookupError, TypeError, ValueError):
            message = "the target cannot do this"
        body = json.dumps(bad_request(message).body()).encode()
        described = (b"content-length", b"content-type")
        headers = [header for header in start["headers"] if header[0].lower() not in described]
        headers += [
            (b"content-length", str(len(body)).encode()),
            (b"content-type", b"application/json"),
        ]
        await self._send({**start, "status": HTTPStatus.BAD_REQUEST.value, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _while_reading(error: Exception) -> bool:
    """Whether the innermost of vLLM's and trimtab's code that raised was reading a request."""
    innermost = ""
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in OWN:
            innermost = module
        trace = trace.tb_next
    return innermost.startswith(tuple(f"{package}." for package in READERS))
