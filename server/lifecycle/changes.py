"""The turns that the API processes of a server take in changing what the workers hold."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from server.api.errors import ApiError
from server.lifecycle.catalog import Catalog, WorkerError, WorkersRefused
from server.lifecycle.leases import CHANGES, Leases
from server.lifecycle.tasks import Tasks

WATCH_SECONDS = 0.05
"""How soon a process notices what another one changed."""


class Changes:
    """One API process' own changes, and what it learns of those that others make."""

    def __init__(self, catalog: Catalog, leases: Leases, tasks: Tasks) -> None:
        self._catalog = catalog
        self._leases = leases
        self._tasks = tasks
        self._catching_up: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Have this process alone change what the workers hold, knowing what they hold.

        Raises:
            WorkerError: some worker could not answer.
        """
        async with self._leases.locked(CHANGES):
            known = self._leases.epoch == self._leases.seen
            with self._leases.announcing() as epoch:
                if not known:
                    await self._catalog.refresh()
                yield
            self._leases.see(epoch)

    async def catch_up(self) -> None:
        """Learn what others have changed; costs nothing if they have not.

        Raises:
            WorkerError: some worker could not answer.
        """
        while self._leases.outdated:
            if self._catching_up is None or self._catching_up.done():
                self._catching_up = self._tasks.spawn(self._learn())
            await asyncio.shield(self._catching_up)

    async def _learn(self) -> None:
        epoch = self._leases.epoch
        if epoch % 2 == 0:
            await self._catalog.refresh()
            self._leases.see(epoch)


@asynccontextmanager
async def reporting_workers() -> AsyncIterator[None]:
    """Turn workers that cannot answer into an `ApiError` 503; `WorkersRefused` passes."""
    try:
        yield
    except WorkersRefused:
        raise
    except WorkerError as error:
        raise ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE, f"the workers cannot answer: {error}"
        ) from None
