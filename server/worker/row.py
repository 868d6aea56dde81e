"""A request in the batch that chose value networks."""

from server.choice import Choice
from server.token_bytes import TokenBytes
from server.worker.controls import Control
from server.worker.history import History
from server.worker.network import ValueNetwork
from server.worker.translation import TranslatedRow


class GuidedRow:
    """A guided request, for as long as it is in the batch.

    Attributes:
        history: its tokens, as far as they have reached the host.
        slot: names the row's place in every table of the worker, while it is in the batch; the
            adapter gives it one.
        translations: the row as networks of another vocabulary read it.
        control: when its guidance begins and ends; None: from first to last.
        failed: it could not be guided, though its networks are sound.
        scores_prompt: its prompt's log-probabilities are wanted: its networks read it for them.
    """

    def __init__(
        self,
        choice: Choice,
        history: History,
        spelling: TokenBytes | None = None,
        scores_prompt: bool = False,
    ) -> None:
        self.choice = choice
        self.history = history
        self.slot: int | None = None
        self.failed = False
        self.scores_prompt = scores_prompt
        self.translations: dict[ValueNetwork, TranslatedRow] = {}
        self.control: Control | None = None
        if choice.after or choice.until_tokens is not None or choice.until_text is not None:
            self.control = Control(choice, spelling)

    @property
    def active(self) -> bool:
        """Whether networks guide its next token."""
        return self.control is None or self.control.active

    @property
    def is_done(self) -> bool:
        """Whether no network will guide it any more."""
        return self.control is not None and self.control.ended

    @property
    def is_fused(self) -> bool:
        """Whether there is more to do than to add value logits."""
        return bool(self.choice.dynamic or self.choice.floor or self.choice.explain)

    def num_generated(self, length: int) -> int:
        """Return how many tokens of a history of `length` are generated; below 0 in a prompt."""
        return length - self.history.prompt_length

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the history's tokens from `start` to before `stop`, as far as the host knows."""
        return self.history.tokens(start, stop)

    def generated(self, start: int, length: int, newest: int) -> list[int]:
        """Return the generated tokens from `start` on of a history of `length` that `newest` ends,
        which may not have reached the host otherwise."""
        tokens = self.history.awaited(self.history.prompt_length + start, length - 1)
        return [*tokens, newest]

    def translation(self, network: ValueNetwork) -> TranslatedRow | None:
        """Return the row as `network` reads it, if that is of another vocabulary."""
        if network.translator is None:
            return None
        if network not in self.translations:
            self.translations[network] = network.translator.follow(self.history.awaited)
        return self.translations[network]
