"""The folder of a finished network: checkpoint, tokenizer and manifest."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from value_models.checkpoint import Problem, copy_checkpoint, find_checkpoint
from value_models.manifest import MANIFEST_FILE, Manifest, tokenizer_fingerprint
from value_models.store import model_path
from value_models.training import TrainingError
from value_models.training.settings import Settings, model_name

PACKAGES = ("torch", "transformers", "accelerate")


def write_network(
    folder: Path,
    settings: Settings,
    network: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    training: dict[str, Any],
) -> None:
    """Write a network as the server takes it.

    Args:
        network: as it was trained; under FSDP its own tensors are not whole.
        weights: all of its parameters, whole, by name.
        training: what the manifest says about data, steps and metrics.

    Raises:
        TrainingError: the base, which is to be kept, is no longer what it was at the start.
    """
    dtype = getattr(torch, settings.dtype)
    network.config.use_cache = True  # Trainer turns it off, for training only.
    with torch.device("meta"):
        stored = AutoModelForCausalLM.from_config(network.config, dtype=dtype)
    stored.load_state_dict(
        {name: tensor.to(dtype).cpu() for name, tensor in weights.items()},
        strict=False,  # tied weights may be there once
        assign=True,
    )
    stored.tie_weights()
    stored.generation_config = network.generation_config
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest = Manifest(
        format_version=1,
        kind=settings.kind,  # type: ignore[arg-type]  # a str here, and pydantic checks it
        reference=settings.reference,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        base=model_name(settings.base),
        description=settings.description,
        example=settings.example,
        default_scale=settings.default_scale,
        training={
            "method": f"inverse value learning, {settings.kind} (arXiv 2410.21027)",
            **training,
            "settings": settings.recorded(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        },
    )
    text = manifest.model_dump_json(indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors lets only the owner read, and servers run as others
    if settings.reference:
        _keep_base(settings.base, folder)


def _keep_base(base: str, folder: Path) -> None:
    try:
        copy_checkpoint(find_checkpoint(base), model_path(folder, "reference"))
    except Problem as problem:
        raise TrainingError(f"{base}: cannot be kept as reference: {problem}") from problem
