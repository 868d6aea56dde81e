"""Loading a vLLM model while others decode: vLLM's `get_model`, in short pieces.

`get_model` is not thread-safe (the current configuration and the default dtype are process-wide)
and stops everything for seconds, most of them in collecting garbage. So the pieces run on the
thread that decodes, between two steps: one for the modules, then one for each tensor.

Reads vLLM 0.32's `BaseModelLoader.load_model` and `DefaultModelLoader.load_weights`.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.torch_utils import set_default_torch_dtype

from server.worker.compilation import LAYER_PREFIX
from server.worker.small_weights import quickly_multiplied
from value_models.store import INDEX_FILE

Pieces = Iterator[None]
"""Work in short pieces: each `next` does one."""


def construct(config: VllmConfig, device: torch.device, max_bytes: int) -> torch.nn.Module:
    """Make the modules that `config` describes, their weights not yet set.

    Raises:
        ValueError: the weights would take more than `max_bytes`; a configuration may claim
            anything.
    """
    dtype = config.model_config.dtype
    with (
        _at_most(max_bytes),
        _current(config),
        set_default_torch_dtype(dtype),
        torch.device(device),
    ):
        return initialize_model(
            vllm_config=config, model_config=config.model_config, prefix=LAYER_PREFIX
        ).eval()


def load_weights(model: torch.nn.Module, config: VllmConfig, device: torch.device) -> Pieces:
    """Copy the checkpoint's weights into `model`, and bring them into the kernels' format.

    Raises:
        ValueError: the checkpoint lacks weights, or holds others than the model has.
    """
    dtype = config.model_config.dtype
    # vLLM's loaders do not say when they have set a part of a fused parameter only.
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
        yield
    for file in _weight_files(Path(config.model_config.model)):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                with _current(config):
                    model.load_weights([(name, tensor)])
                yield
    for name, parameter in model.named_parameters():
        if parameter.isnan().any():
            raise ValueError(f"the checkpoint lacks weights, or has NaN among them: {name}")
        yield
    maybe_retie_word_embeddings(model, config.model_config)
    for module in model.modules():
        if isinstance(method := getattr(module, "quant_method", None), QuantizeMethodBase):
            with _current(config), quickly_multiplied():
                method.process_weights_after_loading(module)
            yield
    for module in model.modules():
        if is_deferred_attention_layer(module):
            with _current(config), torch.device(device):
                module.process_weights_after_loading(dtype)
            yield
    if hasattr(model, "process_weights_after_loading"):
        with _current(config):
            model.process_weights_after_loading()


def release_weights(model: torch.nn.Module) -> None:
    """Free the memory of a model's weights now, whoever may still refer to the model."""
    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            module.cpu_linear = None  # holds the weights as CPU kernels want them
        if hasattr(module, "kv_cache"):
            module.kv_cache = torch.empty(0)
        if hasattr(module, "caches"):
            module.caches = ()  # views of it
    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def weights_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters, shared ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def know_architecture(architecture: str) -> None:
    """Have vLLM look at a model class in this process, should it not know it yet.

    It would start another process otherwise, and wait for seconds.
    """
    model = ModelRegistry.models.get(architecture)
    if model is not None and hasattr(model, "module_name"):
        ModelRegistry.register_model(architecture, model.load_model_cls())


def finish(pieces: Pieces) -> None:
    """Do all that is left."""
    for _ in pieces:
        pass


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that were checked and hashed: others may lie beside them."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    listed: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    return [folder / name for name in sorted(set(listed.values()))]


def _current(config: VllmConfig) -> AbstractContextManager[None]:
    return set_current_vllm_config(config, check_compile=False, prefix=LAYER_PREFIX)


@contextmanager
def _at_most(max_bytes: int) -> Iterator[None]:
    """Raise when modules that are made in this context register more parameters than that."""
    total = 0
    made: dict[int, torch.nn.Parameter] = {}  # kept, so that no other takes the id of one

    def count(_module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal total
        if parameter is None or id(parameter) in made:
            return
        made[id(parameter)] = parameter
        total += parameter.nbytes
        if total > max_bytes:
            raise ValueError(
                f"its configuration asks for more weights than its files hold: over {max_bytes:,} "
                f"bytes up to {name!r}"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
