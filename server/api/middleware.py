"""What is decided about a request from its headers and raw body, before any route sees it."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, bad_request
from server.api.generation import CURRENT
from server.choice import EXTRA_ARG
from server.lifecycle.leases import Lease

FORM = "application/x-www-form-urlencoded"
LEASES = "trimtab.leases"
"""In a request's ASGI scope: a list of the leases to release when it has been answered."""


@dataclass
class Traffic:
    """What an API process is doing."""

    running: int = 0
    """Requests with a body that are being answered, streams included."""
    closing: bool = False
    """Whether new ones are turned away."""


class RequestGate:
    """Limits a body's size, settles its content type, and closes the routes that cannot guide.

    Once the server is shutting down, it closes them all.

    vLLM's request models allow unknown fields, so any other generation endpoint, today's or a later
    version's, would ignore `value_guidance` and answer with the target alone: here it is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        guided_paths: Iterable[str],
        offers: Callable[[str], bool],
        traffic: Traffic,
        max_body_bytes: int,
    ) -> None:
        """`offers` says whether a model's name is that of a value network."""
        self.app = app
        self.guided_paths = frozenset(guided_paths)
        self.offers = offers
        self.traffic = traffic
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        CURRENT.set(None)  # a request pipelined behind another starts in its context
        leases: list[Lease] = []
        self.traffic.running += 1
        try:
            # Streams are answered, and clients that leave are noticed, within this call.
            await self._pass({**scope, LEASES: leases}, receive, send)
        finally:
            self.traffic.running -= 1
            for lease in leases:
                lease.release()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self.traffic.closing:
                raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down")
            body, disconnect = await self._read(scope, receive)
            if disconnect is None:
                path = scope["path"].removeprefix(scope.get("root_path", ""))
                if path in self.guided_paths:
                    scope = _as_json(scope, body)
                else:
                    self._refuse_guidance(path, body)
        except ApiError as error:
            return await error.response()(scope, receive, send)

        replay: list[Message] = [
            disconnect or {"type": "http.request", "body": body, "more_body": False}
        ]

        async def replayed() -> Message:
            return replay.pop() if replay else await receive()

        await self.app(scope, replayed, send)

    async def _read(self, scope: Scope, receive: Receive) -> tuple[bytes, Message | None]:
        """Return the body, or the message that the client left."""
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > self.max_body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"", message
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(chunks), None

    def _too_large(self) -> ApiError:
        return ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the request's body is larger than the {self.max_body_bytes} bytes that are allowed",
        )

    def _refuse_guidance(self, path: str, body: bytes) -> None:
        guided = ", ".join(sorted(self.guided_paths))
        try:
            fields = json.loads(body)  # as vLLM's routes do, which read other encodings too
        except (ValueError, RecursionError):
            # A form, or something the route itself will refuse.
            if b"value_guidance" in body:
                raise _unguided(path, "carries value_guidance", guided, "value_guidance") from None
            return
        if not isinstance(fields, dict):
            return
        if fields.get("value_guidance") is not None:
            raise _unguided(path, "carries value_guidance", guided, "value_guidance")
        model = fields.get("model")
        if isinstance(model, str) and self.offers(model):
            raise _unguided(path, f"names the value network {model[:80]!r}", guided, "model")
        refuse_reserved(fields.get("vllm_xargs"))


def refuse_reserved(vllm_xargs: Any) -> None:
    """Refuse a request that fills the argument by which a resolved choice travels."""
    if isinstance(vllm_xargs, dict) and EXTRA_ARG in vllm_xargs:
        raise bad_request(
            f'vllm_xargs["{EXTRA_ARG}"] is reserved; choose value networks with `model` or '
            "`value_guidance`",
            "vllm_xargs",
        )


def _unguided(path: str, what: str, guided: str, param: str) -> ApiError:
    return bad_request(
        f"the request {what}, but {path[:80]} cannot be guided by value networks; use {guided}",
        param,
    )


def _as_json(scope: Scope, body: bytes) -> Scope:
    """Insist on a JSON body. `curl -d` calls everything a form: take its word for nothing.

    A web page can send a form to a foreign server without asking it first, and then names itself in
    `Origin`; such a request keeps its content type.
    """
    headers = Headers(scope=scope)
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        _refuse_malformed(body)
        return scope
    mislabelled = media_type == FORM and "origin" not in headers and body.lstrip()[:1] == b"{"
    if not mislabelled:
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the content type is {media_type[:80] or 'not given'}; send application/json",
            "content-type",
        )
    _refuse_malformed(body)
    others = [header for header in scope["headers"] if header[0].lower() != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


def _refuse_malformed(body: bytes) -> None:
    """Refuse what is no JSON, or is nested too deep for the code behind to follow."""
    try:
        from_json(body)
    except ValueError as error:
        raise bad_request(f"the request's body is not usable JSON: {error}") from None
