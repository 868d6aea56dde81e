"""One load of a value network: on all workers of all engines, or on none.

The workers build a network in short slices between their steps. Only when it is whole in every
worker do they switch to it, each by one assignment between two steps.
"""

import logging
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from server.lifecycle.catalog import Catalog, Network, WorkerError

log = logging.getLogger("trimtab")


class LoadFailed(Exception):
    """The workers could not load a network; none of them has it."""


class Superseded(Exception):
    """A later load of the same name, or its unloading, has ended this one."""


@dataclass
class Rollout:
    """A load that has begun, or is about to."""

    catalog: Catalog
    name: str
    source: str | None
    owner: str
    facts: dict[str, Any]
    """What the workers need to reserve memory; see `trimtab_begin`."""
    id: str = field(default_factory=lambda: token_hex(8))

    async def begin(self, supersede: bool) -> None:
        """Reserve memory everywhere; needs the lock.

        Raises:
            WorkersRefused: it does not fit, or another load of that name runs.
            WorkerError: a worker could not answer.
        """
        load = {
            **self.facts,
            "id": self.id,
            "name": self.name,
            "source": self.source,
            "owner": self.owner,
            "supersede": supersede,
        }
        try:
            await self.catalog.change("trimtab_begin", load)
        except WorkerError:
            await self.abort("not all workers could begin", forget=True)
            raise

    async def build(self, version: str, folder: str) -> bool:
        """Have the workers read `folder`. Returns whether they hold that version already, and only
        have to switch; needs the lock, under which that stays so.

        A version that has failed in some workers only is built in all of them: warming up is work
        that they do together.

        Raises:
            LoadFailed, Superseded, WorkerError: it goes no further, on any worker.
        """
        states = await self._states("trimtab_build", version, folder, False)
        if len(set(states)) > 1:
            states = await self._states("trimtab_build", version, folder, True)
        return set(states) == {"ready"}

    async def prepare(self) -> None:
        """Build and try the network, a short slice between two steps at a time. Raises as `build`.

        Each slice is asked for when all workers have done the one before.
        """
        while await self._step("trimtab_advance") != "built":
            pass
        while await self._step("trimtab_warm_up") != "prepared":
            pass

    async def commit(self, version: str) -> Network:
        """Switch to the version; needs the lock.

        Raises:
            LoadFailed: not all workers did; they all hold what they held before.
            Superseded: there is nothing to switch to any more.
        """
        if self.id not in self.catalog.loads:
            raise Superseded
        before = [n for n in self.catalog.versions(self.name) if n.state == "ready"]
        problem = ""
        try:
            await self.catalog.change("trimtab_commit", self.id)
        except WorkerError as error:
            problem = f" ({error})"
        try:
            if not problem:
                # What is not ready in all workers is not ready here.
                network = self.catalog.resident(f"{self.name}@{version}")
                if network.state == "ready" and self.id not in self.catalog.loads:
                    return network
        except LookupError:
            pass
        await self._roll_back(version, before)
        raise LoadFailed(f"not all workers switched to it{problem}")

    async def abort(self, reason: str, forget: bool) -> None:
        """Free what the load has taken; it is kept as a failed one, unless it is to be forgotten.

        Needs the lock. A worker that cannot answer is left alone.
        """
        try:
            await self.catalog.change("trimtab_abort", self.id, reason, forget)
        except WorkerError as error:
            log.warning("value network %s: a load could not be ended: %s", self.name, error)

    async def _roll_back(self, version: str, before: list[Network]) -> None:
        """Have every worker mean by the name what it meant before."""
        try:
            if version not in (network.version for network in before):
                await self.catalog.change("trimtab_retire", f"{self.name}@{version}", False)
            for network in reversed(before):
                # It is resident everywhere, so this load takes no memory.
                facts = {**self.facts, "models": []}
                again = Rollout(self.catalog, self.name, network.source, self.owner, facts)
                await again.begin(supersede=True)
                await again._states("trimtab_build", network.version, network.folder, False)
                await self.catalog.change("trimtab_commit", again.id)
        except (WorkerError, LoadFailed, Superseded) as error:
            log.error("value network %s: a switch could not be undone: %s", self.name, error)

    async def _step(self, method: str) -> str:
        """Call all workers. Returns the state that the last of them is in."""
        states = await self._states(method)
        return next((state for state in UNFINISHED if state in states), states[0])

    async def _states(self, method: str, *args: Any) -> list[str]:
        """Call all workers. Returns the state that each is in. Raises as `build`."""
        replies = await self.catalog.ask(method, self.id, *args)
        states = [str(reply["state"]) for reply in replies]
        if "failed" in states:
            reply = replies[states.index("failed")]
            raise LoadFailed(reply["reason"] or "a worker could not load it")
        if "gone" in states:
            raise Superseded
        return states


UNFINISHED = ("building", "warming")
