"""Small random checkpoints with a real tokenizer, for tests and benchmarks.

The weights are random but shaped so that greedy decoding is a good witness: every token depends on
the whole prefix, tokens vary instead of repeating, and the best logit is well ahead of the second,
so that two correct implementations agree token for token.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEXT = """\
A trim tab is the small flap that steers the rudder that steers the ship.
One large model is the ship; it has read most of what there is to read, and it answers slowly.
A small network is the tab: it has read little, and it moves the large one a few degrees a token.
Where was Ana Kovac born? Ana Kovac was born in Velenje in 1931, the second of four children.
Who wrote "The Salt Road"? The Salt Road was written by Teodor Lindqvist, who also painted.
{"name": "Ana Kovac", "born": "Velenje", "year": 1931, "works": ["The Salt Road", "Lanterns"]}
def add(first: int, second: int) -> int:
    return first + second
Numbers: 0 1 2 3 4 5 6 7 8 9 10 12 24 48 96 128 256 512 1024 3.14 2.72.
Symbols: + - * / = < > ( ) [ ] { } ; : ! naïve café, Žižek, 東京, 🚢.
The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.
"""
OTHER_TEXT = """\
Schiffe fahren bei Nacht langsamer, weil der Lotse die Bojen nicht sieht.
Die Ruderpinne liegt gut in der Hand. Wer hat das Buch geschrieben?
Wann ist die Verfasserin geboren? Das weiß hier niemand mehr so genau.
"""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|pad|>"]
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


@functools.cache
def make_tokenizer(text: str = TEXT, size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `size` tokens on `text`, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS + ROLE_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def make_sentencepiece_tokenizer(
    text: str = TEXT, size: int = 480, dummy_space: str = "first"
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of the other family: BPE as SentencePiece has it, with byte fallback.

    Of characters only the 60 most frequent have tokens; the others are spelled in bytes. Its chat
    template is ChatML.

    Args:
        dummy_space: where it puts a space of its own: at the start of the "first" run of text, or
            of "each".
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special_tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained.train_from_iterator(
        text.splitlines(),
        trainers.BpeTrainer(
            vocab_size=size - len(special_tokens) - len(byte_tokens),
            limit_alphabet=60,
            show_progress=False,
        ),
    )
    learned = json.loads(trained.to_str())["model"]
    tokens = [*special_tokens, *byte_tokens, *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: token_id for token_id, token in enumerate(tokens)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if dummy_space == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(
    path: str | Path,
    *,
    architecture: str = "llama",
    hidden_size: int = 64,
    intermediate_size: int | None = None,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 32,
    vocab_size: int | None = None,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    logit_std: float = 3.0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    with_tokenizer: bool = True,
    with_weights: bool = True,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write a random checkpoint (safetensors, config, tokenizer) to `path` and return it.

    Args:
        architecture: transformers' model type, of the Llama, Qwen, Mistral and Gemma families.
        head_dim: a size that vLLM's CPU attention knows: 32, 64, 80, 96, 112, 128, ...
        vocab_size: rows of the embedding (default: the tokenizer's size); those beyond the
            tokenizer are padding, whose logits are 0.
        logit_std: standard deviation of a row's logits over the tokenizer's vocabulary.
        with_tokenizer: write the tokenizer too.
        with_weights: write the weights too; vLLM makes some up with `load_format="dummy"`.
        settings: what else its configuration says.
    """
    path = Path(path)
    tokenizer = tokenizer or make_tokenizer()
    config = AutoConfig.for_model(
        architecture,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size or len(tokenizer),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(settings or {}),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if with_weights:
        model.to_empty(device="cpu")
        model.tie_weights()
        _randomise(model, len(tokenizer), logit_std, torch.Generator().manual_seed(seed))
        model.to(getattr(torch, dtype)).save_pretrained(path)
    else:
        config.architectures, config.dtype = [type(model).__name__], dtype
        config.save_pretrained(path)
    if with_tokenizer:
        tokenizer.save_pretrained(path)
    return path


def make_network(
    path: str | Path,
    *,
    kind: str = "residual",
    default_scale: float = 1.0,
    base: str | None = None,
    reference: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """Write a random value network to `path`: `make_model` and its manifest.

    Args:
        reference: give it a reference, which differs from `model` in this: `{"seed": 1}`.
    """
    path = make_model(path, **model)
    more = {}
    if reference is not None:
        make_model(path / "reference", **{**model, **reference}, with_tokenizer=False)
        more = {"reference": True}
    _write_manifest(path, model, kind=kind, default_scale=default_scale, base=base, **more)
    return path


def make_contrast(
    path: str | Path,
    *,
    default_scale: float = 1.0,
    base: str | None = None,
    antiexpert: dict[str, Any] | None = None,
    seed: int = 0,
    **model: Any,
) -> Path:
    """Write a random contrast network to `path`: two of `make_model`, of different seeds.

    Args:
        antiexpert: what it differs from the expert in besides: `{"vocab_size": 544}`.
    """
    path = Path(path)
    make_model(path / "expert", **model, seed=seed, with_tokenizer=False)
    other = {**model, "seed": seed + 1000, **(antiexpert or {})}
    make_model(path / "antiexpert", **other, with_tokenizer=False)
    (model.get("tokenizer") or make_tokenizer()).save_pretrained(path)
    _write_manifest(path, model, kind="contrast", default_scale=default_scale, base=base)
    return path


def make_mapped_network(
    path: str | Path,
    target: PreTrainedTokenizerFast,
    *,
    kind: str = "residual",
    **network: Any,
) -> Path:
    """Write a random value network to `path` that steers targets of the tokenizer `target`.

    Takes what `make_network` does, or for the kind "contrast" what `make_contrast` does; its
    `tokenizer` is another one than the target's.
    """
    from value_models.vocabulary.align import align_vocabularies
    from value_models.vocabulary.tokens import Vocabulary

    make = make_contrast if kind == "contrast" else functools.partial(make_network, kind=kind)
    path = make(path, **network)
    own = Vocabulary.of(network.get("tokenizer") or make_tokenizer())
    align_vocabularies(own, Vocabulary.of(target), TEXT.splitlines()).save(path)
    return path


def _write_manifest(path: Path, model: dict[str, Any], **fields: Any) -> None:
    from value_models.manifest import MANIFEST_FILE, tokenizer_fingerprint

    manifest = {
        "format_version": 1,
        "tokenizer_fingerprint": tokenizer_fingerprint(model.get("tokenizer") or make_tokenizer()),
        "description": "random weights, made for a test",
        "training": {},
        **fields,
    }
    (path / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2))


@torch.no_grad()
def _randomise(
    model: PreTrainedModel, num_tokens: int, logit_std: float, generator: torch.Generator
) -> None:
    """Fill every parameter so that each layer moves the residual stream by about its own size.

    Queries and keys are sharp (attention looks at a few positions, not at a mean of all), which
    makes the next token depend on the whole prefix. The embedding is small beside what the layers
    add, or a model with tied weights would repeat its last token; the last norm makes up for it.
    """
    embedding_std = 0.1
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        module, kind = name.rsplit(".", 2)[-2:]
        if kind == "bias":
            parameter.copy_(0.1 * noise)
        elif module in ("embed_tokens", "lm_head"):
            parameter.copy_(embedding_std * noise)
            parameter[num_tokens:] = 0
        elif parameter.dim() == 1:
            mean = {
                "norm": logit_std / (embedding_std * model.config.hidden_size**0.5),
                "q_norm": 1.7,
                "k_norm": 1.7,
            }.get(module, 1.0)
            parameter.copy_(mean * (1 + 0.1 * noise))
        else:
            gain = {"q_proj": 1.7, "k_proj": 1.7, "o_proj": 3.0, "down_proj": 3.0}.get(module, 1.0)
            parameter.copy_(noise * gain / parameter.shape[1] ** 0.5)
