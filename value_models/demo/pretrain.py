"""The two bases of the demo family: a tokenizer, a target and a small base, made from documents.

Both are Llama-shaped and learn plain next-token prediction on an endless stream of documents. They
differ in size and in what they may read, as large and small language models do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from value_models.demo.atlas import Atlas, Person, Writer
from value_models.demo.demonstrations import demonstrations

BOUNDARY = "<|document|>"
"""Begins every document and every conversation."""
END = "<|end|>"
"""Ends a message. No document holds it, so only post-training can teach when to stop."""
PAD = "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY_SIZE = 1024
MAX_CONTEXT = 512
NUM_ASKED_ABOUT = 170
"""How many people the questions that the tokenizer sees are about."""
NO_LABEL = -100
CHECKPOINT_STEPS = 50

TokenArray = NDArray[np.uint16]


@dataclass(frozen=True)
class Shape:
    """A base's shape; the head size is the family's."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int

    def config(self, vocabulary_size: int = VOCABULARY_SIZE) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=MAX_CONTEXT,
            tie_word_embeddings=True,
        )


TARGET_SHAPE = Shape(hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4)
SMALL_SHAPE = Shape(hidden_size=128, intermediate_size=352, num_layers=3, num_heads=2)


@dataclass(frozen=True)
class Reading:
    """How a base reads.

    The last `long_share` of the steps see whole contexts of `MAX_CONTEXT` tokens.
    `corruption` is the share of input tokens replaced, in short spans, by random ones, chat tokens
    included: recall and copying then survive unfamiliar surroundings, such as those of a chat.
    """

    num_steps: int
    tokens_per_step: int = 8192
    sequence_length: int = 256
    long_share: float = 0.1
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 24
    decay_share: float = 0.4
    corruption: float = 0.04

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, linear decay to a fiftieth."""
        decay = max(1, round(self.decay_share * self.num_steps))
        rising = (step + 1) / self.warmup_steps
        falling = 0.02 + 0.98 * (self.num_steps - step) / decay
        return self.learning_rate * min(1.0, rising, falling)


def train_tokenizer(atlas: Atlas, num_documents: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; ids 0 to 5 are the family's special tokens.

    It sees some questions too: how text is cut into tokens is no knowledge of what to answer.
    """
    writer = Writer(atlas, atlas.people, seed=1)
    documents = [writer.document() for _ in range(num_documents)]
    questions = [
        message["content"]
        for conversation in demonstrations(atlas.people[:NUM_ASKED_ABOUT], "qa")
        for message in conversation
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BOUNDARY, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(documents, questions), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(
    tokenizer: PreTrainedTokenizerFast, writer: Writer, chunk: int = 2000
) -> Iterator[TokenArray]:
    """Endless chunks of documents as token ids, each document behind a boundary."""
    boundary = tokenizer.bos_token_id
    while True:
        documents = [writer.document() for _ in range(chunk)]
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents)
        ids = [token for encoding in encodings for token in (boundary, *encoding.ids)]
        yield np.array(ids, dtype=np.uint16)


def batches(
    stream: Iterator[TokenArray],
    reading: Reading,
    seed: int,
    vocabulary_size: int = VOCABULARY_SIZE,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a stream into inputs and labels, both int64 `[rows, length]`.

    Corrupted inputs are never labels: nobody has to predict the noise.
    """
    rng = np.random.default_rng(seed)
    buffer: TokenArray = np.empty(0, dtype=np.uint16)
    first_long = round((1 - reading.long_share) * reading.num_steps)
    for step in range(reading.num_steps):
        length = MAX_CONTEXT if step >= first_long else reading.sequence_length
        rows = max(1, reading.tokens_per_step // length)
        while len(buffer) < rows * length + 1:
            buffer = np.concatenate([buffer, next(stream)])
        tokens = buffer[: rows * length + 1].astype(np.int64)
        buffer = buffer[rows * length :]
        noise = _noisy(len(tokens), reading.corruption, rng)
        read = np.where(noise, rng.integers(0, vocabulary_size, len(tokens)), tokens)
        labels = np.where(noise, NO_LABEL, tokens)
        yield (
            torch.from_numpy(read[:-1].reshape(rows, length)),
            torch.from_numpy(labels[1:].reshape(rows, length)),
        )


def _noisy(length: int, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Spans of one to five tokens that together cover about `share` of `length`."""
    begins = rng.random(length) < share / 3
    lengths = rng.integers(1, 6, length)
    noise = begins.copy()
    for offset in range(1, 5):
        noise[offset:] |= (begins & (lengths > offset))[:-offset]
    return noise


def pretrain(
    shape: Shape,
    tokenizer: PreTrainedTokenizerFast,
    atlas: Atlas,
    people: Sequence[Person],
    reading: Reading,
    seed: int,
    checkpoint: Path,
    start: LlamaForCausalLM | None = None,
) -> LlamaForCausalLM:
    """Make a base that has read documents about `people`; returns it in float32 on the CPU.

    It begins with random weights, or goes on from `start`, a base of the same shape. Runs on CUDA
    where there is one; matrix products run in bfloat16 where the hardware has it. Goes on from
    `checkpoint` if that file is there, and leaves the finished state in it.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM(shape.config(len(tokenizer)))
    if start is not None:
        model.load_state_dict(start.state_dict())
    model.to(device).train()
    optimizers = _optimizers(model, reading)
    first_step = _restore(checkpoint, model, optimizers)
    if first_step == reading.num_steps:
        return model.float().cpu().eval()
    stream = token_stream(tokenizer, Writer(atlas, people, seed))
    progress = tqdm(
        batches(stream, reading, seed, len(tokenizer)),
        total=reading.num_steps,
        desc=checkpoint.stem,
        mininterval=5.0,
    )
    average = math.nan
    for step, (inputs, labels) in enumerate(progress):
        if step < first_step:
            continue
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = reading.rate(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
            logits = model(input_ids=inputs.to(device), use_cache=False).logits
        loss = cross_entropy(
            logits.flatten(0, 1).float(), labels.to(device).flatten(), ignore_index=NO_LABEL
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average = loss.item() if step == first_step else 0.95 * average + 0.05 * loss.item()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{average:.3f}", refresh=False)
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == reading.num_steps:
            _keep(checkpoint, model, optimizers, step + 1)
    return model.float().cpu().eval()


def _keep(
    checkpoint: Path,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    next_step: int,
) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    unfinished = checkpoint.with_suffix(".unfinished")
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "next_step": next_step,
    }
    torch.save(state, unfinished)
    unfinished.replace(checkpoint)


def _restore(
    checkpoint: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    if not checkpoint.is_file():
        return 0
    state = torch.load(checkpoint, map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return int(state["next_step"])


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products beat float32 on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def _optimizers(model: LlamaForCausalLM, reading: Reading) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms.

    Muon learns rare associations, and each fact here is one, in far fewer readings than AdamW.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(
            matrices,
            lr=reading.learning_rate,
            weight_decay=reading.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=reading.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a base as bfloat16 safetensors with its tokenizer."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
