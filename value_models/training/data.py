"""Demonstrations as training sees them: token sequences, with labels on the responses."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from value_models.training import TrainingError
from value_models.training.conversation import Conversation, parse
from value_models.training.source import read_lines

IGNORED = -100
"""The label of a token that is no part of a response."""


@dataclass(frozen=True)
class Example:
    """One token sequence; `labels` equal `input_ids` on responses, `IGNORED` elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_response_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


class Examples(Sequence[Example]):
    """Many examples in 5 bytes a token, where lists would take some hundred."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._tokens = array("i")
        self._on_response = bytearray()
        self._ends = array("q", [0])
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        self._tokens.extend(example.input_ids)
        self._on_response.extend(label != IGNORED for label in example.labels)
        self._ends.append(len(self._tokens))

    @property
    def num_response_tokens(self) -> int:
        return sum(self._on_response)

    def num_tokens(self, index: int) -> int:
        """Length of one example."""
        return self._ends[index + 1] - self._ends[index]

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self[one] for one in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        own = slice(self._ends[index], self._ends[index + 1])
        tokens = self._tokens[own].tolist()
        on_response = self._on_response[own]
        labels = [t if on else IGNORED for t, on in zip(tokens, on_response, strict=True)]
        return Example(tokens, labels)


@dataclass
class Demonstrations:
    """A file or dataset as training sees it."""

    examples: Examples
    num_conversations: int
    fingerprint: str
    """`sha256:<hex>` of the file's content, or of a dataset's rows as JSON lines."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Why conversations, or some of their turns, were left out, and how many."""

    def report(self) -> str:
        """One line for people: what was read and what was left out."""
        read = (
            f"{self.num_conversations} conversations read, {len(self.examples)} used, "
            f"{self.examples.num_response_tokens} response tokens"
        )
        losses = "; ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{read}; left out: {losses}" if losses else read

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """Draw a share of the examples, at least one: those to train on, and those held out.

        Raises:
            TrainingError: nothing would be left to train on.
        """
        number = len(self.examples)
        chosen = set(random.Random(seed).sample(range(number), max(1, round(share * number))))
        if len(chosen) == number:
            raise TrainingError(
                f"held-out share {share} of {number} examples leaves none to train on"
            )
        kept, held_out = Examples(), Examples()
        for index, example in enumerate(self.examples):
            (held_out if index in chosen else kept).append(example)
        return kept, held_out


def load_demonstrations(
    data: Path | str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Demonstrations:
    """Read a file or dataset and encode it with the tokenizer's own chat template.

    A conversation longer than `max_length` tokens keeps the leading turns that fit whole.

    Raises:
        TrainingError: the data cannot be read, a line is no conversation (the message names file
            and line), the tokenizer has no chat template, or nothing is left to learn from.
    """
    if not tokenizer.chat_template:
        raise TrainingError(
            "the base's tokenizer has no chat template, so nothing says how a conversation "
            "becomes tokens; pass one with --chat-template"
        )
    digest = hashlib.sha256()
    found = Demonstrations(examples=Examples(), num_conversations=0, fingerprint="")
    for where, line in read_lines(data):
        digest.update(line)
        if not line.strip():
            continue
        conversation = parse(line, where)
        found.num_conversations += 1
        try:
            example = encode(conversation, tokenizer, max_length, found.dropped)
        except TemplateError as error:
            raise TrainingError(
                f"{where}: the chat template refuses this conversation ({error})"
            ) from error
        if example is not None:
            found.examples.append(example)
    found.fingerprint = f"sha256:{digest.hexdigest()}"
    if not found.examples:
        raise TrainingError(f"{data}: nothing to learn from ({found.report()})")
    return found


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    dropped: Counter[str],
) -> Example | None:
    """Turn a conversation into one example, with labels on the assistant's tokens only.

    A response's tokens are those that the template adds to the prompt as a server would render it,
    its end-of-turn token included: there the network learns to stop. Counts in `dropped` what is
    left out; None when nothing remains.
    """
    messages = [{"role": m.role, "content": m.text} for m in conversation.messages]
    if messages[0]["role"] == "assistant":
        # Cut out of a longer conversation: it answers nothing, and many templates refuse it.
        dropped["with leading turns of the assistant, which answer nothing"] += 1
        while messages and messages[0]["role"] == "assistant":
            del messages[0]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        dropped["without an assistant message"] += 1
        return None
    input_ids: list[int] = []
    labels: list[int] = []
    for turn in turns:
        prompt = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        until = _render(tokenizer, messages[: turn + 1], add_generation_prompt=False)
        if prompt[: len(input_ids)] != input_ids or until[: len(prompt)] != prompt:
            # Such as templates that strip earlier turns' thinking: what is rendered here is not
            # what a server would have sent, and the labels would fall on the wrong tokens.
            dropped["with turns that the chat template renders differently later on"] += 1
            break
        if len(until) > max_length:
            dropped[f"cut before a turn that ends beyond {max_length} tokens"] += 1
            break
        labels += [IGNORED] * (len(prompt) - len(input_ids)) + until[len(prompt) :]
        input_ids = until
    if not input_ids:
        return None
    # The first token is never predicted, so that a label there teaches nothing either.
    if all(label == IGNORED for label in labels[1:]):
        dropped["with empty responses only"] += 1
        return None
    return Example(input_ids, labels)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    add_generation_prompt: bool,
) -> list[int]:
    ids: Any = tokenizer.apply_chat_template(
        list(messages),
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    return list(ids)
