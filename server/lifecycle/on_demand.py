"""Networks of the store that are loaded because a request names them."""

import asyncio
import re
from collections.abc import Collection
from contextlib import suppress
from http import HTTPStatus

from server.api.errors import ApiError
from server.api.metrics import count_load
from server.lifecycle.catalog import Catalog, WorkerError
from server.lifecycle.changes import WATCH_SECONDS, Changes
from server.lifecycle.loader import AlreadyLoading, Loader, is_resident
from server.lifecycle.network_log import log_state
from server.lifecycle.refusals import Refusals, cannot_be_loaded, still_loading
from server.lifecycle.store_listing import StoreListing
from server.lifecycle.tasks import Tasks

ON_DEMAND = "on-demand"
"""What the log has for a request that told no id."""

VERSION_PATTERN = "[0-9a-f]{8}"


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
        """`reserved_names` are the target's; `patience` is how many seconds a request waits."""
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
        if not await self._stored.holds(name):
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
        """Load the store's network of that name. Returns why it is not there then, if it is not."""
        try:
            job = await self._loader.begin(name, name, version, request_id, supersede=False)
        except AlreadyLoading:
            error = None
        except ApiError as refusal:
            count_load("refused", None)
            log_state(name, "refused", reason=refusal.message, request_id=request_id)
            error = refusal
            if refusal.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND):
                # The reason names folders of the server, which is the operator's affair.
                error = cannot_be_loaded(name)
        else:
            error = await self._loader.carry_out(job)
            if error is not None and error.status == HTTPStatus.NOT_FOUND:
                return error  # of no concern to who wants another version
        if error is None and not is_resident(name, self._catalog):  # another load goes on
            await self._wait_for_load(name)
            if not is_resident(name, self._catalog) and name not in self._catalog.withheld:
                error = cannot_be_loaded(name)
        if error is not None:
            self._refusals.remember(name, error)
        return error

    async def _wait_for_load(self, name: str) -> None:
        while any(
            load.name == name and load.state == "loading" for load in self._catalog.loads.values()
        ):
            await asyncio.sleep(WATCH_SECONDS)
            await self._changes.catch_up()
