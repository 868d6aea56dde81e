"""How long a prompt is for networks of another vocabulary than the target's, and what they score.

The workers read every text themselves; an API process only looks ahead, so as to refuse a request
before its response has begun.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from server.settings import Settings
from value_models.vocabulary.reading import Reader

SHORT_PROMPT = 1000
"""Tokens that are read in about a millisecond: no reason to leave the event loop."""


class _Vocabulary(NamedTuple):
    reader: Reader
    scored: list[bool]  # by the target's token id


class Vocabularies:
    """The vocabularies of networks that have another one; each is loaded when it is first needed.

    Every method raises `VocabularyError` if the network's folder holds no such map any more.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: dict[str, _Vocabulary] = {}

    def count(self, name: str, token_ids: Sequence[int]) -> int:
        """Return how many of the network's tokens the target's tokens are."""
        return len(self._vocabulary(name).reader.read(token_ids).ids)

    async def count_in_background(self, name: str, token_ids: Sequence[int]) -> int:
        """`count`, in a thread where it takes time."""
        if name in self._loaded and len(token_ids) <= SHORT_PROMPT:
            return self.count(name, token_ids)
        return await asyncio.to_thread(self.count, name, token_ids)

    def scores(self, name: str, token_id: int) -> bool:
        """Whether the network has a logit for this id of the target's, wherever it stands."""
        scored = self._vocabulary(name).scored
        return 0 <= token_id < len(scored) and scored[token_id]

    def _vocabulary(self, name: str) -> _Vocabulary:
        if name not in self._loaded:
            folder = self._settings.networks[name]
            reader = Reader.load(folder, self._settings.tokenizer_fingerprint)
            self._loaded[name] = _Vocabulary(reader, (reader.map.columns >= 0).all(0).tolist())
        return self._loaded[name]
