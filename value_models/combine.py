"""How value logits steer a target: `guided = target + sum_i scale_i * value_i`.

Inverse value learning adds a value network's logits to the base's (Lu et al., NAACL 2025,
arXiv 2410.21027, section 3); the scale is the strength with which a request wants them.
"""

import torch

EXCLUDED = float("-inf")


def add_value_logits(
    logits: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | float,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> None:
    """Add `scale * value` to rows of `logits`, in place.

    A target's vocabulary is often padded, and its padding may be wider than the network's; or the
    two vocabularies are different ones, and some ids have no counterpart. Ids that the network has
    no logit for are excluded: value logits are only defined up to a constant per row, so no number
    stands for "no opinion". What the target excludes stays excluded.

    Args:
        logits: float32 `[num_rows, vocab_size]`; `-inf` marks excluded tokens.
        value: finite `[num_guided, network_vocab_size]`, any float dtype.
        scale: `[num_guided, 1]` or one number.
        rows: int64 `[num_guided]`, the row of `logits` that each row of `value` steers;
            None: all rows, in order.
        columns: for a network of another vocabulary, the column of `value` that each id of the
            target takes, -1 for none (see `value_models.vocabulary`): int64 `[num_mapped]`, the
            same for all rows, or `[num_guided, num_mapped]`. None: id `i` takes column `i`.
    """
    if columns is not None:
        known = columns.clamp(min=0)
        value = value[:, known] if columns.dim() == 1 else value.gather(1, known)
    covered = min(logits.shape[1], value.shape[1])
    scaled = value[:, :covered].float() * scale
    if columns is not None:
        # After scaling: a negative scale would turn an exclusion into a promotion.
        scaled.masked_fill_(columns[..., :covered] < 0, EXCLUDED)
    if rows is None:
        logits[:, :covered] += scaled
        logits[:, covered:] = EXCLUDED
    elif covered == logits.shape[1]:
        logits.index_add_(0, rows, scaled)
    else:
        logits[:, :covered].index_add_(0, rows, scaled)
        logits[:, covered:].index_fill_(0, rows, EXCLUDED)
