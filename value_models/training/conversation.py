"""One demonstration: a conversation, in either of the two formats that people keep them in.

- OpenAI's: `{"messages": [{"role": "user", "content": "..."}, ...]}`;
- ShareGPT's: `{"conversations": [{"from": "human", "value": "..."}, ...]}`, also with `system`.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from value_models.training import TrainingError

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
"""Roles by the names that ShareGPT's files have for them."""


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
    """One line of a file in OpenAI's format."""

    model_config = ConfigDict(extra="forbid")
    messages: list[Message] = Field(min_length=1)


class SharedTurn(BaseModel):
    """One turn of a ShareGPT conversation; scores and the like that lie beside it are ignored."""

    speaker: Literal["system", "human", "user", "gpt", "chatgpt", "assistant"] = Field(alias="from")
    value: str


class SharedConversation(BaseModel):
    """One line of a ShareGPT file; ids and sources that lie beside it are ignored."""

    conversations: list[SharedTurn] = Field(min_length=1)
    system: str | None = None
    tools: Literal["", None] = None
    """Tools would be lost in silence, so they are errors."""

    def plain(self) -> Conversation:
        turns = [
            Message.model_validate({"role": SPEAKERS[turn.speaker], "content": turn.value})
            for turn in self.conversations
        ]
        system = [Message(role="system", content=self.system)] if self.system else []
        return Conversation(messages=system + turns)


def parse(line: bytes, where: str) -> Conversation:
    """Read one JSON line in the format that it turns out to have.

    Raises:
        TrainingError: it is no conversation; the message begins with `where`.
    """
    try:
        fields: Any = json.loads(line)
        if isinstance(fields, dict) and "conversations" in fields:
            conversation = SharedConversation.model_validate(fields).plain()
        else:
            conversation = Conversation.model_validate(fields)
        for message in conversation.messages:
            message.text.encode()  # JSON can say lone surrogates, which no tokenizer takes
        return conversation
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"])) or "line"
        raise TrainingError(f"{where}: {place}: {fault['msg']}") from error
    except UnicodeEncodeError as error:
        raise TrainingError(
            f"{where}: text that cannot be encoded as UTF-8 ({error.reason})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where}: not valid JSON ({error})") from error
