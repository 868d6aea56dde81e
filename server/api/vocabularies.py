"""How long a prompt is for networks of another vocabulary than the target's, and what they score.

The workers read every text themselves; an API process only looks ahead, so as to refuse a request
before its response has begun.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from server.lifecycle.catalog import Catalog, Network
from value_models.vocabulary.reading import Reader

SHORT_PROMPT = 1000
"""Tokens that are read in about a millisecond: no reason to leave the event loop."""


class _Vocabulary(NamedTuple):
    reader: Reader
    scored: list[bool]  # by the target's token id


class Vocabularies:
    """The vocabularies of networks that have another one; each is loaded when it is first needed,
    and forgotten when no worker holds that version of the network any more.

    Every method raises `VocabularyError` if the network's snapshot holds no such map.
    """

    def __init__(self, catalog: Catalog, tokenizer_fingerprint: str) -> None:
        """`tokenizer_fingerprint` is the target's."""
        self._catalog = catalog
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._loaded: dict[str, _Vocabulary] = {}
        catalog.subscribe(self._forget_unloaded)

    def count(self, network: Network, token_ids: Sequence[int]) -> int:
        """Return how many of the network's tokens the target's tokens are."""
        return len(self._vocabulary(network).reader.read(token_ids).ids)

    async def count_in_background(self, network: Network, token_ids: Sequence[int]) -> int:
        """`count`, in a thread where it takes time."""
        if str(network) in self._loaded and len(token_ids) <= SHORT_PROMPT:
            return self.count(network, token_ids)
        return await asyncio.to_thread(self.count, network, token_ids)

    def scores(self, network: Network, token_id: int) -> bool:
        """Whether the network has a logit for this id of the target's, wherever it stands."""
        scored = self._vocabulary(network).scored
        return 0 <= token_id < len(scored) and scored[token_id]

    def _vocabulary(self, network: Network) -> _Vocabulary:
        vocabulary = self._loaded.get(str(network))
        if vocabulary is None:
            reader = Reader.load(Path(network.folder), self._tokenizer_fingerprint)
            vocabulary = _Vocabulary(reader, (reader.map.columns >= 0).all(0).tolist())
            self._loaded[str(network)] = vocabulary
        return vocabulary

    def _forget_unloaded(self) -> None:
        resident = set(map(str, self._catalog))
        for reference in [reference for reference in self._loaded if reference not in resident]:
            del self._loaded[reference]
