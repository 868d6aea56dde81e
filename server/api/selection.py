"""What a request chose: `model` and `value_guidance` resolved to networks of a version."""

import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from server.api.errors import ApiError, bad_request, shorten
from server.api.value_guidance import Guidance, GuidingNetwork
from server.choice import Choice, ChosenNetwork
from server.lifecycle.catalog import Catalog, Network, UnknownNetwork

DYNAMIC_BOUND = 2.0
"""How far a dynamic weight may go where a request does not say: as far as its authors searched."""


@dataclass(frozen=True)
class Selection:
    """The networks that a request names, in its order, and how they are to be combined."""

    networks: tuple[ChosenNetwork, ...]
    guidance: Guidance
    """The rest of what it asks for; its own `networks` have been resolved."""

    @property
    def active(self) -> tuple[ChosenNetwork, ...]:
        """Those that change the logits: a zero scale is exactly unguided."""
        return tuple(network for network in self.networks if network.scale != 0)

    @property
    def header(self) -> str:
        return ", ".join(f"{network};scale={network.scale}" for network in self.networks)

    @property
    def body(self) -> dict[str, Any]:
        """A `value_guidance` that repeats this request exactly, whatever is installed later."""
        networks = [{"name": str(network), "scale": network.scale} for network in self.networks]
        return {"networks": networks, **self.guidance.settings}

    def choice(self, failure_token_id: int, reasoning_end: tuple[int, ...]) -> Choice:
        """What the workers are to do, but for what is known only for each prompt.

        Args:
            reasoning_end: the token ids that end the target's reasoning.
        """
        guidance = self.guidance
        return Choice(
            self.active,
            failure_token_id,
            dynamic=guidance.combine == "dynamic",
            floor=guidance.min_target_prob or 0.0,
            after=reasoning_end if guidance.begin == "after_reasoning" else (),
            until_tokens=guidance.until_tokens,
            until_text=guidance.until_text,
        )


def references(
    model: str | None, value_guidance: str | Guidance | None, max_networks: int
) -> list[tuple[str, str]]:
    """Return what a request may name networks by, each with the field that does.

    Raises:
        ApiError: 400 for the same network twice, or too many.
    """
    named = [entry.name for entry in _named(value_guidance) or []]
    _refuse_repetition([name.partition("@")[0] for name in named])
    if len(named) > max_networks:
        raise bad_request(
            f"value_guidance.networks: these are {len(named)} value networks; at most "
            f"{max_networks} can steer one request",
            "value_guidance.networks",
        )
    found = [(name, "value_guidance") for name in named]
    return found if model is None else [*found, (model, "model")]


def select(
    catalog: Catalog,
    model: str | None,
    value_guidance: str | Guidance | None,
) -> Selection:
    """Resolve what a request names, all of which `references` has passed.

    Raises:
        ApiError: 404 for an unknown network or version; 400 for a `model` that contradicts
            `value_guidance`, for settings of no network, and for networks that cannot be combined
            as asked; 503 for a network that failed.
    """
    guidance = value_guidance if isinstance(value_guidance, Guidance) else Guidance()
    found = _resolve(catalog, model, _named(value_guidance), value_guidance is not None)
    for network, scale in found:
        if network.state == "failed" and scale != 0:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, failure_message(network))
    dynamic = guidance.combine == "dynamic"
    if dynamic:
        _refuse_static([network for network, scale in found if scale != 0])
    chosen = tuple(
        ChosenNetwork(
            network.name,
            network.version,
            _default_scale(network, dynamic) if scale is None else scale,
        )
        for network, scale in found
    )
    selection = Selection(chosen, guidance)
    if guidance.explain and not selection.active:
        raise bad_request(
            "value_guidance.explain: no value network steers this request, so that there is "
            "nothing to explain; name one with a scale other than 0, or leave out explain",
            "value_guidance.explain",
        )
    return selection


def _resolve(
    catalog: Catalog, model: str | None, named: list[GuidingNetwork] | None, has_guidance: bool
) -> list[tuple[Network, float | None]]:
    """Return the networks that `model` and `value_guidance` name, and the scales they give."""
    found = [(_find(catalog, entry.name, "value_guidance"), entry.scale) for entry in named or []]
    if model is None or model not in catalog:
        if has_guidance and named is None:
            raise bad_request(
                "value_guidance.networks: value_guidance names no value network, and neither does "
                "model; name them here, or one as model",
                "value_guidance.networks",
            )
        return found
    by_model = _find(catalog, model, "model")
    if named is None:
        return [(by_model, None)]
    if [network for network, _ in found] != [by_model]:
        raise bad_request(
            f"model and value_guidance contradict each other: model names {by_model}, "
            f"value_guidance {', '.join(str(network) for network, _ in found) or 'none'}; "
            "name the network in one of them",
            "value_guidance",
        )
    return found


def _default_scale(network: Network, dynamic: bool) -> float:
    return math.copysign(DYNAMIC_BOUND, network.scale) if dynamic else network.scale


def _named(value_guidance: str | Guidance | None) -> list[GuidingNetwork] | None:
    """The networks that `value_guidance` names; None: it leaves that to `model`."""
    match value_guidance:
        case None:
            return None
        case str():
            return [GuidingNetwork(name=value_guidance)]
        case _:
            return value_guidance.networks


def _find(catalog: Catalog, reference: str, param: str) -> Network:
    try:
        return catalog.find(reference)
    except UnknownNetwork as error:
        raise ApiError(HTTPStatus.NOT_FOUND, f"{param}: {error}", param) from None


def _refuse_repetition(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise bad_request(
                f"value_guidance.networks: the value network {shorten(name)} is named "
                f"{names.count(name)} times; name it once, with the scale you want",
                "value_guidance.networks",
            )


def _refuse_static(networks: list[Network]) -> None:
    """Refuse networks of which nobody can tell how far they moved from their base."""
    static = [network for network in networks if not network.dynamic]
    if static:
        names = ", ".join(map(str, static))
        raise bad_request(
            f'value_guidance.combine: "dynamic" needs networks that know their base, and {names} '
            'does not; leave out combine, or use a pair (made with "trimtab pair") or a network '
            'that was trained with "trimtab train --reference"',
            "value_guidance.combine",
        )


def failure_message(network: Network) -> str:
    return f"value network {network} has failed: {network.reason or 'unknown reason'}"
