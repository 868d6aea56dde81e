"""The end of what nobody needs any more: versions that are draining, loads of dead processes."""

from pathlib import Path

from server.lifecycle.catalog import Catalog, Load, Network
from server.lifecycle.leases import CHANGES, Leases
from server.lifecycle.network_log import log_network, log_state
from server.lifecycle.snapshots import Snapshots


class Draining:
    """What is left to be freed in the workers, whichever process has left it."""

    def __init__(self, catalog: Catalog, leases: Leases, snapshots: Snapshots) -> None:
        self._catalog = catalog
        self._leases = leases
        self._snapshots = snapshots

    async def sweep(self) -> None:
        """Free what is draining and nobody needs; end loads whose process has died.

        Raises:
            WorkerError: some worker could not answer.
        """
        if not self._to_unload() and not self._orphans():
            return
        leftovers: list[Path] = []
        async with self._leases.locked(CHANGES):
            if self._leases.epoch != self._leases.seen:
                return  # another process was faster; the next sweep sees what is left
            unloaded, orphans = self._to_unload(), self._orphans()
            if not unloaded and not orphans:
                return
            with self._leases.announcing() as epoch:
                for network in unloaded:
                    # What a failed change has left behind may be draining in some workers only.
                    await self._catalog.change("trimtab_retire", str(network), False)
                    await self._catalog.change("trimtab_unload", str(network))
                for load in orphans:
                    await self._catalog.change(
                        "trimtab_abort", load.id, "the process that loaded it has died", False
                    )
            self._leases.see(epoch)
            leftovers = [Path(network.folder) for network in unloaded]
            if orphans and not any(
                load.state == "loading" for load in self._catalog.loads.values()
            ):
                leftovers += self._snapshots.unused()
        for network in unloaded:
            log_network(network, "gone")
        for load in orphans:
            log_state(load.name, "failed", reason="the process that loaded it has died")
        for folder in leftovers:
            await self._snapshots.discard(folder, weights_only=False)

    def _to_unload(self) -> list[Network]:
        """What is draining, and no living process needs any more."""
        draining = [network for network in self._catalog if network.state == "draining"]
        seen = self._leases.seen
        return [network for network in draining if self._leases.drained(str(network), seen)]

    def _orphans(self) -> list[Load]:
        running = [load for load in self._catalog.loads.values() if load.state == "loading"]
        return [load for load in running if not self._leases.lives(load.owner)]
