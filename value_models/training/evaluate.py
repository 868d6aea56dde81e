"""`trimtab evaluate`: how well a network guides a base it may never have seen, read offline.

The metrics are those of training, for networks of every kind, those included that cannot be served.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from value_models.connection import CONNECTIONS
from value_models.manifest import tokenizer_fingerprint
from value_models.store import NetworkError, NetworkFolder, check_network
from value_models.training import TrainingError
from value_models.training.batches import Collator
from value_models.training.data import load_demonstrations
from value_models.training.measure import Metrics, measure
from value_models.training.models import connect, context, load_pretrained, read_tokenizer


def evaluate(
    folder: Path,
    base: str,
    data: Path | str,
    scale: float | None = None,
    batch_size: int = 8,
) -> Metrics:
    """Read demonstrations along with a network beside a base, in float32, on a GPU if there is one.

    Args:
        folder: of the network.
        base: the model that it guides: its own base, or any other with the same tokenizer.
        data: conversations, as `load_demonstrations` takes them.
        scale: factor on the network's logits; None: its own.

    Raises:
        NetworkError: the folder is no sound network.
        TrainingError: base or data cannot be used, the base has another tokenizer, or the network
            is of an unknown kind.
    """
    if batch_size < 1:
        raise TrainingError(f"batch size {batch_size}: it must be at least 1")
    network = check_network(folder)
    kind = network.manifest.kind
    if kind not in CONNECTIONS:
        known = ", ".join(CONNECTIONS)
        raise TrainingError(f"{folder} is of the unknown kind {kind!r}; there are: {known}")
    tokenizer = _load_tokenizer(base, network)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [_load_model(where, device) for where in (str(network.path), base)]
    connect(models[0], kind)
    longest = min(map(context, models))
    examples = load_demonstrations(data, tokenizer, longest).examples
    collate = Collator(tokenizer.pad_token_id or 0)
    starts = range(0, len(examples), batch_size)
    batches = (collate(examples[i : i + batch_size]) for i in tqdm(starts, desc="evaluate"))
    factor = network.manifest.default_scale if scale is None else scale
    cascaded = kind != "residual"
    sums = []
    with torch.inference_mode():
        for on_cpu in batches:
            batch = {name: tensor.to(device) for name, tensor in on_cpu.items()}
            labels = batch.pop("labels")
            base_logits = models[1](**batch, use_cache=False).logits
            if cascaded:
                batch["base_logits"] = base_logits
            value_logits = models[0](**batch, use_cache=False).logits
            sums.append(measure(base_logits, factor * value_logits, labels).sum(0))
    return Metrics.from_sums(torch.stack(sums).sum(0))


def _load_tokenizer(base: str, network: NetworkFolder) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer; the chat template is the network's where the base has none."""
    tokenizer = read_tokenizer(base)
    if tokenizer_fingerprint(tokenizer) != network.manifest.tokenizer_fingerprint:
        raise TrainingError(
            f"{base} has another tokenizer than {network.path}; its demonstrations would be other "
            "tokens"
        )
    if not tokenizer.chat_template:
        own = read_tokenizer(str(network.path))
        if not own.chat_template:
            raise TrainingError(
                f"neither {base} nor {network.path} has a chat template, so nothing says how a "
                "conversation becomes tokens"
            )
        tokenizer.chat_template = own.chat_template
    return tokenizer


def _load_model(where: str, device: torch.device) -> PreTrainedModel:
    model: PreTrainedModel = load_pretrained(
        AutoModelForCausalLM, where, dtype=torch.float32, use_safetensors=True
    )
    model.to(device)
    return model.eval()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `trimtab evaluate`."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="the network's folder")
    parser.add_argument("--base", required=True, help="model that it guides: a folder or hub name")
    parser.add_argument(
        "--data", required=True, help="demonstrations, as `trimtab train` reads them"
    )
    parser.add_argument("--scale", type=float, help="factor on its logits (default: its own)")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations (default: 8)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def main(args: argparse.Namespace) -> int:
    """Run `trimtab evaluate` and return its exit code."""
    try:
        metrics = evaluate(args.folder, args.base, args.data, args.scale, args.batch_size)
    except (TrainingError, NetworkError) as error:
        print(f"trimtab evaluate: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(asdict(metrics), indent=2))
    else:
        for name, figure in asdict(metrics).items():
            shown = f"{figure:.4f}" if isinstance(figure, float) else f"{figure:,}"
            print(f"{name.replace('_', ' '):<18}{shown}")
    return 0
