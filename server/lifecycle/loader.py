"""Loads of value networks, each from the store's folder to the workers' switch to it."""

import logging
import time
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from server.api.errors import ApiError, bad_request
from server.api.metrics import count_load
from server.lifecycle.catalog import Catalog, Network, WorkerError, WorkersRefused
from server.lifecycle.changes import Changes, reporting_workers
from server.lifecycle.eviction import EVICTION_SECONDS, Eviction
from server.lifecycle.leases import BUILDING, Leases
from server.lifecycle.network_log import log_network, log_state
from server.lifecycle.refusals import Refusals, cannot_be_loaded, other_version
from server.lifecycle.rollout import LoadFailed, Rollout, Superseded
from server.lifecycle.snapshots import Snapshots
from server.lifecycle.staging import NetworkFacts, StagedNetwork, Stager, StagingError
from server.lifecycle.state_record import StateRecord
from value_models.store import NetworkError, NoSuchNetwork

log = logging.getLogger("trimtab")

OTHER_FILES_BYTES = 1 << 30
"""What a network's folder may hold besides its weights: a tokenizer, vocabulary maps."""


class AlreadyLoading(Exception):
    """That network is being loaded, or was just now."""


@dataclass(frozen=True)
class Job:
    """One load, from its request to its end."""

    rollout: Rollout
    source: str
    facts: NetworkFacts
    version: str | None
    """The one that a request wants, and no other."""
    request_id: str
    began: float

    @property
    def name(self) -> str:
        return self.rollout.name


class Loader:
    """Carries out the loads that one API process is asked for."""

    def __init__(
        self,
        catalog: Catalog,
        leases: Leases,
        stager: Stager,
        changes: Changes,
        eviction: Eviction,
        snapshots: Snapshots,
        record: StateRecord,
        refusals: Refusals,
        has_store: bool,
    ) -> None:
        """`has_store`: whether there is anything to load from."""
        self._catalog = catalog
        self._leases = leases
        self._stager = stager
        self._changes = changes
        self._eviction = eviction
        self._snapshots = snapshots
        self._record = record
        self._refusals = refusals
        self._has_store = has_store

    async def begin(
        self, name: str, source: str, version: str | None, request_id: str, supersede: bool
    ) -> Job:
        """Check what can be checked without reading weights, and reserve memory.

        Args:
            version: the one that is wanted; None: whichever the folder holds. The folder may not
                hold it, so no other network is unloaded for it.
            supersede: as an operator may, give up a load of that name that runs already.

        Raises:
            ApiError: it is not loaded, and nothing has changed.
            AlreadyLoading: another load of that name runs, and may not be superseded.
        """
        began = time.monotonic()
        facts = await self._inspect(name, source)
        rollout = Rollout(
            self._catalog, name, source, self._leases.owner, facts.model_dump(mode="json")
        )
        job = Job(rollout, source, facts, version, request_id, began)
        deadline: float | None = None
        while True:
            try:
                async with reporting_workers(), self._changes.turn():
                    if not supersede and is_resident(name, self._catalog):
                        raise AlreadyLoading  # another process was faster
                    await rollout.begin(supersede)
            except WorkersRefused as refused:
                shortage = [reply for reply in refused.replies if reply["refused"] == "memory"]
                if not shortage:
                    raise AlreadyLoading from None
                if deadline is None:
                    deadline = time.monotonic() + EVICTION_SECONDS
                if (
                    version is not None
                    or time.monotonic() > deadline
                    or not await self._eviction.make_room(name, shortage)
                ):
                    raise self._eviction.does_not_fit(name, shortage, supersede) from None
                continue
            log_state(name, "loading", source=source, request_id=request_id)
            return job

    async def carry_out(self, job: Job) -> ApiError | None:
        """Load what has begun. Returns why it is not ready, for who asked for it on demand."""
        staged: StagedNetwork | None = None
        try:
            max_bytes = job.facts.num_bytes + OTHER_FILES_BYTES
            staged = await self._stager.stage(job.source, job.name, max_bytes)
            if job.version is not None and staged.version != job.version:
                await self._give_up(job, "another version was wanted", forget=True)
                self._refusals.remember_version(job.name, staged.version)
                return other_version(job.name, job.version, staged.version)
            _refuse_changed(job.facts, staged)
            async with self._leases.locked(BUILDING):
                network = await self._roll_out(job, staged)
        except Superseded:
            await self._give_up(job, "superseded", forget=True)
            log_state(job.name, "superseded", request_id=job.request_id)
            return None
        except Exception as error:
            if not isinstance(error, NetworkError | StagingError | LoadFailed | WorkerError):
                log.exception("value network %s: its load failed", job.name)
            reason = str(error) or type(error).__name__
            await self._give_up(job, reason, forget=False)
            count_load("failed", None)
            log_state(job.name, "failed", reason=reason, request_id=job.request_id)
            return cannot_be_loaded(job.name)
        else:
            seconds = time.monotonic() - job.began
            count_load("ready", seconds)
            log_network(network, "ready", load_seconds=f"{seconds:.2f}", request_id=job.request_id)
            if staged.folder == Path(network.folder):
                await self._snapshots.discard(staged.folder, weights_only=True)
                staged = None
            return None
        finally:
            if staged is not None:
                await self._snapshots.discard(staged.folder, weights_only=False)

    async def _inspect(self, name: str, source: str) -> NetworkFacts:
        if not self._has_store:
            raise ApiError(
                HTTPStatus.CONFLICT,
                "this server has no store to load value networks from; start it with "
                "--value-network-dir DIR",
            )
        try:
            return await self._stager.inspect(source, name)
        except NoSuchNetwork as error:
            raise ApiError(HTTPStatus.NOT_FOUND, str(error), "source") from None
        except NetworkError as error:
            raise bad_request(str(error), "source") from None
        except StagingError as error:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None

    async def _roll_out(self, job: Job, staged: StagedNetwork) -> Network:
        """Build what was staged in all workers, and switch to it."""
        rollout = job.rollout
        async with self._changes.turn():
            if await rollout.build(staged.version, str(staged.folder)):
                return await self._commit(rollout, staged)
        await rollout.prepare()
        async with self._changes.turn():
            return await self._commit(rollout, staged)

    async def _commit(self, rollout: Rollout, staged: StagedNetwork) -> Network:
        replaced = [n for n in self._catalog.versions(staged.name) if n.version == staged.version]
        network = await rollout.commit(staged.version)
        await self._record.write()
        for other in replaced:
            if other.folder != network.folder:
                await self._snapshots.discard(Path(other.folder), weights_only=False)
        return network

    async def _give_up(self, job: Job, reason: str, forget: bool) -> None:
        try:
            async with self._changes.turn():
                await job.rollout.abort(reason, forget)
        except WorkerError as error:
            log.warning("value network %s: a load could not be ended: %s", job.name, error)


def is_resident(name: str, catalog: Catalog) -> bool:
    """Whether new requests may have a version of that name; one that has failed counts too."""
    return any(network.state != "draining" for network in catalog.versions(name))


def _refuse_changed(facts: NetworkFacts, staged: StagedNetwork) -> None:
    """Memory was reserved for what the folder held then. Raises `LoadFailed`."""
    for field in ("models", "max_context", "mapped"):
        if getattr(facts, field) != getattr(staged, field):
            raise LoadFailed("its folder in the store was replaced meanwhile; load it again")
