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
        """Continue prompts of one length.

        Args:
            cached: with KV caches. Without, each step reads the whole sequence and computes logits
                for all of it, as the method's authors serve it: luxinyu1/inverse-value-learning,
                `LlamaResidualPlus` in src/ivl/serve/modeling.py.
        """
        start = time.perf_counter()
        tokens = torch.tensor([request.prompt for request in requests], device=self._device)
        caches = [DynamicCache(config=model.config) if cached else None for model in self._models]
        inputs = tokens
        arrivals: list[float] = []
        steps: list[list[int]] = []
        for _ in range(requests[0].num_tokens):
            logits = [  # of all positions where `logits_to_keep` is 0
                model(inputs, past_key_values=cache, use_cache=cached, logits_to_keep=int(cached))
                .logits[:, -1]
                .float()
                for model, cache in zip(self._models, caches, strict=True)
            ]
            covered = min(each.shape[1] for each in logits)  # paddings of vocabularies differ
            chosen = sum(each[:, :covered] for each in logits).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], 1)
            inputs = chosen if cached else tokens
            steps.append(chosen[:, 0].tolist())  # as a service must, which streams tokens
            arrivals.append(time.perf_counter() - start)
        return Run([Stream(list(row), 0.0, arrivals) for row in zip(*steps, strict=True)])


def load_model(path: Path, dtype: str, device: str) -> PreTrainedModel:
    """Load a checkpoint; one without weights gets random ones."""
    if (path / WEIGHTS).exists():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        return model.to(device).eval()
    with torch.device(device):
        config = AutoConfig.from_pretrained(path)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
