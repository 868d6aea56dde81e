"""Where the target's reasoning ends, as vLLM's parser for it knows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Reasoning:
    """Says whether a prompt has left reasoning behind, and what ends it in an answer."""

    def __init__(self, end: Sequence[int], make_parser: Callable[..., Any]) -> None:
        """
        Args:
            end: the token ids that, in a row, end reasoning.
            make_parser: makes one of vLLM's reasoning parsers; takes the keywords that vLLM gives
                to its engine with a request, such as the chat template's.
        """
        self.end = tuple(end)
        self._make_parser = make_parser

    def has_ended(
        self, prompt_token_ids: Sequence[int], parser_kwargs: Mapping[str, Any] | None
    ) -> bool:
        """Whether an answer to this prompt begins after reasoning, or has none."""
        parser = self._make_parser(**(parser_kwargs or {}))
        return bool(parser.is_reasoning_end(list(prompt_token_ids)))
