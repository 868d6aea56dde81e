"""CUDA graphs of decoding steps: a small model's kernels are shorter than it takes to launch them.

Graphs are captured when a network is loaded, at the batch sizes that vLLM captures the target at. A
graph has its inputs at fixed places: a step copies them there, fills up to the captured size with
rows that read and write vLLM's null block, and replays.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.parallel_state import graph_capture

from server.worker.blocks import BLOCK_SIZE

PADDING_PLACE = BLOCK_SIZE - 1
"""Where rows that fill up a graph write: the null block's last place, which no trial run uses."""


class DecodeInputs(NamedTuple):
    """What a decoding step of a model reads, on the device; one token a row."""

    tokens: torch.Tensor  # int32 [num_rows]
    positions: torch.Tensor  # int64 [num_rows]
    slot_mapping: torch.Tensor  # int64 [num_rows], where in the KV cache the token's own go
    lengths: torch.Tensor  # int32 [num_rows], tokens of each row with this one
    row_starts: torch.Tensor  # int32 [num_rows + 1], 0, 1, 2, ...
    block_ids: torch.Tensor  # int32 [num_rows, max_blocks]

    @classmethod
    def padding(cls, num_rows: int, max_blocks: int, device: torch.device) -> "DecodeInputs":
        """Return inputs of rows that hold one token each, in the null block."""
        int32 = {"dtype": torch.int32, "device": device}
        return cls(
            torch.zeros(num_rows, **int32),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
            torch.full((num_rows,), PADDING_PLACE, dtype=torch.int64, device=device),
            torch.ones(num_rows, **int32),
            torch.arange(num_rows + 1, **int32),
            torch.zeros(num_rows, max_blocks, **int32),
        )

    def first(self, num_rows: int) -> "DecodeInputs":
        """Return views of the first rows."""
        return DecodeInputs(*(part[: num_rows + (part is self.row_starts)] for part in self))

    def fill(self, rows: "DecodeInputs") -> None:
        """Copy `rows` to the front, and make the others padding again."""
        num_rows = len(rows.tokens)
        for ours, theirs in (
            (self.tokens, rows.tokens),
            (self.positions, rows.positions),
            (self.slot_mapping, rows.slot_mapping),
            (self.lengths, rows.lengths),
        ):
            ours[:num_rows].copy_(theirs, non_blocking=True)
        self.block_ids[:num_rows, : rows.block_ids.shape[1]].copy_(rows.block_ids)
        if num_rows < len(self.tokens):
            self.positions[num_rows:].zero_()
            self.slot_mapping[num_rows:].fill_(PADDING_PLACE)
            self.lengths[num_rows:].fill_(1)
            self.block_ids[num_rows:, 0].zero_()


class GraphMemory:
    """What the graphs of all models in a worker share, as they run one after the other.

    The target's graphs have memory of their own: its hidden states may still be wanted when a
    network's graph is replayed.
    """

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None
        self._inputs: dict[tuple[int, int], DecodeInputs] = {}

    @property
    def pool(self) -> tuple[int, int]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def inputs(self, num_rows: int, max_blocks: int, device: torch.device) -> DecodeInputs:
        """Return the inputs that all graphs of this shape read."""
        key = num_rows, max_blocks
        if key not in self._inputs:
            self._inputs[key] = DecodeInputs.padding(num_rows, max_blocks, device)
        return self._inputs[key]


class DecodeGraphs:
    """The graphs of one model, by batch size.

    Attributes:
        sizes: numbers of rows that are captured, ascending.
    """

    def __init__(
        self, sizes: list[int], max_blocks: int, memory: GraphMemory, device: torch.device
    ) -> None:
        self.sizes = sizes
        self._memory = memory
        self._device = device
        self._inputs = memory.inputs(sizes[-1], max_blocks, device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def size_for(self, num_rows: int) -> int | None:
        """Return the smallest captured size that holds so many rows; None: there is none."""
        place = bisect_left(self.sizes, num_rows)
        return self.sizes[place] if place < len(self.sizes) else None

    def fill(self, size: int, rows: DecodeInputs) -> DecodeInputs:
        """Put `rows` where the graph of `size` reads them; returns all that it reads."""
        inputs = self._inputs.first(size)
        inputs.fill(rows)
        return inputs

    def capture(self, size: int, run: Callable[[DecodeInputs], torch.Tensor]) -> None:
        """Capture `run`, which returns hidden states, `[size, hidden_size]`."""
        inputs = self._inputs.first(size)
        run(inputs)  # kernels that are tuned or compiled when they are first used
        graph = torch.cuda.CUDAGraph()
        with graph_capture(self._device) as context:
            run(inputs)
            # Other threads of the worker go on to use CUDA meanwhile.
            with torch.cuda.graph(
                graph, self._memory.pool, context.stream, capture_error_mode="thread_local"
            ):
                hidden = run(inputs)
        self._graphs[size] = graph, hidden

    def replay(self, size: int) -> torch.Tensor:
        """Run the graph over what `fill` has put there.

        Returns:
            `[size, hidden_size]`, valid until any graph of the worker runs again.
        """
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden


def graph_sizes(config: VllmConfig, max_rows: int) -> list[int]:
    """Return the batch sizes to capture a network's decoding at; none where vLLM captures none."""
    compilation = config.compilation_config
    if compilation.cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
        return []
    return sorted(size for size in compilation.cudagraph_capture_sizes or () if size <= max_rows)
