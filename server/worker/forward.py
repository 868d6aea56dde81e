"""One forward of a network's model: rows laid out for vLLM's attention, and run."""

from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from server.worker.attention import LAYERS
from server.worker.blocks import BLOCK_SIZE, BlockTable
from server.worker.bound import Run
from server.worker.graphs import DecodeGraphs, DecodeInputs, GraphMemory, graph_sizes
from server.worker.head import Head
from server.worker.loading import Pieces

AHEAD = 8
"""Steps whose tensors are made together: by the next, the code for it has left the cache."""


class _Next(NamedTuple):
    """Where the next token of each row is; all on the host."""

    positions: torch.Tensor  # int64 [num_rows], in the row
    places: torch.Tensor  # int64 [num_rows], in the pool
    lengths: torch.Tensor  # int32 [num_rows], of the row with it


class _DecodeRows:
    """Rows that decode together, laid out for as long as they and their blocks stay.

    Attributes:
        slots: int64 `[num_rows]`.
        revision: of the block table.
        row_starts: int32 `[num_rows + 1]` on the host, and on the device.
        block_ids: int32 `[num_rows, max_blocks]` on the device.
        longest: tokens of the longest row, with the one that comes next.
        next: of their tokens; None: a row has come to the end of its block.
    """

    next: _Next | None

    def __init__(
        self,
        table: BlockTable,
        slots: np.ndarray,
        lengths: np.ndarray,
        row_starts: tuple[torch.Tensor, torch.Tensor],
        block_ids: torch.Tensor,
    ) -> None:
        positions = lengths - 1
        self.slots = slots
        self.revision = table.revision
        self.row_starts = row_starts
        self.block_ids = block_ids
        self.longest = int(lengths.max())
        # For all steps until a row fills its block: numpy takes as long for one.
        num_steps = BLOCK_SIZE - int((positions % BLOCK_SIZE).max())
        later = np.arange(num_steps, dtype=np.int32)[:, None]
        places = np.stack((positions, table.places(slots, positions)))
        self._steps = zip(later[:, None] + places, later + lengths, strict=True)
        self._ready: list[tuple[bytes, _Next]] = []
        self._lengths = b""
        self._advance()

    def are(self, lengths: np.ndarray) -> bool:
        """Whether these are the lengths of the rows with the next token: int32 `[num_rows]`."""
        return self.next is not None and self._lengths == lengths.tobytes()

    def step(self) -> None:
        """Move on by a token each."""
        self.longest += 1
        self._advance()

    def _advance(self) -> None:
        if not self._ready:
            # Each tensor with a storage of its own: an offset into another would be compiled in.
            self._ready = [
                (lengths.tobytes(), _Next(*map(torch.from_numpy, (positions, places, lengths))))
                for (positions, places), lengths in islice(self._steps, AHEAD)
            ]
            self._ready.reverse()
        self._lengths, self.next = self._ready.pop() if self._ready else (b"", None)


class LayersMetadata:
    """Makes vLLM's metadata of attention: one for all layers of one sliding window.

    What it plans for a batch depends on the window. vLLM 0.32's CPU kernels plan for none where a
    model's layers differ, and then give a layer that has both a window and sinks wrong results.
    """

    def __init__(
        self,
        layers: dict[str, AttentionLayerBase],
        kv_layer: FullAttentionSpec,
        config: VllmConfig,
        device: torch.device,
    ) -> None:
        """For the arguments see `Forward`."""
        names: dict[int | None, list[str]] = {}
        for name, layer in layers.items():
            names.setdefault(layer.sliding_window, []).append(name)
        builder = next(iter(layers.values())).get_attn_backend().get_builder_cls()
        self._builders = [
            (alike, builder(kv_layer, alike, config, device)) for alike in names.values()
        ]

    def build(self, batch: CommonAttentionMetadata) -> dict[str, Any]:
        """Return it for a batch, by layer."""
        built: dict[str, Any] = {}
        for names, builder in self._builders:
            built |= dict.fromkeys(names, builder.build(0, batch))
        return built


class Forward:
    """Runs a model over rows whose keys and values are in a block table.

    Attributes:
        eager: run the model uncompiled, and without CUDA graphs.
        bound: runs the compiled model, with its weights looked up; None: the model does by itself.
        head: returns the logits of hidden states, as the model does or faster.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: dict[str, AttentionLayerBase],
        kv_layer: FullAttentionSpec,
        config: VllmConfig,
        table: BlockTable,
        device: torch.device,
    ) -> None:
        """
        Args:
            model: its layers are bound to the KV cache that `table` is about.
            layers: of attention, by name.
            kv_layer: the shape of each layer's KV cache.
            config: what vLLM runs the model with.
            table: says where rows have their keys and values.
            device: where the model is.
        """
        self.eager = False
        self.bound: Run | None = None
        self.head: Head = model.compute_logits
        self._model = model
        self._config = config
        self._table = table
        self._device = device
        self._is_on_host = device.type == "cpu"
        with set_current_vllm_config(config, check_compile=False):
            self._metadata = LayersMetadata(layers, kv_layer, config, device)
        # What vLLM's `set_forward_context` makes in each step, but for batches of several ranks.
        self._context = create_forward_context(
            {}, config, additional_kwargs={LAYERS: list(layers.values())}
        )
        self._row_starts = torch.arange(table.max_rows + 1, dtype=torch.int32)
        self._decode_rows: _DecodeRows | None = None
        self._graphs: DecodeGraphs | None = None

    def goes_on(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether these rows are those of the last step, longer by its token, in the same blocks.

        Args:
            slots: int64 `[num_rows]`; the same array again means the same rows.
            lengths: int32 `[num_rows]`, of each row with the token that is to be run.
        """
        rows = self._decode_rows
        return (
            rows is not None
            and rows.slots is slots
            and rows.revision == self._table.revision
            and rows.are(lengths)
        )

    def lay_out(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Get ready to decode rows that do not go on, see `goes_on`: they have their blocks."""
        on_host = self._row_starts[: len(slots) + 1]
        row_starts = on_host, on_host.to(self._device)
        blocks = self._to_device(self._table.block_ids[slots])
        self._decode_rows = _DecodeRows(self._table, slots, lengths, row_starts, blocks)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run one token of each row. The hot path: no Python per row.

        Args:
            tokens: int `[num_rows]` on the device, of rows that go on or were laid out.

        Returns:
            Hidden states `[num_rows, hidden_size]`, valid until the next forward.
        """
        rows = self._decode_rows
        placed = map(self._to_device, rows.next)
        inputs = DecodeInputs(tokens, *placed, rows.row_starts[1], rows.block_ids)
        graphs = None if self.eager else self._graphs
        size = None if graphs is None else graphs.size_for(len(tokens))
        if graphs is None or size is None:
            hidden = self._run_decode(inputs, rows)
        else:
            # Some backends plan the kernels' work here, into tensors that the graph reads.
            self._describe_decode(graphs.fill(size, inputs), None)
            hidden = graphs.replay(size)[: len(tokens)]
        rows.step()
        return hidden

    def extend(
        self,
        tokens: torch.Tensor,
        positions: np.ndarray,
        row_starts: np.ndarray,
        slots: np.ndarray,
        lengths: np.ndarray,
    ) -> torch.Tensor:
        """Run any number of tokens of each row.

        Args:
            tokens: int `[num_tokens]` on the device.
            positions: int32 `[num_tokens]`, each token's place in its row.
            row_starts: int32 `[num_rows + 1]`, where each row's tokens begin.
            slots: int64 `[num_rows]`.
            lengths: int32 `[num_rows]`, tokens of each row in the cache after this forward.

        Returns:
            Hidden states `[num_tokens, hidden_size]`.
        """
        queries, longest = np.diff(row_starts), int(lengths.max())
        places = self._table.places(np.repeat(slots, queries), positions)
        slot_mapping = self._to_device(places)
        metadata = self._metadata.build(
            CommonAttentionMetadata(
                query_start_loc=self._to_device(row_starts),
                query_start_loc_cpu=torch.from_numpy(row_starts),
                seq_lens=self._to_device(lengths),
                seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
                num_reqs=len(slots),
                num_actual_tokens=len(positions),
                max_query_len=int(queries.max()),
                max_seq_len=longest,
                block_table_tensor=self._to_device(self._table.first_blocks(slots, longest)),
                slot_mapping=slot_mapping,
            ),
        )
        return self._run(
            tokens, self._to_device(positions.astype(np.int64)), metadata, slot_mapping
        )

    def capture(self, memory: GraphMemory) -> Pieces:
        """Capture CUDA graphs of `decode`, one a piece, where vLLM captures the target's.

        Args:
            memory: shared by all models of the worker.
        """
        sizes = graph_sizes(self._config, self._table.max_rows)
        if not sizes:
            return
        graphs = DecodeGraphs(sizes, self._table.block_ids.shape[1], memory, self._device)
        for size in reversed(sizes):  # the largest first: the others fit into its memory
            graphs.capture(size, lambda inputs: self._run_decode(inputs, None))
            yield
        self._graphs = graphs

    @property
    def has_graphs(self) -> bool:
        """Whether there are graphs of decoding steps."""
        return self._graphs is not None

    def forget_graphs(self) -> None:
        """Free the graphs that were captured."""
        self._graphs = None

    def let_go(self) -> None:
        """Let go of graphs, and of what was made of weights. The model cannot be run any more."""
        self.forget_graphs()
        self.bound = None
        self.head = self._model.compute_logits

    def _describe_decode(self, inputs: DecodeInputs, rows: _DecodeRows | None) -> dict[str, Any]:
        """Return vLLM's metadata of a decoding step, by layer.

        Args:
            rows: those of `inputs`; None: for a graph, which holds for all lengths.
        """
        num_rows = inputs.tokens.shape[0]
        if rows is None:
            row_starts, lengths = self._row_starts[: num_rows + 1], None
            longest = self._table.max_tokens
        else:
            row_starts, lengths, longest = rows.row_starts[0], rows.next.lengths, rows.longest
        return self._metadata.build(
            CommonAttentionMetadata(
                query_start_loc=inputs.row_starts,
                query_start_loc_cpu=row_starts,
                seq_lens=inputs.lengths,
                seq_lens_cpu_upper_bound=lengths,
                num_reqs=num_rows,
                num_actual_tokens=num_rows,
                max_query_len=1,
                max_seq_len=longest,
                block_table_tensor=inputs.block_ids,
                slot_mapping=inputs.slot_mapping,
            ),
        )

    def _run_decode(self, inputs: DecodeInputs, rows: _DecodeRows | None) -> torch.Tensor:
        metadata = self._describe_decode(inputs, rows)
        return self._run(inputs.tokens, inputs.positions, metadata, inputs.slot_mapping)

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        metadata: dict[str, Any],
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """Run the model: `[num_tokens]` each, all on the device; `metadata` by layer."""
        context = self._context
        context.attn_metadata = metadata
        context.slot_mapping = dict.fromkeys(metadata, slot_mapping)
        context.skip_compiled = self.eager
        context.moe_layer_index = 0  # which layers of experts count up, one after the other
        run = self.run_model if self.eager or self.bound is None else self.bound
        with override_forward_context(context):
            return run(tokens, positions)

    def run_model(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the model itself in vLLM's forward context: `[num_tokens]` each, on the device."""
        hidden: torch.Tensor = self._model(input_ids=tokens, positions=positions)
        return hidden

    def _to_device(self, array: np.ndarray | torch.Tensor) -> torch.Tensor:
        if not self._is_on_host:
            return async_tensor_h2d(array, self._device)  # through pinned memory: nothing waits
        return torch.from_numpy(array) if isinstance(array, np.ndarray) else array
