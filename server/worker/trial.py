"""A model is tried before requests come: what cannot be known of it otherwise."""

from pathlib import Path

import numpy as np
import torch
from torch._inductor.exc import InductorError
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.logger import init_logger

from server.worker.blocks import BlockTable
from server.worker.bound import Run, bind
from server.worker.compilation import (
    CompiledForwards,
    compiled_module,
    whatever_folder,
    without_python,
)
from server.worker.forward import Forward
from server.worker.head import direct_head
from server.worker.loading import Pieces

logger = init_logger(__name__)

ROWS = 8
BOUND_ROWS = 3, 2
"""Of the runs that show what a compiled forward looks up. Torch may take a size of 1 for a
constant."""


class Trial:
    """Runs a model as it will run, and has it run in the fastest way that comes to the same.

    The tokens go into vLLM's null block, which nobody reads.
    """

    def __init__(
        self,
        name: Path,
        model: torch.nn.Module,
        forward: Forward,
        table: BlockTable,
        config: VllmConfig,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            name: what the model is called in logs.
            forward: runs the model; is told how to.
            table: of the model, without rows.
            config: what vLLM runs the model with.
            vocab_size: of the model.
            device: where the model is.
        """
        self._name, self._model, self._forward, self._table = name, model, forward, table
        self._config, self._vocab_size, self._device = config, vocab_size, device

    def run(self, forwards: CompiledForwards, without_names: bool) -> Pieces:
        """Try it uncompiled, its head by itself, compiled, bound to its weights, with CUDA graphs.

        Args:
            forwards: those compiled in the worker; this model's is added.
            without_names: none of its operations takes a layer's name.

        Raises:
            RuntimeError: vLLM's kernels cannot run the model's shape.
        """
        eager = self._uncompiled_logits()
        yield
        if self._config.compilation_config.mode != CompilationMode.NONE:
            forwards.adopt(self._model, self._config)
            compiled = self._compiled_logits(without_names)
            # Rounding differs by a few per mille; another network's weights would by about 100 %.
            self._forward.eager = not _alike(compiled, eager)
            if self._forward.eager:
                logger.warning("%s: its compiled forward is off, running eagerly", self._name)
            else:
                forwards.keep(self._model, self._config)
                yield
                yield from self._bind_weights(eager)
            yield
        try:
            yield from self._forward.capture(forwards.graphs)
        except RuntimeError:  # of CUDA: a model that runs without graphs is not to be refused
            logger.warning("%s: runs without CUDA graphs", self._name, exc_info=True)
            return
        if self._forward.has_graphs and not _alike(self.logits(eager=False), eager):
            logger.warning("%s: its CUDA graphs are off, running without them", self._name)
            self._forward.forget_graphs()

    def logits(self, eager: bool, num_rows: int = ROWS) -> torch.Tensor:
        """Return float32 logits of a decoding step: `[num_rows, vocab_size]`.

        Args:
            eager: uncompiled, and without CUDA graphs.
            num_rows: fewer, where the worker has fewer.
        """
        with torch.inference_mode():
            return self._forward.head(self._hidden(eager, num_rows)).float()

    def _hidden(self, eager: bool, num_rows: int = ROWS) -> torch.Tensor:
        num_rows = min(num_rows, self._table.max_rows)
        slots = np.zeros(num_rows, dtype=np.int64)
        # Each writes a place of its own: of several in one place, threads decide which one stays.
        lengths = np.arange(num_rows, dtype=np.int32) + 1
        tokens = torch.arange(num_rows, device=self._device, dtype=torch.int32) % self._vocab_size
        self._forward.eager = eager
        with torch.inference_mode(), set_current_vllm_config(self._config, check_compile=False):
            self._forward.lay_out(slots, lengths)
            hidden = self._forward.decode(tokens)
        self._table.release(0)
        return hidden

    def _uncompiled_logits(self) -> torch.Tensor:
        """Return them, and have the LM head called directly if it is nothing but a product."""
        with torch.inference_mode():
            hidden = self._hidden(eager=True)
            self._forward.head = direct_head(self._model, hidden) or self._forward.head
            return self._forward.head(hidden).float()

    def _compiled_logits(self, without_names: bool) -> torch.Tensor:
        """Return those of the compiled forward, which is loaded or compiled if it has to be."""
        with whatever_folder(self._config):
            if without_names:
                try:
                    with without_python():
                        return self.logits(eager=False)
                except InductorError:
                    logger.info("%s: its kernels are called from Python", self._name, exc_info=True)
            return self.logits(eager=False)

    def _bind_weights(self, eager: torch.Tensor) -> Pieces:
        """Have the compiled forward look up the weights once, if that is all it looks up."""
        forward = self._forward
        if compiled_module(self._model) is None or self._table.max_rows < max(BOUND_ROWS):
            return

        def try_with(run: Run) -> None:
            forward.bound = run
            for num_rows in BOUND_ROWS:
                self.logits(eager=False, num_rows=num_rows)

        forward.bound = bind(forward.run_model, try_with)
        yield
        if forward.bound is not None and not _alike(self.logits(eager=False), eager):
            logger.warning("%s: its weights are looked up in each step", self._name)
            forward.bound = None


def _alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).norm() <= 0.05 * second.norm())
