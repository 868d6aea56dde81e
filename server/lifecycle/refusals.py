"""What a request is told that names a network it cannot have now, and for how long that holds."""

import math
import time
from http import HTTPStatus

from server.api.errors import ApiError
from server.lifecycle.catalog import Catalog
from server.lifecycle.store_listing import STORE_SECONDS

RETRY_SECONDS = 10.0
"""For how long a network that could not be loaded on demand is not tried again."""


class Refusals:
    """Why networks of the store are not loaded on demand.

    One that could not be loaded, or that the store holds in another version, is not read from disk
    again for each request that names it.
    """

    def __init__(self, catalog: Catalog, load_on_demand: bool) -> None:
        """`load_on_demand`: whether requests may load anything at all."""
        self._catalog = catalog
        self._load_on_demand = load_on_demand
        self._errors: dict[str, tuple[float, ApiError]] = {}
        self._stored_versions: dict[str, tuple[float, str]] = {}

    def check(self, name: str, version: str, param: str | None) -> None:
        """Raise `ApiError` if the store's network of that name is not to be loaded now.

        `version` is empty for a request that takes any.
        """
        if name in self._catalog.withheld:
            raise ApiError(
                HTTPStatus.NOT_FOUND, f"value network {name!r}: an operator has unloaded it", param
            )
        if not self._load_on_demand:
            raise ApiError(
                HTTPStatus.NOT_FOUND, f"value network {name!r} is not loaded on this server", param
            )
        now = time.monotonic()
        until, stored = self._stored_versions.get(name, (now, version))
        if version and version != stored and now < until:
            raise other_version(name, version, stored, param)
        until, error = self._errors.get(name, (now, None))
        if error is not None and now < until:
            headers = {"Retry-After": str(math.ceil(until - now))} if error.headers else {}
            raise ApiError(error.status, error.message, param, headers)

    def remember(self, name: str, error: ApiError) -> None:
        """Refuse that network with `error` for a while; shortly, if it names no time to wait."""
        lasting = RETRY_SECONDS if error.headers else STORE_SECONDS
        self._errors[name] = time.monotonic() + lasting, error

    def remember_version(self, name: str, version: str) -> None:
        """Refuse all versions of that network but the one that the store was seen to hold."""
        self._stored_versions[name] = time.monotonic() + RETRY_SECONDS, version

    def forget(self, name: str) -> None:
        """Forget that it could not be loaded: an operator loads it now."""
        self._errors.pop(name, None)


def other_version(name: str, version: str, stored: str, param: str | None = None) -> ApiError:
    """For a request that pins `version` where the store holds another."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"value network {name!r} has no version {version!r}; there is: {stored}",
        param,
    )


def still_loading(name: str) -> ApiError:
    """For a request that has waited as long as requests wait."""
    return _try_again(f"value network {name!r} is still loading; try again", 5)


def cannot_be_loaded(name: str) -> ApiError:
    """For a request whose network failed to load; why is the operator's affair."""
    return _try_again(
        f"value network {name!r} cannot be loaded now; management shows why", int(RETRY_SECONDS)
    )


def _try_again(message: str, seconds: int) -> ApiError:
    headers = {"Retry-After": str(seconds)}
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, headers=headers)
