"""Demonstrations on disk, and the token sequences that training sees.

A file holds one conversation a line, as OpenAI's fine-tuning format has it:
`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2.exceptions import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from value_models.training import TrainingError

IGNORED = -100
"""The label of a token that is no part of a response."""


class TextPart(BaseModel):
    """A part of a message's content; only text can be learned from."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Tool calls and other fields would be lost in silence, so they are errors."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Conversation(BaseModel):
    """One line of a demonstrations file."""

    model_config = ConfigDict(extra="forbid")
    messages: list[Message] = Field(min_length=1)


@dataclass(frozen=True)
class Example:
    """One token sequence; `labels` equal `input_ids` on responses, `IGNORED` elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_response_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass
class Demonstrations:
    """A file as training sees it."""

    examples: list[Example]
    num_conversations: int
    fingerprint: str
    """`sha256:<hex>` of the file's content."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Why conversations, or their last turns, were left out, and how many."""

    @property
    def num_response_tokens(self) -> int:
        return sum(example.num_response_tokens for example in self.examples)

    def report(self) -> str:
        """One line for people: what was read and what was left out."""
        read = (
            f"{self.num_conversations} conversations read, {len(self.examples)} used, "
            f"{self.num_response_tokens} response tokens"
        )
        losses = "; ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{read}; left out: {losses}" if losses else read


def load_demonstrations(
    file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Demonstrations:
    """Read a file and encode it with the tokenizer's own chat template.

    A conversation longer than `max_length` tokens keeps the leading turns that fit whole.

    Raises:
        TrainingError: the file cannot be read, a line is no conversation (the message names file
            and line), the tokenizer has no chat template, or nothing is left to learn from.
    """
    if not tokenizer.chat_template:
        raise TrainingError(
            "the base's tokenizer has no chat template, so nothing says how a conversation "
            "becomes tokens; pass one with --chat-template"
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TrainingError(f"{file}: cannot be read ({error.strerror})") from error
    found = Demonstrations(
        examples=[],
        num_conversations=0,
        fingerprint=f"sha256:{hashlib.sha256(content).hexdigest()}",
    )
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        conversation = _parse(line, where=f"{file}:{number}")
        found.num_conversations += 1
        try:
            example = encode(conversation, tokenizer, max_length, found.dropped)
        except TemplateError as error:
            raise TrainingError(
                f"{file}:{number}: the chat template refuses this conversation ({error})"
            ) from error
        if example is not None:
            found.examples.append(example)
    if not found.examples:
        raise TrainingError(f"{file}: nothing to learn from ({found.report()})")
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
    return Example(input_ids, labels) if input_ids else None


def _parse(line: bytes, where: str) -> Conversation:
    try:
        return Conversation.model_validate(json.loads(line))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"])) or "line"
        raise TrainingError(f"{where}: {place}: {fault['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where}: not valid JSON ({error})") from error


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


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right into one batch: int64 tensors `[rows, longest]`."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        longest = max(len(example.input_ids) for example in examples)
        shape = (len(examples), longest)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            input_ids[row, :length] = torch.tensor(example.input_ids)
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.tensor(example.labels)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
