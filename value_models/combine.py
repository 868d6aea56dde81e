"""How value logits steer a target: `guided = target + sum_i scale_i * value_i`.

Inverse value learning adds a value network's logits to the base's (Lu et al., NAACL 2025,
arXiv 2410.21027, section 3); the scale is the strength with which a request wants them.
"""

import torch
from torch.nn.functional import pad

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
        scale: float32 `[num_guided, 1]` or one number.
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
    if columns is None:
        # One pass, and one way of rounding: a row's logits do not depend on who else is guided.
        if not isinstance(scale, torch.Tensor):
            scale = torch.tensor(scale, dtype=torch.float32, device=logits.device)
        guided = logits if rows is None else logits[rows]
        guided[:, :covered].addcmul_(value[:, :covered], scale)
        if covered < guided.shape[1]:
            guided[:, covered:] = EXCLUDED
        if rows is not None:
            logits.index_copy_(0, rows, guided)
        return
    scaled = value[:, :covered].float() * scale
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


def map_value_logits(
    value: torch.Tensor, vocab_size: int, columns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the value logits by the target's ids, and the ids that the network has none for.

    Args:
        value: finite `[num_rows, network_vocab_size]`, any float dtype.
        vocab_size: number of the target's logits.
        columns: as for `add_value_logits`.

    Returns:
        float32 `[num_rows, vocab_size]`, 0 where the network has no logit; and bool `[vocab_size]`,
        or `[num_rows, vocab_size]` if the columns differ from row to row, True on ids without one.
        None instead: the network has a logit for every id.
    """
    if columns is None:
        if value.shape[1] >= vocab_size:
            return value[:, :vocab_size].float(), None
        columns = torch.arange(value.shape[1], device=value.device)
        mapped = value.float()
    else:
        columns = columns[..., :vocab_size]
        known = columns.clamp(min=0)
        mapped = value[:, known] if columns.dim() == 1 else value.gather(1, known)
        mapped = mapped.float().masked_fill(columns < 0, 0.0)
    padding = (0, vocab_size - columns.shape[-1])
    return pad(mapped, padding), pad(columns < 0, padding, value=True)


def keep_target_in_charge(
    guided: torch.Tensor, target: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Forbid guidance to raise tokens that the target finds near impossible.

    A token is *capped* where the target's probability is below the floor; of the tokens that are
    left to choose from, the target's most likely one never is. Capped tokens end with at most the
    probability that the target gives them, `softmax(result) <= softmax(target)`, and what that
    takes from them goes to the tokens that are not capped, in proportion. This is the gentle
    relative of contrastive decoding's plausibility constraint (Li et al., ACL 2023,
    arXiv 2210.15097), which removes such tokens even where the target would sample them.

    Args:
        guided: `[num_rows, vocab_size]`, finite or -inf.
        target: `[num_rows, vocab_size]`, the logits before guidance.
        floor: probability `[num_rows, 1]`; 0: the row is returned as it is.

    Returns:
        `[num_rows, vocab_size]`: `guided`, with lower logits for capped tokens that it had raised.
    """
    before, after = target.log_softmax(-1), guided.log_softmax(-1)
    mode = before.masked_fill(guided.isneginf(), EXCLUDED).argmax(-1, keepdim=True)
    capped = (before < floor.log()).scatter_(1, mode, False)
    # What capped tokens leave to the others, as a sum of positive terms: 1 - sum(min(p, q)) would
    # lose its digits where the target's most likely token is itself improbable.
    left = before.exp() - torch.minimum(before, after).exp().masked_fill_(~capped, 0.0)
    others = guided.masked_fill(capped, EXCLUDED).logsumexp(-1, keepdim=True)
    shift = others - left.sum(-1, keepdim=True).log()
    return torch.where(capped, torch.minimum(before, after) + shift, guided)
