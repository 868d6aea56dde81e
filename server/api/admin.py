"""Management of value networks over HTTP, and who may use it.

It lies outside `/v1`, whose paths vLLM's own key check guards with the clients' keys: those never
open management.
"""

import hashlib
import hmac
import posixpath
import re
from collections.abc import Callable
from http import HTTPStatus
from ipaddress import ip_address
from typing import Annotated, Any
from uuid import uuid4

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError, bad_request, shorten
from server.api.middleware import FORM
from server.api.resources import NETWORKS_PATH, LoadRequest, NetworkInfo, Overview
from server.api.routes import Service
from server.settings import Settings
from value_models.manifest import NAME_PATTERN

GUARDED = ("admin", "scale_elastic_ep")
"""First parts of the paths that only operators may use: all of management, and the one call of
vLLM's that changes the server and asks for no key."""
MAX_BODY_BYTES = 64 << 10
VERSION_PATTERN = "[0-9a-f]{8}"
REFERENCE_PATTERN = f"{NAME_PATTERN}(@{VERSION_PATTERN})?"

BY_PROXIES = ("forwarded", "via", "x-real-ip")
BY_PROXIES_PREFIXES = ("x-forwarded-", "x-envoy-")
LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")


class AdminGate:
    """Lets only operators through to any path under `/admin`, whether it exists or not.

    With an admin key set, that is who sends it. Without one, it is who sits at this machine: a peer
    on the loopback interface or a Unix socket, and neither a web page nor a proxy, which would
    bring others along. Belongs outside of `RequestGate`, so that nobody else's body is read.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self.app = app
        self._admin_key_digest = settings.admin_key_digest
        self._client_key_digests = settings.client_key_digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not _is_admin(scope):
            return await self.app(scope, receive, send)
        try:
            if self._admin_key_digest is None:
                _require_this_machine(scope)
            else:
                self._require_key(scope, self._admin_key_digest)
        except ApiError as error:
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def _require_key(self, scope: Scope, expected: str) -> None:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").strip().partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise ApiError(
                HTTPStatus.UNAUTHORIZED,
                "management needs the server's admin key: send `Authorization: Bearer KEY`",
                headers={"WWW-Authenticate": 'Bearer realm="trimtab management"'},
            )
        digest = hashlib.sha256(token.strip()).hexdigest()
        is_clients = False
        for client_key_digest in self._client_key_digests:
            is_clients |= hmac.compare_digest(digest, client_key_digest)
        is_operators = hmac.compare_digest(digest, expected)
        if is_clients:
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                "this is a client's key; management has its own, the server's --admin-api-key",
            )
        if not is_operators:
            raise ApiError(HTTPStatus.FORBIDDEN, "this is not the server's admin key")


def _is_admin(scope: Scope) -> bool:
    """Whether a path is one of management's, or could be taken for one by anything on its way.

    What the router matches is `get_route_path`, decoded; that `/admin` in other spellings leads
    nowhere is no reason to answer it differently.
    """
    path = get_route_path(scope).replace("\\", "/").lower()
    # Both, for the router knows no "..": `/admin/..` is management's to it.
    for spelling in (path, posixpath.normpath(path)):
        first = spelling.lstrip("/ \t").partition("/")[0]
        if first.partition(";")[0].strip() in GUARDED:
            return True
    return False


def _require_this_machine(scope: Scope) -> None:
    """Raise `ApiError` unless a request comes straight from this machine."""
    headers = Headers(scope=scope)
    # Browsers say where a request comes from, except for one that a person typed.
    if "origin" in headers or headers.get("sec-fetch-site", "none") != "none":
        raise _key_needed("web pages (the request has an Origin or Sec-Fetch-Site header)")
    for name in headers:
        if name in BY_PROXIES or name.startswith(BY_PROXIES_PREFIXES):
            raise _key_needed(f"requests through a proxy (the request has a header {name[:40]})")
    if "authorization" in headers:
        # A proxy on this machine that hands its clients' keys on, and does not name itself.
        raise _key_needed("requests with a key")
    server = scope.get("server")
    if server is not None and server[1] is None:
        return  # a Unix socket: whoever may open the file
    # A TCP peer that reset its connection has no address any more: that is no reason to trust it.
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        raise _key_needed("requests from other machines")
    # A web page may have its own name resolve to 127.0.0.1, and is then of one origin with this.
    host = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").lower()
    if host not in LOOPBACK_NAMES and not _is_loopback(host):
        raise _key_needed(f"requests under the host name {shorten(host)}; say 127.0.0.1, or")


def _key_needed(whom: str) -> ApiError:
    return ApiError(
        HTTPStatus.FORBIDDEN,
        f"without an admin key, management does not answer {whom}: start the server with "
        "--admin-api-key KEY (or TRIMTAB_ADMIN_API_KEY) and send `Authorization: Bearer KEY`",
    )


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1, on a dual-stack socket
    return (mapped or address).is_loopback


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI's API says it."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    error: ErrorDetail


def _responses(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    descriptions: dict[int | str, str] = {
        HTTPStatus.BAD_REQUEST: "A name, a body or a folder that is not what it has to be",
        HTTPStatus.UNAUTHORIZED: "No admin key was sent",
        HTTPStatus.FORBIDDEN: "Another key was sent; or none is set, and this is no local request",
        HTTPStatus.NOT_FOUND: "There is no such network, version or folder",
        HTTPStatus.CONFLICT: "The name is taken, or the network is in a state that forbids this",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is too large",
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The body is no JSON",
        HTTPStatus.SERVICE_UNAVAILABLE: "The workers or the store cannot be reached now",
        HTTPStatus.INSUFFICIENT_STORAGE: "It does not fit the memory for value networks",
        # Keeps FastAPI from promising a 422 in another form, which is never sent.
        "4XX": "Any other refusal",
    }
    everywhere = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.SERVICE_UNAVAILABLE)
    documented: tuple[int | str, ...] = (*statuses, *everywhere, "4XX")
    return {s: {"model": ErrorBody, "description": descriptions[s]} for s in documented}


Reference = Annotated[
    str,
    Path(
        description="A network's `name`, or one version of it as `name@version`.",
        examples=["qa", "qa@3f2a91c0"],
        json_schema_extra={"pattern": f"^{REFERENCE_PATTERN}$"},
    ),
]
Name = Annotated[
    str,
    Path(
        description="A network's name.",
        examples=["qa"],
        json_schema_extra={"pattern": f"^{NAME_PATTERN}$"},
    ),
]


def attach_admin(app: FastAPI, service: Callable[[], Service]) -> None:
    """Add management's routes to `app`, which `AdminGate` has to guard."""
    # A name with a slash in it is answered as a name, not as a path that leads nowhere.
    one = f"{NETWORKS_PATH}/{{reference:path}}"
    described: dict[str, Any] = {
        "tags": ["management"],
        # For the document alone: the gate has decided already.
        "dependencies": [Depends(HTTPBearer(auto_error=False, scheme_name="AdminKey"))],
    }

    async def list_value_networks() -> Overview:
        """What is in the store and in the workers: versions, states, memory, use."""
        return await service().lifecycle.overview()

    async def describe_value_network(reference: Reference) -> NetworkInfo:
        """One value network."""
        _check_reference(reference)
        return await service().lifecycle.describe(reference)

    async def load_value_network(
        reference: Name, request: Request, response: Response
    ) -> NetworkInfo:
        """Load a value network from the store, or replace it by what is there now.

        What is served goes on until the new version is ready, and requests that were accepted
        before keep the version that they have. Poll the network until its `load` is null.
        """
        if not re.fullmatch(NAME_PATTERN, reference):
            hint = "; a load makes its version, which cannot be chosen" if "@" in reference else ""
            raise bad_request(
                f"{shorten(reference)} is no value network's name: "
                f"names match {NAME_PATTERN}{hint}",
                "reference",
            )
        load = await _read_load_request(request)
        if load.source is not None and not re.fullmatch(NAME_PATTERN, load.source):
            raise bad_request(
                f"{shorten(load.source)} is no folder's name in the store: names match "
                f"{NAME_PATTERN}, and are never paths",
                "source",
            )
        info = await service().lifecycle.load(reference, load.source, _request_id(request))
        if info.load is not None:
            response.status_code = HTTPStatus.ACCEPTED
            root = request.scope.get("root_path", "").rstrip("/")
            response.headers["Location"] = f"{root}{NETWORKS_PATH}/{reference}"
        return info

    async def unload_value_network(
        reference: Reference,
        request: Request,
        from_store: Annotated[
            bool, Query(description="Also delete its folder from the store, for good.")
        ] = False,
    ) -> Response:
        """Stop new requests to a value network at once, and free it when the running ones ended.

        It is not loaded on demand until it is loaded by a `PUT`.
        """
        _check_reference(reference)
        if from_store and "@" in reference:
            raise bad_request(
                "from_store deletes a network's folder, whatever its version: name it without one",
                "reference",
            )
        info = await service().lifecycle.unload(reference, from_store, _request_id(request))
        if info is None:
            return Response(status_code=HTTPStatus.NO_CONTENT)
        return JSONResponse(info.model_dump(mode="json"), status_code=HTTPStatus.ACCEPTED)

    app.add_api_route(
        NETWORKS_PATH,
        list_value_networks,
        methods=["GET"],
        response_model=Overview,
        responses=_responses(),
        **described,
    )
    app.add_api_route(
        one,
        describe_value_network,
        methods=["GET"],
        response_model=NetworkInfo,
        responses=_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND),
        **described,
    )
    location = {"description": "where to poll", "schema": {"type": "string"}}
    app.add_api_route(
        one,
        load_value_network,
        methods=["PUT"],
        response_model=NetworkInfo,
        response_description="It is ready: this very version was resident",
        responses={
            202: {
                "model": NetworkInfo,
                "description": "It is loading",
                "headers": {"Location": location},
            },
            **_responses(
                HTTPStatus.BAD_REQUEST,
                HTTPStatus.NOT_FOUND,
                HTTPStatus.CONFLICT,
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                HTTPStatus.INSUFFICIENT_STORAGE,
            ),
        },
        openapi_extra={
            "requestBody": {
                "required": False,
                "content": {"application/json": {"schema": LoadRequest.model_json_schema()}},
            }
        },
        **described,
    )
    app.add_api_route(
        one,
        unload_value_network,
        methods=["DELETE"],
        status_code=HTTPStatus.ACCEPTED,
        response_model=NetworkInfo,
        response_description="Running requests finish first",
        responses={
            204: {"description": "It is gone already"},
            **_responses(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        },
        **described,
    )


def _check_reference(reference: str) -> None:
    if not re.fullmatch(REFERENCE_PATTERN, reference):
        raise bad_request(
            f"{shorten(reference)} names no value network: "
            f"`name` or `name@version` match {REFERENCE_PATTERN}",
            "reference",
        )


async def _read_load_request(request: Request) -> LoadRequest:
    """Read a body, which may be missing. Raises `ApiError`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the request's body is larger than {MAX_BODY_BYTES} bytes",
            )
    if not body.strip():
        return LoadRequest()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("application/json", FORM, ""):  # `curl -d` calls everything a form
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the content type is {media_type[:80]}; send application/json",
            "content-type",
        )
    try:
        return LoadRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, problem["loc"]))[:80]
        raise bad_request(
            f"the request's body is not as it should be: {field and f'{field}: '}{problem['msg']}; "
            'it is {"source": "<folder in the store>"}, or nothing',
            field or None,
        ) from None


def _request_id(request: Request) -> str:
    """The client's own id for this request, if it is one to put into a log; else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.:-]{1,64}", given, re.ASCII) else uuid4().hex
