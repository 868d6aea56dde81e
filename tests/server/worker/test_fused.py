"""Rows that are more than a sum."""

import pytest
import torch

from server.choice import Choice, ChosenNetwork
from server.worker import fused as module
from server.worker.assignment import FusedRows
from server.worker.fused import FusedBatch
from server.worker.history import ListedHistory
from server.worker.row import GuidedRow
from value_models.fusion import Fusion, solve_weights

CPU = torch.device("cpu")


def test_rows_that_are_solved_in_parts_are_solved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, num_networks, vocab_size = 7, 2, 50
    torch.manual_seed(0)
    batch = FusedBatch(torch.randn(num_rows, vocab_size), num_networks)
    places = torch.arange(num_rows)
    for network in range(num_networks):
        which = torch.full_like(places, network)
        batch.add(places, which, torch.randn(num_rows, vocab_size), None)
        batch.add_distances(places, which, torch.rand(num_rows))
    scales, dynamic = torch.full((num_rows, num_networks), 2.0), torch.tensor([0, 2, 3, 4, 6])
    whole = batch.guide(scales, dynamic, None)
    sizes = []

    def recorded(*args: torch.Tensor) -> Fusion:
        sizes.append(len(args[0]))
        return solve_weights(*args)

    monkeypatch.setattr(module, "solve_weights", recorded)
    monkeypatch.setattr(module, "SOLVED_AT_ONCE", 2 * num_networks * vocab_size)
    parts = batch.guide(scales, dynamic, None)
    assert sizes == [2, 2, 1]
    assert whole.fusion is not None and parts.fusion is not None
    for one, other in zip(whole.fusion, parts.fusion, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole.logits, parts.logits)


def test_a_floor_leaves_rows_alone_that_are_not_guided_yet() -> None:
    """They are there to be explained only; the target's logits come out to the last bit."""
    networks = (ChosenNetwork("qa", "1", 1.0),)
    waiting = Choice(networks, 49, floor=0.05, after=(3,), explain="file")
    rows = FusedRows.of([(0, GuidedRow(waiting, ListedHistory([1, 2], [])))], CPU)
    torch.manual_seed(1)
    target = torch.randn(1, 5000) * 3
    guided = rows.take(target).guide(rows.scales, rows.dynamic, rows.floor)
    assert torch.equal(guided.logits, target)
