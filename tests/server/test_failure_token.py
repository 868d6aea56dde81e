from dataclasses import dataclass

from server.failure_token import choose_failure_token
from tests.models import make_tokenizer


@dataclass
class Vocabulary:
    size: int
    bos_token_id: int | None = None
    unk_token_id: int | None = None
    pad_token_id: int | None = None

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.size)}


def test_the_padding_of_the_output_layer_is_best() -> None:
    assert choose_failure_token(Vocabulary(10, bos_token_id=1), 16, {2}) == 10


def test_ids_with_gaps_are_seen_as_used() -> None:
    vocabulary = Vocabulary(10)
    vocabulary.get_vocab = lambda: {"<far>": 12}  # type: ignore[method-assign]
    assert choose_failure_token(vocabulary, 16, {2}) == 13


def test_else_a_token_that_is_never_generated() -> None:
    assert choose_failure_token(Vocabulary(10, 1, 3, 4), 10, {2}) == 1
    assert choose_failure_token(Vocabulary(10, None, 3, 4), 10, {2}) == 3
    assert choose_failure_token(Vocabulary(10, None, None, 4), 10, {2}) == 4


def test_but_never_one_that_ends_sequences() -> None:
    assert choose_failure_token(Vocabulary(10, 2, 2, 4), 10, {2}) == 4
    assert choose_failure_token(Vocabulary(10, 2, None, 2), 10, {2, None}) == 9  # type: ignore[arg-type]
    assert choose_failure_token(Vocabulary(10), 10, {9, 8}) == 7


def test_with_a_real_tokenizer() -> None:
    tokenizer = make_tokenizer()
    assert choose_failure_token(tokenizer, len(tokenizer) + 32, {1}) == len(tokenizer)
    assert choose_failure_token(tokenizer, len(tokenizer), {1}) == tokenizer.bos_token_id
