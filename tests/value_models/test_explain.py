"""What is said of a token: its probabilities, and contributions that add up."""

import pytest
import torch

from value_models.explain import TOP, Explanation, explain

INF = float("inf")
NUM_ROWS, VOCAB_SIZE = 40, 60


def step(num_networks: int) -> tuple[Explanation, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(num_networks)
    target = 3 * torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator)
    target[1::2, 10:20] = -INF
    values = torch.randn(NUM_ROWS, num_networks, VOCAB_SIZE, generator=generator) + 2
    weights = 2 * torch.randn(NUM_ROWS, num_networks, generator=generator)
    restricted = target.clone()
    restricted[:, 30:35] = -INF
    values[:, :, 30:35] = 0
    guided = restricted + (weights[:, :, None] * values).sum(1)
    parts = {"target": target, "guided": guided, "values": values, "weights": weights}
    parts["restricted"] = restricted
    return explain(**parts), parts


@pytest.mark.parametrize("num_networks", [1, 3])
def test_contributions_add_up_to_the_gain_of_the_chosen_token(num_networks: int) -> None:
    explanation, parts = step(num_networks)
    tokens = torch.multinomial(parts["guided"].softmax(-1), 1)[:, 0]
    before, after, contributions = explanation.chosen(tokens)
    log_restricted = parts["restricted"].double().log_softmax(-1)
    log_guided = parts["guided"].double().log_softmax(-1)
    values = parts["values"].double()
    means = (values * log_restricted.exp()[:, None]).sum(-1, keepdim=True)
    sums = (parts["weights"].double()[:, :, None] * (values - means)).sum(1)
    normaliser = (log_restricted + sums).logsumexp(-1)
    rows = torch.arange(NUM_ROWS)
    gain = (log_guided - log_restricted)[rows, tokens]
    torch.testing.assert_close(contributions.double().sum(1) - normaliser, gain, atol=1e-4, rtol=0)
    torch.testing.assert_close(before, parts["target"].softmax(-1)[rows, tokens])
    torch.testing.assert_close(after, parts["guided"].softmax(-1)[rows, tokens])
    assert contributions.shape == (NUM_ROWS, num_networks)


def test_top_choices_divergence_and_masks() -> None:
    explanation, parts = step(2)
    before, after = parts["target"].double().softmax(-1), parts["guided"].double().softmax(-1)
    for ids, shown, expected in (
        (explanation.target_ids, explanation.target_probabilities, before),
        (explanation.guided_ids, explanation.guided_probabilities, after),
    ):
        assert shown.shape == (NUM_ROWS, TOP)
        torch.testing.assert_close(shown.double(), expected.gather(1, ids), atol=1e-6, rtol=0)
        torch.testing.assert_close(shown.double(), expected.topk(TOP).values, atol=1e-6, rtol=0)
    kl = (after * (after / before).log()).nan_to_num(0.0).sum(-1)
    torch.testing.assert_close(explanation.kl.double(), kl, atol=1e-4, rtol=1e-5)
    assert explanation.masked.tolist() == [False, True] * (NUM_ROWS // 2)


def test_logits_may_be_changed_before_the_token_is_known() -> None:
    explanation, parts = step(1)
    tokens = parts["guided"].argmax(-1)
    expected = explanation.chosen(tokens)
    for name in ("target", "guided", "restricted"):
        parts[name].fill_(0.0)
    for part, known in zip(explanation.chosen(tokens), expected, strict=True):
        assert torch.equal(part, known)
