"""What a value network is trained to minimise (Lu et al., NAACL 2025, arXiv 2410.21027)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from value_models.combine import add_value_logits
from value_models.training.data import IGNORED


@dataclass(frozen=True)
class ResidualLoss:
    """The objective and its parts, each a float32 scalar."""

    total: torch.Tensor
    cross_entropy: torch.Tensor
    norm: torch.Tensor


def residual_loss(
    base_logits: torch.Tensor,
    value_logits: torch.Tensor,
    labels: torch.Tensor,
    norm_weight: float = 0.0,
) -> ResidualLoss:
    """Cross-entropy of `softmax(z_base + z_value)` on response tokens, plus the norm term.

    The base is frozen, so the value network learns only what post-training would have changed in
    it (arXiv 2410.21027, section 3). The norm term is the mean over response tokens of
    `||z_value||_1 / vocab_size`: it keeps the network silent where the base knows better, which is
    what lets it steer other bases.

    Args:
        base_logits: `[rows, length, base_vocab_size]`, without gradient.
        value_logits: `[rows, length, value_vocab_size]`; padding may differ from the base's.
        labels: int64 `[rows, length]`, not shifted, `IGNORED` outside responses. At least one must
            be a response token behind the first column.
        norm_weight: factor on the norm term; 0 leaves it out.
    """
    next_tokens = labels[:, 1:]
    on_response = next_tokens != IGNORED
    value = value_logits[:, :-1][on_response].float()
    guided = base_logits[:, :-1][on_response].float()
    add_value_logits(guided, value, scale=1.0)
    loss = cross_entropy(guided, next_tokens[on_response])
    norm = value.abs().mean()
    total = loss + norm_weight * norm if norm_weight else loss
    return ResidualLoss(total=total, cross_entropy=loss.detach(), norm=norm.detach())
