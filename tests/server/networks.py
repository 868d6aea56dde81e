"""Networks as the workers would report them, without workers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from server.lifecycle.catalog import Catalog

MEMORY = {
    "total_bytes": 10_000,
    "weights_bytes": 0,
    "kv_cache_bytes": 0,
    "loading_bytes": 0,
    "free_bytes": 10_000,
}


def status(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "version": "3f2a91c0",
        "state": "ready",
        "reason": None,
        "scale": 1.0,
        "vocab_size": 512,
        "mapped": False,
        "max_context": 64,
        "num_parameters": 1000,
        "kind": "residual",
        "source": name,
        "folder": f"/run/networks/{name}@3f2a91c0-00",
        "order": 0,
        "weights_bytes": 2000,
        "loaded_at": 1.0,
        "load_seconds": 0.5,
        "last_used": None,
        "forward_seconds": 0.0,
        "forward_tokens": 0,
        "prefix_queries": 0,
        "prefix_hits": 0,
        "kv_tokens": 0,
        "drops": 0,
        "rows": 0,
        "pool": {"id": "0", "kv_cache_bytes": 0, "tokens": 1000, "used_tokens": 0},
        **changes,
    }


def report(*networks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """One worker's reply."""
    return {"networks": list(networks), "loads": [], "withheld": [], "memory": MEMORY, **changes}


class Workers:
    """Workers, each of an engine of its own, that answer what a test has them answer."""

    def __init__(self, *reports: list[dict[str, Any]]) -> None:
        self.replies: list[list[Any]] = [[report(*networks)] for networks in reports]
        self.calls: list[str] = []

    async def call(self, method: str, *args: Any) -> list[list[Any]]:
        self.calls.append(method)
        return self.replies


async def catalog_of(*networks: dict[str, Any]) -> Catalog:
    catalog = Catalog(Workers(list(networks)).call)
    await catalog.attach()
    return catalog


class Worker:
    """Behaves as `server.worker.extension` does, with networks that are only names."""

    def __init__(self, *networks: dict[str, Any], total_bytes: int = 10_000) -> None:
        self.networks = {(n["name"], n["version"]): dict(n) for n in networks}
        self.loads: dict[str, dict[str, Any]] = {}
        self.withheld: set[str] = set()
        self.total_bytes = total_bytes
        self.needed: dict[str, int] = {}
        self.slices: dict[str, int] = {}
        self.order = itertools.count(1)
        self.fails_at: str | None = None
        """The method that answers that its load has failed."""
        self.breaks_at: str | None = None
        """The method that cannot answer, the next time that it is called."""
        self.unloaded: list[str] = []

    def call(self, method: str, *args: Any) -> dict[str, Any]:
        if method == self.breaks_at:
            self.breaks_at = None
            return {"error": "RuntimeError: it broke"}
        if method == self.fails_at and args[0] in self.loads:
            self._fail(args[0], "it does not run")
            return {"state": "failed", "reason": "it does not run"}
        name = method.removeprefix("trimtab_")
        reply = self.status() if name == "networks" else getattr(self, name)(*args)
        assert isinstance(reply, dict)
        return reply

    def attach(self) -> dict[str, Any]:
        return self.status()

    def status(self) -> dict[str, Any]:
        return report(
            *(dict(network) for network in self.networks.values()),
            loads=[dict(load) for load in self.loads.values()],
            withheld=sorted(self.withheld),
            memory=MEMORY | {"total_bytes": self.total_bytes, "free_bytes": self._free()},
        )

    def begin(self, load: dict[str, Any]) -> dict[str, Any]:
        running = [i for i, other in self.loads.items() if other["name"] == load["name"]]
        if not load["supersede"] and any(self.loads[i]["state"] == "loading" for i in running):
            return {"refused": "loading"}
        needed = 2 * sum(model["num_parameters"] for model in load["models"])
        free = self._free() + sum(self.needed.get(i, 0) for i in running)
        if needed > free:
            numbers = {"needed": needed, "free": free, "total": self.total_bytes}
            return {"refused": "memory", **numbers, **self.status()}
        for i in running:
            self._end(i)
        self.needed[load["id"]] = needed
        kept = {key: load[key] for key in ("id", "name", "source", "owner")}
        self.loads[load["id"]] = {**kept, "state": "loading", "reason": None, "started_at": 1.0}
        return self.status()

    def build(self, load_id: str, version: str, folder: str, anew: bool) -> dict[str, Any]:
        load = self.loads.get(load_id)
        if load is None or load["state"] != "loading":
            return {"state": "gone", "reason": None}
        self.slices[load_id] = 3
        resident = self.networks.get((load["name"], version))
        held = resident is not None and resident["reason"] is None and not anew
        load["built"] = (version, folder, held)
        return {"state": "ready" if held else "building", "reason": None}

    def advance(self, load_id: str) -> dict[str, Any]:
        return self._slice(load_id, "building", "built")

    def warm_up(self, load_id: str) -> dict[str, Any]:
        return self._slice(load_id, "warming", "prepared")

    def commit(self, load_id: str) -> dict[str, Any]:
        load = self.loads.get(load_id)
        if load is None or load["state"] != "loading":
            return self.status()
        name, (version, folder, held) = load["name"], load["built"]
        network = self.networks.get((name, version))
        if network is None or not held:
            network = status(
                name, version=version, folder=folder, weights_bytes=self.needed[load_id]
            )
        network.update(state="ready", source=load["source"], order=next(self.order))
        self.networks[name, version] = network
        for other in self.networks.values():
            if other["name"] == name and other is not network:
                other["state"] = "draining"
        self.withheld.discard(name)
        self._end(load_id)
        return self.status()

    def abort(self, load_id: str, reason: str, forget: bool) -> dict[str, Any]:
        if load_id in self.loads:
            self._fail(load_id, reason)
            if forget:
                self._end(load_id)
        return self.status()

    def retire(self, reference: str, withhold: bool) -> dict[str, Any]:
        name, pinned, version = reference.partition("@")
        for load_id in [i for i, load in self.loads.items() if load["name"] == name]:
            if not pinned:
                self._end(load_id)
        for key, network in self.networks.items():
            if key[0] == name and (not pinned or key[1] == version):
                network["state"] = "draining"
        if withhold:
            self.withheld.add(name)
        return self.status()

    def unload(self, reference: str) -> dict[str, Any]:
        name, _, version = reference.partition("@")
        if self.networks.get((name, version), {}).get("state") == "draining":
            del self.networks[name, version]
            self.unloaded.append(reference)
        return self.status()

    def _slice(self, load_id: str, doing: str, done: str) -> dict[str, Any]:
        load = self.loads.get(load_id)
        if load is None or load["state"] != "loading":
            return {"state": "gone", "reason": None}
        self.slices[load_id] -= 1
        if self.slices[load_id] > 0:
            return {"state": doing, "reason": None}
        self.slices[load_id] = 3
        return {"state": done, "reason": None}

    def _fail(self, load_id: str, reason: str) -> None:
        self.needed.pop(load_id, None)
        self.loads[load_id].update(state="failed", reason=reason)

    def _end(self, load_id: str) -> None:
        self.needed.pop(load_id, None)
        self.loads.pop(load_id, None)

    def _free(self) -> int:
        held = sum(int(network["weights_bytes"]) for network in self.networks.values())
        return self.total_bytes - held - sum(self.needed.values())


class Engines:
    """Engines of workers, which take calls in the order in which they come."""

    def __init__(self, *engines: list[Worker]) -> None:
        self.engines = engines
        self.calls: list[str] = []
        self.before: Callable[[str], Any] = lambda method: None
        """Called, and waited for, before a method reaches the workers."""

    async def call(self, method: str, *args: Any) -> list[list[Any]]:
        self.calls.append(method)
        waited = self.before(method)
        if waited is not None:
            await waited
        await asyncio.sleep(0)
        return [[worker.call(method, *args) for worker in engine] for engine in self.engines]

    @property
    def workers(self) -> list[Worker]:
        return [worker for engine in self.engines for worker in engine]
