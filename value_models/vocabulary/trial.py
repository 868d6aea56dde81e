"""Two real vocabularies aligned and read at true size: `python -m value_models.vocabulary.trial`.

The vocabularies are those that vLLM's dependency mistral_common brings: SentencePiece with 32,768
tokens and Tekken with 131,072. The text is what lies in this environment's packages: code, and
prose about code. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from statistics import median

from value_models.vocabulary.align import align
from value_models.vocabulary.reading import Reader
from value_models.vocabulary.tokens import load_tokenizer, load_vocabulary

FILES = ("mistral_instruct_tokenizer_240323.model.v3", "tekken_240911.json")
TEXT_SUFFIXES = (".md", ".po", ".py", ".rst", ".txt")
MOST_OF_ONE_FILE = 40_000
NUM_STEPS = 4000


def main() -> None:
    """Print, as JSON, what each direction covers and costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=10, help="of text (default: 10)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    package = find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        parser.exit(1, "mistral_common is not installed\n")
    data = Path(package.submodule_search_locations[0]) / "data"
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.txt"
        corpus.write_text("".join(_texts(int(options.megabytes * 1e6))), encoding="utf-8")
        for name in FILES:
            load_tokenizer(data / name).save_pretrained(Path(scratch) / name)
        for value, target in permutations(FILES):
            folder = Path(scratch) / value
            began = time.perf_counter()
            built = align(
                folder, data / target, [corpus], processes=options.processes, progress=True
            )
            seconds = time.perf_counter() - began
            built.save(folder)
            began = time.perf_counter()
            reader = Reader.load(folder, built.target_fingerprint)
            loading = time.perf_counter() - began
            report = built.report
            results.append(
                {
                    "network": value,
                    "target": target,
                    "corpus_bytes": report["bytes"],
                    "align_seconds": round(seconds, 1),
                    "tokens": report["tokens"],
                    "occurrences": report["occurrences"],
                    "lossy_texts": report["lossy_texts"],
                    "load_seconds": round(loading, 2),
                    "microseconds_per_step": _cost(reader, data / target, corpus),
                }
            )
    print(json.dumps({"processes": options.processes, "directions": results}, indent=2))


def _texts(num_bytes: int) -> Iterator[str]:
    """The same files in the same order on machines with the same packages."""
    files = sorted(
        file
        for file in Path(sysconfig.get_path("purelib")).rglob("*")
        if file.suffix in TEXT_SUFFIXES and file.is_file()
    )
    random.Random(0).shuffle(files)
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")[:MOST_OF_ONE_FILE]
        num_bytes -= len(text.encode())
        yield text
        if num_bytes <= 0:
            return


def _cost(reader: Reader, target: Path, corpus: Path) -> dict[str, float]:
    """Time of one token appended to a history, which grows to thousands."""
    text = corpus.read_text(encoding="utf-8")[: 8 * NUM_STEPS]
    ids = load_vocabulary(target).tokenizer(text, add_special_tokens=False)["input_ids"]
    history = reader.follow()
    history.extend(ids[:64])
    steps = []
    for token_id in ids[64 : 64 + NUM_STEPS]:
        began = time.perf_counter()
        history.extend([token_id])
        steps.append((time.perf_counter() - began) * 1e6)
    return {"median": round(median(steps), 1), "worst": round(max(steps), 1)}


if __name__ == "__main__":
    main()
