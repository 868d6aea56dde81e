"""What a running server writes into its state file."""

import asyncio
import logging
from pathlib import Path

from server.lifecycle.catalog import Catalog
from server.lifecycle.state_file import (
    CorruptStateFile,
    RememberedNetwork,
    State,
    read_state,
    write_state,
)

log = logging.getLogger("trimtab")


class StateRecord:
    """Which networks of the store are resident, and which an operator has unloaded.

    Attributes:
        error: why the state file is not what it should be; None if it is, or there is none.
    """

    def __init__(self, catalog: Catalog, file: Path | None) -> None:
        self._catalog = catalog
        self._file = file
        self.error: str | None = None

    async def write(self) -> None:
        """Write down what the catalog knows; needs the lock `CHANGES`."""
        file = self._file
        if file is None:
            return
        try:
            await asyncio.to_thread(self._update, file)
            self.error = None
        except OSError as error:
            self.error = f"{file} cannot be written: {error}"
            log.warning("the state file %s", self.error)

    def _update(self, file: Path) -> None:
        networks = {
            network.name: RememberedNetwork(
                name=network.name, source=network.source, version=network.version
            )
            for network in reversed(list(self._catalog))
            if network.state != "draining" and network.source is not None
        }
        # What could not be loaded at this start, and may be tried again now, may load at the next.
        loads = {load.name for load in self._catalog.loads.values()}
        try:
            before = read_state(file) or State()
        except CorruptStateFile:
            before = State()
        for network in before.networks:
            if network.name in loads:
                networks.setdefault(network.name, network)
        state = State(
            networks=tuple(networks[name] for name in sorted(networks)),
            withheld=tuple(sorted(self._catalog.withheld)),
        )
        if state != before:
            write_state(file, state)
