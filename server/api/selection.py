"""What a request chose: `model` and `value_guidance` resolved to networks of a version."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from server.api.errors import ApiError, bad_request, shorten
from server.api.value_guidance import GuidingNetwork, GuidingNetworks
from server.choice import ChosenNetwork
from server.lifecycle.catalog import Catalog, Network, UnknownNetwork


@dataclass(frozen=True)
class Selection:
    """The networks that a request names, in its order."""

    networks: tuple[ChosenNetwork, ...]

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
        return {"networks": networks}


def references(
    model: str | None, value_guidance: str | GuidingNetworks | None, max_networks: int
) -> list[tuple[str, str]]:
    """Return what a request may name networks by, each with the field that does.

    Raises:
        ApiError: 400 for the same network twice, or too many.
    """
    named = [entry.name for entry in _named(value_guidance)]
    _refuse_repetition([name.partition("@")[0] for name in named])
    if len(named) > max_networks:
        raise bad_request(
            f"value_guidance names {len(named)} value networks; at most {max_networks} can steer "
            "one request",
            "value_guidance",
        )
    found = [(name, "value_guidance") for name in named]
    return found if model is None else [*found, (model, "model")]


def select(
    catalog: Catalog,
    model: str | None,
    value_guidance: str | GuidingNetworks | None,
) -> Selection:
    """Resolve what a request names, all of which `references` has passed.

    Raises:
        ApiError: 404 for an unknown network or version, 400 for a `model` that contradicts
            `value_guidance`, 503 for a network that failed.
    """
    named = _named(value_guidance)
    found = [(_find(catalog, entry.name, "value_guidance"), entry.scale) for entry in named]
    if model is not None and model in catalog:
        by_model = _find(catalog, model, "model")
        if value_guidance is None:
            found = [(by_model, None)]
        elif [network for network, _ in found] != [by_model]:
            raise bad_request(
                f"model and value_guidance contradict each other: model names {by_model}, "
                f"value_guidance {', '.join(str(network) for network, _ in found) or 'none'}; "
                "name the network in one of them",
                "value_guidance",
            )
    for network, scale in found:
        if network.state == "failed" and scale != 0:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, failure_message(network))
    return Selection(
        tuple(
            ChosenNetwork(network.name, network.version, network.scale if scale is None else scale)
            for network, scale in found
        )
    )


def _named(value_guidance: str | GuidingNetworks | None) -> list[GuidingNetwork]:
    match value_guidance:
        case None:
            return []
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
                f"value_guidance names the value network {shorten(name)} {names.count(name)} "
                "times; name it once, with the scale you want",
                "value_guidance",
            )


def failure_message(network: Network) -> str:
    return f"value network {network} has failed: {network.reason or 'unknown reason'}"
