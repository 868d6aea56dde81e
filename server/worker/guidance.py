"""One decoding step of guidance: the target's logits in, guided logits out.

This is the core that vLLM's two model runners share. It knows rows, networks and logits; the
adapters know how a runner announces rows and where it keeps tokens.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from vllm.logger import init_logger

from server.run_directory import EXPLAIN
from server.worker.assignment import Assignment, FusedRows, assign
from server.worker.explanations import Explained, Explanations
from server.worker.fused import FusedBatch
from server.worker.network import Rows, ValueNetwork
from server.worker.residency import Residency
from server.worker.row import GuidedRow
from server.worker.soundness import soundness
from value_models.combine import add_value_logits
from value_models.explain import explain

logger = init_logger(__name__)


class Batch(NamedTuple):
    """What a step needs to know of the rows of `logits`, guided or not."""

    lengths: np.ndarray  # int32 [num_rows], tokens of history, this step's input the last of them
    sampled: np.ndarray  # bool [num_rows], False: still in chunked prefill, its sample is discarded
    last_tokens: torch.Tensor  # int [num_rows] on the device, the last input token of each row
    request_ids: Sequence[str]  # [num_rows]
    history: torch.Tensor | None = None
    """Int32 `[max_rows, max_model_len]` on the device: the tokens of each row, by its slot, this
    step's input included; None: they are on the host only, see `GuidedRow.tokens`."""

    @property
    def all_sampled(self) -> bool:
        """Whether all are sampled."""
        return b"\0" not in self.sampled.tobytes()  # quicker than numpy's reductions


class Guidance:
    """The rows that chose value networks, and one decoding step of theirs.

    Attributes:
        residency, device: as given.
        any_ended: whether `ended` may be true of any row.
        explanations: of rows whose next token is about to be sampled.
    """

    def __init__(self, residency: Residency, device: torch.device, run_dir: Path | None) -> None:
        """
        Args:
            residency: has the networks, which may change between two steps.
            device: where logits are.
            run_dir: where explanations are written; None: nobody asks for any.
        """
        self.residency = residency
        self.device = device
        self.any_ended = False
        self.explanations = Explanations((run_dir or Path()) / EXPLAIN)
        self._rows: dict[int, GuidedRow] = {}
        self._controlled: list[tuple[int, GuidedRow]] = []
        self._revision = residency.revision
        self._assignments: list[Assignment] = []
        self._fused: FusedRows | None = None
        self._soundness = soundness(device, self.fail)
        self._failure_tokens: tuple[torch.Tensor, torch.Tensor] | None = None
        self._excluded = torch.tensor(float("-inf"), device=device)

    def release(self, row: GuidedRow) -> None:
        """Forget a row that left the batch; it may come back as a new one."""
        for chosen in row.choice.networks:
            network = self.residency.find(chosen.name, chosen.version)
            if network is not None:
                network.release(row.slot)

    def arrange(self, rows: dict[int, GuidedRow]) -> None:
        """Take note of where guided rows now are in the batch: index -> row."""
        self._rows, self._revision = rows, self.residency.revision
        ordered = sorted(rows.items())
        self._controlled = [(index, row) for index, row in ordered if row.control is not None]
        self.any_ended = any(map(self.ended, rows.values()))
        fused = [(i, r) for i, r in ordered if r.is_fused and (r.active or r.choice.explain)]
        self._fused = FusedRows.of(fused, self.device) if fused else None
        self._assignments = assign(ordered, self._fused, self.residency.find, self.device)
        self._failure_tokens = (
            torch.tensor(list(rows), dtype=torch.int64, device=self.device),
            torch.tensor(
                [row.choice.failure_token_id for row in rows.values()],
                dtype=torch.int64,
                device=self.device,
            ),
        )

    def step(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return guided logits for one decoding step.

        A network that throws or whose logits are not finite is marked failed; nothing is raised.

        Args:
            logits: `[num_rows, vocab_size]` of the target, grammar masks applied; may be changed.
            batch: the same rows.

        Returns:
            float32 `[num_rows, vocab_size]`; rows without guidance are exactly the target's.
        """
        newest = _OnHost(batch.last_tokens)
        self._soundness.begin_step()
        turned = self._follow_controls(batch, newest) if self._controlled else False
        if turned or self._revision != self.residency.revision:
            self.arrange(self._rows)
        logits = logits.to(torch.float32)
        fused = None if self._fused is None else self._fused.take(logits)
        for assignment in self._assignments:
            if assignment.network.failure is None:
                self._guide(logits, fused, assignment, batch, newest)
        if fused is not None:
            try:
                self._fuse(logits, fused, batch)
            except Exception:  # memory, say: only these rows have failed, not their networks
                logger.exception("guidance: rows could not be fused")
                self.any_ended = True
                for row in self._fused.members:
                    row.failed = True
        if self._failure_tokens is not None:
            logits.index_put_(self._failure_tokens, self._excluded)
            self._soundness.end_rows(logits, *self._failure_tokens)
        return logits

    def end_unsound(self, logits: torch.Tensor) -> None:
        """End rows of this step's answers that were not finite, once more: masks came since.

        Args:
            logits: float32 `[num_rows, vocab_size]` of the step, after all masks of vLLM's.
        """
        if self._failure_tokens is not None:
            self._soundness.end_again(logits, *self._failure_tokens)

    def ended(self, row: GuidedRow) -> bool:
        """Whether a row cannot go on.

        A network that it chose has failed, is not resident at all, or cannot read so much; or the
        row itself has failed.
        """
        if row.failed:
            return True
        if row.is_done:
            return False
        networks = [self.residency.find(c.name, c.version) for c in row.choice.networks]
        return any(network is None or network.failure is not None for network in networks) or any(
            translation.outgrown for translation in row.translations.values()
        )

    def fail(self, reason: str, *networks: ValueNetwork) -> None:
        """Mark networks as failed; without any, all of them: the step itself is broken."""
        self.any_ended = True
        for network in networks or self.residency.networks():
            network.fail(reason)
            logger.error("value network %s failed: %s", network, reason)

    def caught(self, network: ValueNetwork, error: BaseException) -> None:
        """Mark a network that threw as failed: whatever it is, it must not reach the engine."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error
        logger.exception("value network %s threw", network)
        self.fail(f"it threw {type(error).__name__}: {error}", network)

    def collect(self) -> None:
        """Learn what the device has found out: whether networks' logits were finite."""
        self._soundness.collect()

    def _follow_controls(self, batch: Batch, newest: Callable[[], list[int]]) -> bool:
        """Let rows begin and end to be guided; returns whether any did."""
        turned = False
        for index, row in self._controlled:
            if not batch.sampled[index]:
                continue
            before = row.active, row.is_done
            length = int(batch.lengths[index])
            row.control.advance(
                row.num_generated(length),
                lambda start, row=row, index=index, length=length: row.generated(
                    start, length, newest()[index]
                ),
            )
            if (row.active, row.is_done) != before:
                turned = True
                if not row.active:
                    self.release(row)
                    row.translations.clear()
        return turned

    def _guide(
        self,
        logits: torch.Tensor,
        fused: FusedBatch | None,
        assignment: Assignment,
        batch: Batch,
        newest: Callable[[], list[int]],
    ) -> None:
        """Add what one network thinks to its rows; where they are fused, to `fused`."""
        network = assignment.network
        began, columns = time.perf_counter(), None
        try:
            scored, owed = self._divide(assignment, batch, newest)
            if len(scored.rows):
                read = self._rows_of(scored, batch)
                scores = network.score(read, scored.dynamic if scored.any_dynamic else None)
                if network.translator is not None:
                    columns = network.translator.columns(scored.translations)
            if owed is not None:
                network.read(owed)
        except BaseException as error:
            self.caught(network, error)
            return
        if not len(scored.rows) or not self._soundness.admits(network, scores, scored.index):
            return
        network.seconds += time.perf_counter() - began
        network.last_used = time.time()
        if fused is None or scored.is_plain:
            rows = None if len(scored.rows) == len(logits) else scored.index
            add_value_logits(logits, scores.value, scored.scales, rows, columns)
        else:
            scored.divide(logits, fused, scores, columns)

    def _fuse(self, logits: torch.Tensor, fused: FusedBatch, batch: Batch) -> None:
        rows = self._fused
        guided = fused.guide(rows.scales, rows.dynamic, rows.floor)
        logits.index_copy_(0, rows.index, guided.logits)
        self.explanations.forget()
        if not self.explanations.wanted:
            return
        asked = [place for place, row in enumerate(rows.members) if row.choice.explain]
        asked = [place for place in asked if batch.sampled[rows.indices[place]]]
        if not asked:
            return
        present = fused.present.tolist()
        solved = {} if rows.dynamic is None else _places(rows.dynamic.tolist())
        notes = []
        for place in asked:
            row, index = rows.members[place], rows.indices[place]
            networks = [n for n, is_present in enumerate(present[place]) if is_present]
            notes.append(
                Explained(
                    index,
                    place,
                    row.choice.explain,
                    batch.request_ids[index],
                    row.num_generated(int(batch.lengths[index])),
                    networks,
                    row.active,
                    solved.get(place) if networks else None,
                )
            )
        found = explain(fused.target, guided.logits, fused.values, guided.weights, fused.restricted)
        self.explanations.note(notes, found, guided.weights, guided.fusion)

    def _divide(
        self, assignment: Assignment, batch: Batch, newest: Callable[[], list[int]]
    ) -> tuple[Assignment, Rows | None]:
        """Return the rows that the network scores in this step, and what else it reads.

        Rows in chunked prefill are not sampled. The network follows them chunk by chunk, or a long
        prompt would keep everyone waiting at its end.
        """
        translated = assignment.network.translator is not None
        if batch.all_sampled and not translated:
            return assignment, None
        ready = sampled = batch.sampled[assignment.rows]
        if translated:
            ready = self._advance(assignment, batch, newest)
        scored = assignment.only(ready)
        if scored is assignment or sampled.all():
            return scored, None
        owing = assignment.follows & ~sampled
        if translated:
            # A beginning may be longer than the whole prompt, and what may be rewritten waits.
            longest = assignment.network.max_context
            owing &= [0 < row.num_stable <= longest for row in assignment.translations]
        owed = self._rows_of(assignment.only(owing), batch)
        if translated:
            owed = owed._replace(lengths=owed.num_stable)
        return scored, owed

    def _advance(
        self, assignment: Assignment, batch: Batch, newest: Callable[[], list[int]]
    ) -> np.ndarray:
        """Have a network of another vocabulary read what is new; returns bool `[num_guided]`.

        True are rows that it scores in this step. It has no opinion on a row that waits, say for
        the rest of a character: the target alone goes on.
        """
        network = assignment.network
        ready = batch.sampled[assignment.rows]
        for i, row in enumerate(assignment.translations):
            index = assignment.rows[i]
            kept = row.advance(int(batch.lengths[index]), lambda index=index: newest()[index])
            network.rewind(assignment.slots[i], kept)
            if ready[i] and not row.waiting and len(row.ids) > network.max_context:
                row.outgrown = self.any_ended = True
            ready[i] &= not (row.waiting or row.outgrown)
        return ready

    def _rows_of(self, assignment: Assignment, batch: Batch) -> Rows:
        """Return rows as their network reads them."""
        if assignment.network.translator is not None:
            return _translated(assignment, self.device)
        lengths, last_tokens = batch.lengths, batch.last_tokens
        if len(assignment.rows) != len(lengths):
            lengths, last_tokens = lengths[assignment.rows], last_tokens[assignment.index]
        return Rows(
            assignment.slots, lengths, last_tokens, assignment.histories, lengths, batch.history
        )


class _OnHost:
    """Tokens of the device on the host. Waits for the device: once, and only if asked."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens
        self._listed: list[int] | None = None

    def __call__(self) -> list[int]:
        if self._listed is None:
            self._listed = self._tokens.tolist()
        return self._listed


def _places(rows: Sequence[int]) -> dict[int, int]:
    return {row: place for place, row in enumerate(rows)}


def _translated(assignment: Assignment, device: torch.device) -> Rows:
    """Return the rows in the tokens of their network, which is of another vocabulary."""
    rows = assignment.translations
    return Rows(
        assignment.slots,
        np.array([len(row.ids) for row in rows], dtype=np.int32),
        torch.tensor([row.ids[-1] for row in rows], dtype=torch.int32).to(device),
        assignment.histories,
        np.array([row.num_stable for row in rows], dtype=np.int32),
    )
