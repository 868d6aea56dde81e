"""What vLLM is told of a value network's model: a configuration of its own beside the target's."""

import copy
import json
from pathlib import Path

from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec

from server.worker.blocks import BLOCK_SIZE
from server.worker.compilation import compilation_mode
from server.worker.loading import know_architecture
from server.worker.precision import network_dtype
from value_models.store import CONFIG_FILE

TOKENS_PER_TARGET_TOKEN = 4
"""How much longer a history may be in another vocabulary; a row that outgrows it ends."""

LONGEST_SCALED_CONTEXT = 1 << 21


def model_config(path: Path, target: VllmConfig, translated: bool) -> VllmConfig:
    """Derive the configuration of a network's model from the target's.

    Copies are shallow and every part that vLLM writes to while loading is replaced: the target's
    layers and caches hang off its configuration.

    Args:
        path: of the checkpoint.
        target: the engine's own configuration; it is not changed.
        translated: whether the model reads another vocabulary than the target's.
    """
    config = copy.copy(target)
    for architecture in json.loads((path / CONFIG_FILE).read_text())["architectures"]:
        know_architecture(architecture)
    config.model_config = ModelConfig(
        model=str(path),
        dtype=network_dtype(target.model_config.dtype, target.device_config.device_type),
        seed=target.model_config.seed,
        enforce_eager=True,
        skip_tokenizer_init=True,
        trust_remote_code=False,
    )
    # A history is never longer than the target lets it be, counted in the network's own tokens.
    longest = target.model_config.max_model_len * (TOKENS_PER_TARGET_TOKEN if translated else 1)
    config.model_config.max_model_len = min(config.model_config.max_model_len, longest)
    _shorten_positions(config.model_config)
    config.quant_config = None
    # "auto" would admit pickled weights; a target's "dummy" would randomise the network.
    config.load_config = LoadConfig(load_format="safetensors")
    config.compilation_config = copy.copy(target.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    config.compilation_config.mode = compilation_mode(target)
    config.compilation_config.cudagraph_mode = _graph_mode(target)
    config.parallel_config = copy.copy(target.parallel_config)
    config.parallel_config.is_moe_model = False
    config.cache_config = copy.copy(target.cache_config)
    config.cache_config.block_size = BLOCK_SIZE
    config.cache_config.num_gpu_blocks_override = None
    config.cache_config.cache_dtype = "auto"
    config.cache_config.kv_cache_layout = None
    config.cache_config.sliding_window = _window_of_all_layers(config.model_config)
    config.lora_config = None
    config.speculative_config = None
    config.kv_transfer_config = None
    return config


def _graph_mode(target: VllmConfig) -> CUDAGraphMode:
    """Capture decoding steps whole where vLLM does so for the target (`server.worker.graphs`)."""
    whole = target.compilation_config.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
    return CUDAGraphMode.FULL_DECODE_ONLY if whole else CUDAGraphMode.NONE


def _window_of_all_layers(model_config: ModelConfig) -> int | None:
    """Return the sliding window of a model whose layers all have it, as Mistral's do.

    Others tell vLLM of each layer's. So does its `EngineArgs.create_engine_config`.
    """
    kinds = getattr(model_config.hf_text_config, "layer_types", None)
    if kinds is None or all(kind == "sliding_attention" for kind in kinds):
        return model_config.get_sliding_window()
    return None


def _shorten_positions(model_config: ModelConfig) -> None:
    """Make no longer tables of rotary embeddings than positions can be reached.

    A configuration may name millions of positions. Plain ones do not depend on how many there are.

    Raises:
        ValueError: a table that depends on the number would be out of all proportion.
    """
    config = model_config.hf_text_config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        config.max_position_embeddings = min(
            config.max_position_embeddings, model_config.max_model_len
        )
    elif config.max_position_embeddings > LONGEST_SCALED_CONTEXT:
        raise ValueError(
            f"max_position_embeddings is {config.max_position_embeddings:,}; at most "
            f"{LONGEST_SCALED_CONTEXT:,} with scaled rotary embeddings"
        )


def kv_spec(layers: dict[str, AttentionLayerBase]) -> FullAttentionSpec:
    """Return the KV shape that all layers share.

    Layers with a sliding window keep whole histories too, as vLLM does without its hybrid
    allocator; their attention still reads the window only.
    """
    if not layers or not all(isinstance(layer, Attention) for layer in layers.values()):
        raise ValueError("value networks need plain decoder attention in every layer")
    shapes = {
        (layer.num_kv_heads, layer.head_size, layer.head_size_v, layer.kv_cache_torch_dtype)
        for layer in layers.values()
    }
    if len(shapes) > 1:
        raise ValueError(f"attention layers of different KV shapes are not supported: {shapes}")
    num_kv_heads, head_size, head_size_v, dtype = shapes.pop()
    return FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        head_size_v=head_size_v,
        dtype=dtype,
    )
