import math

import pytest
import torch

from value_models.training.data import IGNORED
from value_models.training.objective import residual_loss

ROWS, LENGTH, VOCABULARY = 3, 7, 11


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator)
    value = torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[:, :3] = IGNORED
    labels[1, 5:] = IGNORED
    return base, value.requires_grad_(), labels


def reference(base, value, labels, norm_weight):
    """The paper's formula, one token at a time, in plain Python."""
    losses, norms = [], []
    for row in range(labels.shape[0]):
        for position in range(1, labels.shape[1]):
            label = int(labels[row, position])
            if label == IGNORED:
                continue
            z_value = value[row, position - 1].tolist()
            z_base = base[row, position - 1].tolist()
            z = [b + v for b, v in zip(z_base, z_value, strict=True)]
            losses.append(math.log(sum(math.exp(x) for x in z)) - z[label])
            norms.append(sum(abs(x) for x in z_value) / len(z_value))
    return sum(losses) / len(losses) + norm_weight * sum(norms) / len(norms)


@pytest.mark.parametrize("norm_weight", [0.0, 0.3, 1.0])
def test_it_equals_the_formula(batch, norm_weight):
    loss = residual_loss(*batch, norm_weight)
    assert loss.total.item() == pytest.approx(reference(*batch, norm_weight), rel=1e-5)
    assert loss.total.item() == pytest.approx(
        loss.cross_entropy.item() + norm_weight * loss.norm.item(), rel=1e-5
    )


def test_only_the_positions_before_response_tokens_get_a_gradient(batch):
    base, value, labels = batch
    residual_loss(base, value, labels, 0.5).total.backward()
    touched = value.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(touched)
    expected[:, :-1] = labels[:, 1:] != IGNORED
    assert torch.equal(touched, expected)


def test_the_gradient_is_that_of_guided_probabilities(batch):
    base, value, labels = batch
    residual_loss(base, value, labels).total.backward()
    on_response = labels[:, 1:] != IGNORED
    expected = torch.softmax((base + value.detach())[:, :-1], -1)[on_response]
    expected[torch.arange(len(expected)), labels[:, 1:][on_response]] -= 1
    torch.testing.assert_close(value.grad[:, :-1][on_response], expected / len(expected))


def test_the_inputs_are_left_as_they_were(batch):
    base, value, labels = batch
    before = base.clone(), value.detach().clone()
    residual_loss(base, value, labels)
    assert torch.equal(base, before[0]) and torch.equal(value, before[1])


def test_a_base_with_a_wider_padded_vocabulary(batch):
    base, value, labels = batch
    wider = torch.cat([base, torch.full((ROWS, LENGTH, 5), 50.0)], dim=-1)
    expected = residual_loss(base, value, labels, 0.3).total
    torch.testing.assert_close(residual_loss(wider, value, labels, 0.3).total, expected)


def test_bfloat16_logits_are_summed_in_float32(batch):
    base, value, labels = (t.bfloat16() if t.is_floating_point() else t for t in batch)
    loss = residual_loss(base, value, labels, 0.3)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(
        loss.total, residual_loss(base.float(), value.float(), labels, 0.3).total
    )
