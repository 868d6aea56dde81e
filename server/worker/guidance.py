"""One decoding step of guidance: the target's logits in, guided logits out.

This is the core that vLLM's two model runners share. It knows rows, networks and logits; the
adapters know how a runner announces rows and where it keeps tokens.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from vllm.logger import init_logger

from server.choice import Choice
from server.worker.blocks import TokensOf
from server.worker.network import Rows, ValueNetwork
from server.worker.residency import Residency
from server.worker.translation import TranslatedRow
from value_models.combine import add_value_logits

logger = init_logger(__name__)


class GuidedRow:
    """A request in the batch that chose value networks.

    Attributes:
        slot: names the row's place in every table of the worker, while it is in the batch; the
            adapter gives it one.
        translations: the row as networks of another vocabulary read it.
    """

    def __init__(self, choice: Choice, prompt_ids: list[int], output_ids: list[int]) -> None:
        self.choice = choice
        self.slot: int | None = None
        self.translations: dict[ValueNetwork, TranslatedRow] = {}
        self._prompt_ids = prompt_ids
        self._output_ids = output_ids  # vLLM's own list, which grows as tokens are sampled

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the history's tokens from `start` to before `stop`, as far as the host knows."""
        prompt_length = len(self._prompt_ids)
        tokens = self._prompt_ids[start:stop]
        if stop > prompt_length:
            tokens += self._output_ids[max(0, start - prompt_length) : stop - prompt_length]
        # Asynchronous scheduling holds the place of a token still on the device with -1.
        return tokens[: tokens.index(-1)] if -1 in tokens else tokens

    def translation(self, network: ValueNetwork) -> TranslatedRow | None:
        """Return the row as `network` reads it, if that is of another vocabulary."""
        if network.translator is None:
            return None
        if network not in self.translations:
            self.translations[network] = network.translator.follow(self.tokens)
        return self.translations[network]


class Batch(NamedTuple):
    """What a step needs to know of the rows of `logits`, guided or not."""

    lengths: np.ndarray  # int32 [num_rows], tokens of history, this step's input the last of them
    sampled: np.ndarray  # bool [num_rows], False: still in chunked prefill, its sample is discarded
    last_tokens: torch.Tensor  # int [num_rows] on the device, the last input token of each row


class _Assignment(NamedTuple):
    """The rows of a batch that one network steers."""

    network: ValueNetwork
    rows: np.ndarray  # int64 [num_guided]
    slots: np.ndarray  # int64 [num_guided]
    histories: list[TokensOf]
    translations: list[TranslatedRow]  # [num_guided], or empty where both vocabularies are one
    scales: torch.Tensor  # float32 [num_guided, 1] on the device

    def only(self, chosen: np.ndarray) -> "_Assignment":
        """Return it without the rows that are not chosen: bool `[num_guided]`."""
        if chosen.all():
            return self
        kept = np.flatnonzero(chosen)
        return _Assignment(
            self.network,
            self.rows[kept],
            self.slots[kept],
            [self.histories[i] for i in kept],
            [self.translations[i] for i in kept] if self.translations else [],
            self.scales[torch.from_numpy(kept)],
        )


class Guidance:
    """The rows that chose value networks, and one decoding step of theirs.

    Attributes:
        any_ended: whether `ended` may be true of any row.
    """

    def __init__(self, residency: Residency, device: torch.device) -> None:
        """`residency` has the networks, which may change between two steps."""
        self._residency = residency
        self._device = device
        self.any_ended = False
        self._rows: dict[int, GuidedRow] = {}
        self._revision = residency.revision
        self._assignments: list[_Assignment] = []
        self._failure_mask: tuple[torch.Tensor, torch.Tensor] | None = None

    def release(self, row: GuidedRow) -> None:
        """Forget a row that left the batch; it may come back as a new one."""
        for network in self._residency.networks():
            network.release(row.slot)

    def arrange(self, rows: dict[int, GuidedRow]) -> None:
        """Take note of where guided rows now are in the batch: index -> row."""
        self._rows, self._revision = rows, self._residency.revision
        chosen: dict[ValueNetwork, list[tuple[int, GuidedRow, float]]] = {}
        for index, row in sorted(rows.items()):
            for choice in row.choice.networks:
                network = self._residency.find(choice.name, choice.version)
                if network is not None:
                    chosen.setdefault(network, []).append((index, row, choice.scale))
        self.any_ended = any(map(self.ended, rows.values()))
        self._assignments = [self._assign(network, members) for network, members in chosen.items()]
        self._failure_mask = (
            torch.tensor(list(rows), dtype=torch.int64, device=self._device),
            torch.tensor(
                [row.choice.failure_token_id for row in rows.values()],
                dtype=torch.int64,
                device=self._device,
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
        if self._revision != self._residency.revision:
            self.arrange(self._rows)
        logits = logits.to(torch.float32)
        newest = cache(batch.last_tokens.tolist)  # waits for the device: once, and only if asked
        for assignment in self._assignments:
            if assignment.network.failure is None:
                self._guide(logits, assignment, batch, newest)
        if self._failure_mask is not None:
            logits.index_put_(self._failure_mask, logits.new_tensor(float("-inf")))
        return logits

    def ended(self, row: GuidedRow) -> bool:
        """Whether a row cannot go on.

        A network that it chose has failed, is not resident at all, or cannot read so much.
        """
        networks = [self._residency.find(c.name, c.version) for c in row.choice.networks]
        return any(network is None or network.failure is not None for network in networks) or any(
            translation.outgrown for translation in row.translations.values()
        )

    def fail(self, reason: str, *networks: ValueNetwork) -> None:
        """Mark networks as failed; without any, all of them: the step itself is broken."""
        self.any_ended = True
        for network in networks or self._residency.networks():
            network.fail(reason)
            logger.error("value network %s failed: %s", network, reason)

    def _assign(
        self, network: ValueNetwork, members: list[tuple[int, GuidedRow, float]]
    ) -> _Assignment:
        rows = [row for _, row, _ in members]
        translations = [t for row in rows if (t := row.translation(network)) is not None]
        return _Assignment(
            network,
            np.array([index for index, _, _ in members]),
            np.array([row.slot for row in rows]),
            [history.tokens for history in translations or rows],
            translations,
            torch.tensor([[scale] for _, _, scale in members], device=self._device),
        )

    def _guide(
        self,
        logits: torch.Tensor,
        assignment: _Assignment,
        batch: Batch,
        newest: Callable[[], list[int]],
    ) -> None:
        network = assignment.network
        columns = None
        began = time.perf_counter()
        try:
            assignment = assignment.only(self._ready(assignment, batch, newest))
            if not len(assignment.rows):
                return
            everything = len(assignment.rows) == len(batch.lengths)
            rows = None if everything else torch.from_numpy(assignment.rows).to(self._device)
            if network.translator is None:
                lengths = batch.lengths[assignment.rows]
                last_tokens = batch.last_tokens if everything else batch.last_tokens[rows]
                read = Rows(assignment.slots, lengths, last_tokens, assignment.histories, lengths)
            else:
                read = _translated(assignment, self._device)
                columns = network.translator.columns(assignment.translations)
            value = network.score(read)
        except BaseException as error:  # whatever it is, it must not reach the engine
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            logger.exception("value network %s threw", network)
            self.fail(f"it threw {type(error).__name__}: {error}", network)
            return
        # A sum is finite only if every logit is: one pass, one number to wait for.
        if not torch.isfinite(value.sum(dtype=torch.float32)):
            self.fail("its logits are not finite", network)
            return
        network.seconds += time.perf_counter() - began
        network.last_used = time.time()
        add_value_logits(logits, value, assignment.scales, rows, columns)

    def _ready(
        self, assignment: _Assignment, batch: Batch, newest: Callable[[], list[int]]
    ) -> np.ndarray:
        """Return which rows the network scores in this step, as bool `[num_guided]`.

        A network of another vocabulary reads what is new at first. It has no opinion on a row that
        waits, say for the rest of a character: the target alone goes on.
        """
        network = assignment.network
        ready = batch.sampled[assignment.rows]
        if network.translator is None:
            return ready
        for i in np.flatnonzero(ready).tolist():
            row, index = assignment.translations[i], assignment.rows[i]
            kept = row.advance(int(batch.lengths[index]), lambda index=index: newest()[index])
            network.rewind(assignment.slots[i], kept)
            if not row.waiting and len(row.ids) > network.max_context:
                row.outgrown = self.any_ended = True
            ready[i] = not (row.waiting or row.outgrown)
        return ready


def _translated(assignment: _Assignment, device: torch.device) -> Rows:
    """Return the rows in the tokens of their network, which is of another vocabulary."""
    rows = assignment.translations
    return Rows(
        assignment.slots,
        np.array([len(row.ids) for row in rows], dtype=np.int32),
        torch.tensor([row.ids[-1] for row in rows], dtype=torch.int32).to(device),
        assignment.histories,
        np.array([row.num_stable for row in rows], dtype=np.int32),
    )
