"""What the study trains: value networks on the small base, and fully fine-tuned references."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from value_models.demo.demonstrations import demonstrations, write_demonstrations
from value_models.study.family import base_path, study_atlas
from value_models.training.batches import Collator
from value_models.training.data import load_demonstrations
from value_models.training.train import Settings, train

SEEDS = (0, 1, 2)
STEPS = 400
BATCH_SIZE = 32
NORM_WEIGHT = 0.1
LEARNING_RATE = 2.5e-4
FULL_LEARNING_RATE = 5e-4
FULL_STEPS = 200
"""Of full fine-tuning: enough for bases that know more. The small one takes as many steps as its
networks, because it is also the expert of proxy tuning."""


@dataclass(frozen=True)
class Recipe:
    """One way to train a network: the common settings, and what is changed in them."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, data: Path, out: Path, seed: int) -> Settings:
        common: dict[str, Any] = {
            "base": str(base_path("small", out.parent)),
            "data": data,
            "out": out,
            "max_steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "batch_size": BATCH_SIZE,
            "norm_weight": NORM_WEIGHT,
            "warmup_share": 0.05,
            "dtype": "float32",
            "seed": seed,
        }
        return Settings(**{**common, **self.changes})


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("residual"),
        Recipe("norm 0", {"norm_weight": 0.0}),
        Recipe("norm 1", {"norm_weight": 1.0}),
        Recipe("norm 10", {"norm_weight": 10.0}),
        Recipe("cascade", {"kind": "cascade"}),
        Recipe("cascade+", {"kind": "cascade+"}),
        Recipe("random start", {"from_scratch": True}),
        Recipe("chi2", {"objective": "chi2"}),
        Recipe("hellinger", {"objective": "hellinger"}),
        Recipe("KL", {"kl_weight": 0.05, "norm_weight": 0.0}),
        Recipe("larger step", {"learning_rate": 1e-3}),
    )
}


def write_data(folder: Path) -> Path:
    """Write the study's demonstrations, unless they are there."""
    file = folder / "qa.jsonl"
    if not file.exists():
        write_demonstrations(demonstrations(study_atlas().demonstrated, "qa"), file)
    return file


def network_path(recipe: str, seed: int, folder: Path) -> Path:
    return folder / "networks" / f"{recipe.replace(' ', '-').replace('+', '-plus')}-{seed}"


def tuned_path(base: str, seed: int, folder: Path) -> Path:
    return folder / "tuned" / f"{base}-{seed}"


def train_network(recipe: str, seed: int, folder: Path) -> None:
    """Train one network, unless it is there."""
    out = network_path(recipe, seed, folder)
    if not out.exists():
        train(RECIPES[recipe].settings(write_data(folder), out, seed))


def fine_tune(base: str, seed: int, folder: Path) -> None:
    """Fine-tune all weights of a base on the demonstrations, unless that is done."""
    out = tuned_path(base, seed, folder)
    if out.exists():
        return
    path = base_path(base, folder / "bases")
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = load_demonstrations(write_data(folder), tokenizer, max_length=512)
    scratch = out.with_name(out.name + ".training")
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=str(scratch),
            max_steps=STEPS if base == "small" else FULL_STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=FULL_LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.01,
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=data.examples,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    trainer.train()
    trainer.model.save_pretrained(scratch / "model")
    (scratch / "model").replace(out)
    shutil.rmtree(scratch)
