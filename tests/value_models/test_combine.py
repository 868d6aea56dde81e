"""Adding value logits: which rows change, and what stays excluded."""

import math

import pytest
import torch

from value_models.combine import add_value_logits

INF = float("inf")


def test_adds_scaled_logits_to_the_chosen_rows_only() -> None:
    logits = torch.zeros(3, 4)
    value = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    add_value_logits(logits, value, torch.tensor([[0.5], [-2.0]]), torch.tensor([2, 0]))
    assert logits.tolist() == [[-8, -6, -4, -2], [0, 0, 0, 0], [0.5, 1, 1.5, 2]]


def test_all_rows_in_order_is_the_same_as_naming_them() -> None:
    value = torch.randn(3, 6, dtype=torch.bfloat16)
    named, in_order = torch.ones(3, 8), torch.ones(3, 8)
    add_value_logits(named, value, 0.7, torch.arange(3))
    add_value_logits(in_order, value, 0.7)
    assert torch.equal(named, in_order)


def test_what_the_target_excludes_stays_excluded() -> None:
    logits = torch.tensor([[-INF, 0.0, 0.0]])
    add_value_logits(logits, torch.tensor([[100.0, 1.0, 1.0]]), -8.0)
    assert logits[0, 0] == -INF
    assert not any(math.isnan(value) for value in logits[0].tolist())


def test_ids_that_the_network_does_not_know_are_excluded() -> None:
    logits = torch.zeros(2, 5)
    add_value_logits(logits, torch.ones(1, 3), 1.0, torch.tensor([1]))
    assert logits[0].tolist() == [0] * 5
    assert logits[1].tolist() == [1, 1, 1, -INF, -INF]


def test_a_network_with_more_padding_than_the_target() -> None:
    logits = torch.zeros(1, 3)
    add_value_logits(logits, torch.tensor([[1.0, 2.0, 3.0, 99.0]]), 1.0)
    assert logits.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_another_vocabulary_takes_its_counterparts_columns(scale: float) -> None:
    value = torch.randn(2, 4)
    columns = torch.tensor([3, -1, 0, 3, 1])
    logits = torch.randn(2, 7)
    expected = logits + torch.full((2, 7), -INF)
    for target_id, column in enumerate(columns.tolist()):
        if column >= 0:
            expected[:, target_id] = logits[:, target_id] + scale * value[:, column]
    add_value_logits(logits, value, scale, columns=columns)
    torch.testing.assert_close(logits, expected)


def test_columns_may_differ_from_row_to_row() -> None:
    value = torch.randn(2, 4)
    columns = torch.tensor([[0, 1, -1], [2, -1, 3]])
    logits = torch.zeros(5, 3)
    rows = torch.tensor([4, 1])
    add_value_logits(logits, value, 2.0, rows, columns)
    assert logits[4].tolist() == [2 * value[0, 0], 2 * value[0, 1], -INF]
    assert logits[1].tolist() == [2 * value[1, 2], -INF, 2 * value[1, 3]]
    assert not logits[[0, 2, 3]].any()
