"""When the guidance of a row begins and when it ends."""

from collections.abc import Callable

from server.choice import Choice
from server.token_bytes import TokenBytes


class Control:
    """Follows what a row generates, token by token: a choice may guide a part of it only.

    What it says depends on the generated tokens alone, so that a row that was preempted, or whose
    history was cut short, comes to the same again.

    Attributes:
        active: whether the next token is guided.
        ended: whether no further token will be.
    """

    def __init__(self, choice: Choice, spelling: TokenBytes | None) -> None:
        """`spelling` is needed for a choice that ends guidance at a text."""
        self._after = list(choice.after)
        self._until_tokens = choice.until_tokens
        self._until_text = None if choice.until_text is None else choice.until_text.encode()
        self._spelling = spelling
        self._restart()

    @property
    def _counts_only(self) -> bool:
        return not self._after and self._until_text is None

    def advance(self, num_generated: int, generated: Callable[[int], list[int]]) -> bool:
        """Take note of what was generated; returns `active`.

        Args:
            num_generated: tokens so far.
            generated: returns those from an index on, the newest included; called only where the
                choice depends on more than their number.
        """
        if num_generated < self._read:
            self._restart()
        if self._counts_only:
            self._read = num_generated
            self._end_if(self._until_tokens is not None and num_generated >= self._until_tokens)
        elif not self.ended and num_generated > self._read:
            tokens = generated(self._read)
            self._read += len(tokens)
            for token in tokens:
                self._follow(token)
        return self.active

    def _restart(self) -> None:
        self._read = self._guided = 0
        self._recent: list[int] = []
        self._text = b""
        self.ended = False
        self.active = not self._after

    def _follow(self, token: int) -> None:
        if self.ended:
            return
        if not self.active:
            self._recent = [*self._recent, token][-len(self._after) :]
            self.active = self._recent == self._after
            return
        self._guided += 1
        if self._until_text is not None:
            assert self._spelling is not None, "the API process refuses this choice"
            self._text += self._spelling.text([token])
            self._end_if(self._until_text in self._text)
            # Enough for what may have begun here; none of it was the whole text.
            self._text = self._text[max(0, len(self._text) - len(self._until_text) + 1) :]
        self._end_if(self._until_tokens is not None and self._guided >= self._until_tokens)

    def _end_if(self, condition: bool) -> None:
        if condition:
            self.ended, self.active = True, False
