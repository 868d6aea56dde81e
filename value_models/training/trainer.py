"""transformers' Trainer with a frozen base beside the network that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerControl
from transformers.integrations import TensorBoardCallback

from value_models.training.batches import Collator
from value_models.training.data import Examples
from value_models.training.measure import Metrics, measure
from value_models.training.objective import guided_loss
from value_models.training.settings import Settings

PARTS = ("cross_entropy", "value_norm", "kl_from_base")


class ValueTrainer(Trainer):
    """Minimises the objective of `settings`; logs its parts, and measures what is held out."""

    control: TrainerControl

    def __init__(
        self, base: PreTrainedModel, settings: Settings, pad_token_id: int, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        # The objective is a mean over its own batch, so accumulated batches are averaged.
        self.model_accepts_loss_kwargs = False
        self._base = base
        self._settings = settings
        self._unpacked = Collator(pad_token_id)
        self._parts: list[torch.Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        base_logits, outputs = self._forward(model, inputs)
        loss = guided_loss(
            base_logits,
            outputs.logits,
            inputs["labels"],
            objective=self._settings.objective,
            beta=self._settings.beta,
            norm=self._settings.norm,
            norm_weight=self._settings.norm_weight,
            kl_weight=self._settings.kl_weight,
        )
        self._parts.append(torch.stack([loss.cross_entropy, loss.norm, loss.kl]))
        return (loss.total, outputs) if return_outputs else loss.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, so that the price of each is visible."""
        if "loss" in logs and self._parts:
            means = torch.stack(self._parts).mean(0)
            means = self.accelerator.reduce(means, reduction="mean")
            logs |= dict(zip(PARTS, means.tolist(), strict=True))
            self._parts.clear()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure and log what is held out; Trainer calls it every `eval_steps`."""
        metrics = self.measure(self.eval_dataset).named("eval_")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def measure(self, examples: Examples) -> Metrics:
        """Measure the network as it is; called by all processes, which share the work."""
        loader = self.accelerator.prepare_data_loader(
            DataLoader(
                examples,  # type: ignore[arg-type]  # a sequence is all that it needs
                batch_size=self.args.per_device_eval_batch_size,
                collate_fn=self._unpacked,
                # Its own, so that measuring leaves no trace in what is trained.
                generator=torch.Generator(),
            )
        )
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(8, dtype=torch.float64, device=self.args.device)
        for inputs in loader:
            base_logits, outputs = self._forward(self.model, inputs)
            rows = measure(base_logits, outputs.logits, inputs["labels"])
            sums += self.accelerator.gather_for_metrics(rows).sum(0)
        self.model.train(was_training)
        return Metrics.from_sums(sums)

    def _forward(
        self, model: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Any]:
        tokens = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        # No inference tensor is kept for a backward pass: each is first indexed, multiplied or
        # cast outside, and what comes out of that is an ordinary tensor.
        with torch.inference_mode():
            base_logits = self._base(**tokens, use_cache=False).logits
        base_logits = base_logits.to(inputs["labels"].device)
        if self._settings.kind != "residual":
            tokens["base_logits"] = base_logits
        return base_logits, model(**tokens, use_cache=False)


class EventFiles(TensorBoardCallback):
    """TensorBoard's event files in a folder of our choice, also after training has ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)
