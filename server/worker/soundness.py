"""Whether what networks answer is finite: a NaN in the logits would become token 0 in silence."""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from server.worker.network import Scores, ValueNetwork

FORCED = 1e30
"""A logit that decides, whatever comes after: more than vLLM's thinking budget gives its end."""

NOT_FINITE = "its logits are not finite"

LAG = 2
"""Steps after which a verdict is read; vLLM prepares one step while another one runs."""


class Soundness(Protocol):
    """Looks at each answer of a network before it is used."""

    def admits(self, network: ValueNetwork, scores: Scores, rows: torch.Tensor) -> bool:
        """Whether the scores may be used.

        Args:
            rows: int64 `[num_rows]` on the device, whose they are in the batch.
        """

    def end_rows(self, logits: torch.Tensor, rows: torch.Tensor, failure_ids: torch.Tensor) -> None:
        """End the rows whose scores in this step should not have been used.

        Args:
            logits: float32 `[num_rows, vocab_size]` of the step, changed in place.
            rows, failure_ids: int64 `[num_guided]` on the device, all guided rows and the tokens
                that end them.
        """

    def end_again(
        self, logits: torch.Tensor, rows: torch.Tensor, failure_ids: torch.Tensor
    ) -> None:
        """Keep them ended, at the end of the step: masks came since, which may exclude the tokens
        that end them. Arguments as those of `end_rows`."""

    def begin_step(self) -> None:
        """Have networks failed whose answers turned out not to be finite some steps ago."""

    def collect(self) -> None:
        """Have networks failed whose answers turned out not to be finite; waits for the device."""


def are_finite(scores: Scores) -> bool:
    """Whether all of them are; waits for the device."""
    # A sum is finite only if every logit is: one pass, one number. It is made in float32 in any
    # case; of float16 it would not fit into float16 again.
    total = scores.value.sum(dtype=torch.float32 if scores.value.dtype == torch.float16 else None)
    if scores.distances is not None:
        total = total + scores.distances.sum()
    return math.isfinite(total.item())  # of a tensor, it would be four operations


class Immediate:
    """Knows at once: for devices that nobody has to wait for."""

    def __init__(self, fail: Callable[[str, ValueNetwork], None]) -> None:
        self._fail = fail

    def admits(self, network: ValueNetwork, scores: Scores, rows: torch.Tensor) -> bool:
        if are_finite(scores):
            return True
        self._fail(NOT_FINITE, network)
        return False

    def end_rows(self, logits: torch.Tensor, rows: torch.Tensor, failure_ids: torch.Tensor) -> None:
        pass

    def end_again(
        self, logits: torch.Tensor, rows: torch.Tensor, failure_ids: torch.Tensor
    ) -> None:
        pass

    def begin_step(self) -> None:
        pass

    def collect(self) -> None:
        pass


class _Verdict(NamedTuple):
    """What one network's answers were like; on its way to the host."""

    network: ValueNetwork
    step: int
    is_finite: torch.Tensor  # bool [], on the host once `arrived`
    arrived: torch.cuda.Event | None


class Deferred:
    """Lets the device go on: rows are ended there, and the host learns of it in a later step.

    In which one does not depend on when a verdict arrives: tensor-parallel ranks must agree on it.
    """

    def __init__(self, fail: Callable[[str, ValueNetwork], None]) -> None:
        self._fail = fail
        self._step = 0
        self._verdicts: deque[_Verdict] = deque()
        self._finite: list[tuple[torch.Tensor, torch.Tensor]] = []  # of this step
        self._broken: torch.Tensor | None = None  # bool [num_rows] of this step, once they ended

    def admits(self, network: ValueNetwork, scores: Scores, rows: torch.Tensor) -> bool:
        finite = scores.value.sum(-1, dtype=torch.float32).isfinite()
        if scores.distances is not None:  # of some rows; which ones decides nothing here
            finite = finite & scores.distances.sum().isfinite()
        self._finite.append((rows, finite))
        on_host, arrived = finite.all(), None
        if on_host.is_cuda:
            on_host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(on_host, True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._verdicts.append(_Verdict(network, self._step, on_host, arrived))
        return True

    def end_rows(self, logits: torch.Tensor, rows: torch.Tensor, failure_ids: torch.Tensor) -> None:
        if not self._finite:
            return
        broken = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for scored, finite in self._finite:
            broken[scored] |= ~finite
        logits.masked_fill_(broken[:, None], float("-inf"))
        _force(logits, broken, rows, failure_ids)
        self._broken = broken

    def end_again(
        self, logits: torch.Tensor, rows: torch.Tensor, failure_ids: torch.Tensor
    ) -> None:
        # Whatever came since excludes tokens, and brings none back: one number a row is enough.
        if self._broken is not None:
            _force(logits, self._broken, rows, failure_ids)
        self._forget()

    def begin_step(self) -> None:
        self._forget()
        self._step += 1
        self._take(self._step - LAG)

    def collect(self) -> None:
        self._take(self._step)

    def _forget(self) -> None:
        self._finite.clear()
        self._broken = None

    def _take(self, last: int) -> None:
        """Take the verdicts of steps up to `last`."""
        while self._verdicts and self._verdicts[0].step <= last:
            network, _, is_finite, arrived = self._verdicts.popleft()
            if arrived is not None:
                arrived.synchronize()
            if network.failure is None and not is_finite:
                self._fail(NOT_FINITE, network)


def _force(
    logits: torch.Tensor, broken: torch.Tensor, rows: torch.Tensor, failure_ids: torch.Tensor
) -> None:
    forced = torch.where(broken[rows], FORCED, logits[rows, failure_ids])
    logits.index_put_((rows, failure_ids), forced)


def soundness(device: torch.device, fail: Callable[[str, ValueNetwork], None]) -> Soundness:
    """Return what suits the device. `fail(reason, network)` marks a network as failed."""
    return Immediate(fail) if device.type == "cpu" else Deferred(fail)
