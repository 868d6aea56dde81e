"""Whoever manages a server's value networks, and waits for each change to be complete."""

import time
from typing import Any

import httpx

PATH = "/admin/value_networks"


class LoadFailed(Exception):
    """The server could not load a network; the message says why."""


class Operator:
    """Management over HTTP."""

    def __init__(self, client: httpx.Client, poll_seconds: float = 0.02) -> None:
        self._client = client
        self._poll_seconds = poll_seconds

    def overview(self) -> Any:
        return self._get("")

    def describe(self, reference: str) -> Any:
        """Return the network's information; None if the server knows no such network."""
        response = self._client.get(f"{PATH}/{reference}")
        return None if response.status_code == httpx.codes.NOT_FOUND else _json(response)

    def resident(self) -> dict[str, list[str]]:
        """name -> versions in the workers, whatever their state."""
        networks = self.overview()["data"]
        versions = {n["name"]: [v["version"] for v in n["versions"]] for n in networks}
        return {name: found for name, found in versions.items() if found}

    def put(self, name: str, source: str | None = None) -> httpx.Response:
        return self._client.put(f"{PATH}/{name}", json={} if source is None else {"source": source})

    def delete(self, reference: str, **params: Any) -> httpx.Response:
        return self._client.delete(f"{PATH}/{reference}", params=params)

    def load(self, name: str, source: str | None = None) -> Any:
        """Load or replace; what was replaced may still be draining at the end.

        Raises:
            LoadFailed: it could not be loaded.
            httpx.HTTPStatusError: it was refused.
        """
        info = _json(self.put(name, source))
        while info["load"] is not None and info["load"]["state"] == "loading":
            time.sleep(self._poll_seconds)
            info = self._get(f"/{name}")
        if info["load"] is not None:
            raise LoadFailed(info["load"]["reason"])
        assert info["versions"][0]["source"] == (source or name), info
        return info

    def swap(self, name: str, source: str | None = None) -> Any:
        """Load or replace, until nothing else of that name is left."""
        info = self.load(name, source)
        while len(info["versions"]) > 1:
            time.sleep(self._poll_seconds)
            info = self._get(f"/{name}")
        return info

    def unload(self, reference: str) -> None:
        """Unload, until it is gone."""
        self.delete(reference).raise_for_status()
        while (info := self.describe(reference)) is not None and info["versions"]:
            time.sleep(self._poll_seconds)

    def _get(self, path: str) -> Any:
        return _json(self._client.get(f"{PATH}{path}"))


def _json(response: httpx.Response) -> Any:
    return response.raise_for_status().json()
