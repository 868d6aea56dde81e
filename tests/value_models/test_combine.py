"""Adding value logits: which rows change, and what stays excluded."""

import math

import pytest
import torch

from value_models.combine import add_value_logits, keep_target_in_charge, map_value_logits

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


@pytest.mark.parametrize("network_size", [3, 5, 8])
def test_value_logits_by_the_targets_ids(network_size: int) -> None:
    value = torch.randn(2, network_size, dtype=torch.bfloat16)
    mapped, missing = map_value_logits(value, 5)
    covered = min(network_size, 5)
    assert mapped.dtype == torch.float32
    assert torch.equal(mapped[:, :covered], value[:, :covered].float())
    assert not mapped[:, covered:].any()
    expected = None if network_size >= 5 else [False] * 3 + [True] * 2
    assert (missing if missing is None else missing.tolist()) == expected


@pytest.mark.parametrize(
    "columns", [torch.tensor([3, -1, 0, 3]), torch.tensor([[0, 1, -1, 2], [2, -1, 3, -1]])]
)
@pytest.mark.parametrize("vocab_size", [3, 4, 6])
def test_mapped_logits_and_their_gaps_are_what_is_added(
    columns: torch.Tensor, vocab_size: int
) -> None:
    value, logits = torch.randn(2, 4), torch.randn(2, vocab_size)
    mapped, missing = map_value_logits(value, vocab_size, columns)
    assert missing is not None
    combined = (logits + 0.7 * mapped).masked_fill(missing, -INF)
    add_value_logits(logits, value, 0.7, columns=columns[..., :vocab_size])
    torch.testing.assert_close(combined, logits)


def test_capped_tokens_are_never_raised_and_the_others_share_in_proportion() -> None:
    generator = torch.Generator().manual_seed(0)
    target = 4 * torch.randn(200, 50, generator=generator)
    target[torch.rand(200, 50, generator=generator) < 0.2] = -INF
    guided = target + 5 * torch.randn(200, 50, generator=generator)
    guided[torch.rand(200, 50, generator=generator) < 0.1] = -INF
    floor = 10 ** (-4 * torch.rand(200, 1, generator=generator))
    result = keep_target_in_charge(guided, target, floor)
    before, after, kept = (x.double().softmax(-1) for x in (target, guided, result))
    mode = before.masked_fill(guided == -INF, -1).argmax(-1, keepdim=True)
    capped = (before < floor).scatter(1, mode, False)
    assert ((after > before) & capped).any(1).float().mean() > 0.5
    assert (kept <= before * (1 + 1e-5))[capped].all()
    expected = torch.where(capped, torch.minimum(before, after), 0.0)
    others = after.masked_fill(capped, 0.0)
    left = 1 - expected.sum(-1, keepdim=True)
    expected += left * others / others.sum(-1, keepdim=True)
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(result == -INF, guided == -INF)


def test_a_floor_of_zero_leaves_its_row_as_it_is() -> None:
    target, guided = torch.randn(2, 20), 9 * torch.randn(2, 20)
    guided[:, 3] = -INF
    result = keep_target_in_charge(guided, target, torch.tensor([[0.0], [0.05]]))
    assert torch.equal(result[0], guided[0])
    assert not torch.equal(result[1], guided[1])


def test_one_token_is_left_where_all_are_below_the_floor() -> None:
    target = torch.tensor([[0.1, 0.0, 0.0, -INF]])
    guided = torch.tensor([[-50.0, 9.0, 9.0, -INF]])
    kept = keep_target_in_charge(guided, target, torch.tensor([[0.9]])).softmax(-1)
    before = target.softmax(-1)
    torch.testing.assert_close(kept, before, atol=1e-6, rtol=0)


def test_the_mode_is_one_that_guidance_allows() -> None:
    target, guided = torch.tensor([[5.0, 1.0, 0.0]]), torch.tensor([[-INF, 0.0, 7.0]])
    kept = keep_target_in_charge(guided, target, torch.tensor([[0.5]])).softmax(-1)
    rare = target.softmax(-1)[0, 2].item()
    assert kept[0].tolist() == pytest.approx([0.0, 1 - rare, rare], abs=1e-6)
