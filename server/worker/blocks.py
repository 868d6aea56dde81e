"""The KV blocks of value networks, through vLLM's `KVCacheManager`.

Models whose KV caches have one shape share a pool, so memory goes where the traffic is. The state
in it is a cache over token history: anything may be dropped and recomputed, slower but never wrong.
"""

import mmap
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    create_kv_cache_views,
)
from vllm.v1.request import Request

BLOCK_SIZE = 32
"""Tokens per KV block: the CPU kernels want a multiple of 32, FlashAttention one of 16."""

TokensOf = Callable[[int, int], list[int]]
"""`tokens(start, stop)`: a row's token history from `start` to before `stop`; may end early."""


class KVShape(NamedTuple):
    """What models must have in common to share a pool."""

    layer: FullAttentionSpec
    num_layers: int

    @property
    def block_bytes(self) -> int:
        """Memory of one block, in all layers."""
        return self.layer.page_size_bytes * self.num_layers

    def bytes_for(self, num_tokens: int) -> int:
        """Memory of the smallest pool that holds a sequence of this length."""
        # One block more: block 0 is vLLM's null block.
        return (-(-num_tokens // BLOCK_SIZE) + 1) * self.block_bytes


class BlockPool:
    """The paged KV cache of all models with one KV shape.

    Attributes:
        id, shape: as given.
        num_bytes: memory of the whole pool.
        layer_caches: one tensor for each layer, which every model's layer of that place binds.
        num_tokens: how many tokens fit.
        tables: of the models that take blocks from it.
        now: the time, in steps.
        tainted: blocks may hold NaN or infinity. Kernels multiply what lies behind a row's end in
            its last block by a probability of 0, so such blocks are cleared for their next owner.
    """

    def __init__(
        self,
        pool_id: str,
        vllm_config: VllmConfig,
        shape: KVShape,
        num_bytes: int,
        device: torch.device,
        prefix_caching: bool,
    ) -> None:
        """Allocate `num_bytes` of KV cache, at least what `shape.bytes_for` a context.

        Args:
            pool_id: what operators see it by.
            vllm_config: of any model with this shape; its `cache_config` names the layout.
            shape: of the models; the layers' `block_size` is `BLOCK_SIZE`.
            num_bytes: memory for the whole pool.
            device: where the KV cache lies.
            prefix_caching: let rows of one model share the blocks of equal prefixes.
        """
        layers = [f"layers.{i}" for i in range(shape.num_layers)]
        config = get_kv_cache_config_from_groups(
            vllm_config, [KVCacheGroupSpec(layers, shape.layer)], num_bytes
        )
        self.id = pool_id
        self.shape = shape
        self.num_bytes = config.num_blocks * shape.block_bytes
        layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
        (tensor,) = config.kv_cache_tensors
        buffer = _zeros(tensor.size, device)
        views = create_kv_cache_views(buffer, shape.layer, config.num_blocks, layout, tensor)
        caches = dict(zip(tensor.layers, views, strict=True))
        self.num_tokens = (config.num_blocks - 1) * BLOCK_SIZE
        self.layer_caches = [caches[layer] for layer in layers]
        self.tables: list[BlockTable] = []
        self.now = 0
        self.tainted = False
        self._manager = KVCacheManager(
            config,
            max_model_len=self.num_tokens,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            enable_caching=prefix_caching,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)

    @property
    def used_tokens(self) -> int:
        """Tokens of running rows; what else it holds are prefixes that may be used again."""
        return sum(int(table.computed.sum()) for table in self.tables)

    def new_table(self, max_rows: int, max_context: int, salt: str) -> "BlockTable":
        """Make the table of one model. `salt` keeps its cached prefixes from all others'."""
        table = BlockTable(self, max_rows, max_context, salt)
        self.tables.append(table)
        return table

    def remove_table(self, table: "BlockTable") -> None:
        """Free all blocks of a model that goes."""
        for slot in list(table.requests):
            table.release(slot)
        if table in self.tables:
            self.tables.remove(table)

    def tick(self) -> int:
        """Begin a step: what is used in it carries the time `now`, which is returned."""
        self.now += 1
        return self.now

    def clear(self, block_ids: list[int]) -> None:
        """Overwrite what earlier owners left in these blocks."""
        for cache in self.layer_caches:
            cache[block_ids] = 0

    def drop_least_recently_used(self) -> bool:
        """Free the blocks of the sequence that was used longest ago and is not held.

        Returns:
            False when every sequence in the pool is held.
        """
        candidates = [
            (table.last_used[slot], table, slot)
            for table in self.tables
            for slot in table.requests
            if slot not in table.held
        ]
        if not candidates:
            return False
        _, table, slot = min(candidates, key=lambda candidate: candidate[0])
        table.release(slot)
        table.drops += 1
        return True


def _zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Return int8 zeros. On a CPU the kernel hands them out a page at a time, as they are used:
    to write them all would stop decoding for as long as it takes, up to a second per GiB."""
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.int8, device=device)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.int8)


class BlockTable:
    """Which of a pool's blocks hold which row's history, for one model.

    A *slot* names a guided request for as long as it is in the batch. The arrays are indexed by
    slot and read by the decoding step as a whole: a row that only decodes costs no Python.

    Attributes:
        computed: int32 `[max_rows]`, tokens whose keys and values are in the cache.
        capacity: int32 `[max_rows]`, tokens that the slot's blocks can hold.
        last_used: int64 `[max_rows]`, when a slot last ran, by the pool's `tick`.
        block_ids: int32 `[max_rows, max_blocks]`.
        revision: changes whenever `block_ids` does, or `computed` in another way than by a decoding
            step, which sets it to one more.
        requests: vLLM's record of each slot that owns blocks.
        drops: sequences that lost their blocks to others and had to be recomputed.
        prefix_queries: tokens of sequences that were looked up in the prefix cache.
        prefix_hits: how many of them were there.
        held: slots that take part in the forward being put together, safe from `drop`.
    """

    def __init__(self, pool: BlockPool, max_rows: int, max_context: int, salt: str) -> None:
        self.computed = np.zeros(max_rows, dtype=np.int32)
        self.capacity = np.zeros(max_rows, dtype=np.int32)
        self.last_used = np.zeros(max_rows, dtype=np.int64)
        max_blocks = -(-max_context // BLOCK_SIZE)
        self.block_ids = np.zeros((max_rows, max_blocks), dtype=np.int32)
        self.revision = 0
        self.requests: dict[int, Request] = {}
        self.held: set[int] = set()
        self.drops = self.prefix_queries = self.prefix_hits = 0
        self._pool = pool
        self._salt = salt
        self._opened = 0

    @property
    def max_rows(self) -> int:
        """How many slots there are."""
        return len(self.computed)

    @property
    def max_tokens(self) -> int:
        """Tokens that the blocks of one slot can hold at most."""
        return self.block_ids.shape[1] * BLOCK_SIZE

    def places(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return where in the pool single tokens lie.

        Args:
            slots: int64 `[num_tokens]`.
            positions: int32 `[num_tokens]`, within the slots' sequences.

        Returns:
            int64 `[num_tokens]`, vLLM's slot mapping.
        """
        blocks = self.block_ids[slots, positions // BLOCK_SIZE].astype(np.int64)
        return blocks * BLOCK_SIZE + positions % BLOCK_SIZE

    def first_blocks(self, slots: np.ndarray, num_tokens: int) -> np.ndarray:
        """Return the blocks of the first tokens: int32 `[num_slots, num_blocks]`."""
        return self.block_ids[slots, : -(-num_tokens // BLOCK_SIZE)]

    def open(self, slot: int, tokens: TokensOf, num_stable: int) -> None:
        """Start a slot's sequence: `computed` becomes what the prefix cache already holds.

        Args:
            slot: not open yet.
            tokens: of the sequence.
            num_stable: how many leading tokens will never change; the others are not looked up.
        """
        self._opened += 1
        request = Request(
            request_id=f"{self._salt}/{self._opened}",
            prompt_token_ids=tokens(0, num_stable),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            cache_salt=self._salt,
            block_hasher=self._pool._hasher,
        )
        manager = self._pool._manager
        num_cached = 0
        if request.num_tokens:  # vLLM's lookup wants at least one
            blocks, num_cached, _ = manager.get_computed_blocks(request)
        if num_cached:
            # Adopting the hit pins its blocks; the rest is allocated as the forward needs it.
            manager.allocate_slots(
                request,
                num_new_tokens=0,
                num_new_computed_tokens=num_cached,
                new_computed_blocks=blocks,
            )
        self.requests[slot] = request
        self.computed[slot] = num_cached
        self.prefix_queries += request.num_tokens
        self.prefix_hits += num_cached
        self.last_used[slot] = self._pool.now
        self._refresh(slot)

    def reserve(
        self,
        slot: int,
        tokens: TokensOf,
        length: int,
        num_stable: int,
        may_drop: bool = True,
    ) -> bool:
        """Make room for the first `length` tokens of an open slot, dropping others where needed.

        vLLM publishes the blocks that these tokens fill to the prefix cache right away: the caller
        computes exactly these tokens in its next forward. It publishes no further than it has been
        told of tokens, so it is told of the first `num_stable` only: a block that may be written
        again is nobody else's.

        Returns:
            False when the pool is full of held sequences; without `may_drop`, of any.
        """
        if length <= self.capacity[slot]:
            return True
        request = self.requests[slot]
        request.num_computed_tokens = int(self.computed[slot])
        known = request.num_tokens
        if known < num_stable:
            request.append_output_token_ids(tokens(known, num_stable))
        num_new = length - request.num_computed_tokens
        while (blocks := self._pool._manager.allocate_slots(request, num_new)) is None:
            if not (may_drop and self._pool.drop_least_recently_used()):
                return False
        if self._pool.tainted:
            self._pool.clear(blocks.get_block_ids()[0])
        self._refresh(slot)
        return True

    def rewind(self, slot: int, length: int) -> None:
        """Forget what is computed behind the first `length` tokens; the slot keeps its blocks.

        Tokens that were passed as stable must not have changed, unless `length` is 0.
        """
        if not length:
            self.release(slot)
        elif length < self.computed[slot]:
            self.computed[slot] = length
            self.revision += 1

    def release(self, slot: int) -> None:
        """Free a slot's blocks; full ones stay in the prefix cache until their space is needed."""
        request = self.requests.pop(slot, None)
        if request is not None:
            self._pool._manager.free(request)
        self.computed[slot] = self.capacity[slot] = 0
        self.revision += 1
        self.held.discard(slot)

    def _refresh(self, slot: int) -> None:
        (blocks,) = self._pool._manager.get_block_ids(self.requests[slot].request_id)
        self.block_ids[slot, : len(blocks)] = blocks
        self.revision += 1
        self.capacity[slot] = len(blocks) * BLOCK_SIZE
