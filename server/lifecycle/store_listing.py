"""The names that the store holds, as one API process last heard of them."""

import asyncio
import math
import time

from server.lifecycle.staging import Stager, StagingError
from server.lifecycle.tasks import Tasks

STORE_SECONDS = 1.0
"""How old a listing of the store may be."""
STORE_PATIENCE_SECONDS = 2.0
"""How long anyone waits for a listing: a store that hangs must not hold up who mistyped a name."""


class StoreListing:
    """What is in the store; empty for a server that has none.

    Attributes:
        names: as `Stager.list` returned them last.
        error: why `names` may be old; None if the store has answered.
    """

    def __init__(self, stager: Stager, tasks: Tasks, configured: bool) -> None:
        """`configured`: whether the server has a store."""
        self._stager = stager
        self._tasks = tasks
        self._configured = configured
        self.names: list[str] = []
        self.error: str | None = None
        self._listed_at = -math.inf
        self._listing: asyncio.Task[None] | None = None
        self._listing_began = -math.inf

    async def refresh(self) -> None:
        """Learn what the store holds now, unless it takes long to say."""
        if not self._configured:
            return
        asked = time.monotonic()
        deadline = asked + STORE_PATIENCE_SECONDS
        began = -math.inf
        # A listing that was under way may have missed what was published meanwhile.
        while began < asked:
            if self._listing is None or self._listing.done():
                self._listing = self._tasks.spawn(self._list())
                self._listing_began = time.monotonic()
            listing, began = self._listing, self._listing_began
            await asyncio.wait({listing}, timeout=max(0.0, deadline - time.monotonic()))
            if not listing.done():
                self.error = "the store does not answer"
                return

    async def holds(self, name: str) -> bool:
        """Whether the store holds that name; what was published just now included."""
        if name not in self.names or time.monotonic() - self._listed_at > STORE_SECONDS:
            await self.refresh()
        return name in self.names

    async def _list(self) -> None:
        try:
            self.names = await self._stager.list()
            self.error = None
        except StagingError as error:
            self.error = str(error)
        self._listed_at = time.monotonic()
