"""OpenAI's endpoints, as clients of value networks see them.

Each takes over a route of vLLM's, resolves what the request chose, and hands the request, otherwise
untouched, to vLLM's own endpoint.
"""

import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    Field,
    ModelWrapValidatorHandler,
    create_model,
    model_validator,
)

from server.api.combinations import refuse_combinations
from server.api.errors import ApiError, bad_request, shorten
from server.api.explanation import FIELD, Explanation, Spelling, explain_stream
from server.api.generation import CURRENT, GuidedRequest
from server.api.metrics import count_request
from server.api.middleware import LEASES, refuse_reserved
from server.api.reasoning import Reasoning
from server.api.selection import Selection, references, select
from server.api.value_guidance import Guidance, ValueGuidance
from server.choice import EXTRA_ARG, seal
from server.lifecycle.catalog import Catalog
from server.lifecycle.leases import Leases
from server.lifecycle.lifecycle import Lifecycle
from server.settings import STATUS_PATH, Settings, instance_id

GUIDED_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MODELS_PATH = "/v1/models"
NETWORKS_HEADER = "x-value-networks"
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")

Endpoint = Callable[..., Awaitable[Response]]


@dataclass(frozen=True)
class Service:
    """What the routes need to know, once the engine is up."""

    settings: Settings
    catalog: Catalog
    leases: Leases
    lifecycle: Lifecycle
    target: str
    """The name under which the target is served."""
    target_names: tuple[str, ...]
    """All names under which it is served; a network never takes one."""
    failure_token_id: int
    explanations: Path
    """Where records of what guidance did are kept while their requests run."""
    spelling: Spelling
    """Of the target's tokens."""
    reasoning: Reasoning | None
    """The target's, if the server knows how it ends."""


def take_over(app: FastAPI, service: Callable[[], Service]) -> None:
    """Add routes to `app` that replace vLLM's of the same path.

    Raises:
        LookupError: vLLM has no such route.
    """
    routes = {
        (route.path, method): route
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    for path in GUIDED_PATHS:
        original = routes[path, "POST"]
        request_model = original.dependant.body_params[0].field_info.annotation
        assert isinstance(request_model, type) and issubclass(request_model, BaseModel)
        app.add_api_route(
            path,
            _guide(original.endpoint, _with_value_guidance(request_model), service),
            methods=["POST"],
            dependencies=original.dependencies,
            responses=original.responses,
            name=original.name,
            response_model=None,
        )
    app.add_api_route(
        MODELS_PATH,
        _list_models(routes[MODELS_PATH, "GET"].endpoint, service),
        methods=["GET"],
        name="show_available_models",
        response_model=None,
    )
    app.add_api_route(STATUS_PATH, _status(service), methods=["GET"], response_model=None)


def _with_value_guidance(request_model: type[BaseModel]) -> type[BaseModel]:
    """vLLM's request model with the field that it lacks."""
    description = (
        "Value networks that steer this request: a network's name, or several with scales, and "
        "how they are combined. Naming a network as `model` does the same."
    )
    guided: type[BaseModel] = create_model(
        f"Guided{request_model.__name__}",
        __base__=(_Usable, request_model),
        value_guidance=(
            ValueGuidance | None,
            Field(default=None, description=description, examples=["qa"]),
        ),
    )
    # vLLM keeps the names of known fields here, and its model may have filled it already.
    guided.field_names = None  # type: ignore[attr-defined]
    return guided


class _Usable(BaseModel):
    """Refuses what vLLM's own validators, and the transport to its engine, stumble over."""

    @model_validator(mode="wrap")
    @classmethod
    def refuse_unusable(cls, fields: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(fields, dict):
            for name, value in fields.items():
                if isinstance(value, int) and not -(2**63) <= value < 2**63:
                    raise bad_request(f"{shorten(name)}: integers end at 64 bits", name[:80])
        try:
            return validate(fields)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
            raise bad_request(f"a field of the request is of an unusable type: {error}") from error


def _guide(
    original: Endpoint, request_model: type[BaseModel], service: Callable[[], Service]
) -> Endpoint:
    # Unknown fields are allowed, and mean nothing.
    limits = [name for name in OUTPUT_LIMITS if name in request_model.model_fields]
    takes_several_prompts = "prompt" in request_model.model_fields

    async def endpoint(request: Any, raw_request: Request) -> Response:
        here = service()
        refuse_reserved(request.vllm_xargs)
        model = None if request.model in here.target_names else request.model
        selection = await _select(here, model, request.value_guidance, raw_request)
        if not selection.networks:
            return _mention_networks(await original(request, raw_request), here.catalog)

        named_by_model = model is not None and model in here.catalog
        if named_by_model:
            request.model = here.target
        explanation = None
        if selection.active:
            _carry_choice(here, request, selection)
            if selection.guidance.explain:
                explanation = Explanation(
                    here.explanations,
                    here.spelling,
                    selection.active,
                    choice_per_call=takes_several_prompts,
                )
        # vLLM's request model fills in a missing limit: only the request as sent knows.
        sent = await raw_request.json()
        limit_name = next((name for name in limits if sent.get(name) is not None), None)
        guided = GuidedRequest(
            networks=selection.active,
            model=model if named_by_model else None,
            max_tokens=getattr(request, limit_name) if limit_name else None,
            limit_name=limit_name or "max_tokens",
            lease=next(iter(raw_request.scope[LEASES]), None),
            explanation=explanation,
        )
        CURRENT.set(guided)
        return _name_networks(await original(request, raw_request), selection, guided)

    # FastAPI reads the signature: the body's type is known only now.
    endpoint.__annotations__["request"] = request_model
    endpoint.__doc__ = original.__doc__
    return endpoint


async def _select(
    here: Service,
    model: str | None,
    value_guidance: str | Guidance | None,
    raw_request: Request,
) -> Selection:
    """Resolve what a request names, and hold those versions until it has been answered."""
    named = references(model, value_guidance, here.settings.max_networks)
    for reference, field in named:
        await here.lifecycle.ensure(reference, field, raw_request.headers.get("x-request-id"))
    # Nothing is awaited from here on, so that what is resolved is also held.
    selection = select(here.catalog, model, value_guidance)
    if selection.active:
        raw_request.scope[LEASES].append(here.leases.take(map(str, selection.active)))
        for network in selection.active:
            count_request(network.name, network.version)
    return selection


def _carry_choice(here: Service, request: Any, selection: Selection) -> None:
    """Put the choice where it reaches the workers, through vLLM's own fields of a request."""
    refuse_combinations(
        request,
        selection,
        reasons=here.reasoning is not None,
        reads_text=here.settings.token_bytes is not None,
    )
    reasoning_end = here.reasoning.end if here.reasoning else ()
    choice = selection.choice(here.failure_token_id, reasoning_end)
    sealed = seal(choice, here.settings.key)
    request.vllm_xargs = {**(request.vllm_xargs or {}), EXTRA_ARG: sealed}
    request.stop_token_ids = [*(request.stop_token_ids or []), here.failure_token_id]


def _mention_networks(response: Response, catalog: Catalog) -> Response:
    """Add the networks to vLLM's answer that there is no such model: it lists the target only."""
    if response is None or response.status_code != HTTPStatus.NOT_FOUND:
        return response
    fields = json.loads(bytes(response.body))
    if fields.get("error", {}).get("param") != "model":
        return response
    networks = ", ".join(network.name for network in catalog.ready()) or "none"
    fields["error"]["message"] += f" Value networks: {networks}."
    return JSONResponse(fields, status_code=response.status_code)


def _name_networks(response: Response, selection: Selection, guided: GuidedRequest) -> Response:
    """Say in the response which networks steered it, and how, if the client asked."""
    # vLLM's endpoints return None to a client that has left.
    if response is None or response.status_code != HTTPStatus.OK:
        return response
    response.headers[NETWORKS_HEADER] = selection.header
    if isinstance(response, StreamingResponse):
        if guided.explanation is not None:
            response.body_iterator = explain_stream(response.body_iterator, guided.explanation)
        response.body_iterator = _report_loss(response.body_iterator, guided)
        return response
    fields = json.loads(bytes(response.body))
    fields["value_guidance"] = selection.body
    if guided.explanation is not None:
        fields[FIELD] = guided.explanation.take_all()
    named = JSONResponse(fields, background=response.background)
    named.raw_headers.extend(
        header
        for header in response.raw_headers
        if header[0] not in (b"content-length", b"content-type")
    )
    return named


async def _report_loss(events: AsyncIterable[Any], guided: GuidedRequest) -> AsyncIterator[Any]:
    """End a stream that vLLM would drop with an error event.

    vLLM reports a failed generation in chat and completion streams, but its stream of responses
    breaks off on one.
    """
    sent = 0
    try:
        async for event in events:
            sent += 1
            yield event
    except Exception:
        if guided.error is None:
            raise
        failure = guided.error
        if not isinstance(failure, ApiError):
            failure = ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, str(failure))
        fields = {"type": "error", "sequence_number": sent, **failure.body()}
        yield f"event: error\ndata: {json.dumps(fields)}\n\n"


def _list_models(original: Endpoint, service: Callable[[], Service]) -> Endpoint:
    async def endpoint(raw_request: Request) -> Response:
        """List the target, and each value network as a model whose parent is the target."""
        here = service()
        models = json.loads(bytes((await original(raw_request)).body))
        target = next(card for card in models["data"] if card["id"] == here.target)
        models["data"] += [
            {
                **target,
                "id": network.name,
                "root": str(network),
                "parent": here.target,
                "max_model_len": min(target["max_model_len"], network.max_context),
            }
            for network in here.catalog.ready()
        ]
        return JSONResponse(models)

    return endpoint


def _status(service: Callable[[], Service]) -> Endpoint:
    async def endpoint() -> Response:
        """Say which server answers, and the state of its value networks."""
        here = service()
        networks = {str(network): network.state for network in here.catalog}
        return JSONResponse({"instance": instance_id(here.settings.key), "networks": networks})

    return endpoint
