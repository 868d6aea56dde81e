"""The KV pools of a worker: which there are, and how large a new one is made."""

from collections.abc import Collection

import torch
from vllm.config import VllmConfig

from server.worker.blocks import BlockPool, KVShape
from server.worker.network import ValueNetwork

Need = tuple[KVShape, int]
"""A pool of this shape is wanted, of so many bytes at least."""


class Pools:
    """All KV pools of a worker, by shape.

    Models of one shape share a pool, whether they are of one network or of several, as long as it
    holds the longest sequence that they read.
    """

    def __init__(self, vllm_config: VllmConfig, prefix_caching: bool, device: torch.device) -> None:
        self._config = vllm_config
        self._prefix_caching = prefix_caching
        self._device = device
        self._pools: list[BlockPool] = []
        self._num_made = 0

    @property
    def num_bytes(self) -> int:
        """Memory of all of them."""
        return sum(pool.num_bytes for pool in self._pools)

    def missing(self, network: ValueNetwork) -> dict[KVShape, int]:
        """Return the pools that a network needs and that are not there: their least bytes."""
        return {
            shape: shape.bytes_for(network.max_context)
            for shape in network.kv_shapes
            if self._find(shape, network.max_context) is None
        }

    def provide(
        self, network: ValueNetwork, free: int, others: Collection[Need] = ()
    ) -> dict[KVShape, BlockPool]:
        """Return a pool for each shape of a network, making those that are missing.

        Args:
            network: without pools.
            free: bytes; what `missing` says fits.
            others: what more networks will need, for which memory is kept.
        """
        missing = self.missing(network)
        kept = sum(num_bytes for _, num_bytes in others)
        # Half of the memory stays free for networks to come.
        share = (free - kept) // (2 * max(1, len(missing) + len(others)))
        to_come = sum(missing.values())
        for shape, least in missing.items():
            to_come -= least
            pool = self._make(network, shape, min(share, free - to_come), least)
            free -= pool.num_bytes
        pools = {shape: self._find(shape, network.max_context) for shape in network.kv_shapes}
        return {shape: pool for shape, pool in pools.items() if pool is not None}

    def has_room(self, layers: int, kv_heads: int, head_size: int, num_tokens: int) -> bool:
        """Whether a model of this KV shape, which nobody has read yet, finds its pool there."""
        return any(
            (pool.shape.num_layers, pool.shape.layer.num_kv_heads, pool.shape.layer.head_size)
            == (layers, kv_heads, head_size)
            and pool.num_tokens >= num_tokens
            for pool in self._pools
        )

    def held_alone_by(self, network: ValueNetwork) -> int:
        """Memory of the pools that no other network takes blocks from."""
        alone = 0
        for pool in network.pools:
            own = [model for model in network.models.values() if model.pool is pool]
            alone += pool.num_bytes if len(own) == len(pool.tables) else 0
        return alone

    def drop_unused(self) -> None:
        """Free the pools that no network takes blocks from any more."""
        self._pools = [pool for pool in self._pools if pool.tables]

    def _find(self, shape: KVShape, num_tokens: int) -> BlockPool | None:
        pools = (pool for pool in self._pools if pool.shape == shape)
        return next((pool for pool in pools if pool.num_tokens >= num_tokens), None)

    def _make(self, network: ValueNetwork, shape: KVShape, wanted: int, least: int) -> BlockPool:
        models = [model for model in network.models.values() if model.kv_shape == shape]
        # Full contexts of all rows, and as much again of prefixes to be used again.
        most = 2 * least * len(models) * self._config.scheduler_config.max_num_seqs
        pool = BlockPool(
            f"pool-{self._num_made}",
            models[0].config,
            shape,
            max(min(wanted, most), least),
            self._device,
            self._prefix_caching,
        )
        self._num_made += 1
        self._pools.append(pool)
        return pool
