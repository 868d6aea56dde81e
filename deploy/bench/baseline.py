"""Guided decoding with transformers alone: what a service can do without trimtab."""

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from deploy.bench.engine import Prompts, Run


class Baseline:
    """Target and value network as transformers models, their logits summed at every step."""

    def __init__(self, target: Path, network: Path, dtype: str) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._models = [
            AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(self._device)
            for path in (target, network)
        ]

    @torch.inference_mode()
    def generate(self, prompts: Prompts, num_tokens: int, cached: bool) -> Run:
        """Generate greedily; without `cached`, every step runs over the whole sequence."""
        start = time.perf_counter()
        tokens = torch.tensor(prompts, device=self._device)  # [batch, length], all of one length
        prompt_length = tokens.shape[1]
        caches = [DynamicCache(config=model.config) if cached else None for model in self._models]
        inputs = tokens
        for _ in range(num_tokens):
            logits = sum(
                model(
                    inputs, past_key_values=cache, use_cache=cached, logits_to_keep=1
                ).logits.float()
                for model, cache in zip(self._models, caches, strict=True)
            )
            chosen = logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], 1)
            inputs = chosen if cached else tokens
        generated = tokens[:, prompt_length:].tolist()
        return Run(time.perf_counter() - start, generated)
