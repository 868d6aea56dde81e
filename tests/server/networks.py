"""Networks as the workers would report them, without workers."""

from typing import Any

from server.catalog import Catalog


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
        **changes,
    }


class Workers:
    """Workers that answer what a test has them answer."""

    def __init__(self, *reports: list[dict[str, Any]]) -> None:
        self.replies: list[Any] = [{"networks": report} for report in reports]
        self.calls: list[str] = []

    async def call(self, method: str) -> list[Any]:
        self.calls.append(method)
        return self.replies


async def catalog_of(*networks: dict[str, Any]) -> Catalog:
    catalog = Catalog(Workers(list(networks)).call)
    await catalog.attach()
    return catalog
