"""Guided decoding with transformers alone: what a service can do without trimtab."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from deploy.bench.checkpoints import WEIGHTS
from deploy.bench.engine import Request, Run, Stream


class Baseline:
    """Target and value network as transformers models, their logits summed at every step."""

    def __init__(self, target: Path, network: Path, dtype: str) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._models = [load_model(path, dtype, self._device) for path in (target, network)]

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], cached: bool) -> Run:
        """Continue a batch of prompts until each has its tokens.

        As `generate` does it: shorter prompts are padded on the left, and rows that have their
        tokens are computed to the end.

        Args:
            cached: with KV caches. Without, each step reads the whole sequence and computes logits
                for all of it, as the method's authors serve it: luxinyu1/inverse-value-learning,
                `LlamaResidualPlus` in src/ivl/serve/modeling.py.
        """
        start = time.perf_counter()
        tokens, mask = self._pad([request.prompt for request in requests])
        caches = [DynamicCache(config=model.config) if cached else None for model in self._models]
        inputs = tokens
        arrivals: list[float] = []
        steps: list[list[int]] = []
        for _ in range(max(request.num_tokens for request in requests)):
            logits = [  # of all positions where `logits_to_keep` is 0
                model(
                    inputs,
                    past_key_values=cache,
                    use_cache=cached,
                    logits_to_keep=int(cached),
                    **_where(mask, inputs.shape[1]),
                )
                .logits[:, -1]
                .float()
                for model, cache in zip(self._models, caches, strict=True)
            ]
            covered = min(each.shape[1] for each in logits)  # paddings of vocabularies differ
            chosen = sum(each[:, :covered] for each in logits).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], 1)
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(chosen)], 1)
            inputs = chosen if cached else tokens
            steps.append(chosen[:, 0].tolist())  # as a service must, which streams tokens
            arrivals.append(time.perf_counter() - start)
        return Run(
            [
                Stream(list(row[: request.num_tokens]), 0.0, arrivals[: request.num_tokens])
                for request, row in zip(requests, zip(*steps, strict=True), strict=True)
            ]
        )

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `[rows, longest]`, and where tokens are: None if there is no padding."""
        longest = max(map(len, prompts))
        paddings = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * padding + list(p) for padding, p in zip(paddings, prompts, strict=True)]
        tokens = torch.tensor(rows, device=self._device)
        if not any(paddings):
            return tokens, None
        there = [[0] * padding + [1] * (longest - padding) for padding in paddings]
        return tokens, torch.tensor(there, device=self._device)


def _where(mask: torch.Tensor | None, num_inputs: int) -> dict[str, torch.Tensor]:
    """Return where the last `num_inputs` tokens are, if that does not go without saying."""
    if mask is None:
        return {}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions[:, -num_inputs:]}


def load_model(path: Path, dtype: str, device: str) -> PreTrainedModel:
    """Load a checkpoint; one without weights gets random ones."""
    if (path / WEIGHTS).exists():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        return model.to(device).eval()
    with torch.device(device):
        config = AutoConfig.from_pretrained(path)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
