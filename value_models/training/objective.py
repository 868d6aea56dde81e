"""What a value network is trained to minimise.

The network adds its logits `z` to those of the frozen base, so it guides the base's distribution
`p` towards `q = softmax(z_base + z)` (Lu et al., NAACL 2025, arXiv 2410.21027, section 3).

Every objective here follows from one picture (Wang et al., arXiv 2507.00018: supervised
fine-tuning learns an implicit reward; the derivation below is ours, token by token, along Garg et
al., NeurIPS 2021, arXiv 2106.12142). Take each response token as one decision and look for the `q`
that is closest to the demonstrations `d` without leaving the base:

    minimise over q  D_f(q || d) + beta * KL(q || p),    D_f(q || d) = E_d[f(q / d)].

An f-divergence is the largest value of `E_d[phi(r)] - E_q[r]` over rewards `r`, `phi(x) = -f*(-x)`
with `f*` the convex conjugate of `f`. For a given reward the best `q` is `p * exp(r / beta) / Z`,
which a network with the logits `z = r / beta` makes exactly, and it is worth `beta * log Z`. What
remains is to find the reward: divided by `beta`,

    loss = mean over response tokens a of  log Z - phi(beta * z_a) / beta,    Z = E_p[exp z].

For the total variation (of unbounded rewards), `phi(x) = x`: the loss is the cross-entropy less a
constant, and `beta`, with it the divergence from the base, drops out. Another `phi` keeps it in: a
growing reward counts for ever less, and `beta` says how soon. As `phi(x) = x - O(x^2)`, each loss
is the cross-entropy plus a price on large rewards.

The same paper's first advice, smaller steps, needs no objective: it is `--learning-rate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn import functional

from value_models.combine import add_value_logits
from value_models.training.data import IGNORED

Norm = Literal["l1", "l2"]


def cross_entropy(reward: torch.Tensor) -> torch.Tensor:
    """Total variation, `phi(x) = x`: plain supervised fine-tuning."""
    return reward


def chi2(reward: torch.Tensor) -> torch.Tensor:
    """Pearson's chi-squared, `f(t) = (t - 1)^2`: `phi(x) = x - x^2 / 4`.

    Adds `beta / 4 * z_a^2` to the cross-entropy: no demonstrated token is pushed beyond `2 / beta`.
    """
    return reward - reward.square() / 4


def hellinger(reward: torch.Tensor) -> torch.Tensor:
    """Squared Hellinger, `f(t) = (sqrt(t) - 1)^2`: `phi(x) = x / (1 + x)` for `x > -1`.

    Below -1/2 it goes on along its tangent: an untrained network may be anywhere, and the pole at
    -1 would end the run.
    """
    inside = reward.clamp(min=-0.5)
    return inside / (1 + inside) + 4 * (reward - inside)


OBJECTIVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cross_entropy": cross_entropy,
    "chi2": chi2,
    "hellinger": hellinger,
}
"""`phi` by name: what the reward of a demonstrated token counts for, elementwise."""


class ResponseTokens(NamedTuple):
    """The guided base at every response token of a batch, in their order; float32."""

    demonstrated: torch.Tensor  # int64 [tokens, 1], what the demonstration says
    value: torch.Tensor  # [tokens, value_vocab_size], z
    guided: torch.Tensor  # [tokens, base_vocab_size], z_base + z
    cross_entropy: torch.Tensor  # [tokens], -log q(a), in nats
    base_normaliser: torch.Tensor  # [tokens, 1], log of the sum of exp(z_base)

    def kl(self) -> torch.Tensor:
        """`KL(q || p) = E_q[z] - log Z`, exact over the vocabulary: `[tokens]`, in nats."""
        # Ids that only one side has carry no probability in q.
        shared = min(self.value.shape[-1], self.guided.shape[-1])
        normaliser = self.cross_entropy[:, None] + self.guided.gather(-1, self.demonstrated)
        q = (self.guided[:, :shared] - normaliser).exp()
        expected: torch.Tensor = torch.linalg.vecdot(q, self.value[:, :shared])
        return expected - (normaliser - self.base_normaliser)[:, 0]


def guide(
    base_logits: torch.Tensor, value_logits: torch.Tensor, labels: torch.Tensor
) -> ResponseTokens:
    """Add value logits to the base's at the positions that predict a response token.

    Args:
        base_logits: `[rows, length, base_vocab_size]`, without gradient.
        value_logits: `[rows, length, value_vocab_size]`; padding may differ from the base's.
        labels: int64 `[rows, length]`, not shifted, `IGNORED` outside responses.
    """
    next_tokens = labels[:, 1:]
    on_response = next_tokens != IGNORED
    value = value_logits[:, :-1][on_response].float()
    guided = base_logits[:, :-1][on_response].float()
    base_normaliser = guided.logsumexp(-1, keepdim=True)
    add_value_logits(guided, value, scale=1.0)
    demonstrated = next_tokens[on_response]
    return ResponseTokens(
        demonstrated=demonstrated[:, None],
        value=value,
        guided=guided,
        cross_entropy=functional.cross_entropy(guided, demonstrated, reduction="none"),
        base_normaliser=base_normaliser,
    )


def norms(value: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Size of value logits `[tokens, vocab_size]` at each token: `[tokens]`, in logits.

    - `l1`: `||z||_1 / vocab_size` (arXiv 2410.21027; there with weight 1).
    - `l2`: `||z||_2 / sqrt(vocab_size)`, the root mean square. The paper's L2 form has no stated
      scale; this one equals `l1` where all logits have one size.
    """
    if norm == "l1":
        return value.abs().mean(-1)
    # vector_norm has the gradient 0 at 0, where a square root has none.
    lengths: torch.Tensor = torch.linalg.vector_norm(value, dim=-1)
    return lengths / math.sqrt(value.shape[-1])


@dataclass(frozen=True)
class Loss:
    """The loss and its parts, each a float32 scalar: means over response tokens."""

    total: torch.Tensor
    """What is minimised; the only one with a gradient."""
    cross_entropy: torch.Tensor
    norm: torch.Tensor
    kl: torch.Tensor


def guided_loss(
    base_logits: torch.Tensor,
    value_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    objective: str = "cross_entropy",
    beta: float = 0.1,
    norm: Norm = "l1",
    norm_weight: float = 0.0,
    kl_weight: float = 0.0,
) -> Loss:
    """The objective on response tokens, plus the weighted norm and divergence from the base.

    The norm keeps the network silent where the base knows better, which is what lets it steer other
    bases. `kl_weight * KL(q || p)` is the plain way to stay near this one.

    Args:
        base_logits, value_logits, labels: as `guide` takes them. At least one label must be a
            response token behind the first column.
        objective: a name in `OBJECTIVES`.
        beta: the reward of one logit; `cross_entropy` does not depend on it.
        norm_weight, kl_weight: 0 leaves the term out.
    """
    tokens = guide(base_logits, value_logits, labels)
    entropy = tokens.cross_entropy.mean()
    size = norms(tokens.value, norm).mean()
    with torch.set_grad_enabled(torch.is_grad_enabled() and kl_weight != 0):
        kl = tokens.kl().mean()
    total = entropy
    if objective != "cross_entropy":
        reward = beta * tokens.value.gather(-1, tokens.demonstrated)
        total = total + ((reward - OBJECTIVES[objective](reward)) / beta).mean()
    if norm_weight:
        total = total + norm_weight * size
    if kl_weight:
        total = total + kl_weight * kl
    return Loss(total, entropy.detach(), size.detach(), kl.detach())
