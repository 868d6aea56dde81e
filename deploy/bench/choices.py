"""What the choices behind a decoding step are worth: each undone, beside the step.

One process without an engine runs guided steps of a network of 5.7 M parameters. Between two steps
it reads as much memory as a target would, so that the network's weights are not in the cache.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from deploy.bench.arguments import add_batches, add_rounds
from deploy.bench.checkpoints import Checkpoints, make_checkpoints
from deploy.bench.report import Answer, Table, say
from deploy.bench.rounds import (
    by_case,
    make_prompts,
    median,
    ratio,
    runs_of,
    take_turns,
)

AS_IS = "as it is"
IN_TARGETS_DTYPE = "networks compute in the target's dtype"
SLOW_BLOCKS = "a row that fills a block sends its batch down the path of rows that owe tokens"
LAID_OUT = "rows are laid out anew in each step"
VLLMS_ATTENTION = "attention is vLLM's layer, and kernels are called from Python"
LOOKED_UP = "weights are looked up in each step"
ASKED = "the LM head is asked in each step what it is"
ONEDNNS = "small weights are multiplied by oneDNN, too"
TWO_PASSES = "value logits are scaled into a tensor of their own, then added"
UNCOMPILED = "networks run uncompiled"
LOADED = (AS_IS, IN_TARGETS_DTYPE, VLLMS_ATTENTION, LOOKED_UP, ASKED, ONEDNNS)
"""What a network has to be loaded for in its own way."""
NAMES = (*LOADED, SLOW_BLOCKS, LAID_OUT, TWO_PASSES, UNCOMPILED)
BETWEEN = 1 << 28
"""Bytes read between two steps: as many as the target of 105 M has in bfloat16, and a fourth more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 9)
    add_batches(parser, (1, 4, 16))


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from tests.server.worker.alone import process_group

    # As many as the worker has on a small machine (`server/cpu.py`).
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    say("making random checkpoints")
    checkpoints = make_checkpoints(folder, "bfloat16", ["guiding"])
    with process_group(folder), contextlib.ExitStack() as stack:
        loaded = {name: stack.enter_context(steps(checkpoints, name)) for name in LOADED}

        def measure(name: str, batch_size: int, number: int) -> float:
            which = loaded.get(name, loaded[AS_IS])
            with undone(name, which):
                return which.run(batch_size, arguments.tokens, number)

        rounds = take_turns(arguments.batch_sizes, NAMES, arguments.rounds, measure)
        dtypes = {"network_dtype": loaded[AS_IS].dtype, "target_dtype": checkpoints.dtype}
    return Answer(
        tables=[
            Table(
                "Milliseconds of a guided step, the target's forward left out",
                by_case(rounds, NAMES, lambda found, name: median(found, name, _milliseconds)),
            ),
            Table(
                "Time against the step as it is",
                by_case(rounds, NAMES[1:], lambda found, name: ratio(found, name, AS_IS, float)),
            ),
        ],
        models=checkpoints.describe() | dtypes,
        runs=runs_of(rounds, seconds=float),
    )


class Steps:
    """Guided decoding steps of one network, without an engine."""

    def __init__(self, residency: Any) -> None:
        from server.worker.guidance import Guidance

        (self.network,) = residency.networks()
        (self.model,) = self.network.models.values()
        self.dtype = str(self.model.config.model_config.dtype).removeprefix("torch.")
        self._guidance = Guidance(residency, torch.device("cpu"), None)
        self._memory = torch.ones(BETWEEN // 4)

    def run(self, batch_size: int, num_steps: int, seed: int) -> float:
        """Return seconds of the mean step, of rows that fill their blocks one after the other."""
        from server.choice import Choice, ChosenNetwork
        from server.worker.guidance import Batch
        from server.worker.history import ListedHistory
        from server.worker.row import GuidedRow

        folder, vocab_size = self.network.folder, self.model.vocab_size
        choice = Choice((ChosenNetwork(folder.name, folder.version, 1.0),), vocab_size - 1)
        prompts = make_prompts(batch_size, 64, seed)
        prompts = [prompt[: 32 + 5 * row % 32] for row, prompt in enumerate(prompts)]
        rows = {}
        for index, prompt in enumerate(prompts):
            rows[index] = GuidedRow(choice, ListedHistory(prompt, [9] * num_steps))
            rows[index].slot = index
        self._guidance.arrange(rows)
        seconds = 0.0
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
        for step in range(num_steps):
            batch = Batch(
                lengths + step,
                np.ones(batch_size, dtype=bool),
                torch.tensor([9 if step else prompt[-1] for prompt in prompts], dtype=torch.int32),
                [str(index) for index in rows],
            )
            logits = torch.randn(batch_size, vocab_size, dtype=torch.bfloat16)
            self._memory.sum()
            began = time.perf_counter()
            self._guidance.step(logits, batch)
            if step:  # the first one reads the prompts
                seconds += time.perf_counter() - began
        for row in rows.values():
            self._guidance.release(row)
        return seconds / (num_steps - 1)


@contextlib.contextmanager
def steps(checkpoints: Checkpoints, name: str = AS_IS) -> Iterator[Steps]:
    """Load the network, as it is or without one of the choices."""
    import vllm.ir
    from vllm.engine.arg_utils import EngineArgs

    from tests.server.worker.alone import residency

    config = EngineArgs(str(checkpoints.target)).create_engine_config()
    vllm.ir.set_default_torch_wrap(False)  # as in vLLM's CPU worker
    without = {
        IN_TARGETS_DTYPE: patch("server.worker.configuration.network_dtype", lambda to, _: to),
        VLLMS_ATTENTION: patch("server.worker.model.make_direct", lambda _: False),
        LOOKED_UP: patch("server.worker.trial.bind", lambda *_: None),
        ASKED: patch("server.worker.trial.direct_head", lambda *_: None),
        ONEDNNS: patch("server.worker.small_weights.MAX_BYTES", 0),
    }
    with contextlib.ExitStack() as loaded:
        with without.get(name, contextlib.nullcontext()):  # or others would do without it, too
            worker = loaded.enter_context(
                residency(checkpoints.target, checkpoints.networks, config)
            )
        yield Steps(worker)


@contextlib.contextmanager
def undone(name: str, which: Steps) -> Iterator[None]:
    """Do without one of the choices."""
    from server.worker import guidance
    from server.worker.model import NetworkModel

    forward = which.model._forward
    if name == SLOW_BLOCKS:
        changed = patch.object(NetworkModel, "_make_room", _has_room)
    elif name == LAID_OUT:
        changed = patch.object(forward, "goes_on", lambda *_: False)
    elif name == TWO_PASSES:
        changed = patch.object(guidance, "add_value_logits", _add_in_two_passes)
    elif name == UNCOMPILED:
        changed = patch.object(forward, "eager", True)
    else:  # as it is, or loaded in another way
        changed = contextlib.nullcontext()
    with changed:
        yield


def _has_room(model: Any, rows: Any) -> bool:
    return bool((rows.lengths <= model.table.capacity[rows.slots]).all())


def _add_in_two_passes(
    logits: torch.Tensor, value: torch.Tensor, scale: torch.Tensor, *_: object
) -> None:
    covered = min(logits.shape[1], value.shape[1])
    scaled = value[:, :covered].float() * scale
    logits[:, :covered] += scaled
    logits[:, covered:] = float("-inf")


def _milliseconds(seconds: float) -> float:
    return 1e3 * seconds
