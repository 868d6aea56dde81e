"""`trimtab train`: a residual value network from demonstrations, on a frozen base."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from value_models.manifest import MANIFEST_FILE, SCALE_LIMIT, Manifest, tokenizer_fingerprint
from value_models.store import NetworkError, NetworkFolder, check_network
from value_models.training import TrainingError
from value_models.training.data import Collator, Demonstrations, load_demonstrations
from value_models.training.objective import residual_loss

DTYPES = ("bfloat16", "float16", "float32")
STATE_FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """How to train. Paths are where things are; all other fields end up in the manifest."""

    base: str
    """The frozen base: a folder or a name on the Hugging Face hub."""
    data: Path
    out: Path
    start: str | None = None
    """The checkpoint that the network starts from; None: the base itself."""
    chat_template: Path | None = None
    description: str = ""
    example: str = ""
    default_scale: float = 1.0
    """The factor on the network's logits in requests that name none; not used in training."""
    epochs: float = 3.0
    max_steps: int | None = None
    """Overrides `epochs`."""
    learning_rate: float = 1e-4
    batch_size: int = 8
    """Conversations per step and device."""
    gradient_accumulation: int = 1
    max_length: int = 2048
    """Tokens; never more than the network's own context."""
    norm_weight: float = 0.0
    warmup_share: float = 0.01
    weight_decay: float = 0.01
    seed: int = 0
    dtype: str = "bfloat16"
    """Of the weights on disk. Training keeps float32 weights."""
    save_steps: int = 200
    """Steps between checkpoints to resume from."""

    def recorded(self) -> dict[str, Any]:
        """What shapes the result, without the paths of this machine."""
        fields = asdict(self)
        places = ("base", "data", "out", "start")
        for field in (*places, "description", "example", "default_scale", "save_steps"):
            del fields[field]
        fields["start"] = _model_name(self.start or self.base)
        fields["chat_template"] = "given" if self.chat_template else "the tokenizer's"
        return fields


class ResidualTrainer(Trainer):
    """transformers' Trainer with the residual objective beside a frozen base."""

    def __init__(self, base: PreTrainedModel, norm_weight: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        # The objective is a mean over its own batch, so accumulated batches are averaged.
        self.model_accepts_loss_kwargs = False
        self._base = base.to(self.args.device).eval().requires_grad_(False)
        self._norm_weight = norm_weight
        self._parts: dict[str, list[torch.Tensor]] = {"cross_entropy": [], "value_norm": []}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            base_logits = self._base(**tokens, use_cache=False).logits
        outputs = model(**tokens, use_cache=False)
        loss = residual_loss(base_logits, outputs.logits, labels, self._norm_weight)
        self._parts["cross_entropy"].append(loss.cross_entropy)
        self._parts["value_norm"].append(loss.norm)
        return (loss.total, outputs) if return_outputs else loss.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, so that the norm's price is visible."""
        if "loss" in logs:
            for name, values in self._parts.items():
                if values:
                    logs[name] = torch.stack(values).mean().item()
                    values.clear()
        super().log(logs, start_time)


def train(settings: Settings) -> NetworkFolder:
    """Train a network and write its folder, complete or not at all.

    The same settings after an interruption go on from the last checkpoint, which lies beside the
    folder until it is finished.

    Raises:
        TrainingError: nothing can be trained with these settings.
        NetworkError: the folder that was written does not pass the server's own checks.
    """
    out = settings.out.resolve()
    state = out.with_name(out.name + ".training")
    if not abs(settings.default_scale) <= SCALE_LIMIT:
        raise TrainingError(
            f"default scale {settings.default_scale}: a scale lies within +-{SCALE_LIMIT:g}"
        )
    if out.exists():
        raise TrainingError(f"{settings.out} is already there; remove it or choose another --out")
    tokenizer = _load_tokenizer(settings)
    network = _load_model(settings.start or settings.base, torch.float32)
    base = _load_model(settings.base, torch.bfloat16 if _on_fast_gpu() else torch.float32)
    max_length = min(settings.max_length, _context(network), _context(base))
    data = load_demonstrations(settings.data, tokenizer, max_length)
    print(f"{settings.data.name}: {data.report()}", file=sys.stderr)
    _claim_state(state, settings, data)

    trainer = ResidualTrainer(
        base=base,
        norm_weight=settings.norm_weight,
        model=network,
        args=_trainer_arguments(settings, state),
        train_dataset=data.examples,
        data_collator=Collator(_padding(tokenizer)),
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(state))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        unfinished = state / "network"
        shutil.rmtree(unfinished, ignore_errors=True)
        _write_network(unfinished, settings, trainer, tokenizer, data)
        check_network(unfinished, name="unfinished")
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(out)
        shutil.rmtree(state)
    trainer.accelerator.wait_for_everyone()
    return check_network(out)


def _claim_state(state: Path, settings: Settings, data: Demonstrations) -> None:
    """Make the folder of checkpoints, or make sure that it belongs to this very run."""
    run = asdict(settings) | {"data_fingerprint": data.fingerprint}
    described = json.dumps(run, default=str, indent=2, sort_keys=True)
    file = state / STATE_FILE
    if file.is_file():
        if file.read_text(encoding="utf-8") != described:
            raise TrainingError(
                f"{state} holds a run with other settings or data; repeat its command to go on, "
                "or remove that folder to begin anew"
            )
        return
    state.mkdir(parents=True, exist_ok=True)
    file.write_text(described, encoding="utf-8")


def _last_checkpoint(state: Path) -> str | None:
    """The newest whole checkpoint; a run may have been killed while it wrote one."""
    whole = [
        folder
        for folder in state.glob("checkpoint-*")
        # Trainer writes this file last.
        if (folder / "trainer_state.json").is_file()
    ]
    if not whole:
        return None
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2])))


def _load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    tokenizers = {}
    for model in {settings.base, settings.start or settings.base}:
        try:
            tokenizers[model] = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise TrainingError(f"{model}: no usable tokenizer ({_one_line(error)})") from error
    fingerprints = {tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers.values()}
    if len(fingerprints) > 1:
        raise TrainingError(
            f"{settings.base} and {settings.start} have different tokenizers; start from a model "
            "of the base's family"
        )
    tokenizer = tokenizers[settings.base]
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"{settings.chat_template}: cannot be read ({error.strerror})"
            ) from error
    return tokenizer


def _load_model(model: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"{model}: cannot be loaded ({_one_line(error)})") from error


def _on_fast_gpu() -> bool:
    """Whether there is a GPU with bfloat16: the base is kept in it, the network autocasts to it."""
    return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported())


def _context(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().max_position_embeddings)


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    # Padding is masked and carries no label: any id does where the tokenizer has none.
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


def _trainer_arguments(settings: Settings, state: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(state),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_share,
        weight_decay=settings.weight_decay,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        bf16=_on_fast_gpu(),
        seed=settings.seed,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=20,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _write_network(
    folder: Path,
    settings: Settings,
    trainer: ResidualTrainer,
    tokenizer: PreTrainedTokenizerBase,
    data: Demonstrations,
) -> None:
    network = trainer.accelerator.unwrap_model(trainer.model)
    network.to(getattr(torch, settings.dtype))
    network.config.use_cache = True  # Trainer turns it off, for training only.
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest = Manifest(
        format_version=1,
        kind="residual",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        base=_model_name(settings.base),
        description=settings.description,
        example=settings.example,
        default_scale=settings.default_scale,
        training={
            "method": "inverse value learning, residual (arXiv 2410.21027)",
            "data": {
                "file": settings.data.name,
                "fingerprint": data.fingerprint,
                "conversations": data.num_conversations,
                "examples": len(data.examples),
                "response_tokens": data.num_response_tokens,
                "dropped": dict(data.dropped),
            },
            "settings": settings.recorded(),
            "steps": trainer.state.global_step,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "accelerate": importlib.metadata.version("accelerate"),
            },
        },
    )
    text = manifest.model_dump_json(indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors lets only the owner read, and servers run as others


def _model_name(model: str) -> str:
    """A hub name as it is; of a local folder only its own name, which says nothing of a machine."""
    folder = Path(model)
    return folder.resolve().name if folder.exists() else model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `trimtab train`."""
    defaults = Settings(base="", data=Path(), out=Path())
    parser.add_argument("--base", required=True, help="frozen base: a folder or a hub name")
    parser.add_argument(
        "--data", required=True, type=Path, help="demonstrations, one OpenAI-style JSON line each"
    )
    parser.add_argument("--out", required=True, type=Path, help="network folder to write")
    parser.add_argument("--start", help="checkpoint that the network starts from (default: base)")
    parser.add_argument(
        "--chat-template", type=Path, help="Jinja file, for a tokenizer that has no chat template"
    )
    parser.add_argument("--description", default="", help="for people, kept in the manifest")
    parser.add_argument("--example", default="", help="a request that shows what it is for")
    for option, meaning in (
        ("default-scale", "factor on its logits in requests that name none, at most 8"),
        ("epochs", "passes over the demonstrations"),
        ("learning-rate", "peak of the cosine schedule"),
        ("batch-size", "conversations per step and device"),
        ("gradient-accumulation", "batches per step"),
        ("max-length", "longest conversation in tokens; longer ones keep the turns that fit"),
        ("norm-weight", "weight of the norm term; more leaves more to the base"),
        ("warmup-share", "share of the steps with a rising learning rate"),
        ("weight-decay", "AdamW's weight decay"),
        ("seed", "seed of the order of the data"),
        ("save-steps", "steps between checkpoints to resume from"),
    ):
        default = getattr(defaults, option.replace("-", "_"))
        parser.add_argument(
            f"--{option}",
            type=type(default),
            default=default,
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument("--max-steps", type=int, help="stop after so many steps, not --epochs")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=defaults.dtype, help="of the weights on disk"
    )


def main(args: argparse.Namespace) -> int:
    """Run `trimtab train` and return its exit code."""
    names = Settings.__dataclass_fields__
    settings = Settings(**{name: getattr(args, name) for name in names})
    try:
        network = train(settings)
    except (TrainingError, NetworkError) as error:
        print(f"trimtab train: {error}", file=sys.stderr)
        return 1
    print(
        f"wrote {settings.out} ({network.num_parameters:,} parameters, version {network.version}); "
        f"serve it with --value-network {network.name}={settings.out}"
    )
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """`python -m value_models.training`."""
    parser = argparse.ArgumentParser(
        prog="python -m value_models.training", description="Train a value network."
    )
    add_arguments(parser)
    return main(parser.parse_args(arguments))
