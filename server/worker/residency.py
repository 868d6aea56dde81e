"""Which value networks a worker holds: loading, memory, versions, unloading.

All of it happens on the thread that decodes, between two steps: the API processes call, and each
call does a short piece of work (`server.worker.extension`). An operation that spans several calls
is a `_Load`; all workers of an engine get the same calls in the same order.
"""

import gc
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from server.settings import Settings
from server.worker.blocks import BLOCK_SIZE
from server.worker.compilation import CompiledForwards
from server.worker.configuration import TOKENS_PER_TARGET_TOKEN
from server.worker.loading import Pieces, finish
from server.worker.network import ValueNetwork
from server.worker.pools import Need, Pools
from server.worker.precision import network_dtype
from server.worker.translation import Readers
from value_models.manifest import MANIFEST_FILE, Manifest
from value_models.store import ModelFolder, NetworkFolder, check_network, model_path

logger = init_logger(__name__)

Reply = dict[str, Any]

SHORTEST_SLICE = 0.002
LONGEST_SLICE = 0.012
SLICE_SHARE = 0.25
"""A slice of a load takes at most this share of a decoding step, within these bounds in seconds."""


class OutOfMemory(ValueError):
    """Value networks would take more memory than they may."""


@dataclass
class _Resident:
    """A network that rows may use, and what is known of it besides."""

    network: ValueNetwork
    source: str | None
    order: int
    loaded_at: float
    load_seconds: float
    draining: bool = False


@dataclass
class _Load:
    """A network on its way in, or why it did not get there."""

    id: str
    name: str
    source: str
    owner: str
    started_at: float
    promised_bytes: int = 0
    facts: Reply = field(default_factory=dict)
    state: Literal["loading", "failed"] = "loading"
    reason: str | None = None
    version: str = ""
    pieces: Pieces | None = None
    network: ValueNetwork | None = None
    warming: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def is_prepared(self) -> bool:
        """Whether there is nothing left to do but to switch."""
        tried = self.warming and self.pieces is None
        return self.state == "loading" and (self.network is None or tried)

    def free(self) -> None:
        """Give back whatever was built."""
        self.pieces = None
        self.promised_bytes = 0
        if self.network is not None:
            self.network.free()
            self.network = None


class Residency:
    """The value networks of one worker.

    Attributes:
        revision: changes whenever `find` may answer differently.
        step_seconds: the time of a decoding step lately; bounds the slices of a load.
    """

    def __init__(self, vllm_config: VllmConfig, settings: Settings, device: torch.device) -> None:
        """Load every network of `settings`, to the end.

        Raises:
            NetworkError, ValueError, OutOfMemory: of a network that a flag names; one that comes
                from the store is noted as failed.
        """
        self.revision = 0
        self.step_seconds = 0.0
        self._config = vllm_config
        self._settings = settings
        self._device = device
        self._total = int(settings.value_memory_gb * (1 << 30))
        self._residents: dict[tuple[str, str], _Resident] = {}
        self._loads: dict[str, _Load] = {}
        self._pools = Pools(vllm_config, settings.prefix_caching, device)
        self._forwards = CompiledForwards()
        self._readers = Readers()
        self._withheld = set(settings.withheld)
        self._order = 0
        for name, reason in settings.unloadable.items():
            self._note_failure(name, settings.sources.get(name, name), reason)
        self._load_at_start()
        # On CUDA, vLLM sizes the target's KV cache by what is left now.
        self._reservation: torch.Tensor | None = None
        if device.type == "cuda":
            self._reservation = torch.empty(self._free(), dtype=torch.uint8, device=device)

    def settle(self) -> None:
        """The engine has taken its memory: free what was kept for networks to come."""
        self._reservation = None
        # A full collection walks all of vLLM's objects, and few of them are ever garbage.
        gc.collect()
        gc.freeze()

    def find(self, name: str, version: str) -> ValueNetwork | None:
        """Return the network of that version, also if it is draining or has failed."""
        resident = self._residents.get((name, version))
        return None if resident is None else resident.network

    def networks(self) -> Iterable[ValueNetwork]:
        """All that rows may use."""
        return (resident.network for resident in self._residents.values())

    def status(self) -> Reply:
        """Describe all of it, as plain data for the API processes."""
        return {
            "networks": [self._describe(resident) for resident in self._residents.values()],
            "loads": [
                {
                    "id": load.id,
                    "name": load.name,
                    "source": load.source,
                    "owner": load.owner,
                    "state": load.state,
                    "reason": load.reason,
                    "started_at": load.started_at,
                }
                for load in self._loads.values()
            ],
            "withheld": sorted(self._withheld),
            "memory": {
                "total_bytes": self._total,
                "weights_bytes": self._weights(),
                "kv_cache_bytes": self._pools.num_bytes,
                "loading_bytes": self._promised(),
                "free_bytes": self._free(),
            },
        }

    def begin(self, load: Reply) -> Reply:
        """Promise memory to a load: `id`, `name`, `source`, `owner`, `models`, `vocab_size`,
        `max_context`, `mapped`, and whether it may `supersede` one of that name that runs. Of each
        model: `role`, `num_parameters`, `kv_shape` (layers, KV heads, head size), `vocab_size`,
        `max_context`."""
        running = self._running(load["name"])
        if running is not None and not load["supersede"]:
            return {"refused": "loading"}
        needed = self._needed(load)
        free = self._free() + (0 if running is None else self._held_by(running))
        if needed > free:
            refused = {"refused": "memory", "needed": needed, "free": free, "total": self._total}
            return refused | self.status()
        if running is not None:
            running.free()
            self._pools.drop_unused()
        self._forget_loads(load["name"])
        self._loads[load["id"]] = _Load(
            load["id"], load["name"], load["source"], load["owner"], time.time(), needed, load
        )
        return self.status()

    def build(self, load_id: str, version: str, folder: str, anew: bool) -> Reply:
        """Say where the load's network lies. `advance` reads it.

        A version that is resident and sound is ready at once, unless it is to be built `anew`:
        that it failed in another engine is seen only there.
        """
        load = self._loads.get(load_id)
        if load is None or load.state != "loading":
            return _gone(load)
        load.version = version
        resident = self._residents.get((load.name, version))
        if resident is not None and resident.network.failure is None and not anew:
            return {"state": "ready", "reason": None}
        try:
            load.pieces = self._build(load, _checked(load, Path(folder)), may_compile=False)
        except Exception as error:
            self._fail(load, _reason(error))
            return {"state": "failed", "reason": load.reason}
        return {"state": "building", "reason": None}

    def advance(self, load_id: str) -> Reply:
        """Do one slice of building."""
        deadline = time.perf_counter() + min(
            max(SLICE_SHARE * self.step_seconds, SHORTEST_SLICE), LONGEST_SLICE
        )
        load = self._loads.get(load_id)
        while load is not None and load.pieces is not None and not load.warming:
            state = self._next_piece(load)
            if state != "building":
                return {"state": state, "reason": load.reason}
            if time.perf_counter() >= deadline:
                return {"state": "building", "reason": None}
        if load is not None and load.network is not None:
            return {"state": "built", "reason": None}
        return _gone(load)

    def warm_up(self, load_id: str) -> Reply:
        """Do one piece of trying the network: tensor-parallel workers run it together."""
        load = self._loads.get(load_id)
        if load is None or load.network is None:
            return _gone(load)
        if not load.warming:
            load.warming = True
            load.pieces = self._bind(load)
        if load.pieces is None:
            return {"state": "prepared", "reason": None}
        state = self._next_piece(load)
        state = {"building": "warming", "built": "prepared"}.get(state, state)
        return {"state": state, "reason": load.reason}

    def commit(self, load_id: str) -> Reply:
        """Switch: the load's version is what its name means now, older ones are draining."""
        load = self._loads.get(load_id)
        if load is None or not load.is_prepared:
            return self.status()
        key = load.name, load.version
        resident = self._residents.get(key)
        if load.network is not None:
            if resident is not None:
                resident.network.free()  # it has failed, here or in another engine
            seconds = time.monotonic() - load.began
            resident = _Resident(load.network, load.source, 0, time.time(), seconds)
        if resident is None:
            return self.status()
        del self._loads[load_id]
        self._order += 1
        resident.order, resident.draining, resident.source = self._order, False, load.source
        self._residents[key] = resident
        for (name, _), other in self._residents.items():
            if name == load.name and other is not resident:
                other.draining = True
        self._withheld.discard(load.name)
        self.revision += 1
        return self.status()

    def abort(self, load_id: str, reason: str, forget: bool) -> Reply:
        """End a load; keep it as the failed one of its name, unless it is to be forgotten."""
        load = self._loads.get(load_id)
        if load is not None:
            self._fail(load, reason)
            if forget:
                del self._loads[load_id]
            self._pools.drop_unused()
        return self.status()

    def retire(self, reference: str, withhold: bool) -> Reply:
        """Let `name`, with all versions and loads, or `name@version` drain."""
        name, pinned, version = reference.partition("@")
        if not pinned:
            for load in [load for load in self._loads.values() if load.name == name]:
                load.free()
                del self._loads[load.id]
            self._pools.drop_unused()
        for key, resident in self._residents.items():
            if key[0] == name and (not pinned or key[1] == version):
                resident.draining = True
        if withhold:
            self._withheld.add(name)
        self.revision += 1
        return self.status()

    def unload(self, reference: str) -> Reply:
        """Free a version that is draining."""
        name, _, version = reference.partition("@")
        resident = self._residents.get((name, version))
        if resident is not None and resident.draining:
            del self._residents[name, version]
            resident.network.free()
            self._pools.drop_unused()
            self.revision += 1
            del resident
            gc.collect()  # a model refers to itself in many ways; since `settle` this takes little
        return self.status()

    def _load_at_start(self) -> None:
        built = []
        for name, folder in self._settings.networks.items():
            source = self._settings.sources.get(name)
            load = _Load(f"start {name}", name, source or name, "", time.time())
            try:
                checked = check_network(folder, name)
                load.version = checked.version
                finish(self._build(load, checked, may_compile=True))
                load.promised_bytes = load.network.weights_bytes  # pools come below, for all
                self._loads[load.id] = load
                built.append(load)
            except Exception as error:
                load.free()
                if source is None:
                    raise
                logger.exception("value network %s cannot be loaded", name)
                self._note_failure(name, source, _reason(error))
        # The largest contexts first: smaller ones find room in their pools.
        built.sort(key=lambda load: -load.network.max_context)
        while built:
            load = built.pop(0)
            source = self._settings.sources.get(load.name)
            others = {need for o in built for need in self._pools.missing(o.network).items()}
            try:
                load.warming = True
                finish(self._bind(load, others))
                load.pieces = None
                self.commit(load.id)
                self._residents[load.name, load.version].source = source
            except Exception as error:
                if source is None:
                    raise
                logger.exception("value network %s cannot be loaded", load.name)
                self._fail(load, _reason(error))
        self._pools.drop_unused()

    def _build(self, load: _Load, folder: NetworkFolder, may_compile: bool) -> Pieces:
        network = yield from ValueNetwork.build(
            folder,
            self._config,
            self._settings.tokenizer_fingerprint,
            self._readers,
            self._forwards,
            may_compile,
            self._device,
        )
        load.network = network
        needed = network.weights_bytes + sum(self._pools.missing(network).values())
        self._check_memory(needed, self._free() + load.promised_bytes)
        load.promised_bytes = needed

    def _bind(self, load: _Load, others: Collection[Need] = ()) -> Pieces:
        network = load.network
        assert network is not None
        free = self._free() + load.promised_bytes - network.weights_bytes
        self._check_memory(sum(self._pools.missing(network).values()), free)
        pools = self._pools.provide(network, free, others)
        load.promised_bytes = network.weights_bytes
        self._order += 1
        yield from network.bind(pools, self._forwards, self._order)

    def _next_piece(self, load: _Load) -> str:
        """Do one piece of a load. Returns its state: building, built or failed."""
        assert load.pieces is not None
        try:
            next(load.pieces)
        except StopIteration:
            load.pieces = None
            return "built"
        except BaseException as error:  # whatever it is, it must not reach the engine
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            logger.exception("value network %s cannot be loaded", load.name)
            self._fail(load, _reason(error))
            self._pools.drop_unused()
            return "failed"
        return "building"

    def _fail(self, load: _Load, reason: str) -> None:
        load.free()
        load.state, load.reason = "failed", reason

    def _note_failure(self, name: str, source: str, reason: str) -> None:
        load = _Load(f"start {name}", name, source, "", time.time(), state="failed", reason=reason)
        self._loads[load.id] = load

    def _running(self, name: str) -> _Load | None:
        loads = (load for load in self._loads.values() if load.name == name)
        return next((load for load in loads if load.state == "loading"), None)

    def _forget_loads(self, name: str) -> None:
        self._loads = {i: load for i, load in self._loads.items() if load.name != name}

    def _needed(self, load: Reply) -> int:
        """Estimate what a network will take that nobody has read yet."""
        ranks = self._config.parallel_config.tensor_parallel_size
        itemsize = network_dtype(self._config.model_config.dtype, self._device.type).itemsize
        limit = self._config.model_config.max_model_len
        longest = min(
            load["max_context"], limit * (TOKENS_PER_TARGET_TOKEN if load["mapped"] else 1)
        )
        num_blocks = -(-longest // BLOCK_SIZE) + 1
        weights = sum(model["num_parameters"] for model in load["models"]) * itemsize // ranks
        pools = 0
        for layers, heads, head_size in {tuple(model["kv_shape"]) for model in load["models"]}:
            heads = max(1, heads // ranks)
            if not self._pools.has_room(layers, heads, head_size, longest):
                pools += num_blocks * BLOCK_SIZE * layers * heads * head_size * 2 * itemsize
        return weights + pools

    def _held_by(self, load: _Load) -> int:
        """Memory that comes back if a load ends: its promise, and pools made for it alone."""
        pools = 0 if load.network is None else self._pools.held_alone_by(load.network)
        return load.promised_bytes + pools

    def _check_memory(self, needed: int, free: int) -> None:
        if needed > free:
            raise OutOfMemory(
                f"needs {needed:,} bytes, but {free:,} of the {self._total:,} bytes for value "
                "networks are free; unload others, or give more with --value-memory-gb"
            )

    def _weights(self) -> int:
        return sum(network.weights_bytes for network in self.networks())

    def _promised(self) -> int:
        return sum(load.promised_bytes for load in self._loads.values())

    def _free(self) -> int:
        return max(0, self._total - self._weights() - self._pools.num_bytes - self._promised())

    def _describe(self, resident: _Resident) -> Reply:
        network = resident.network
        folder, pool = network.folder, network.pools[0]
        tables = [model.table for model in network.models.values()]
        state = "draining" if resident.draining else "failed" if network.failure else "ready"
        return {
            "name": folder.name,
            "version": folder.version,
            "kind": folder.manifest.kind,
            "scale": folder.manifest.default_scale,
            "state": state,
            "reason": network.failure,
            "source": resident.source,
            "folder": str(folder.path),
            "order": resident.order,
            "max_context": network.max_context,
            "vocab_size": folder.vocab_size,
            "mapped": network.translator is not None,
            "dynamic": network.knows_base,
            "num_parameters": folder.num_parameters,
            "weights_bytes": network.weights_bytes,
            "loaded_at": resident.loaded_at,
            "load_seconds": resident.load_seconds,
            "last_used": network.last_used,
            "forward_seconds": network.seconds,
            "forward_tokens": network.num_tokens,
            "prefix_queries": sum(table.prefix_queries for table in tables),
            "prefix_hits": sum(table.prefix_hits for table in tables),
            "kv_tokens": sum(int(table.computed.sum()) for table in tables),
            "drops": sum(table.drops for table in tables),
            "rows": sum(len(table.requests) for table in tables),
            "pool": {
                "id": pool.id,
                "kv_cache_bytes": pool.num_bytes,
                "tokens": pool.num_tokens,
                "used_tokens": pool.used_tokens,
            },
        }


def _checked(load: _Load, folder: Path) -> NetworkFolder:
    """Describe a folder that an API process has checked, which takes too long here."""
    return NetworkFolder(
        name=load.name,
        path=folder,
        manifest=Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes()),
        version=load.version,
        models=tuple(
            ModelFolder(
                role=model["role"],
                path=model_path(folder, model["role"]),
                vocab_size=model["vocab_size"],
                max_context=model["max_context"],
                num_parameters=model["num_parameters"],
                num_bytes=0,
                kv_shape=tuple(model["kv_shape"]),
            )
            for model in load.facts["models"]
        ),
        vocabulary_maps=(),
    )


def _gone(load: _Load | None) -> Reply:
    if load is not None and load.state == "failed":
        return {"state": "failed", "reason": load.reason}
    return {"state": "gone", "reason": "it was superseded or unloaded meanwhile"}


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
