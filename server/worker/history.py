"""What the host knows of a row's tokens."""

from typing import Protocol


class History(Protocol):
    """The tokens of one row: its prompt, and what was generated since."""

    @property
    def prompt_length(self) -> int:
        """How many tokens the prompt has."""

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the tokens from `start` to before `stop`, as far as the host knows them now."""

    def awaited(self, start: int, stop: int) -> list[int]:
        """Return the same, but wait for tokens that are on their way to the host."""


class ListedHistory:
    """A history that vLLM's V1 runner keeps in two lists."""

    def __init__(self, prompt_ids: list[int], output_ids: list[int]) -> None:
        self._prompt_ids = prompt_ids
        self._output_ids = output_ids  # vLLM's own list, which grows as tokens are sampled

    @property
    def prompt_length(self) -> int:
        return len(self._prompt_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        prompt_length = len(self._prompt_ids)
        tokens = self._prompt_ids[start:stop]
        if stop > prompt_length:
            tokens += self._output_ids[max(0, start - prompt_length) : stop - prompt_length]
        # Asynchronous scheduling holds the place of a token still on the device with -1.
        return tokens[: tokens.index(-1)] if -1 in tokens else tokens

    def awaited(self, start: int, stop: int) -> list[int]:
        return self.tokens(start, stop)  # vLLM has waited: it repairs its lists before it samples
