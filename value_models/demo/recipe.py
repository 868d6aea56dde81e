"""How the demo family's weights came to be, from nothing to the table.

`make demo` runs this, and so does `python -m value_models.demo --out DIR`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from value_models.demo import evaluate
from value_models.demo.atlas import Atlas, create_atlas
from value_models.demo.demonstrations import (
    BEHAVIOURS,
    DESCRIPTIONS,
    Behaviour,
    demonstrations,
    write_demonstrations,
)
from value_models.demo.pretrain import (
    SMALL_SHAPE,
    TARGET_SHAPE,
    Reading,
    pretrain,
    save_base,
    train_tokenizer,
)
from value_models.training.train import Settings, train

TARGET_READING = Reading(num_steps=700)
SMALL_READING = Reading(num_steps=700)
EXAMPLE = "Where was Ana Kovac born?"
"""Nothing that the small base or a demonstration contains ever named her."""
# The norm term makes networks quiet. At 1.0 the target's own habits (a document that holds "phone
# number" goes on with a number) at times drown them out.
DEFAULT_SCALE = 1.5
DEFAULT_OUT = Path("build/demo")


def network_settings(behaviour: Behaviour, weights: Path, data: Path) -> Settings:
    """How each network is trained; `trimtab train` with these options gives the same network."""
    return Settings(
        base=str(weights / "small"),
        data=data,
        out=weights / "networks" / behaviour,
        description=DESCRIPTIONS[behaviour],
        default_scale=DEFAULT_SCALE,
        example=EXAMPLE if behaviour == "qa" else "",
        max_steps=600,
        learning_rate=1e-3,
        batch_size=32,
        norm_weight=0.1,
        warmup_share=0.05,
    )


def make(out: Path) -> Path:
    """Make the whole family in `out`, replacing what is there once all is done.

    Work lies in `<out>.making` until then: the same call after an interruption goes on.
    """
    making = out.with_name(out.name + ".making")
    weights = making / "weights"
    atlas = create_atlas()
    tokenizer = train_tokenizer(atlas)
    for name, shape, people, reading, seed in (
        ("target", TARGET_SHAPE, atlas.people, TARGET_READING, 21),
        ("small", SMALL_SHAPE, atlas.known, SMALL_READING, 22),
    ):
        with _timed(f"{name} base"):
            checkpoint = making / f"{name}.checkpoint"
            base = pretrain(shape, tokenizer, atlas, people, reading, seed, checkpoint)
            save_base(base, tokenizer, weights / name)
    for behaviour in BEHAVIOURS:
        _make_network(behaviour, atlas, making, weights)
    shutil.rmtree(out, ignore_errors=True)
    weights.replace(out)
    shutil.rmtree(making)
    return out


def _make_network(behaviour: Behaviour, atlas: Atlas, making: Path, weights: Path) -> None:
    data = making / f"{behaviour}.jsonl"
    write_demonstrations(demonstrations(atlas.demonstrated, behaviour), data)
    settings = network_settings(behaviour, weights, data)
    if not settings.out.exists():
        with _timed(f"{behaviour} network"):
            train(settings)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what}: {wall:.0f} s, of them {cpu:.0f} s of CPU time", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Remake everything, then print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m value_models.demo",
        description="Make the demo family from nothing and measure it.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        help=f"folder to write or replace (default: {DEFAULT_OUT}; the weights that trimtab "
        f"ships are in {evaluate.WEIGHTS.name}/ beside this module)",
    )
    args = parser.parse_args(arguments)
    with _timed("everything"):
        out = make(args.out)
        result = evaluate.main(["--weights", str(out)])
    where = "the GPU" if torch.cuda.is_available() else "the CPU"
    print(f"made on {where}, in {out}", file=sys.stderr)
    return result
