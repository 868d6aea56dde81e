"""The LM head of a network's model, where it is one multiplication: called as that.

vLLM asks in each step how the head is quantized, on which platform it is, whether logits are capped
and who else has a part of them. None of it changes. `python -m deploy.bench choices` says what it
spares not to ask.

Reads vLLM 0.32's `LogitsProcessor` and `dispatch_cpu_unquantized_gemm`.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

Head = Callable[[torch.Tensor], torch.Tensor]
"""Returns the logits `[num_rows, vocab_size]` of hidden states `[num_rows, hidden_size]`."""


def direct_head(model: torch.nn.Module, hidden: torch.Tensor) -> Head | None:
    """Return the head of a model on a CPU.

    Args:
        hidden: some states to try it with, `[num_rows, hidden_size]`.

    Returns:
        None: the model makes its logits of them in another way.
    """
    calls: list[tuple[LogitsProcessor, tuple[Any, ...], Any]] = []
    hooks = [
        module.register_forward_hook(lambda *call: calls.append(call))
        for module in model.modules()
        if type(module) is LogitsProcessor
    ]
    try:
        logits = model.compute_logits(hidden)
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != 1:
        return None
    processor, (layer, *given), returned = calls[0]
    called_plainly = returned is logits and len(given) == 1 and given[0] is hidden
    if not (called_plainly and _only_multiplies(processor, layer, hidden.dtype)):
        return None
    vocab_size = logits.shape[1]
    is_padded = layer.cpu_linear(hidden, layer.weight, None).shape[1] != vocab_size

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = layer.cpu_linear(hidden, layer.weight, None)
        return logits[:, :vocab_size] if is_padded else logits

    return head if torch.equal(head(hidden), logits) else None


def _only_multiplies(processor: LogitsProcessor, layer: Any, dtype: torch.dtype) -> bool:
    return (
        hasattr(layer, "cpu_linear")
        and type(layer.quant_method) in (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)
        and layer.tp_size == 1
        and processor.scale == 1.0
        and processor.soft_cap is None
        and not processor.logits_as_input
        and processor.head_dtype in (None, dtype)
    )
