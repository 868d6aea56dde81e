"""Networks of the store that are loaded because a request names them."""

import asyncio
import re
from collections.abc import Collection
from contextlib import suppress
from http import HTTPStatus

from server.api.errors import ApiError
from server.api.metrics import count_load
from server.lifecycle.catalog import Catalog, Load, WorkerError
from server.lifecycle.changes import WATCH_SECONDS, Changes
from server.lifecycle.loader import AlreadyLoading, Loader, is_resident
from server.lifecycle.network_log import log_state
from server.lifecycle.refusals import Refusals, cannot_be_loaded, still_loading
from server.lifecycle.store_listing import StoreListing
from server.lifecycle.tasks import Tasks

ON_DEMAND = "on-demand"
"""What the log has for a request that told no id."""

VERSION_PATTERN = "[0-9a-f]{8}"

BEGIN_TRIES = 5
"""Loads for requests that pin a version end without a word if the store holds another."""


class OnDemand:
    """The loads that requests of one API process wait for."""

    def __init__(
        self,
        catalog: Catalog,
        changes: Changes,
        stored: StoreListing,
        loader: Loader,
        refusals: Refusals,
        tasks: Tasks,
        reserved_names: Collection[str],
        patience: float,
    ) -> None:
        """`reserved_names` are no network's; `patience` is how many seconds a request waits."""
        self._catalog = catalog
        self._changes = changes
        self._stored = stored
        self._loader = loader
        self._refusals = refusals
        self._tasks = tasks
        self._reserved_names = frozenset(reserved_names)
        self._patience = patience
        self._loads: dict[str, asyncio.Task[ApiError | None]] = {}

    async def ensure(self, reference: str, param: str | None, request_id: str | None) -> None:
        """Have the network that a request names ready, if it can be; see `Lifecycle.ensure`."""
        with suppress(WorkerError):  # what was known before still serves
            await self._changes.catch_up()
        name, pinned, version = reference.partition("@")
        if is_resident(name, self._catalog) or name in self._reserved_names:
            return
        if pinned and not re.fullmatch(VERSION_PATTERN, version):
            return
        if not self._is_loading(name):
            if not await self._stored.holds(source_of(name, self._catalog)):
                return
            self._refusals.check(name, version, param)
        task = self._loads.get(reference)
        if task is None:
            bringing = self._bring(name, version or None, request_id or ON_DEMAND)
            task = self._loads[reference] = self._tasks.spawn(bringing)
            task.add_done_callback(lambda _: self._loads.pop(reference))
        await asyncio.wait({task}, timeout=self._patience)
        if not task.done():
            raise still_loading(name)
        error = task.result()
        if error is not None:
            raise ApiError(error.status, error.message, param, error.headers)

    async def _bring(self, name: str, version: str | None, request_id: str) -> ApiError | None:
        """Have a network of that name. Returns why it is not there then, if it is not."""
        for attempt in range(BEGIN_TRIES):
            waited = await self._wait_for_load(name)
            if is_resident(name, self._catalog):
                return None
            if not await self._stored.holds(source_of(name, self._catalog)):
                return None
            try:
                self._refusals.check(name, version or "", None)
            except ApiError as refusal:
                return refusal
            if (waited or attempt) and _failed_load(name, self._catalog) is not None:
                return self._remembered(name, cannot_be_loaded(name))
            try:
                return await self._load(name, version, request_id)
            except AlreadyLoading:
                continue
        return still_loading(name)

    async def _load(self, name: str, version: str | None, request_id: str) -> ApiError | None:
        """Load the network of that name from the store. Returns why it cannot be, if so.

        Raises:
            AlreadyLoading: another load of that name runs, or was faster.
        """
        source = source_of(name, self._catalog)
        if version is not None and source != name:
            # It would be forgotten where the name comes from if the folder held another version.
            return cannot_be_loaded(name)
        try:
            job = await self._loader.begin(name, source, version, request_id, supersede=False)
        except ApiError as refusal:
            count_load("refused", None)
            log_state(name, "refused", reason=refusal.message, request_id=request_id)
            if refusal.status == HTTPStatus.INSUFFICIENT_STORAGE:
                # For a request that takes any version there may be room: others go for it.
                return refusal if version is not None else self._remembered(name, refusal)
            # The reason names folders of the server, which is the operator's affair.
            return self._remembered(name, cannot_be_loaded(name))
        error = await self._loader.carry_out(job)
        if error is None:
            if not is_resident(name, self._catalog):
                raise AlreadyLoading  # it was superseded, or unloaded at once
            return None
        if error.status == HTTPStatus.NOT_FOUND:
            return error  # of no concern to who wants another version
        return self._remembered(name, error)

    def _remembered(self, name: str, error: ApiError) -> ApiError:
        self._refusals.remember(name, error)
        return error

    def _is_loading(self, name: str) -> bool:
        loads = self._catalog.loads.values()
        return any(load.name == name and load.state == "loading" for load in loads)

    async def _wait_for_load(self, name: str) -> bool:
        """Wait until no load of that name runs. Returns whether one did."""
        waited = False
        while self._is_loading(name):
            waited = True
            await asyncio.sleep(WATCH_SECONDS)
            with suppress(WorkerError):  # they may answer the next time; requests wait so long only
                await self._changes.catch_up()
        return waited


def source_of(name: str, catalog: Catalog) -> str:
    """The store's folder from which a network that is not resident is loaded on demand.

    It is the one of that name, but for a network that should have come from another, and did not.
    """
    failed = _failed_load(name, catalog)
    return failed.source if failed is not None and failed.source is not None else name


def _failed_load(name: str, catalog: Catalog) -> Load | None:
    loads = catalog.loads.values()
    return next((load for load in loads if load.name == name and load.state == "failed"), None)
