import pytest
import torch

from value_models.training.data import IGNORED
from value_models.training.measure import Metrics, measure

VOCABULARY = 6


def one_hot(*tokens: int) -> torch.Tensor:
    return 10 * torch.nn.functional.one_hot(torch.tensor(tokens), VOCABULARY).float()


def test_right_tokens_and_whole_responses_are_counted():
    # Logits at a position are about the token behind it.
    base = torch.zeros(3, 4, VOCABULARY)
    value = torch.stack([one_hot(2, 3, 4, 0), one_hot(2, 3, 5, 0), one_hot(1, 1, 1, 1)])
    labels = torch.tensor(
        [
            [IGNORED, 2, 3, 4],  # all right
            [IGNORED, 2, 3, 4],  # the last one wrong
            [IGNORED, IGNORED, 1, IGNORED],  # right, and what is no response does not count
        ]
    )
    metrics = Metrics.from_sums(measure(base, value, labels).sum(0))
    assert metrics.guided_accuracy == pytest.approx(6 / 7)
    assert metrics.exact_match == pytest.approx(2 / 3)
    assert metrics.conversations == 3
    assert metrics.value_norm == pytest.approx(10 / VOCABULARY)


def test_a_silent_network_measures_the_base():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 5, VOCABULARY, generator=generator)
    labels = base.argmax(-1).roll(1, 1)
    labels[:, 3] = (labels[:, 3] + 1) % VOCABULARY
    metrics = Metrics.from_sums(measure(base, torch.zeros_like(base), labels).sum(0))
    assert metrics.guided_accuracy == metrics.base_accuracy == 0.75
    assert metrics.kl_from_base == pytest.approx(0, abs=1e-6)
    assert metrics.exact_match == 0
    expected = torch.nn.functional.cross_entropy(
        base[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert metrics.cross_entropy == pytest.approx(expected.item(), rel=1e-5)


def test_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    base, value = torch.randn(2, 4, 7, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (4, 7), generator=generator)
    labels[1, 3:] = IGNORED
    whole = measure(base, value, labels).sum(0)
    parts = sum(measure(base[r], value[r], labels[r]).sum(0) for r in (slice(0, 1), slice(1, 4)))
    torch.testing.assert_close(whole, parts)
