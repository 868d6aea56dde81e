"""The private copies of networks' folders, in the run directory, that workers load from."""

import logging
from pathlib import Path

from server.lifecycle.catalog import Catalog
from server.lifecycle.staging import Stager, StagingError
from server.run_directory import NETWORKS
from value_models.store import NetworkError

log = logging.getLogger("trimtab")


class Snapshots:
    """The snapshots of one server, which its stagers make."""

    def __init__(self, catalog: Catalog, stager: Stager, run_dir: Path | None) -> None:
        self._catalog = catalog
        self._stager = stager
        self._run_dir = run_dir

    async def discard(self, folder: Path, weights_only: bool) -> None:
        """Delete a snapshot, or its weights; never another folder."""
        if self._run_dir is None or folder.parent != self._run_dir / NETWORKS:
            return
        try:
            await self._stager.discard(folder, weights_only)
        except (StagingError, NetworkError) as error:
            log.warning("the snapshot %s cannot be deleted: %s", folder, error)

    def unused(self) -> list[Path]:
        """Those that no resident network was loaded from."""
        assert self._run_dir is not None
        used = {Path(network.folder) for network in self._catalog}
        return [folder for folder in (self._run_dir / NETWORKS).iterdir() if folder not in used]
