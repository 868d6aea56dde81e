"""How to train a value network: everything that a run depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from value_models.connection import CONNECTIONS
from value_models.manifest import SCALE_LIMIT
from value_models.store import check_name
from value_models.training import TrainingError
from value_models.training.objective import OBJECTIVES, Norm

DTYPES = ("bfloat16", "float16", "float32")
PRECISIONS = ("auto", "bfloat16", "float32")
QUANTIZATIONS = ("8bit", "4bit")

BOUNDS: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("above 0", lambda number: number > 0, ("beta", "epochs", "learning_rate")),
    ("at least 0", lambda number: number >= 0, ("norm_weight", "kl_weight", "weight_decay")),
    (
        "at least 0 and below 1",
        lambda number: 0 <= number < 1,
        ("warmup_share", "held_out_share"),
    ),
    (
        "at least 1",
        lambda number: number >= 1,
        (
            "max_steps",
            "batch_size",
            "gradient_accumulation",
            "max_length",
            "held_out_steps",
            "save_steps",
        ),
    ),
)
"""What numbers must be, and be finite: in words, as a test, and the fields that it is about."""


@dataclass(frozen=True)
class Settings:
    """How to train. Paths are where things are; what shapes the result ends up in the manifest."""

    base: str
    """The frozen base: a folder or a name on the Hugging Face hub."""
    data: Path | str
    """Demonstrations: a JSONL file, or the name of a Hugging Face dataset, `org/name[:split]`."""
    out: Path
    start: str | None = None
    """The checkpoint that the network starts from; None: the base itself."""
    from_scratch: bool = False
    """Take only the shape of `start`, and random weights from `seed`."""
    kind: str = "residual"
    """How the network reads the base: a name in `value_models.connection.CONNECTIONS`."""
    reference: bool = False
    """Keep the base in the network's folder too, so that its distance from it can be measured."""
    chat_template: Path | None = None
    description: str = ""
    example: str = ""
    default_scale: float = 1.0
    """The factor on the network's logits in requests that name none; not used in training."""

    objective: str = "cross_entropy"
    """A name in `value_models.training.objective.OBJECTIVES`."""
    beta: float = 0.1
    """The reward of one logit, for the objectives that have one."""
    norm: Norm = "l1"
    norm_weight: float = 0.1
    """Without the norm a network overrules what larger targets know (docs/study.md)."""
    kl_weight: float = 0.0
    """Weight of the KL divergence from the base, in nats per response token."""

    epochs: float = 3.0
    max_steps: int | None = None
    """Overrides `epochs`."""
    learning_rate: float = 1e-4
    batch_size: int = 8
    """Rows per step and device: conversations, or packs of them."""
    gradient_accumulation: int = 1
    max_length: int = 2048
    """Tokens of a row; never more than the network's own context."""
    packing: bool = False
    """Put several conversations into one row; none sees another."""
    warmup_share: float = 0.01
    weight_decay: float = 0.01
    seed: int = 0

    held_out: Path | None = None
    """Demonstrations to measure guided accuracy on, never trained on."""
    held_out_share: float = 0.0
    """Share of `data` to hold out, drawn by `seed`."""
    held_out_steps: int = 200
    """Steps between measurements."""
    log_dir: Path | None = None
    """Where TensorBoard's event files go; None: nowhere."""

    precision: str = "auto"
    """Of the arithmetic, over float32 weights; `auto`: bfloat16 on GPUs that have it."""
    gradient_checkpointing: bool = False
    base_quantization: Literal["8bit", "4bit"] | None = None
    base_device_map: str | None = None
    """`auto` spreads the base over all GPUs; None: a whole copy beside each process's network."""
    dtype: str = "bfloat16"
    """Of the weights on disk. Training keeps float32 weights."""
    save_steps: int = 200
    """Steps between checkpoints to resume from."""

    def check(self) -> None:
        """Refuse what no run could satisfy.

        Raises:
            TrainingError: an unknown choice, a number out of bounds, or two that exclude each
                other.
            NetworkError: the last part of `out` is no name for a network.
        """
        check_name(self.out.name)
        for name, value, known in (
            ("kind", self.kind, CONNECTIONS),
            ("objective", self.objective, OBJECTIVES),
            ("norm", self.norm, ("l1", "l2")),
            ("precision", self.precision, PRECISIONS),
            ("dtype", self.dtype, DTYPES),
            ("base quantization", self.base_quantization, (None, *QUANTIZATIONS)),
            ("base device map", self.base_device_map, (None, "auto")),
        ):
            if value not in known:
                choices = ", ".join(str(one) for one in known)
                raise TrainingError(f"{name} {value!r} is unknown; there are: {choices}")
        if not abs(self.default_scale) <= SCALE_LIMIT:
            raise TrainingError(
                f"default scale {self.default_scale}: a scale lies within +-{SCALE_LIMIT:g}"
            )
        for bound, holds, fields in BOUNDS:
            for field in fields:
                number = getattr(self, field)
                if number is not None and not (math.isfinite(number) and holds(number)):
                    name = field.replace("held_out", "held-out").replace("_", " ")
                    raise TrainingError(f"{name} {number}: it must be {bound}, and finite")
        if self.reference and self.kind != "residual":
            raise TrainingError(
                f"only a network of kind residual can have a reference, not {self.kind!r}"
            )
        if self.held_out is not None and self.held_out_share:
            raise TrainingError("hold out a file or a share of the data, not both")

    def recorded(self) -> dict[str, Any]:
        """What shapes the result, without the paths of this machine."""
        fields = asdict(self)
        places = ("base", "data", "out", "start", "held_out", "log_dir", "base_device_map")
        elsewhere = ("kind", "reference", "description", "example", "default_scale")
        for field in (*places, *elsewhere, "save_steps", "held_out_steps"):
            del fields[field]
        fields["start"] = model_name(self.start or self.base)
        fields["chat_template"] = "given" if self.chat_template else "the tokenizer's"
        return fields


def model_name(model: str) -> str:
    """A hub name as it is; of a local folder only its own name, which says nothing of a machine."""
    folder = Path(model)
    return folder.resolve().name if folder.exists() else model
