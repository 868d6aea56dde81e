"""One model of a value network: a vLLM model beside the target, with KV blocks of its own."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from vllm.config import CompilationMode, VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

from server.worker.attention import make_direct
from server.worker.blocks import BlockPool, BlockTable, KVShape, TokensOf
from server.worker.compilation import CompiledForwards
from server.worker.configuration import kv_spec, model_config
from server.worker.forward import Forward
from server.worker.loading import (
    Pieces,
    construct,
    load_weights,
    release_weights,
    weights_bytes,
)
from server.worker.trial import Trial
from value_models.store import ModelFolder


class Rows(NamedTuple):
    """The rows of one decoding step that one network steers."""

    slots: np.ndarray  # int64 [num_rows], see BlockTable
    lengths: np.ndarray  # int32 [num_rows], tokens of history, this step's input the last of them
    last_tokens: torch.Tensor  # int [num_rows] on the device, this step's input tokens
    histories: Sequence[TokensOf]  # [num_rows], each row's tokens as far as the host knows
    num_stable: np.ndarray  # int32 [num_rows], leading tokens of history that will never change
    on_device: torch.Tensor | None = None  # int32 [max_rows, max_tokens], histories by slot, if so

    def at(self, indices: torch.Tensor) -> "Rows":
        """Return some of the rows. `indices`: int64 `[num_chosen]` on the host."""
        chosen = indices.numpy()
        return Rows(
            self.slots[chosen],
            self.lengths[chosen],
            self.last_tokens[indices.to(self.last_tokens.device)],
            [self.histories[i] for i in chosen],
            self.num_stable[chosen],
            self.on_device,
        )


class NetworkModel:
    """One model in a worker.

    Made by `build`, then bound to a pool of KV blocks by `bind` and tried by `warm_up`; from then
    on it scores rows.

    Attributes:
        path: of its checkpoint; what it is called in logs.
        config: what vLLM runs it with.
        vocab_size: its number of logits.
        longest: tokens of the longest sequence that it can read.
        weights_bytes: memory of the weights in this worker.
        kv_shape: decides which pools it can take blocks from.
        num_tokens: that it has computed.
        pool: where its KV blocks are; None before it is bound.
        table: which rows have which of them; set by `bind`.
    """

    table: BlockTable

    @classmethod
    def build(
        cls,
        folder: ModelFolder,
        target_config: VllmConfig,
        translated: bool,
        forwards: CompiledForwards,
        may_compile: bool,
        device: torch.device,
    ) -> Generator[None, None, "NetworkModel"]:
        """Load a model in short pieces; the generator returns it.

        Args:
            folder: checked by `value_models.store`; not read any more once this has ended.
            target_config: the engine's own configuration; it is not changed.
            translated: whether it reads another vocabulary than the target's.
            forwards: those compiled in the worker; `warm_up` may add this model's.
            may_compile: take the seconds to compile, if no model of this architecture has.
            device: where the target's logits are.

        Raises:
            ValueError: the weights are not those of its configuration, or its attention cannot
                share one paged KV cache.
        """
        config = model_config(folder.path, target_config, translated)
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
        return cls(folder, model, num_bytes, config, target_config, device)

    def __init__(
        self,
        folder: ModelFolder,
        model: torch.nn.Module,
        num_bytes: int,
        config: VllmConfig,
        target_config: VllmConfig,
        device: torch.device,
    ) -> None:
        self.path: Path = folder.path
        self.config = config
        self.vocab_size = folder.vocab_size
        self.longest: int = config.model_config.max_model_len
        self.weights_bytes = num_bytes
        self.num_tokens = 0
        self._device = device
        self._model = model
        self._layers = get_layers_from_vllm_config(config, AttentionLayerBase)
        self._is_direct = make_direct(self._layers.values())
        config.cache_config.kv_cache_layout = get_supported_kv_cache_layouts(
            {layer.get_attn_backend() for layer in self._layers.values()}
        )[0].name
        self.kv_shape = KVShape(kv_spec(self._layers), len(self._layers))
        self.pool: BlockPool | None = None
        scheduler = target_config.scheduler_config
        self._max_rows = scheduler.max_num_seqs
        self._max_tokens = max(scheduler.max_num_batched_tokens, self._max_rows)
        # A client may send, and another processor sample, ids that only the target has.
        self._lacks_ids = self.vocab_size < target_config.model_config.get_vocab_size()

    def bind(self, pool: BlockPool, max_context: int, salt: str) -> None:
        """Take KV blocks from `pool`.

        Args:
            pool: of this model's `kv_shape`, for sequences of `max_context` tokens.
            max_context: the longest sequence that it will be given.
            salt: keeps its cached prefixes from those of all other models, before and after.
        """
        self.pool = pool
        self.table = pool.new_table(self._max_rows, max_context, salt)
        for layer, cache in zip(self._layers.values(), pool.layer_caches, strict=True):
            layer.bind_kv_cache(cache)
        self._forward = Forward(
            self._model, self._layers, self.kv_shape.layer, self.config, self.table, self._device
        )

    def warm_up(self, forwards: CompiledForwards) -> Pieces:
        """Try the model as it will run: what cannot must be known before requests come.

        Args:
            forwards: as given to `build`.

        Raises:
            RuntimeError: vLLM's kernels cannot run the model's shape.
        """
        yield  # all workers have come so far: what follows may wait for the others
        yield from self.trial().run(forwards, without_names=self._is_direct)

    def trial(self) -> Trial:
        """Return what tries the model, which is bound and has no rows."""
        return Trial(
            self.path,
            self._model,
            self._forward,
            self.table,
            self.config,
            self.vocab_size,
            self._device,
        )

    def free(self) -> None:
        """Give back weights and KV blocks. The model must not be used any more."""
        if self.pool is not None:
            self.pool.remove_table(self.table)
            self._forward.let_go()
        release_weights(self._model)
        self.config.compilation_config.static_forward_context.clear()

    def score(self, rows: Rows) -> torch.Tensor:
        """Return the next-token logits after each row's history.

        Only tokens that are not yet in the KV cache are computed, in one forward where they fit.

        Returns:
            `[num_rows, vocab_size]` in the model's dtype.
        """
        if self._lacks_ids:
            rows = rows._replace(last_tokens=rows.last_tokens.clamp(max=self.vocab_size - 1))
        if self._forward.goes_on(rows.slots, rows.lengths) or self._begin_decoding(rows):
            hidden = self._decode(rows.slots, rows.lengths, rows.last_tokens)
        else:
            hidden = self._extend(rows)
        self.table.last_used[rows.slots] = self.pool.tick()
        return self._forward.head(hidden)

    def read(self, rows: Rows) -> None:
        """Bring rows' histories into the KV cache, for steps to come.

        One forward at most, and only where there is room: nobody else's blocks are taken for it.
        """
        table = self.table
        table.last_used[rows.slots] = self.pool.tick()
        owing = np.flatnonzero(table.computed[rows.slots] < rows.lengths).tolist()
        part = self._next_part(rows, owing, may_drop=False)
        if part:
            self._run_part(rows, part, [])

    def score_history(self, slot: int, tokens: TokensOf, start: int, stop: int) -> torch.Tensor:
        """Return the logits behind each of one row's tokens from `start` to before `stop`.

        Whatever lies before is computed if it is not yet, and these tokens in any case: their
        logits are not kept. The slot's sequence then ends at `stop`. It may share blocks with other
        rows through the prefix cache, and writes into them what they hold already, but for
        rounding: their tokens are the same. No other row reads them meanwhile, as all of them run
        in forwards of their own.

        Args:
            slot: may be open or not; if not, it is opened without a look into the prefix cache.
            tokens: of the sequence; all before `stop` are known to the host.
            start: less than `stop`.
            stop: at most `max_context`.

        Returns:
            `[stop - start, vocab_size]` in the model's dtype.
        """
        table = self.table
        table.last_used[slot] = self.pool.tick()
        table.rewind(slot, start)
        if slot not in table.requests:
            table.open(slot, tokens, num_stable=0)
        logits = []
        while (begin := int(table.computed[slot])) < stop:
            end = min(stop, begin + self._max_tokens)
            table.held.add(slot)
            # Which tokens are stable is known when the row is scored: its blocks are shared then.
            fits = table.reserve(slot, tokens, end, num_stable=0)
            table.held.clear()
            assert fits, "the pool holds less than one context"
            hidden = self._run_span(slot, tokens, begin, end)
            if end > start:
                logits.append(self._forward.head(hidden[max(0, start - begin) :]))
        return torch.cat(logits)

    def rewind(self, slot: int, length: int) -> None:
        """Compute a slot's history anew behind its first `length` tokens: they were rewritten."""
        self.table.rewind(slot, length)

    def release(self, slot: int) -> None:
        """Forget a slot's history. Its full blocks stay in the prefix cache."""
        self.table.release(slot)

    def _decode(self, slots: np.ndarray, lengths: np.ndarray, tokens: torch.Tensor) -> torch.Tensor:
        """Run one token of each row, which are laid out. The hot path: no Python per row."""
        hidden = self._forward.decode(tokens)
        self.table.computed[slots] = lengths
        self.num_tokens += len(slots)
        return hidden

    def _begin_decoding(self, rows: Rows) -> bool:
        """Lay out rows that owe one token each; False: some owe more, or there is no room."""
        owe_one = self.table.computed[rows.slots] + 1 == rows.lengths
        if not (owe_one.all() and self._make_room(rows)):
            return False
        self._forward.lay_out(rows.slots, rows.lengths)
        return True

    def _make_room(self, rows: Rows) -> bool:
        """Find blocks for rows whose last one is full; False: not for all of them."""
        table = self.table
        full = np.flatnonzero(rows.lengths > table.capacity[rows.slots]).tolist()
        if not all(int(rows.slots[index]) in table.requests for index in full):
            return False  # a row of one token, which is not open yet
        if not full:
            return True
        table.held.update(rows.slots.tolist())
        try:
            return all(
                table.reserve(
                    int(rows.slots[index]),
                    rows.histories[index],
                    int(rows.lengths[index]),
                    int(rows.num_stable[index]),
                )
                for index in full
            )
        finally:
            table.held.clear()

    def _extend(self, rows: Rows) -> torch.Tensor:
        """Run whatever each row still owes, in as many forwards as memory asks for.

        Returns:
            The last hidden state of each row, `[num_rows, hidden_size]`.
        """
        table = self.table
        for index, slot in enumerate(rows.slots.tolist()):
            if slot in table.requests and table.computed[slot] >= rows.lengths[index]:
                table.release(slot)  # the history was cut short
        order: list[int] = []
        states: list[torch.Tensor] = []
        pending = list(range(len(rows.slots)))
        while pending:
            part = self._next_part(rows, pending)
            assert part, "the pool holds less than one context"
            finished = [i for i, (index, _, end) in enumerate(part) if end == rows.lengths[index]]
            states.append(self._run_part(rows, part, finished))
            done = [part[i][0] for i in finished]
            order += done
            pending = [index for index in pending if index not in done]
        hidden = states[0] if len(states) == 1 else torch.cat(states)
        if order == sorted(order):
            return hidden
        return hidden[torch.tensor(np.argsort(order), device=self._device)]

    def _next_part(
        self, rows: Rows, pending: Sequence[int], may_drop: bool = True
    ) -> list[tuple[int, int, int]]:
        """Choose what to run in one forward: (index, first token, end) of as many rows as fit."""
        table = self.table
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
                if not table.reserve(slot, tokens, stop, num_stable, may_drop):
                    table.held.discard(slot)
                    break
                part.append((index, start, stop))
                budget -= stop - start
        finally:
            table.held.clear()
        return part

    def _run_part(
        self, rows: Rows, part: Sequence[tuple[int, int, int]], finished: Sequence[int]
    ) -> torch.Tensor:
        """Run one part and return the last hidden state of its finished rows."""
        slots = rows.slots[[index for index, _, _ in part]]
        stops = np.array([stop for _, _, stop in part], dtype=np.int32)
        row_starts = np.zeros(len(part) + 1, dtype=np.int32)
        np.cumsum([stop - start for _, start, stop in part], out=row_starts[1:])
        positions = np.concatenate(
            [np.arange(start, stop, dtype=np.int32) for _, start, stop in part]
        )
        token_ids = self._tokens_of(rows, part, slots, row_starts, positions)
        last = torch.from_numpy(row_starts[1:] - 1).to(self._device, torch.int64)[list(finished)]
        newest = [part[i][0] for i in finished]
        token_ids[last] = rows.last_tokens[newest].to(token_ids.dtype)
        hidden = self._run(token_ids, positions, row_starts, slots, stops)
        return hidden[last]

    def _tokens_of(
        self,
        rows: Rows,
        part: Sequence[tuple[int, int, int]],
        slots: np.ndarray,
        row_starts: np.ndarray,
        positions: np.ndarray,
    ) -> torch.Tensor:
        """Return the tokens of one part, int32 `[num_tokens]` on the device; of those that have
        not reached the host yet, which a row's newest may not have, any."""
        if rows.on_device is not None:
            places = np.stack((np.repeat(slots, np.diff(row_starts)), positions))
            at, position = torch.from_numpy(places).to(self._device, non_blocking=True)
            return rows.on_device[at, position]
        ids = np.zeros(len(positions), dtype=np.int32)
        for (i, start, stop), row_start in zip(part, row_starts, strict=False):
            known = rows.histories[i](start, stop)
            ids[row_start : row_start + len(known)] = known
        return torch.from_numpy(ids).to(self._device, non_blocking=True)

    def _run_span(self, slot: int, tokens: TokensOf, start: int, stop: int) -> torch.Tensor:
        """Run one row's next tokens and return all of their last hidden states."""
        ids = torch.tensor(tokens(start, stop), dtype=torch.int32).to(self._device)
        assert len(ids) == stop - start, "tokens are missing on the host"
        return self._run(
            ids,
            np.arange(start, stop, dtype=np.int32),
            np.array([0, stop - start], dtype=np.int32),
            np.array([slot]),
            np.array([stop], dtype=np.int32),
        )

    def _run(
        self,
        token_ids: torch.Tensor,
        positions: np.ndarray,
        row_starts: np.ndarray,
        slots: np.ndarray,
        stops: np.ndarray,
    ) -> torch.Tensor:
        """Run tokens of any rows, see `Forward.extend`, and take note that they are computed."""
        token_ids = token_ids.clamp_(0, self.vocab_size - 1)
        hidden = self._forward.extend(token_ids, positions, row_starts, slots, stops)
        self.table.computed[slots] = stops
        self.table.revision += 1
        self.num_tokens += len(positions)
        return hidden
