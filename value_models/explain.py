"""What guidance changed at one token: the target's choices, the guided ones, who contributed."""

from __future__ import annotations

from typing import NamedTuple

import torch

from value_models.fusion import divergence

TOP = 5
"""How many of the most likely tokens are shown."""


class Explanation(NamedTuple):
    """One decoding step of some rows, explained."""

    kl: torch.Tensor  # float32 [num_rows], nats: KL(guided || target)
    target_ids: torch.Tensor  # int64 [num_rows, TOP], most likely first
    target_probabilities: torch.Tensor  # float32 [num_rows, TOP]
    guided_ids: torch.Tensor  # int64 [num_rows, TOP]
    guided_probabilities: torch.Tensor  # float32 [num_rows, TOP]
    masked: torch.Tensor  # bool [num_rows]: the target's logits came with excluded tokens
    # What `chosen` looks into; not to be changed before it has.
    target: torch.Tensor  # float32 [num_rows, vocab_size], probabilities
    guided: torch.Tensor  # float32 [num_rows, vocab_size], probabilities
    values: torch.Tensor  # [num_rows, num_networks, vocab_size]
    weights: torch.Tensor  # float32 [num_rows, num_networks]
    means: torch.Tensor  # float32 [num_rows, num_networks]: what the target expects of `values`

    def chosen(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Explain the tokens that were chosen.

        A network's contribution is its weight times how far its logit of the token lies above the
        mean of its logits under the target, in nats. The contributions add up to the gain of the
        token's log-probability, up to one normaliser for all tokens:
        `sum_t contribution_t - log E[exp(sum_t contribution_t)] = log guided - log target`, where
        the expectation and `target` are of the target over the tokens that networks have logits
        for. With a floor, that is the gain before it.

        Args:
            tokens: int64 `[num_rows]`.

        Returns:
            The target's and the guided probability, `[num_rows]` each, and the contributions,
            `[num_rows, num_networks]`.
        """
        column = tokens[:, None]
        value = self.values.gather(2, column[:, None].expand(-1, self.values.shape[1], 1))
        contributions = self.weights * (value[:, :, 0].float() - self.means)
        target, guided = (p.gather(1, column)[:, 0] for p in (self.target, self.guided))
        return target, guided, contributions


def explain(
    target: torch.Tensor,
    guided: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor,
    restricted: torch.Tensor,
) -> Explanation:
    """Explain one decoding step.

    Args:
        target: `[num_rows, vocab_size]`, the logits before guidance; `-inf`: excluded.
        guided: `[num_rows, vocab_size]`, the logits behind it.
        values: finite `[num_rows, num_networks, vocab_size]`.
        weights: `[num_rows, num_networks]`.
        restricted: `[num_rows, vocab_size]`, the target without tokens that networks have no
            logit for.
    """
    before, after = target.float().softmax(-1), guided.float().softmax(-1)
    top_before, top_after = (p.topk(min(TOP, p.shape[1])) for p in (before, after))
    expected = restricted.float().softmax(-1)[:, :, None]
    return Explanation(
        kl=divergence(guided, target),
        target_ids=top_before.indices,
        target_probabilities=top_before.values,
        guided_ids=top_after.indices,
        guided_probabilities=top_after.values,
        masked=target.isneginf().any(-1),
        target=before,
        guided=after,
        values=values,
        weights=weights,
        means=torch.bmm(values.float(), expected)[:, :, 0],
    )
