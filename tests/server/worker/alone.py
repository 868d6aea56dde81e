"""A worker's value networks without an engine: a `Residency` in the test's own process."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs

from server.settings import Settings
from server.worker.model import Rows
from server.worker.residency import Residency
from value_models.manifest import tokenizer_fingerprint

# Before vLLM reads them.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextlib.contextmanager
def process_group(root: Path) -> Iterator[None]:
    """What vLLM's layers ask for: a group of one process.

    Torn down at the end, or engines that later tests fork from this process would find it.
    """
    try:
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{root}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        yield
    finally:
        cleanup_dist_env_and_memory()


def engine_config(target: Path, **options: Any) -> VllmConfig:
    """Return what vLLM makes of these options, in float32."""
    arguments = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, **options}
    return EngineArgs(str(target), **arguments).create_engine_config()


@contextlib.contextmanager
def residency(
    target: Path, networks: dict[str, Path], config: VllmConfig, **settings: Any
) -> Iterator[Residency]:
    """Load networks as a worker does at its start."""
    fingerprint = tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(target))
    chosen = Settings(networks=networks, key="", tokenizer_fingerprint=fingerprint, **settings)
    # `inference_mode` is what vLLM's workers run in.
    with set_current_vllm_config(config), torch.inference_mode():
        residency = Residency(config, chosen, torch.device("cpu"))
        try:
            yield residency
        finally:
            for network in residency.networks():
                network.free()


def tokens_of(history: Sequence[int]) -> Callable[[int, int], list[int]]:
    """Return a history as the worker reads it."""
    return lambda start, stop: list(history[start:stop])


def rows_of(histories: Mapping[int, Sequence[int]]) -> Rows:
    """Return these rows, by slot, as a step gives them: the host knows all tokens."""
    lengths = np.array([len(history) for history in histories.values()], dtype=np.int32)
    return Rows(
        np.array(list(histories)),
        lengths,
        torch.tensor([history[-1] for history in histories.values()], dtype=torch.int32),
        [tokens_of(history) for history in histories.values()],
        lengths,
    )


@torch.no_grad()
def plain_logits(checkpoint: Path, history: Sequence[int]) -> torch.Tensor:
    """Return what transformers computes: float32 `[len(history), vocab_size]`."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",  # torch's knows no cap
    ).eval()
    logits: torch.Tensor = model(torch.tensor([list(history)])).logits[0]
    return logits
