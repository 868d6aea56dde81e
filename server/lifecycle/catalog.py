"""The value networks that a server knows: names, versions and states.

The worker is the truth for what is resident; a catalog is what one API process last heard of it.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

AGREEMENT_TRIES = 5
AGREEMENT_SECONDS = 0.02
"""Engines answer for themselves: while another process changes something they may differ."""


class CallWorkers(Protocol):
    """Calls a method of the worker extension in every worker."""

    async def __call__(self, method: str, *args: Any) -> list[list[Any]]:
        """Return the replies, `[engine][worker]`."""


class Pool(BaseModel):
    """KV cache in a worker; networks of one KV shape share it."""

    model_config = ConfigDict(frozen=True)

    id: str
    kv_cache_bytes: int
    tokens: int
    used_tokens: int


class Network(BaseModel):
    """One version of a value network as the workers report it."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    state: Literal["ready", "draining", "failed"]
    """Draining: for the requests that were accepted with it, and for no others."""
    reason: str | None
    """Why it failed."""
    scale: float
    """The factor on its logits where a request names none."""
    vocab_size: int
    """Its own token ids are below this."""
    mapped: bool
    """Whether it has another vocabulary than the target, and reads through a map."""
    dynamic: bool = False
    """Whether it knows its base, so that its weight can be solved for at every step."""
    max_context: int
    """The longest sequence it reads, prompt and output together, in tokens of its own."""
    num_parameters: int
    kind: str
    source: str | None
    """Its folder in the store; None: given by a flag."""
    folder: str
    """The snapshot that it was loaded from, without the weights."""
    order: int
    """Larger is newer."""
    weights_bytes: int
    loaded_at: float
    load_seconds: float
    last_used: float | None
    forward_seconds: float
    forward_tokens: int
    prefix_queries: int
    prefix_hits: int
    kv_tokens: int
    drops: int
    rows: int
    """Rows of the running batch that it guides."""
    pool: Pool

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Load(BaseModel):
    """A load that runs, or the latest one of its name if that failed."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    source: str | None
    owner: str
    """The API process that carries it out; see `server.lifecycle.leases`."""
    state: Literal["loading", "failed"]
    reason: str | None
    started_at: float


class Memory(BaseModel):
    """The budget of all value networks in one worker, in bytes."""

    model_config = ConfigDict(frozen=True)

    total_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    loading_bytes: int
    free_bytes: int


class WorkerStatus(BaseModel):
    """What one worker holds."""

    model_config = ConfigDict(frozen=True)

    networks: list[Network]
    loads: list[Load]
    withheld: list[str]
    memory: Memory


Statuses = list[list[WorkerStatus]]
"""Those of all workers, `[engine][worker]`; the workers of one engine split each network."""


class UnknownNetwork(LookupError):
    """No network, or no version of one, goes by that name."""


class WorkerError(RuntimeError):
    """The workers could not answer, or do not agree."""


class WorkersRefused(WorkerError):
    """A worker declined what it was asked for; `replies` are those of the workers that did."""

    def __init__(self, replies: list[dict[str, Any]]) -> None:
        super().__init__(f"refused: {replies[0]['refused']}")
        self.replies = replies


class Catalog:
    """Value networks by name and version, as of the last answer from the workers.

    Attributes:
        loads: those that run, and the failed ones, by id.
        withheld: names that an operator unloaded.
        memory: of the worker with the least left; None before the first answer.
    """

    def __init__(self, call_workers: CallWorkers) -> None:
        self._call_workers = call_workers
        self._networks: dict[str, Network] = {}
        self.loads: dict[str, Load] = {}
        self.withheld: frozenset[str] = frozenset()
        self.memory: Memory | None = None
        self._calls = 0
        self._learnt_call = 0
        self._listeners: list[Callable[[], None]] = []

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have `listener` called whenever something was learnt."""
        self._listeners.append(listener)

    async def attach(self) -> None:
        """Have every worker make its networks ready, and learn which there are.

        Raises:
            WorkerError: some worker could not.
        """
        await self._learn_from("trimtab_attach")

    async def refresh(self) -> Statuses:
        """Learn the workers' state anew, and return it. Raises `WorkerError`."""
        return await self._learn_from("trimtab_networks")

    async def change(self, method: str, *args: Any) -> Statuses:
        """Call a method that changes what workers hold and replies with their state: learn it.

        Raises:
            WorkersRefused: some worker declined.
            WorkerError: some worker could not.
        """
        call, replies = await self._ask(method, *args)
        refused = [reply for engine in replies for reply in engine if "refused" in reply]
        if refused:
            raise WorkersRefused(refused)
        statuses = _statuses(method, replies)
        self._learn(call, statuses)
        return statuses

    async def ask(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a method with a reply of its own.

        Raises:
            WorkerError: some worker could not answer.
        """
        _, replies = await self._ask(method, *args)
        return [reply for engine in replies for reply in engine]

    def __iter__(self) -> Iterator[Network]:
        """Every version, the newest of each name first."""
        return iter(self._networks.values())

    def __contains__(self, reference: str) -> bool:
        """Whether `reference`, `name` or `name@version`, names a network of any version."""
        name = reference.partition("@")[0]
        return any(network.name == name for network in self)

    def ready(self) -> list[Network]:
        """What each name means."""
        newest: dict[str, Network] = {}
        for network in self:
            if network.state == "ready":
                newest.setdefault(network.name, network)
        return list(newest.values())

    def versions(self, name: str) -> list[Network]:
        """The resident versions of `name`, the newest first."""
        return [network for network in self if network.name == name]

    def find(self, reference: str) -> Network:
        """Return what `name` or `name@version` means to a new request.

        A name means its newest ready version; if it has none, the newest failed one.

        Raises:
            UnknownNetwork: there is none, or it is draining.
        """
        name, pinned, version = reference.partition("@")
        versions = [network for network in self.versions(name) if network.state != "draining"]
        versions.sort(key=lambda network: network.state != "ready")  # stable: newest first
        if not versions:
            known = ", ".join(dict.fromkeys(network.name for network in self.ready())) or "none"
            raise UnknownNetwork(f"there is no value network {name!r}; there is: {known}")
        for network in versions:
            if not pinned or network.version == version:
                return network
        known = ", ".join(network.version for network in versions)
        raise UnknownNetwork(
            f"value network {name!r} has no version {version!r}; there is: {known}"
        )

    def resident(self, reference: str) -> Network:
        """Return `name@version` in whatever state: a request keeps the version it has.

        Raises:
            UnknownNetwork: the workers do not hold it.
        """
        network = self._networks.get(reference)
        if network is None:
            raise UnknownNetwork(f"value network {reference} is not resident any more")
        return network

    async def _learn_from(self, method: str) -> Statuses:
        for attempt in range(AGREEMENT_TRIES):
            call, replies = await self._ask(method)
            statuses = _statuses(method, replies)
            if _agree(statuses):
                break
            if attempt + 1 < AGREEMENT_TRIES:
                await asyncio.sleep(AGREEMENT_SECONDS)
            elif method == "trimtab_attach":
                raise WorkerError("the workers hold different value networks")
        self._learn(call, statuses)
        return statuses

    async def _ask(self, method: str, *args: Any) -> tuple[int, list[list[dict[str, Any]]]]:
        self._calls += 1
        call = self._calls
        try:
            replies = await self._call_workers(method, *args)
        except Exception as error:  # remote calls fail with a bare Exception
            raise WorkerError(f"{method} failed: {error}") from error
        for reply in (reply for engine in replies for reply in engine):
            if not isinstance(reply, dict):
                raise WorkerError(f"a worker's reply to {method} is malformed: {reply!r:.100}")
            if "error" in reply:
                raise WorkerError(str(reply["error"]))
        return call, replies

    def _learn(self, call: int, statuses: Statuses) -> None:
        """Take over what the workers said, unless a later call was answered already."""
        if call < self._learnt_call:
            return
        self._learnt_call = call
        networks = sorted(_merged_networks(statuses), key=lambda network: -network.order)
        self._networks = {str(network): network for network in networks}
        workers = [worker for engine in statuses for worker in engine]
        self.loads = _merged_loads(workers)
        self.withheld = frozenset(name for worker in workers for name in worker.withheld)
        self.memory = min((worker.memory for worker in workers), key=lambda m: m.free_bytes)
        for listener in self._listeners:
            listener()


def _statuses(method: str, replies: Sequence[Sequence[dict[str, Any]]]) -> Statuses:
    try:
        statuses = [[WorkerStatus.model_validate(reply) for reply in engine] for engine in replies]
    except ValidationError as error:
        raise WorkerError(f"a worker's reply to {method} is malformed: {error}") from error
    if not statuses or not all(statuses):
        raise WorkerError(f"no worker answered {method}")
    return statuses


def _agree(statuses: Statuses) -> bool:
    """Whether workers hold the same versions; one of them may have failed in some only."""
    held = {
        frozenset((str(network), network.state == "draining") for network in worker.networks)
        for engine in statuses
        for worker in engine
    }
    return len(held) == 1


def _merged_networks(statuses: Statuses) -> Iterator[Network]:
    """Yield each version once.

    One that not all workers hold is what a change has left behind that failed in the midst: it is
    for no new request, and to be unloaded.
    """
    held = [[{str(n): n for n in worker.networks} for worker in engine] for engine in statuses]
    workers = [worker for engine in held for worker in engine]
    for reference in dict.fromkeys(reference for worker in workers for reference in worker):
        reports = [
            [worker[reference] for worker in engine if reference in worker] for engine in held
        ]
        network = _merged([engine for engine in reports if engine])
        everywhere = all(reference in worker for worker in workers)
        yield network if everywhere else network.model_copy(update={"state": "draining"})


def _merged(reports: list[list[Network]]) -> Network:
    """One version as all workers report it.

    Seconds are the slowest worker's. Tokens are counted once for each engine: its workers compute
    the same ones.
    """
    networks = [network for engine in reports for network in engine]
    engines = [engine[0] for engine in reports]

    def most(field: str) -> float:
        return max(float(getattr(network, field)) for network in networks)

    def total(field: str) -> int:
        return sum(int(getattr(network, field)) for network in engines)

    pool = engines[0].pool.model_copy(
        update={
            "tokens": sum(network.pool.tokens for network in engines),
            "used_tokens": sum(network.pool.used_tokens for network in engines),
        }
    )
    used = [network.last_used for network in networks if network.last_used is not None]
    return networks[0].model_copy(
        update={
            "state": min((network.state for network in networks), key=STATES.index),
            "reason": next((network.reason for network in networks if network.reason), None),
            "weights_bytes": max(network.weights_bytes for network in networks),
            "last_used": max(used, default=None),
            "pool": pool,
            **{field: most(field) for field in SECONDS},
            **{field: total(field) for field in COUNTS},
        }
    )


STATES = ("draining", "failed", "ready")
"""One worker's makes it everyone's, in this order."""
SECONDS = ("loaded_at", "load_seconds", "forward_seconds")
COUNTS = ("forward_tokens", "prefix_queries", "prefix_hits", "kv_tokens", "drops", "rows")


def _merged_loads(workers: Sequence[WorkerStatus]) -> dict[str, Load]:
    loads: dict[str, Load] = {}
    for load in (load for worker in workers for load in worker.loads):
        if load.id not in loads or load.state == "failed":
            loads[load.id] = load
    return loads
