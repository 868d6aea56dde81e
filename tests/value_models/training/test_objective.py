import math

import pytest
import torch

from value_models.training.data import IGNORED
from value_models.training.objective import OBJECTIVES, guided_loss, norms

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
    loss = guided_loss(*batch, norm_weight=norm_weight)
    assert loss.total.item() == pytest.approx(reference(*batch, norm_weight), rel=1e-5)
    assert loss.total.item() == pytest.approx(
        loss.cross_entropy.item() + norm_weight * loss.norm.item(), rel=1e-5
    )


def test_only_the_positions_before_response_tokens_get_a_gradient(batch):
    base, value, labels = batch
    guided_loss(base, value, labels, norm_weight=0.5).total.backward()
    touched = value.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(touched)
    expected[:, :-1] = labels[:, 1:] != IGNORED
    assert torch.equal(touched, expected)


def test_the_gradient_is_that_of_guided_probabilities(batch):
    base, value, labels = batch
    guided_loss(base, value, labels).total.backward()
    on_response = labels[:, 1:] != IGNORED
    expected = torch.softmax((base + value.detach())[:, :-1], -1)[on_response]
    expected[torch.arange(len(expected)), labels[:, 1:][on_response]] -= 1
    torch.testing.assert_close(value.grad[:, :-1][on_response], expected / len(expected))


def test_the_inputs_are_left_as_they_were(batch):
    base, value, labels = batch
    before = base.clone(), value.detach().clone()
    guided_loss(base, value, labels)
    assert torch.equal(base, before[0]) and torch.equal(value, before[1])


def test_a_base_with_a_wider_padded_vocabulary(batch):
    base, value, labels = batch
    wider = torch.cat([base, torch.full((ROWS, LENGTH, 5), 50.0)], dim=-1)
    expected = guided_loss(base, value, labels, norm_weight=0.3).total
    torch.testing.assert_close(guided_loss(wider, value, labels, norm_weight=0.3).total, expected)


def test_bfloat16_logits_are_summed_in_float32(batch):
    base, value, labels = (t.bfloat16() if t.is_floating_point() else t for t in batch)
    loss = guided_loss(base, value, labels, norm_weight=0.3)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(
        loss.total, guided_loss(base.float(), value.float(), labels, norm_weight=0.3).total
    )


def test_the_divergence_from_the_base_is_exact(batch):
    base, value, labels = batch
    on_response = labels[:, 1:] != IGNORED
    q = (base + value).detach()[:, :-1][on_response].log_softmax(-1)
    p = base[:, :-1][on_response].log_softmax(-1)
    expected = (q.exp() * (q - p)).sum(-1).mean()
    torch.testing.assert_close(guided_loss(*batch).kl, expected)
    loss = guided_loss(*batch, kl_weight=0.3)
    torch.testing.assert_close(loss.total.detach(), loss.cross_entropy + 0.3 * expected)
    wider = torch.cat([base, torch.full((ROWS, LENGTH, 5), -3.0)], dim=-1)
    assert guided_loss(wider, value, labels).kl > expected  # the base loses what it gave to padding


def test_only_a_weight_lets_the_divergence_pull(batch):
    base, value, labels = batch
    guided_loss(base, value, labels).total.backward()
    without = value.grad.clone()
    value.grad = None
    guided_loss(base, value, labels, kl_weight=1.0).total.backward()
    assert not torch.allclose(value.grad, without)


def test_norms_are_in_logits_whatever_the_vocabulary():
    value = torch.tensor([[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert norms(value, "l1").tolist() == [7 / 4, 1.0]
    assert norms(value, "l2").tolist() == [5 / 2, 1.0]
    zero = torch.zeros(2, 4, requires_grad=True)
    norms(zero, "l2").sum().backward()
    assert torch.equal(zero.grad, torch.zeros(2, 4))


CONJUGATES = {  # f*, of which the objectives use phi(x) = -f*(-x)
    "chi2": (lambda t: (t - 1) ** 2, 4.0),
    "hellinger": (lambda t: (t.sqrt() - 1) ** 2, 0.4),
}


@pytest.mark.parametrize("name", CONJUGATES)
def test_phi_is_the_conjugate_of_its_divergence(name):
    f, bound = CONJUGATES[name]
    t = torch.linspace(0, 50, 500_001, dtype=torch.float64)
    for x in torch.linspace(-bound if name == "hellinger" else -2.0, 1.9, 9, dtype=torch.float64):
        conjugate = (-x * t - f(t)).max()
        assert OBJECTIVES[name](x).item() == pytest.approx(-conjugate.item(), abs=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_the_log_partition_less_phi(batch, name):
    base, value, labels = batch
    beta = 0.3
    on_response = labels[:, 1:] != IGNORED
    z = value.detach()[:, :-1][on_response]
    p = base[:, :-1][on_response].softmax(-1)
    demonstrated = labels[:, 1:][on_response][:, None]
    reward = beta * z.gather(1, demonstrated)[:, 0]
    log_partition = (p * z.exp()).sum(-1).log()
    expected = (log_partition - OBJECTIVES[name](reward) / beta).mean()
    constant = p.gather(1, demonstrated).log().mean()
    loss = guided_loss(base, value, labels, objective=name, beta=beta)
    torch.testing.assert_close(loss.total.detach(), expected - constant)


@pytest.mark.parametrize("name", ["chi2", "hellinger"])
def test_less_beta_is_nearer_to_the_cross_entropy(batch, name):
    plain = guided_loss(*batch).total
    far, near = (guided_loss(*batch, objective=name, beta=beta).total for beta in (0.5, 1e-3))
    assert far > near > plain
    torch.testing.assert_close(near, plain, rtol=0, atol=0.01)


def test_hellinger_survives_what_an_untrained_network_says():
    reward = torch.tensor([-1e4, -1.0, -0.5, 0.0, 1e4], requires_grad=True)
    counted = OBJECTIVES["hellinger"](reward)
    counted.sum().backward()
    assert counted.isfinite().all() and (counted.diff() > 0).all()
    assert reward.grad.tolist()[:4] == [4.0, 4.0, 4.0, 1.0]


def test_logits_of_a_base_under_inference_mode_train_the_network(batch):
    base, value, labels = batch
    with torch.inference_mode():
        frozen = base * 1
    guided_loss(
        frozen, value, labels, objective="chi2", norm_weight=1, kl_weight=1
    ).total.backward()
    assert value.grad.abs().sum() > 0
