"""The token id by which a value network's failure ends a request.

A failing network cannot raise: an exception in a logits processor ends vLLM's engine. So the
processor makes the row emit one reserved id, which is among the request's stop ids. The request
ends at once, and the API process, which sees that id as the stop reason, answers with an error.
"""

from collections.abc import Collection
from typing import Protocol


class Vocabulary(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    bos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None

    def __len__(self) -> int: ...

    def get_vocab(self) -> dict[str, int]: ...


def choose_failure_token(
    tokenizer: Vocabulary, vocab_size: int, stop_token_ids: Collection[int]
) -> int:
    """Return an id that no guided request needs.

    Best is an id that the target's output layer has and its tokenizer has not: most vocabularies
    are padded to a round size. Otherwise a token that starts or fills sequences and so is never
    generated (bos, unk, pad, in this order), unless it ends them too. Otherwise the last id.

    Args:
        vocab_size: number of the target's logits.
        stop_token_ids: what ends the target's sequences (EOS, and all of generation_config's).
    """
    first_unused = max(
        [len(tokenizer), *(token_id + 1 for token_id in tokenizer.get_vocab().values())]
    )
    if first_unused < vocab_size:
        return first_unused
    for token_id in (tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id):
        if token_id is not None and token_id < vocab_size and token_id not in stop_token_ids:
            return token_id
    return max(i for i in range(vocab_size) if i not in stop_token_ids)
