"""Answers that are not finite end their own rows, and their network, with and without waiting."""

from typing import Any

import pytest
import torch

from server.worker.network import Scores
from server.worker.soundness import (
    LAG,
    NOT_FINITE,
    Deferred,
    Immediate,
    are_finite,
    soundness,
)

ROWS, VOCAB = 4, 6
INF = float("inf")


class Network:
    failure: str | None = None


def failing(failed: list[Any]) -> Any:
    def fail(reason: str, network: Network) -> None:
        network.failure = reason
        failed.append(network)

    return fail


def scores(*broken: int, distances: list[float] | None = None) -> Scores:
    value = torch.randn(3, VOCAB)
    for row in broken:
        value[row, 2] = float("nan")
    return Scores(value, None if distances is None else torch.tensor(distances))


def test_what_a_device_gets() -> None:
    assert isinstance(soundness(torch.device("cpu"), failing([])), Immediate)
    assert isinstance(soundness(torch.device("cuda"), failing([])), Deferred)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_may_come_to_more_than_their_format_holds(dtype: torch.dtype) -> None:
    value = torch.full((3, 4096), 60.0, dtype=dtype)  # float16 ends at 65504
    assert are_finite(Scores(value, None))
    value[1, 7] = INF
    assert not are_finite(Scores(value, None))


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_one_logit_is_enough(value: float) -> None:
    failed: list[Any] = []
    answer = scores()
    answer.value[1, 4] = value
    assert not Immediate(failing(failed)).admits(Network(), answer, torch.arange(3))
    assert [network.failure for network in failed] == [NOT_FINITE]


def test_distances_count_too() -> None:
    failed: list[Any] = []
    sound = Immediate(failing(failed))
    assert sound.admits(Network(), scores(distances=[0.5]), torch.arange(3))
    assert not sound.admits(Network(), scores(distances=[0.5, INF]), torch.arange(3))


def test_deferred_rows_are_ended_on_the_device_and_the_host_learns_later() -> None:
    failed: list[Any] = []
    sound = Deferred(failing(failed))
    whole, broken = Network(), Network()
    index = torch.tensor([0, 2, 3])
    assert sound.admits(whole, scores(), index)
    assert sound.admits(broken, scores(1), index)  # the second of its rows: 2
    logits = torch.randn(ROWS, VOCAB)
    logits[2, 1] = float("nan")
    expected = logits.clone()
    failure_ids = torch.tensor([5, 5, 4])
    sound.end_rows(logits, index, failure_ids)
    assert not failed
    assert torch.equal(logits[[0, 1, 3]], expected[[0, 1, 3]])
    assert logits[2].argmax() == 5 and (logits[2] == -INF).sum() == VOCAB - 1
    sound.collect()
    assert failed == [broken] and broken.failure == NOT_FINITE and whole.failure is None


@pytest.mark.parametrize("masked_last", [True, False])
def test_deferred_steps_do_not_see_each_other(masked_last: bool) -> None:
    sound = Deferred(failing([]))
    index, failure_ids = torch.tensor([1, 2, 3]), torch.tensor([5, 5, 5])
    sound.admits(Network(), scores(0), index)
    sound.end_rows(torch.zeros(ROWS, VOCAB), index, failure_ids)
    if masked_last:
        sound.end_again(torch.zeros(ROWS, VOCAB), index, failure_ids)
    else:
        sound.begin_step()
    logits = torch.randn(ROWS, VOCAB)
    expected = logits.clone()
    sound.end_again(logits, index, failure_ids)  # a batch that nobody guided
    sound.admits(Network(), scores(), index)
    sound.end_rows(logits, index, failure_ids)
    sound.end_again(logits, index, failure_ids)
    assert torch.equal(logits, expected)


def test_rows_are_ended_again_behind_masks_that_came_since() -> None:
    """`min_tokens` excludes the failure token, which is among the stop tokens."""
    sound = Deferred(failing([]))
    index = torch.tensor([0, 1, 2])
    sound.admits(Network(), scores(1), index)
    logits, failure_ids = torch.zeros(ROWS, VOCAB), torch.tensor([5, 5, 5])
    sound.end_rows(logits, index, failure_ids)
    logits[:, 5] = -INF
    sound.end_again(logits, index, failure_ids)
    assert logits[1].argmax() == 5 and (logits[1] == -INF).sum() == VOCAB - 1
    assert logits[0, 5] == -INF


def test_a_verdict_is_read_in_a_step_that_all_workers_agree_on() -> None:
    """Not whenever it arrives, but it is waited for."""
    waited: list[str] = []

    class Event:
        def synchronize(self) -> None:
            waited.append("for the device")

    failed: list[Any] = []
    sound = Deferred(failing(failed))
    sound.begin_step()
    sound.admits(Network(), scores(2), torch.arange(3))
    event: Any = Event()
    sound._verdicts[0] = sound._verdicts[0]._replace(arrived=event)
    for _ in range(LAG - 1):
        sound.begin_step()
    assert not failed and not waited
    sound.begin_step()
    assert len(failed) == 1 and waited
