"""Room for a network that does not fit: idle ones are unloaded for it, or it is refused."""

import asyncio
import time
from collections.abc import Collection, Iterable
from http import HTTPStatus
from typing import Any

from server.api.errors import ApiError
from server.lifecycle.catalog import Catalog, Network
from server.lifecycle.changes import WATCH_SECONDS, Changes, reporting_workers
from server.lifecycle.draining import Draining
from server.lifecycle.leases import Leases
from server.lifecycle.network_log import log_network
from server.lifecycle.state_record import StateRecord

EVICTION_SECONDS = 5.0
"""How long a load waits for what it has evicted."""


class Eviction:
    """Which resident networks may go for another one.

    A `shortage` is the replies of the workers that lack memory: each has the bytes `needed`,
    `free` and `total`.
    """

    def __init__(
        self,
        catalog: Catalog,
        leases: Leases,
        changes: Changes,
        draining: Draining,
        record: StateRecord,
        enabled: bool,
    ) -> None:
        """`enabled`: whether a load may unload other networks at all."""
        self._catalog = catalog
        self._leases = leases
        self._changes = changes
        self._draining = draining
        self._record = record
        self._enabled = enabled

    async def make_room(self, name: str, shortage: list[dict[str, Any]]) -> bool:
        """Unload idle networks, the least recently used first, until there may be room for `name`.

        Returns False if that would not do, or has not done in `EVICTION_SECONDS`.

        Raises:
            ApiError: 503 some worker could not answer.
        """
        if not self._enabled:
            return False
        missing = max(reply["needed"] - reply["free"] for reply in shortage)
        async with reporting_workers(), self._changes.turn():
            # On demand a network is loaded from the folder of its name, and from no other.
            candidates = [n for n in self._unloadable(name) if n.source == n.name]
            idle = [network for network in candidates if self._is_idle(network)]
            if missing > gain(idle, self._catalog):
                return False
            evicted: list[Network] = []
            while missing > gain(evicted, self._catalog):
                evicted.append(idle[len(evicted)])
                await self._catalog.change("trimtab_retire", str(evicted[-1]), False)
                log_network(evicted[-1], "draining", evicted_for=name)
            await self._record.write()
        deadline = time.monotonic() + EVICTION_SECONDS
        references = {str(network) for network in evicted}
        while references & set(map(str, self._catalog)):
            if time.monotonic() > deadline:
                return False
            async with reporting_workers():
                await self._draining.sweep()
            await asyncio.sleep(WATCH_SECONDS)
        return True

    def does_not_fit(
        self, name: str, shortage: list[dict[str, Any]], for_operator: bool
    ) -> ApiError:
        """Say what is missing for `name`, and to an operator also what could be unloaded."""
        worst = max(shortage, key=lambda reply: int(reply["needed"]) - int(reply["free"]))
        message = (
            f"value network {name!r} needs {worst['needed']:,} bytes, but {worst['free']:,} of the "
            f"{worst['total']:,} bytes for value networks (--value-memory-gb) are free"
        )
        others = [
            f"{network.name} ({gain([network], self._catalog):,} bytes, "
            f"{'idle' if self._is_idle(network) else 'in use'})"
            for network in self._unloadable(name)
        ]
        if others and for_operator:
            message += f"; these could be unloaded: {', '.join(others)}"
        return ApiError(HTTPStatus.INSUFFICIENT_STORAGE, message)

    def _unloadable(self, name: str) -> list[Network]:
        """Networks of the store other than `name`; idle, long unused ones first."""
        networks = [
            network
            for network in self._catalog
            if network.state == "ready" and network.source is not None and network.name != name
        ]
        networks.sort(
            key=lambda n: (not self._is_idle(n), n.last_used or 0.0, n.loaded_at),
        )
        return networks

    def _is_idle(self, network: Network) -> bool:
        return not self._leases.count(str(network))


def gain(networks: Collection[Network], resident: Iterable[Network]) -> int:
    """Return the bytes that unloading `networks` frees: weights, and pools nobody else uses."""
    unloaded = {str(network) for network in networks}
    kept_pools = {n.pool.id for n in resident if str(n) not in unloaded}
    pools = {n.pool.id: n.pool.kv_cache_bytes for n in networks if n.pool.id not in kept_pools}
    return sum(network.weights_bytes for network in networks) + sum(pools.values())
