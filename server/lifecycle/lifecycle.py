"""How value networks come and go while a server runs.

Each API process has a `Lifecycle`, and any of them may be asked. What the workers hold is the
truth; the processes only take turns in changing it (`server.lifecycle.leases`), so that each change
is whole, and known to all before anything is taken away.
"""

import asyncio
import logging
import re
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from typing import Any

from server.api.errors import ApiError, bad_request, shorten
from server.api.metrics import count_load
from server.api.resources import (
    MemoryInfo,
    NetworkInfo,
    Overview,
    StateFileInfo,
    StoreInfo,
)
from server.lifecycle import overview
from server.lifecycle.catalog import Catalog
from server.lifecycle.changes import WATCH_SECONDS, Changes, reporting_workers
from server.lifecycle.draining import Draining
from server.lifecycle.eviction import Eviction
from server.lifecycle.leases import CHANGES, Leases
from server.lifecycle.loader import Loader
from server.lifecycle.network_log import log_network, log_state
from server.lifecycle.on_demand import OnDemand, source_of
from server.lifecycle.refusals import Refusals
from server.lifecycle.snapshots import Snapshots
from server.lifecycle.staging import Stager, StagingError
from server.lifecycle.state_record import StateRecord
from server.lifecycle.store_listing import StoreListing
from server.lifecycle.tasks import Tasks
from server.settings import Settings
from value_models.manifest import NAME_PATTERN
from value_models.store import NetworkError, NoSuchNetwork

log = logging.getLogger("trimtab")


class Lifecycle:
    """Loads, unloads and describes value networks, for one API process."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        leases: Leases,
        stager: Stager,
        reserved_names: Collection[str],
    ) -> None:
        """`reserved_names` are the target's and its LoRA adapters': no network takes one."""
        has_store = settings.store is not None
        self._settings = settings
        self._catalog = catalog
        self._leases = leases
        self._stager = stager
        self._reserved_names = frozenset(reserved_names)
        self._tasks = Tasks()
        self._stored = StoreListing(stager, self._tasks, has_store)
        self._record = StateRecord(catalog, settings.state_file)
        self._snapshots = Snapshots(catalog, stager, settings.run_dir)
        self._changes = Changes(catalog, leases, self._tasks)
        self._draining = Draining(catalog, leases, self._snapshots)
        self._refusals = Refusals(catalog, settings.load_on_demand)
        eviction = Eviction(
            catalog, leases, self._changes, self._draining, self._record, settings.evict_idle
        )
        self._loader = Loader(
            catalog,
            leases,
            stager,
            self._changes,
            eviction,
            self._snapshots,
            self._record,
            self._refusals,
            has_store,
        )
        self._on_demand = OnDemand(
            catalog,
            self._changes,
            self._stored,
            self._loader,
            self._refusals,
            self._tasks,
            self._reserved_names,
            settings.load_timeout,
        )

    async def start(self) -> None:
        """Have the workers guide requests, and begin to watch.

        Raises:
            WorkerError: some worker cannot.
        """
        async with self._leases.locked(CHANGES):
            first = not self._leases.epoch
            with self._leases.announcing() as epoch:
                await self._catalog.attach()
                if first:
                    await self._record.write()
            self._leases.see(epoch)
        if first:
            self._tasks.spawn(self._finish_start())
        self._tasks.spawn(self._stored.refresh())
        self._tasks.spawn(self._watch())

    async def _finish_start(self) -> None:
        networks = list(self._catalog)
        for network in networks:
            log_network(network, network.state)
        for network in networks:
            await self._snapshots.discard(Path(network.folder), weights_only=True)

    async def _watch(self) -> None:
        """Follow what other processes change, and finish what is draining."""
        failing = False
        while True:
            try:
                self._leases.announce_for_the_dead()
                await self._changes.catch_up()
                await self._draining.sweep()
                failing = False
            except Exception as error:
                if not failing:
                    log.warning("value networks cannot be watched: %s", error)
                failing = True
            await asyncio.sleep(WATCH_SECONDS if not failing else 20 * WATCH_SECONDS)

    async def close(self) -> None:
        """Stop watching; loads that have begun are left to whoever finds this process gone."""
        await self._tasks.close()
        self._leases.close()

    async def worker_status(self) -> list[list[dict[str, Any]]]:
        """Ask what each worker holds: `[engine][worker]`, as the workers say it.

        Raises:
            WorkerError: some worker could not answer.
        """
        statuses = await self._catalog.refresh()
        return [[worker.model_dump() for worker in engine] for engine in statuses]

    async def overview(self) -> Overview:
        """Describe all networks. Raises `ApiError` 503."""
        await self._look()
        memory = self._catalog.memory
        assert memory is not None
        infos = [self._info(name) for name in overview.names_of(self._catalog, self._stored.names)]
        file = self._settings.state_file
        path = None if file is None else str(file)
        return Overview(
            data=[info for info in infos if info is not None],
            memory=MemoryInfo.model_validate(memory.model_dump()),
            store=StoreInfo(configured=self._settings.store is not None, error=self._stored.error),
            state_file=StateFileInfo(path=path, error=self._record.error),
        )

    async def describe(self, reference: str) -> NetworkInfo:
        """Describe `name` or `name@version`. Raises `ApiError` 404, 503."""
        await self._look()
        info = self._info(reference)
        if info is None:
            raise self._not_found(reference)
        return info

    async def load(self, name: str, source: str | None, request_id: str) -> NetworkInfo:
        """Begin to load the store's folder `source`, by default `name`, under `name`.

        What goes by that name now goes on until the new version is ready. A load of that name that
        runs already is given up.

        Raises:
            ApiError: 400 what is in the folder is no network for this target, 404 there is no such
                folder, 409 there is no store or the name is reserved, 503 store or workers
                cannot be reached, 507 it does not fit.
        """
        return await self._tasks.to_the_end(self._load(name, source or name, request_id))

    async def unload(self, reference: str, remove: bool, request_id: str) -> NetworkInfo | None:
        """Accept no new requests for `name` or `name@version`, and free it when none runs.

        `remove` deletes its folder from the store first. Returns None if it is gone already.

        Raises:
            ApiError: 404 there is none, 409 it cannot be deleted from the store, 503.
        """
        return await self._tasks.to_the_end(self._unload(reference, remove, request_id))

    def offers(self, reference: str) -> bool:
        """Whether a request may name this network, as far as is known without asking anyone."""
        name = reference.partition("@")[0]
        if not self._reserved_names.isdisjoint((reference, name)):
            return False
        return reference in self._catalog or (
            self._settings.load_on_demand and source_of(name, self._catalog) in self._stored.names
        )

    async def ensure(
        self, reference: str, param: str | None = None, request_id: str | None = None
    ) -> None:
        """Have the network that a request names ready, if it can be; needed before it is resolved.

        A network that is in the store only is loaded for it, once for all requests that wait. A
        load that runs already is waited for, whoever began it.
        Returns without a word where there is no such network.

        Raises:
            ApiError: 404 an operator unloaded it, or the store holds another version; 503 it takes
                longer than requests wait, or cannot be loaded; 507 it does not fit.
        """
        await self._on_demand.ensure(reference, param, request_id)

    async def _load(self, name: str, source: str, request_id: str) -> NetworkInfo:
        self._check_names(name, source)
        self._refusals.forget(name)
        try:
            job = await self._loader.begin(name, source, None, request_id, supersede=True)
        except ApiError:
            count_load("refused", None)
            raise
        self._tasks.spawn(self._loader.carry_out(job))
        info = self._info(name)
        assert info is not None  # its load is known
        return info

    async def _unload(self, reference: str, remove: bool, request_id: str) -> NetworkInfo | None:
        name, pinned, _ = reference.partition("@")
        await self._stored.refresh()
        removed = remove and await self._remove(name)
        async with reporting_workers():
            async with self._changes.turn():
                if self._info(reference) is None and not removed:
                    raise self._not_found(reference)
                versions = self._catalog.versions(name)
                others = [n for n in versions if pinned and str(n) != reference]
                last = all(network.state == "draining" for network in others)
                # A network that is published anew after it was removed may be loaded on demand.
                withhold = last and (not remove or name in self._stored.names)
                await self._catalog.change("trimtab_retire", reference, withhold)
                await self._record.write()
            log_state(name, "draining", reference=reference, removed=remove, request_id=request_id)
            await self._draining.sweep()
        if any(reference in (network.name, str(network)) for network in self._catalog):
            return self._info(reference)
        return None

    async def _remove(self, name: str) -> bool:
        """Delete the folder that `name` comes from; what is resident needs it no more.

        Returns False if there is no such network.
        """
        await self._look()
        if self._info(name) is None:
            return False
        sources = [n.source for n in self._catalog.versions(name) if n.state != "draining"]
        source = next((source for source in sources if source is not None), name)
        try:
            await self._stager.remove(source)
        except NoSuchNetwork as error:
            raise ApiError(HTTPStatus.NOT_FOUND, str(error)) from None
        except NetworkError as error:
            raise ApiError(HTTPStatus.CONFLICT, str(error)) from None
        except StagingError as error:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None
        await self._stored.refresh()
        return True

    async def _look(self) -> None:
        """Learn what there is between two changes: what is shown as ready is also remembered."""
        await self._stored.refresh()
        async with reporting_workers(), self._leases.locked(CHANGES):
            await self._catalog.refresh()

    def _info(self, reference: str) -> NetworkInfo | None:
        return overview.describe(reference, self._catalog, self._leases, self._stored.names)

    def _check_names(self, name: str, source: str) -> None:
        for given, param in ((name, "name"), (source, "source")):
            if not re.fullmatch(NAME_PATTERN, given):
                raise bad_request(
                    f"{param} {shorten(given)} is no name of a value network, which matches "
                    f"{NAME_PATTERN}; a source is a folder's name in the store, never a path",
                    param,
                )
        if name in self._reserved_names:
            raise ApiError(
                HTTPStatus.CONFLICT,
                f"{name!r} is the target's own name or a LoRA adapter's; choose another",
                "name",
            )

    def _not_found(self, reference: str) -> ApiError:
        known = ", ".join(overview.names_of(self._catalog, self._stored.names)) or "none"
        return ApiError(
            HTTPStatus.NOT_FOUND,
            f"there is no value network {shorten(reference)}; there is: {known}",
        )
