"""Work that goes on by itself, and ends at the latest when its process does."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class Tasks:
    """The tasks that one API process has begun for its value networks."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Begin work that nobody needs to wait for."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def to_the_end(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do work that a client who leaves must not cut in two."""
        return await asyncio.shield(self.spawn(work))

    async def close(self) -> None:
        """Cancel what still runs, and wait until it has ended."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
