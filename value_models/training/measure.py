"""How well a network guides its base through demonstrations, read along with teacher forcing."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from value_models.training.data import IGNORED
from value_models.training.objective import guide, norms


@dataclass(frozen=True)
class Metrics:
    """Means over response tokens, but for the last two."""

    cross_entropy: float
    """Of the guided base, in nats."""
    value_norm: float
    """`||z||_1 / vocab_size`, whatever norm was trained with."""
    kl_from_base: float
    """`KL(guided || base)`, in nats."""
    guided_accuracy: float
    """Share of response tokens that the guided base thinks most likely."""
    base_accuracy: float
    """The same of the base alone: what there was before."""
    exact_match: float
    """Share of conversations whose every response greedy decoding of the guided base repeats whole:
    it does exactly if each token is the most likely one behind the demonstration's own."""
    conversations: int

    @classmethod
    def from_sums(cls, sums: torch.Tensor) -> Metrics:
        """From the sum over rows of what `measure` returns: `[8]`."""
        tokens, entropy, norm, kl, right, base_right, exact, rows = sums.tolist()
        return cls(
            cross_entropy=entropy / tokens,
            value_norm=norm / tokens,
            kl_from_base=kl / tokens,
            guided_accuracy=right / tokens,
            base_accuracy=base_right / tokens,
            exact_match=exact / rows,
            conversations=int(rows),
        )

    def named(self, prefix: str = "") -> dict[str, float]:
        return {f"{prefix}{name}": value for name, value in asdict(self).items()}


def measure(
    base_logits: torch.Tensor, value_logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sums for `Metrics.from_sums`, one row for each conversation: float64 `[rows, 8]`.

    Args: as `value_models.training.objective.guide`; one conversation a row.
    """
    tokens = guide(base_logits, value_logits, labels)
    on_response = labels[:, 1:] != IGNORED
    right = tokens.guided.argmax(-1) == tokens.demonstrated[:, 0]
    base_right = base_logits[:, :-1].argmax(-1)[on_response] == tokens.demonstrated[:, 0]
    each = torch.stack(
        [
            torch.ones_like(right),
            tokens.cross_entropy,
            norms(tokens.value, "l1"),
            tokens.kl(),
            right,
            base_right,
        ],
        dim=-1,
    )
    row_of_token = on_response.nonzero()[:, 0]
    sums = labels.new_zeros(len(labels), each.shape[-1], dtype=torch.float64)
    sums.index_add_(0, row_of_token, each.double())
    exact = sums[:, 4] == sums[:, 0]
    return torch.cat([sums, exact[:, None], torch.ones_like(sums[:, :1])], dim=-1)
