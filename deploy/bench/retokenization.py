"""What it costs to read a target's text in a network's own tokens, for each row and step.

The vocabularies are real ones, which vLLM's dependency mistral_common brings: SentencePiece with
32,768 tokens and Tekken with 131,072. The text is this project's documentation.
"""

import argparse
import statistics
import time
from importlib.resources import files
from itertools import permutations
from pathlib import Path

from deploy.bench.report import Answer, Cell, Table, say
from deploy.bench.rounds import percentile
from value_models.vocabulary.align import align_vocabularies
from value_models.vocabulary.reading import Reader
from value_models.vocabulary.tokens import Vocabulary, load_vocabulary

VOCABULARIES = {
    "SentencePiece, 32 k": "mistral_instruct_tokenizer_240323.model.v3",
    "Tekken, 131 k": "tekken_240911.json",
}
PROMPT_TOKENS = 64
STEPS = 3000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    """Follow the text a token at a time, as a decoding row does, in both directions."""
    say("aligning two real vocabularies")
    data = files("mistral_common") / "data"
    loaded = {name: load_vocabulary(str(data / file)) for name, file in VOCABULARIES.items()}
    root = Path(__file__).parents[2]
    documents = [*sorted(root.glob("docs/*.md")), root / "README.md"]
    text = "\n".join(file.read_text(encoding="utf-8") for file in documents)
    rows: list[dict[str, Cell]] = [
        {
            "network": network,
            "target": target,
            **summarise(_microseconds(loaded[network], loaded[target], text)),
        }
        for network, target in permutations(VOCABULARIES)
    ]
    title = f"Microseconds a row and step, over {STEPS} steps"
    return Answer(tables=[Table(title, rows)])


def summarise(taken: list[float]) -> dict[str, Cell]:
    return {
        "median": round(statistics.median(taken), 1),
        "99th percentile": round(percentile(taken, 0.99), 1),
        "longest": round(max(taken), 1),
    }


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
