"""The maps from the small base's vocabulary to the foreign one, by each method."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from value_models.demo.atlas import Writer, create_atlas
from value_models.study.family import base_path
from value_models.vocabulary.align import MAP_METHODS, MapMethod, align_vocabularies
from value_models.vocabulary.map import VocabularyMap, map_file
from value_models.vocabulary.reading import Reader
from value_models.vocabulary.tokens import Vocabulary

NUM_DOCUMENTS = 10_000


def make_maps(folder: Path) -> None:
    """Make the maps, unless they are there."""
    atlas = create_atlas()
    writer = Writer(atlas, atlas.people, seed=41)
    texts = [writer.document() for _ in range(NUM_DOCUMENTS)]
    value, target = (
        Vocabulary.of(AutoTokenizer.from_pretrained(base_path(base, folder / "bases")))
        for base in ("small", "foreign")
    )
    for method in MAP_METHODS:
        place = folder / "maps" / method
        if not map_file(place, target.fingerprint).exists():
            place.mkdir(parents=True, exist_ok=True)
            align_vocabularies(value, target, texts, method=method).save(place)


def load_reader(method: MapMethod, folder: Path) -> Reader:
    """Load what reads the target through one of the maps that `make_maps` made."""
    tokenizers = [
        AutoTokenizer.from_pretrained(base_path(base, folder / "bases"))
        for base in ("small", "foreign")
    ]
    fingerprint = Vocabulary.of(tokenizers[1]).fingerprint
    vocabulary_map = VocabularyMap.load(map_file(folder / "maps" / method, fingerprint))
    return Reader(vocabulary_map, tokenizers[0])
