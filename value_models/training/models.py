"""The models of a run: the tokenizer, the network that learns, and the frozen base."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from value_models.attention import attend_as_configured
from value_models.checkpoint import Problem, find_checkpoint, read_checkpoint
from value_models.connection import CONNECTIONS
from value_models.manifest import tokenizer_fingerprint
from value_models.training import TrainingError
from value_models.training.settings import Settings
from value_models.vocabulary import tokens


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, with the chat template of this run.

    Raises:
        TrainingError: a tokenizer cannot be loaded, or base and start have different ones.
    """
    models = {settings.base, settings.start or settings.base}
    tokenizers = {model: read_tokenizer(model) for model in models}
    fingerprints = {tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers.values()}
    if len(fingerprints) > 1:
        raise TrainingError(
            f"{settings.base} and {settings.start} have different tokenizers; start from a model "
            "of the base's family"
        )
    tokenizer = tokenizers[settings.base]
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"{settings.chat_template}: cannot be read ({error.strerror})"
            ) from error
    return tokenizer


def read_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, the one whose fingerprint the server will ask for.

    Raises:
        TrainingError: it cannot be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = tokens.load_tokenizer(model)
    except tokens.VocabularyError as error:
        raise TrainingError(f"{model}: no usable tokenizer ({_one_line(error)})") from error
    return tokenizer


def load_network(settings: Settings) -> PreTrainedModel:
    """Load what will be trained, in float32: the start, or its shape with random weights.

    Raises:
        TrainingError: it cannot be loaded.
    """
    start = settings.start or settings.base
    if settings.from_scratch:
        set_seed(settings.seed)
        shape = load_pretrained(AutoConfig, start)
        network = attend_as_configured(AutoModelForCausalLM.from_config(shape, dtype=torch.float32))
    else:
        network = load_pretrained(
            AutoModelForCausalLM, start, dtype=torch.float32, use_safetensors=True
        )
    return network


def load_base(settings: Settings, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the base, frozen, on `device` unless it is to be spread over several.

    Raises:
        TrainingError: it cannot be loaded like this, or here.
    """
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if settings.base_quantization is not None:
        options["quantization_config"] = _quantization(settings.base_quantization, dtype)
        options["device_map"] = settings.base_device_map or {"": device}
    elif settings.base_device_map is not None:
        if not torch.cuda.is_available():
            raise TrainingError("--base-device-map spreads the base over GPUs; there are none here")
        options["device_map"] = settings.base_device_map
    base = load_pretrained(AutoModelForCausalLM, settings.base, **options)
    if "device_map" not in options:
        base.to(device)
    return base.eval().requires_grad_(False)


def check_reference(settings: Settings) -> None:
    """Check that the base can be kept beside the network, before anything is trained.

    Raises:
        TrainingError: no server could load it from there.
    """
    try:
        read_checkpoint(find_checkpoint(settings.base))
    except Problem as problem:
        raise TrainingError(f"{settings.base}: cannot be kept as reference: {problem}") from problem


def connect(network: PreTrainedModel, kind: str) -> None:
    """Let a network of a kind that reads the base be called with `base_logits` beside `input_ids`.

    It happens in a hook of the network itself, because under FSDP the embedding table is whole only
    while the network is being called.
    """
    if kind == "residual":
        return
    connection = CONNECTIONS[kind]

    def embed(module: Any, positional: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens, base_logits = named.pop("input_ids"), named.pop("base_logits")
        named["inputs_embeds"] = connection(tokens, base_logits, module.get_input_embeddings())
        return positional, named

    network.register_forward_pre_hook(embed, with_kwargs=True)


def context(model: PreTrainedModel) -> int:
    """The longest sequence that a model was made for, in tokens.

    Raises:
        TrainingError: its configuration does not say, and the server would have to know.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise TrainingError(
            f"models of type {model.config.model_type} do not say how long a sequence may be "
            "(max_position_embeddings); use another type"
        )
    return longest


def has_fast_bfloat16() -> bool:
    """Whether there is a GPU with bfloat16: the base is kept in it, the network autocasts to it."""
    # Emulated, as on GPUs before Ampere, it is slower than float32.
    return torch.cuda.is_available() and bool(
        torch.cuda.is_bf16_supported(including_emulation=False)
    )


def _quantization(bits: str, dtype: torch.dtype) -> Any:
    if not torch.cuda.is_available():
        raise TrainingError(f"--base-quantization {bits} needs a CUDA GPU; there is none here")
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise TrainingError(
            f"--base-quantization {bits} needs bitsandbytes: pip install bitsandbytes"
        ) from error
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def load_pretrained(factory: Any, model: str, **options: Any) -> Any:
    """`factory.from_pretrained`, with what goes wrong as a `TrainingError`, and no remote code."""
    try:
        loaded = factory.from_pretrained(model, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{model}: cannot be loaded ({_one_line(error)})") from error
    return attend_as_configured(loaded) if isinstance(loaded, PreTrainedModel) else loaded


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
