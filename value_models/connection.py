"""What a value network reads: the three ways to connect it to its base (arXiv 2410.21027).

A connection makes the network's input embeddings. Everything else (the objective, the combination,
the metrics) is the same for all kinds, so a fourth kind is one more function and its entry in
`CONNECTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Connection = Callable[[torch.Tensor, torch.Tensor, nn.Embedding], torch.Tensor]
"""`(input_ids, base_logits, embedding)` -> the network's input embeddings.

- `input_ids`: int64 `[rows, length]`.
- `base_logits`: `[rows, length, base_vocab_size]`, the base's next-token logits behind each token.
- `embedding`: the network's own token embeddings, `[vocab_size, hidden_size]`.
- returns `[rows, length, hidden_size]`.
"""


def residual(
    input_ids: torch.Tensor, base_logits: torch.Tensor, embedding: nn.Embedding
) -> torch.Tensor:
    """The tokens alone: the network needs nothing of the base, and transfers best."""
    embedded: torch.Tensor = embedding(input_ids)
    return embedded


def cascade(
    input_ids: torch.Tensor, base_logits: torch.Tensor, embedding: nn.Embedding
) -> torch.Tensor:
    """The expectation of the embedding table under the base's next-token distribution."""
    # Either vocabulary may be padded; what only the base has carries no embedding.
    shared = min(base_logits.shape[-1], embedding.num_embeddings)
    # By a call, not from `weight`: some models scale what they embed, and FSDP shards the weight.
    table: torch.Tensor = embedding(torch.arange(shared, device=input_ids.device))
    expected = base_logits[..., :shared].softmax(-1, dtype=torch.float32)
    return expected.to(table.dtype) @ table


def cascade_plus(
    input_ids: torch.Tensor, base_logits: torch.Tensor, embedding: nn.Embedding
) -> torch.Tensor:
    """The sum of the two: what has been said, and what the base would say next."""
    return residual(input_ids, base_logits, embedding) + cascade(input_ids, base_logits, embedding)


CONNECTIONS: dict[str, Connection] = {
    "residual": residual,
    "cascade": cascade,
    "cascade+": cascade_plus,
}
"""The connections by the name of their kind in the manifest."""
