"""A resident value network: a vLLM model beside the target, with KV blocks of its own."""

import copy
import json
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from vllm.config import (
    CompilationMode,
    CUDAGraphMode,
    ModelConfig,
    VllmConfig,
    get_layers_from_vllm_config,
    set_current_vllm_config,
)
from vllm.config.load import LoadConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.kv_cache_interface import FullAttentionSpec

from server.worker.blocks import BLOCK_SIZE, BlockPool, BlockTable, KVShape, TokensOf
from server.worker.compilation import CompiledForwards, compilation_mode
from server.worker.loading import (
    Pieces,
    construct,
    know_architecture,
    load_weights,
    release_weights,
    weights_bytes,
)
from server.worker.translation import Readers, Translator
from value_models.store import CONFIG_FILE, NetworkFolder

logger = init_logger(__name__)

TOKENS_PER_TARGET_TOKEN = 4
"""How much longer a history may be in another vocabulary; a row that outgrows it ends."""

LONGEST_SCALED_CONTEXT = 1 << 21


class Rows(NamedTuple):
    """The rows of one decoding step that one network steers."""

    slots: np.ndarray  # int64 [num_rows], see BlockTable
    lengths: np.ndarray  # int32 [num_rows], tokens of history, this step's input the last of them
    last_tokens: torch.Tensor  # int [num_rows] on the device, this step's input tokens
    histories: Sequence[TokensOf]  # [num_rows], each row's tokens as far as the host knows
    num_stable: np.ndarray  # int32 [num_rows], leading tokens of history that will never change


class ValueNetwork:
    """One value network in a worker.

    Made by `build`, then bound to a pool of KV blocks by `bind`; from then on it scores rows.

    Attributes:
        failure: why it must not be used any more, or None. Set once, never cleared.
        translator: reads rows for a network of another vocabulary than the target's, or None.
        weights_bytes: memory of the weights in this worker.
        kv_shape: decides which pools it can take blocks from.
        longest: tokens of the longest sequence that it may have to read.
        seconds: of decoding steps that were spent on it.
        num_tokens: that it has computed.
        last_used: when rows were last scored, Unix time; None: never.
    """

    @classmethod
    def build(
        cls,
        folder: NetworkFolder,
        target_config: VllmConfig,
        target_fingerprint: str,
        readers: Readers,
        forwards: CompiledForwards,
        may_compile: bool,
        device: torch.device,
    ) -> Generator[None, None, "ValueNetwork"]:
        """Load a network in short pieces; the generator returns it.

        Args:
            folder: checked by `value_models.store`; not read any more once this has ended.
            target_config: the engine's own configuration; it is not changed.
            target_fingerprint: of the target's tokenizer; the folder fits it.
            readers: all of the worker's.
            forwards: those compiled in the worker; `bind` may add this network's.
            may_compile: take the seconds to compile, if no network of this architecture has.
            device: where the target's logits are.

        Raises:
            ValueError: the folder's map for this target cannot be used, the weights are not those
                of its configuration, or its attention cannot share one paged KV cache.
        """
        translator = None
        if folder.manifest.tokenizer_fingerprint != target_fingerprint:
            translator = Translator(readers.load(folder.path, target_fingerprint), device)
            yield
        config = _network_config(folder, target_config, translator is not None)
        if not (may_compile or forwards.knows(config)):
            # Nor single operations, which vLLM compiles where it compiles models.
            config.compilation_config.mode = CompilationMode.NONE
            config.compilation_config.custom_ops = ["all"]
        yield
        # vLLM makes tied embeddings twice before it ties them, and pads vocabularies.
        allowed = 2.25 * folder.num_parameters * config.model_config.dtype.itemsize + (1 << 20)
        model = construct(config, device, int(allowed))
        yield
        num_bytes = weights_bytes(model)
        yield from load_weights(model, config, device)
        return cls(folder, model, num_bytes, config, translator, target_config, device)

    def __init__(
        self,
        folder: NetworkFolder,
        model: torch.nn.Module,
        num_bytes: int,
        config: VllmConfig,
        translator: Translator | None,
        target_config: VllmConfig,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.failure: str | None = None
        self.translator = translator
        self.seconds = 0.0
        self.num_tokens = 0
        self.last_used: float | None = None
        self._device = device
        self._config = config
        self._model = model
        self.weights_bytes = num_bytes
        self._layers = get_layers_from_vllm_config(config, AttentionLayerBase)
        config.cache_config.kv_cache_layout = get_supported_kv_cache_layouts(
            {layer.get_attn_backend() for layer in self._layers.values()}
        )[0].name
        self._layer_names = list(self._layers)
        self.kv_shape = KVShape(_kv_spec(self._layers), len(self._layers))
        self.longest: int = config.model_config.max_model_len
        scheduler = target_config.scheduler_config
        self._max_rows = scheduler.max_num_seqs
        self._max_tokens = max(scheduler.max_num_batched_tokens, self._max_rows)
        self._row_starts = torch.arange(self._max_rows + 1, dtype=torch.int32)
        self._eager = False

    @property
    def config(self) -> VllmConfig:
        """What vLLM runs the network with."""
        return self._config

    def bind(self, pool: BlockPool, forwards: CompiledForwards, load_id: int) -> Pieces:
        """Take KV blocks from `pool`, then run the model once or twice, in pieces.

        Args:
            pool: of this network's `kv_shape`, for sequences of its `longest`.
            forwards: as given to `build`.
            load_id: unique in the worker's life, so that no cached block outlives its network.

        Raises:
            RuntimeError: vLLM's kernels cannot run the model's shape.
        """
        self.max_context = min(self.longest, pool.num_tokens)
        self._pool = pool
        self._table = pool.new_table(self._max_rows, self.max_context, f"{self}#{load_id}")
        for layer, cache in zip(self._layers.values(), pool.layer_caches, strict=True):
            layer.bind_kv_cache(cache)
        backend = next(iter(self._layers.values())).get_attn_backend()
        with set_current_vllm_config(self._config, check_compile=False):
            self._metadata_builder = backend.get_builder_cls()(
                self.kv_shape.layer, self._layer_names, self._config, self._device
            )
        yield from self._warm_up(forwards)

    @property
    def pool(self) -> BlockPool | None:
        """Where its KV blocks are, once it is bound."""
        return getattr(self, "_pool", None)

    def free(self) -> None:
        """Give back weights and KV blocks. The network must not be used any more."""
        if hasattr(self, "_table"):
            self._pool.remove_table(self._table)
        release_weights(self._model)
        self._config.compilation_config.static_forward_context.clear()

    def __str__(self) -> str:
        return f"{self.folder.name}@{self.folder.version}"

    @property
    def table(self) -> BlockTable:
        """Which rows have which KV blocks."""
        return self._table

    def fail(self, reason: str) -> None:
        """Mark the network as failed, for good."""
        self.failure = reason
        self._pool.tainted = True

    def release(self, slot: int) -> None:
        """Forget a slot's history. Its full blocks stay in the prefix cache."""
        self._table.release(slot)

    def rewind(self, slot: int, length: int) -> None:
        """Compute a slot's history anew behind its first `length` tokens: they were rewritten."""
        self._table.rewind(slot, length)

    def score(self, rows: Rows) -> torch.Tensor:
        """Return the network's next-token logits after each row's history.

        Only tokens that are not yet in the KV cache are computed, in one forward where they fit.

        Returns:
            `[num_rows, vocab_size]` in the network's dtype.
        """
        table = self._table
        positions = rows.lengths - 1
        # A client may send, and another processor sample, ids that only the target has.
        rows = rows._replace(last_tokens=rows.last_tokens.clamp(0, self.folder.vocab_size - 1))
        if np.array_equal(table.computed[rows.slots], positions) and np.all(
            rows.lengths <= table.capacity[rows.slots]
        ):
            logits = self._decode(rows.slots, positions, rows.last_tokens)
        else:
            logits = self._extend(rows)
        table.last_used[rows.slots] = self._pool.tick()
        return logits

    def _warm_up(self, forwards: CompiledForwards) -> Pieces:
        """Try the model, compiled or not: what cannot run must be known before requests come.

        The tokens go into vLLM's null block, which nobody reads.
        """
        # Two rows at least: torch.compile would take a size of 1 for a constant.
        num_rows = min(8, self._max_rows)
        slots, positions = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=np.int32)
        tokens = torch.arange(num_rows, device=self._device, dtype=torch.int32)
        tokens %= self.folder.vocab_size

        def run(eager: bool) -> torch.Tensor:
            self._eager = eager
            with (
                torch.inference_mode(),
                set_current_vllm_config(self._config, check_compile=False),
            ):
                logits = self._decode(slots, positions, tokens).float()
            self._table.release(0)
            return logits

        yield  # all workers have come so far: what follows may wait for the others
        eager = run(eager=True)
        yield
        if self._config.compilation_config.mode == CompilationMode.NONE:
            return
        forwards.adopt(self._model, self._config)
        compiled = run(eager=False)
        # Rounding differs by a few per mille; another network's weights would by about 100 %.
        self._eager = not (compiled - eager).norm() <= 0.05 * eager.norm()
        if self._eager:
            logger.warning("value network %s: its compiled forward is off, running eagerly", self)
        else:
            forwards.keep(self._model, self._config)
        yield

    def _decode(
        self, slots: np.ndarray, positions: np.ndarray, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Run one token of each row. The hot path: no Python per row."""
        hidden = self._forward(
            tokens, positions, self._row_starts[: len(slots) + 1], slots, positions + 1
        )
        self._table.computed[slots] = positions + 1
        return self._model.compute_logits(hidden)

    def _extend(self, rows: Rows) -> torch.Tensor:
        """Run whatever each row still owes, in as many forwards as memory asks for."""
        table = self._table
        for index, slot in enumerate(rows.slots.tolist()):
            if slot in table.requests and table.computed[slot] >= rows.lengths[index]:
                table.release(slot)  # the history was cut short
        logits: list[torch.Tensor | None] = [None] * len(rows.slots)
        pending = list(range(len(rows.slots)))
        while pending:
            part = self._next_part(rows, pending)
            finished = [
                (i, index)
                for i, (index, start, stop) in enumerate(part)
                if stop == rows.lengths[index]
            ]
            hidden = self._run_part(rows, part, [i for i, _ in finished])
            for (_, index), row_logits in zip(
                finished, self._model.compute_logits(hidden) if finished else (), strict=True
            ):
                logits[index] = row_logits
            done = {index for _, index in finished}
            pending = [index for index in pending if index not in done]
        return torch.stack(logits)

    def _next_part(self, rows: Rows, pending: Sequence[int]) -> list[tuple[int, int, int]]:
        """Choose what to run in one forward: (index, first token, end) of as many rows as fit."""
        table = self._table
        part: list[tuple[int, int, int]] = []
        budget = self._max_tokens
        try:
            for index in pending:
                if budget == 0:
                    break
                slot, length = int(rows.slots[index]), int(rows.lengths[index])
                tokens, num_stable = rows.histories[index], int(rows.num_stable[index])
                if slot not in table.requests:
                    table.open(slot, tokens, num_stable)
                table.held.add(slot)
                start = int(table.computed[slot])
                stop = min(length, start + budget)
                if not table.reserve(slot, tokens, stop, num_stable):
                    table.held.discard(slot)
                    break
                part.append((index, start, stop))
                budget -= stop - start
        finally:
            table.held.clear()
        assert part, "the pool holds less than one context"
        return part

    def _run_part(
        self, rows: Rows, part: Sequence[tuple[int, int, int]], finished: Sequence[int]
    ) -> torch.Tensor:
        """Run one part and return the last hidden state of its finished rows."""
        slots = rows.slots[[index for index, _, _ in part]]
        stops = np.array([stop for _, _, stop in part], dtype=np.int32)
        row_starts = np.zeros(len(part) + 1, dtype=np.int32)
        np.cumsum([stop - start for _, start, stop in part], out=row_starts[1:])
        ids = np.zeros(row_starts[-1], dtype=np.int32)
        for (i, start, stop), row_start in zip(part, row_starts, strict=False):
            # The newest token may not have reached the host yet: it is put in on the device.
            known = rows.histories[i](start, stop)
            ids[row_start : row_start + len(known)] = known
        positions = np.concatenate(
            [np.arange(start, stop, dtype=np.int32) for _, start, stop in part]
        )
        token_ids = torch.from_numpy(ids).to(self._device, non_blocking=True)
        last = torch.from_numpy(row_starts[1:] - 1).to(self._device, torch.int64)[list(finished)]
        newest = [part[i][0] for i in finished]
        token_ids[last] = rows.last_tokens[newest].to(token_ids.dtype)
        token_ids.clamp_(0, self.folder.vocab_size - 1)
        hidden = self._forward(token_ids, positions, torch.from_numpy(row_starts), slots, stops)
        self._table.computed[slots] = stops
        return hidden[last]

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: np.ndarray,
        row_starts: torch.Tensor,
        slots: np.ndarray,
        lengths: np.ndarray,
    ) -> torch.Tensor:
        """Run the model over a ragged batch, reading and writing its KV blocks.

        Args:
            token_ids: `[num_tokens]` on the device.
            positions: `[num_tokens]`, each token's place in its row.
            row_starts: int32 `[num_rows + 1]`, where each row's tokens begin; on the host.
            slots: `[num_rows]`.
            lengths: `[num_rows]`, tokens of each row in the cache after this forward.

        Returns:
            `[num_tokens, hidden_size]`
        """
        num_rows, num_tokens = len(slots), len(positions)
        longest = int(lengths.max())
        block_ids = self._table.block_ids[slots, : -(-longest // BLOCK_SIZE)]
        row_lengths = np.diff(row_starts.numpy())
        token_rows = (
            np.arange(num_rows)
            if num_tokens == num_rows
            else np.repeat(range(num_rows), row_lengths)
        )
        token_slots = block_ids[token_rows, positions // BLOCK_SIZE].astype(np.int64)
        token_slots = token_slots * BLOCK_SIZE + positions % BLOCK_SIZE
        seq_lens = torch.from_numpy(lengths.astype(np.int32))
        slot_mapping = self._to_device(token_slots)
        metadata = self._metadata_builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=row_starts.to(self._device, non_blocking=True),
                query_start_loc_cpu=row_starts,
                seq_lens=seq_lens.to(self._device, non_blocking=True),
                seq_lens_cpu_upper_bound=seq_lens,
                num_reqs=num_rows,
                num_actual_tokens=num_tokens,
                max_query_len=int(row_lengths.max()),
                max_seq_len=longest,
                block_table_tensor=self._to_device(block_ids),
                slot_mapping=slot_mapping,
            ),
        )
        with set_forward_context(
            dict.fromkeys(self._layer_names, metadata),
            self._config,
            num_tokens=num_tokens,
            slot_mapping=dict.fromkeys(self._layer_names, slot_mapping),
            skip_compiled=self._eager,
        ):
            self.num_tokens += num_tokens
            hidden: torch.Tensor = self._model(
                input_ids=token_ids, positions=self._to_device(positions.astype(np.int64))
            )
        return hidden

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _network_config(folder: NetworkFolder, target: VllmConfig, translated: bool) -> VllmConfig:
    """Derive the configuration of a value network from the target's.

    Copies are shallow and every part that vLLM writes to while loading is replaced: the target's
    layers and caches hang off its configuration.
    """
    config = copy.copy(target)
    for architecture in json.loads((folder.path / CONFIG_FILE).read_text())["architectures"]:
        know_architecture(architecture)
    config.model_config = ModelConfig(
        model=str(folder.path),
        dtype=target.model_config.dtype,
        seed=target.model_config.seed,
        enforce_eager=True,
        skip_tokenizer_init=True,
        trust_remote_code=False,
    )
    # A history is never longer than the target lets it be, counted in the network's own tokens.
    longest = target.model_config.max_model_len * (TOKENS_PER_TARGET_TOKEN if translated else 1)
    config.model_config.max_model_len = min(config.model_config.max_model_len, longest)
    _shorten_positions(config.model_config)
    config.quant_config = None
    # "auto" would admit pickled weights; a target's "dummy" would randomise the network.
    config.load_config = LoadConfig(load_format="safetensors")
    config.compilation_config = copy.copy(target.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    config.compilation_config.mode = compilation_mode(target)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    config.parallel_config = copy.copy(target.parallel_config)
    config.parallel_config.is_moe_model = False
    config.cache_config = copy.copy(target.cache_config)
    config.cache_config.block_size = BLOCK_SIZE
    config.cache_config.num_gpu_blocks_override = None
    config.cache_config.cache_dtype = "auto"
    config.cache_config.kv_cache_layout = None
    config.cache_config.sliding_window = None
    config.lora_config = None
    config.speculative_config = None
    config.kv_transfer_config = None
    return config


def _shorten_positions(model_config: ModelConfig) -> None:
    """Make no longer tables of rotary embeddings than positions can be reached.

    A configuration may name millions of positions. Plain ones do not depend on how many there are.

    Raises:
        ValueError: a table that depends on the number would be out of all proportion.
    """
    config = model_config.hf_text_config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        config.max_position_embeddings = min(
            config.max_position_embeddings, model_config.max_model_len
        )
    elif config.max_position_embeddings > LONGEST_SCALED_CONTEXT:
        raise ValueError(
            f"max_position_embeddings is {config.max_position_embeddings:,}; at most "
            f"{LONGEST_SCALED_CONTEXT:,} with scaled rotary embeddings"
        )


def _kv_spec(layers: dict[str, AttentionLayerBase]) -> FullAttentionSpec:
    """Return the KV shape that all layers share.

    Layers with a sliding window keep whole histories too, as vLLM does without its hybrid
    allocator; their attention still reads the window only.
    """
    if not layers or not all(isinstance(layer, Attention) for layer in layers.values()):
        raise ValueError("value networks need plain decoder attention in every layer")
    shapes = {
        (layer.num_kv_heads, layer.head_size, layer.head_size_v, layer.kv_cache_torch_dtype)
        for layer in layers.values()
    }
    if len(shapes) > 1:
        raise ValueError(f"attention layers of different KV shapes are not supported: {shapes}")
    num_kv_heads, head_size, head_size_v, dtype = shapes.pop()
    return FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        head_size_v=head_size_v,
        dtype=dtype,
    )
