"""Attention of networks on a CPU: one operation a layer, which has nothing left to look up.

vLLM makes two operations of it. Each finds its layer by name, and makes the views of the KV cache
that the kernels take, in Python and anew at each call. What that costs a small network's step,
`python -m deploy.bench choices` says.

Reads vLLM 0.32's `Attention`, `CPUAttentionBackendImpl` and `vllm._custom_ops`.
"""

from collections.abc import Collection, Sequence

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

LAYERS = "trimtab_layers"
"""Where the forward context has the model's layers, a list."""

_library = torch.library.Library("trimtab", "FRAGMENT")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor(a!) output, int place) -> ()"
)


class DirectAttention(Attention):
    """An attention layer of vLLM's, as it is, but for how it gets to the kernels.

    Attributes:
        place: among the model's layers.
        caches: keys and values as the kernels take them, `[num_blocks, num_kv_heads, block_size,
            head_size]` each; empty while no KV cache is bound.
    """

    place: int
    caches: tuple[torch.Tensor, ...]

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Use this KV cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`."""
        super().bind_kv_cache(kv_cache)
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        halves = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1)
        self.caches = halves.chunk(2, dim=2)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Write keys and values into the KV cache, and attend; for the arguments see vLLM's."""
        if output_shape is not None or output_dtype is not None:
            return super().forward(query, key, value, output_shape, output_dtype)
        # Kernels trust what they are told: a configuration may claim fewer heads than keys have.
        num_tokens = len(query)
        output = query.new_empty(num_tokens, self.num_heads, self.head_size_v)
        torch.ops.trimtab.attention(
            query.view(num_tokens, self.num_heads, self.head_size),
            key.view(num_tokens, self.num_kv_heads, self.head_size),
            value.view(num_tokens, self.num_kv_heads, self.head_size_v),
            output,
            self.place,
        )
        return output.view(num_tokens, -1)


def make_direct(layers: Collection[AttentionLayerBase]) -> bool:
    """Turn all layers of a model, in order, into such that call the kernels themselves.

    Returns:
        Whether it has; if not all are plain ones on a CPU, all stay vLLM's.
    """
    if not all(map(_is_plain, layers)):
        return False
    for place, layer in enumerate(layers):
        layer.__class__ = DirectAttention
        layer.place, layer.caches = place, ()
    return True


def _is_plain(layer: AttentionLayerBase) -> bool:
    return (
        type(layer) is Attention
        and layer.attn_backend.get_name() == "CPU_ATTN"
        and layer.attn_type == AttentionType.DECODER
        and layer.kv_sharing_target_layer_name is None
        and layer.kv_cache_dtype == "auto"
        and layer.query_quant is None
        and layer.impl.sinks is None
    )


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, place: int
) -> None:
    """Attend in the layer of that place: `[num_tokens, heads, head_size]` each, into `output`."""
    context = get_forward_context()
    layers: Sequence[DirectAttention] = context.additional_kwargs[LAYERS]
    layer = layers[place]
    metadata, impl = context.attn_metadata[layer.layer_name], layer.impl
    keys, values = layer.caches
    scales = layer._k_scale_float, layer._v_scale_float
    torch.ops._C.cpu_attn_reshape_and_cache.default(
        key, value, keys, values, metadata.slot_mapping, layer.isa, *scales, impl.kv_cache_dtype
    )
    torch.ops._C.cpu_attention_with_kv_cache.default(
        query,
        keys,
        values,
        output,
        metadata.query_start_loc,
        metadata.seq_lens,
        impl.scale,
        metadata.causal,
        impl.alibi_slopes,
        impl.sliding_window,
        metadata.block_table,
        impl.logits_soft_cap,
        metadata.scheduler_metadata,
        impl.sinks,
        metadata.dynamic_causal,
        *scales,
        impl.kv_cache_dtype,
    )


_library.impl("attention", _attention, "CPU")
_library.impl("attention", lambda *_: None, "Meta")
