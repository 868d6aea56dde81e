"""What it costs to read a target's text in a network's own tokens, for each row and step.

The vocabularies are real ones, which vLLM's dependency mistral_common brings: SentencePiece with
32,768 tokens and Tekken with 131,072. The text is this project's documentation.
"""

import statistics
import time
from importlib.resources import files
from itertools import permutations
from pathlib import Path
from typing import Any

from value_models.vocabulary.align import align_vocabularies
from value_models.vocabulary.reading import Reader
from value_models.vocabulary.tokens import Vocabulary, load_vocabulary

VOCABULARIES = {
    "SentencePiece, 32 k": "mistral_instruct_tokenizer_240323.model.v3",
    "Tekken, 131 k": "tekken_240911.json",
}
PROMPT_TOKENS = 64
STEPS = 3000


def measure() -> list[dict[str, Any]]:
    """Follow the text a token at a time, as a decoding row does, in both directions.

    Returns:
        For each pair of vocabularies the microseconds of a step: median, 99th percentile, worst.
    """
    data = files("mistral_common") / "data"
    loaded = {name: load_vocabulary(str(data / file)) for name, file in VOCABULARIES.items()}
    root = Path(__file__).parents[2]
    documents = [*sorted(root.glob("docs/*.md")), root / "README.md"]
    text = "\n".join(file.read_text(encoding="utf-8") for file in documents)
    return [
        {
            "network": network,
            "target": target,
            "steps": STEPS,
            **_summary(_microseconds(loaded[network], loaded[target], text)),
        }
        for network, target in permutations(VOCABULARIES)
    ]


def _microseconds(network: Vocabulary, target: Vocabulary, text: str) -> list[float]:
    reader = Reader(align_vocabularies(network, target, [text]), network.tokenizer)
    ids = target.tokenizer(text, add_special_tokens=False).input_ids
    ids = (ids * -(-(PROMPT_TOKENS + STEPS) // len(ids)))[: PROMPT_TOKENS + STEPS]
    history = reader.follow()
    history.extend(ids[:PROMPT_TOKENS])
    taken = []
    for token_id in ids[PROMPT_TOKENS:]:
        start = time.perf_counter()
        history.extend([token_id])
        taken.append(1e6 * (time.perf_counter() - start))
    return taken


def _summary(taken: list[float]) -> dict[str, float]:
    return {
        "median_microseconds": round(statistics.median(taken), 1),
        "p99_microseconds": round(statistics.quantiles(taken, n=100)[98], 1),
        "worst_microseconds": round(max(taken), 1),
    }
