"""The command `trimtab align`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from value_models.store import NetworkError, check_network
from value_models.vocabulary.align import MAP_METHODS, align
from value_models.vocabulary.tokens import VocabularyError

DESCRIPTION = """\
Map a value network's vocabulary to that of a target with another tokenizer.

Both tokenizers read the same text; each of the target's tokens is paired with the network's token
that begins most often in the same place, or else with that of equal bytes, or else with its longest
beginning. Chat turns and special tokens are paired by meaning. The map is stored in the network's
folder.
"""
ORIGINS = {
    "exact": "of equal bytes",
    "aligned": "paired by the text",
    "prefix": "by their longest beginning",
    "special": "special, paired by meaning",
    "none": "without counterpart",
    "unused": "special or unused, without counterpart",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--value", required=True, metavar="DIR", help="the value network's folder")
    parser.add_argument(
        "--target",
        required=True,
        metavar="MODEL",
        help="the target: its folder, its name on the hub, or a tokenizer file of mistral_common's",
    )
    parser.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="FILE",
        help="plain text, or .jsonl with messages, conversations or text in each line",
    )
    parser.add_argument(
        "--special",
        action="append",
        default=[],
        metavar="TARGET=VALUE",
        help="pair two special tokens as they are spelled ('<|im_end|>=</s>'); "
        "'TARGET=' leaves one without counterpart; may be repeated",
    )
    parser.add_argument(
        "--method",
        choices=MAP_METHODS,
        default=MAP_METHODS[0],
        help="default: start; the others, by warping or equal bytes alone, are to compare with",
    )
    parser.add_argument(
        "--processes", type=_positive, metavar="N", help="default: as the corpus is worth"
    )


def main(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code."""
    try:
        network = check_network(options.value)
        built = align(
            options.value,
            options.target,
            options.corpus,
            specials=options.special,
            method=options.method,
            processes=options.processes,
            progress=True,
        )
        if built.target_fingerprint == built.value_fingerprint:
            print("The target has the network's own tokenizer: it needs no map.")
            return 0
        if built.columns.max() >= network.vocab_size:
            raise VocabularyError(
                f"{options.value} has {network.vocab_size} logits, fewer than its tokenizer has "
                "tokens; the checkpoint is not this tokenizer's"
            )
        file = built.save(Path(options.value))
    except (VocabularyError, NetworkError) as error:
        print(error, file=sys.stderr)
        return 1
    for line in describe(built.report):
        print(line)
    print(f"Written to {file}")
    return 0


def describe(report: dict[str, Any]) -> list[str]:
    """Say in lines of text what a map covers (`VocabularyMap.report`)."""
    occurred = sum(report["occurrences"].values())
    lines = [f"{report['bytes']:,} bytes of text, {occurred:,} of the target's tokens"]
    for origin, meaning in ORIGINS.items():
        if origin not in report["tokens"]:
            continue
        share = report["occurrences"].get(origin, 0) / max(occurred, 1)
        lines.append(
            f"{report['tokens'][origin]:>9,} tokens {meaning} ({share:.2%} of the text's tokens)"
        )
        examples = ", ".join(
            f"'{there}' = '{here}'" if here else f"'{there}'"
            for there, here in report["examples"].get(origin, ())
        )
        if examples:
            lines.append(f"{'':>10}such as {examples}")
    if report["lossy_texts"]:
        lines.append(
            f"{report['lossy_texts']:,} of {report['texts']:,} pieces of text are left out: a "
            "tokenizer does not give them back byte for byte"
        )
    return [*lines, *(f"Note: {warning}" for warning in report["warnings"])]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
