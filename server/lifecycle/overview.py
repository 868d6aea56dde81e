"""Value networks as management shows them: what is resident, and what the store holds besides."""

from collections.abc import Collection

from server.api.resources import LoadInfo, NetworkInfo, Use, VersionInfo
from server.lifecycle.catalog import Catalog, Load, Network
from server.lifecycle.leases import Leases


def names_of(catalog: Catalog, stored: Collection[str]) -> list[str]:
    """Every name that there is something to say about."""
    resident = {network.name for network in catalog}
    loads = {load.name for load in catalog.loads.values()}
    return sorted(resident | loads | set(stored))


def describe(
    reference: str, catalog: Catalog, leases: Leases, stored: Collection[str]
) -> NetworkInfo | None:
    """Describe `name`, or what there is of `name@version`; None if there is no such thing."""
    name, pinned, version = reference.partition("@")
    versions = catalog.versions(name)
    load = None
    if pinned:
        versions = [network for network in versions if network.version == version]
        if not versions:
            return None
    else:
        load = _load_of(name, catalog)
    if not versions and load is None and name not in stored:
        return None
    newest = versions[0] if versions else None
    ready = next((network for network in versions if network.state == "ready"), None)
    current = newest or load
    return NetworkInfo(
        name=name,
        state=current.state if current is not None else "not_loaded",
        version=ready.version if ready is not None else None,
        reason=(newest.reason if newest else None) or (load.reason if load else None),
        in_store=name in stored,
        withheld=name in catalog.withheld,
        versions=[_version(network, leases) for network in versions],
        load=None if load is None else _load(load),
    )


def _load_of(name: str, catalog: Catalog) -> Load | None:
    loads = [load for load in catalog.loads.values() if load.name == name]
    return max(loads, key=lambda load: (load.state == "loading", load.started_at), default=None)


def _load(load: Load) -> LoadInfo:
    return LoadInfo(
        id=load.id,
        state=load.state,
        source=load.source or load.name,
        reason=load.reason,
        started_at=load.started_at,
    )


def _version(network: Network, leases: Leases) -> VersionInfo:
    return VersionInfo(
        version=network.version,
        state=network.state,
        reason=network.reason,
        source=network.source,
        kind=network.kind,
        scale=network.scale,
        num_parameters=network.num_parameters,
        max_context=network.max_context,
        mapped=network.mapped,
        weights_bytes=network.weights_bytes,
        loaded_at=network.loaded_at,
        load_seconds=network.load_seconds,
        use=Use(
            running_requests=leases.count(str(network)),
            last_used=network.last_used,
            forward_seconds=network.forward_seconds,
            forward_tokens=network.forward_tokens,
            prefix_cache_queries=network.prefix_queries,
            prefix_cache_hits=network.prefix_hits,
            kv_cache_tokens=network.kv_tokens,
        ),
    )
