"""The options of `trimtab train`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from value_models.connection import CONNECTIONS
from value_models.training.settings import DTYPES, PRECISIONS, QUANTIZATIONS, Settings

DEFAULTS = Settings(base="", data=Path(), out=Path())
STUDIED = {"objective", "beta", "kl_weight"}
"""Settings without an option: the study (docs/study.md) compares them, and they did not help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them, in the order in which people need them."""
    parser.usage = f"{parser.prog} --base BASE --data DATA --out OUT [options]"
    add = parser.add_argument_group("what is trained").add_argument
    add("--base", required=True, help="frozen base: a folder or a hub name")
    add(
        "--data",
        required=True,
        help="demonstrations: a JSONL file, OpenAI or ShareGPT format, or a dataset on the hub, "
        "org/name[:split]",
    )
    add("--out", required=True, type=Path, help="network folder to write")
    add("--start", help="checkpoint that the network starts from (default: base)")
    add("--from-scratch", action="store_true", help="take its shape only, and random weights")
    _add(add, "kind", "how the network reads the base", choices=CONNECTIONS)
    add(
        "--reference",
        action="store_true",
        help="keep the base beside the network, so that it can be combined dynamically: the server "
        "then runs both",
    )
    add("--chat-template", type=Path, help="Jinja file, for a tokenizer without a chat template")
    _add(add, "max-length", "longest row in tokens; longer conversations keep the turns that fit")
    _add(add, "dtype", "of the weights on disk", choices=DTYPES)

    add = parser.add_argument_group("what the manifest tells people").add_argument
    add("--description", default="", help="what the network does")
    add("--example", default="", help="a request that shows it")
    _add(add, "default-scale", "factor on its logits in requests that name none, at most 8")

    add = parser.add_argument_group("objective").add_argument
    _add(add, "norm-weight", "weight of the value logits' norm; more leaves more to the base")
    _add(add, "norm", "which norm", choices=("l1", "l2"))

    add = parser.add_argument_group("schedule").add_argument
    _add(add, "epochs", "passes over the demonstrations")
    add("--max-steps", type=int, help="stop after so many steps, not --epochs")
    _add(add, "learning-rate", "peak of the cosine schedule")
    _add(add, "warmup-share", "share of the steps with a rising learning rate")
    _add(add, "weight-decay", "AdamW's weight decay")
    _add(add, "batch-size", "rows per batch and process")
    _add(add, "gradient-accumulation", "batches per step")
    add("--packing", action="store_true", help="several conversations in a row, kept apart")
    _add(add, "seed", "seed of everything random")

    add = parser.add_argument_group("measuring and resuming").add_argument
    add("--held-out", type=Path, help="demonstrations to measure on, as JSONL")
    _add(add, "held-out-share", "share of --data to hold out instead")
    _add(add, "held-out-steps", "steps between measurements")
    add("--log-dir", type=Path, help="for TensorBoard's event files (default: OUT.logs)")
    _add(add, "save-steps", "steps between checkpoints to resume from")

    add = parser.add_argument_group("memory and speed").add_argument
    _add(add, "precision", "of the arithmetic; auto: bfloat16 on GPUs", choices=PRECISIONS)
    add("--gradient-checkpointing", action="store_true", help="less memory, a third slower")
    add("--base-quantization", choices=QUANTIZATIONS, help="load the base so, by bitsandbytes")
    add("--base-device-map", choices=["auto"], help="spread the base over all GPUs")


def settings_from(args: argparse.Namespace) -> Settings:
    """Turn parsed options into settings."""
    names = Settings.__dataclass_fields__.keys() - STUDIED
    settings = Settings(**{name: getattr(args, name) for name in names})
    if settings.log_dir is None:
        settings = replace(settings, log_dir=settings.out.with_name(settings.out.name + ".logs"))
    return settings


def _add(add: Any, option: str, meaning: str, **more: Any) -> None:
    default = getattr(DEFAULTS, option.replace("-", "_"))
    add(
        f"--{option}",
        type=type(default),
        default=default,
        help=f"{meaning} (default: {default})",
        **more,
    )
