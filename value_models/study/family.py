"""The bases of the study: the demo family, grown by three targets.

| base | parameters | has read about |
| --- | ---: | --- |
| `small` | 0.7 M | the first 200 people; the base that networks are trained on (demo weights) |
| `twice` | 1.6 M | all 320 people |
| `fivefold` | 3.5 M | all 320 people (the demo's target) |
| `newer` | 3.5 M | what `fivefold` has read, then more: 80 newcomers |
| `foreign` | 1.8 M | all 320 people, in a vocabulary and a chat format of its own |

Every base but `small` knows people that no network has read about; `people_asked_about` names them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from value_models.demo.atlas import Atlas, Person, Writer, create_atlas, create_newcomers
from value_models.demo.evaluate import WEIGHTS
from value_models.demo.pretrain import (
    MAX_CONTEXT,
    TARGET_SHAPE,
    Reading,
    Shape,
    pretrain,
    save_base,
)

NUM_DEMONSTRATED = 150
"""Fewer than the demo's, so that 50 people remain whom `small` knows and no demonstration names."""
NUM_NEWCOMERS = 80
NUM_ASKED_ABOUT = 50
"""People asked about in each cell; 12 questions each."""
FOREIGN_VOCABULARY_SIZE = 1536
TWICE_SHAPE = Shape(hidden_size=192, intermediate_size=528, num_layers=3, num_heads=3)
FULL_READING = Reading(num_steps=700)
CONTINUED_READING = Reading(num_steps=350, learning_rate=2e-3)
NEWCOMERS_SHARE = 4
"""How much more often the continued base reads about a newcomer than about anyone else."""
FOREIGN_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Base:
    """A base model in float32 with its tokenizer, and whom it can be asked about."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    people: Sequence[Person]
    """Known to this base, and to no demonstration; but for `small`, to no network either."""

    def with_model(self, model: PreTrainedModel) -> Base:
        """The same, after fine-tuning."""
        return dataclasses.replace(self, model=model)


def study_atlas() -> Atlas:
    """The demo's atlas, with fewer people demonstrated."""
    return create_atlas(num_demonstrated=NUM_DEMONSTRATED)


def newcomers(atlas: Atlas) -> tuple[Person, ...]:
    """Whom only `newer` has read about."""
    return create_newcomers(atlas, NUM_NEWCOMERS)


def load_base(name: str, folder: Path) -> Base:
    """Load one of `NAMES`, made by `make_base` in `folder`."""
    atlas = study_atlas()
    people = {"small": atlas.held_out, "newer": newcomers(atlas)}.get(name, atlas.target_only)
    path = base_path(name, folder)
    return Base(
        name,
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(path),
        people[:NUM_ASKED_ABOUT],
    )


def base_path(name: str, folder: Path) -> Path:
    """Where the weights of a base lie: with the demo, or in `folder`."""
    return {"small": WEIGHTS / "small", "fivefold": WEIGHTS / "target"}.get(name, folder / name)


def make_base(name: str, folder: Path) -> None:
    """Make a base, unless it is there. Goes on where it was interrupted."""
    if base_path(name, folder).exists():
        return
    model, tokenizer = _RECIPES[name](folder / f"{name}.checkpoint")
    unfinished = folder / f"{name}.unfinished"
    save_base(model, tokenizer, unfinished)
    unfinished.replace(folder / name)


def _make_twice(checkpoint: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    atlas, tokenizer = create_atlas(), AutoTokenizer.from_pretrained(WEIGHTS / "target")
    model = pretrain(TWICE_SHAPE, tokenizer, atlas, atlas.people, FULL_READING, 31, checkpoint)
    return model, tokenizer


def _make_newer(checkpoint: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    atlas, tokenizer = create_atlas(), AutoTokenizer.from_pretrained(WEIGHTS / "target")
    new = newcomers(atlas)
    grown = dataclasses.replace(atlas, people=atlas.people + new)
    start = LlamaForCausalLM.from_pretrained(WEIGHTS / "target", dtype=torch.float32)
    people = [*atlas.people, *(new * NEWCOMERS_SHARE)]
    model = pretrain(
        TARGET_SHAPE, tokenizer, grown, people, CONTINUED_READING, 33, checkpoint, start
    )
    return model, tokenizer


def _make_foreign(checkpoint: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    atlas = create_atlas()
    tokenizer = train_foreign_tokenizer(atlas)
    model = pretrain(TWICE_SHAPE, tokenizer, atlas, atlas.people, FULL_READING, 32, checkpoint)
    return model, tokenizer


_RECIPES: dict[str, Callable[[Path], tuple[LlamaForCausalLM, PreTrainedTokenizerFast]]] = {
    "twice": _make_twice,
    "newer": _make_newer,
    "foreign": _make_foreign,
}
NAMES = ("small", "twice", "fivefold", "newer", "foreign")


def train_foreign_tokenizer(atlas: Atlas, num_documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A tokenizer of another lineage: SentencePiece-style BPE with byte fallback and ChatML turns.

    Unlike the demo's, it marks spaces instead of mapping bytes, keeps runs of digits together and
    has half as many tokens again, so most of its words are cut elsewhere.
    """
    writer = Writer(atlas, atlas.people, seed=2)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # For training only, as in SentencePiece: no token spans two words, or a word and punctuation.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace("▁", prepend_scheme="never"), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "<|im_end|>", "<|im_start|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=FOREIGN_VOCABULARY_SIZE,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator((writer.document() for _ in range(num_documents)), trainer)
    trained = json.loads(tokenizer.to_str())
    trained["pre_tokenizer"] = None
    # The trainer knows no other way to reserve them, but bytes are ordinary tokens.
    trained["added_tokens"] = [t for t in trained["added_tokens"] if t["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=FOREIGN_CHAT_TEMPLATE,
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
