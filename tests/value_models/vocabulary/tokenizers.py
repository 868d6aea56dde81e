"""Small tokenizers of each known family, trained on the spot, and text that is hard to read."""

import functools
import json
import random
from importlib.util import find_spec
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.models import TEXT, make_tokenizer

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MORE_TEXT = TEXT + (
    "Быстрая бурая лиса. الثعلب البني السريع. 東京は日本の首都です。日本語の文章を書きます。\n"
    "हिन्दी में लिखा हुआ वाक्य. It's what they'll say: we've DONE it, HTTPServer camelCase.\n"
    "    indented\n        deeper   gaps\t\ttabs\r\n\r\n\n\n----====////....!!!???\n"
    "👩‍👩‍👧‍👦 🏳️‍🌈 🚢🚢 naïve cafe\u0301 1234567890 3.14159\n"
)


def byte_level(
    pattern: str | None, *, text: str = MORE_TEXT, size: int = 700, **options: object
) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `pattern` None is GPT-2's, else split as Llama 3 and its kin."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=bool(options.get("ignore_merges"))))
    if options.get("nfc"):
        tokenizer.normalizer = normalizers.NFC()
    bytes_only = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(options.get("prefix_space")), use_regex=pattern is None
    )
    tokenizer.pre_tokenizer = (
        bytes_only
        if pattern is None
        else pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytes_only]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    if options.get("found_in_text"):
        tokenizer.add_tokens(
            [
                AddedToken("<tool_call>", normalized=False),
                AddedToken("  \n<x>"),
                AddedToken("<a call of a tool of a long name that cuts text>", normalized=False),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def sentencepiece(dummy_space: str, *, size: int = 800) -> PreTrainedTokenizerFast:
    """A SentencePiece-style BPE with byte fallback over whole text.

    `dummy_space`: "never", "first" (Metaspace), "always" (Metaspace) or "legacy" (Prepend).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=100,
        show_progress=False,
    )
    tokenizer.train_from_iterator(MORE_TEXT.splitlines(), trainer)
    tokenizer = unspecial_bytes(tokenizer)
    if dummy_space == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=dummy_space, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=INST_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def unspecial_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens are part of the model, not added tokens: training can only add them as such."""
    layout = json.loads(tokenizer.to_str())
    layout["added_tokens"] = [
        token for token in layout["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(layout))


def unigram(*, size: int = 600) -> PreTrainedTokenizerFast:
    """A SentencePiece-style Unigram model."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(MORE_TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


MAKERS = {
    "byte-level": make_tokenizer,
    "gpt2": lambda: byte_level(None),
    "gpt2 with a prefix space": lambda: byte_level(None, prefix_space=True),
    "llama3": lambda: byte_level(LLAMA3, ignore_merges=True),
    "qwen": lambda: byte_level(QWEN, nfc=True, found_in_text=True),
    "tekken": lambda: byte_level(TEKKEN, ignore_merges=True),
    "unknown pattern": lambda: byte_level(r"\p{L}+(?=\s)|."),
    "sentencepiece first": lambda: sentencepiece("first"),
    "sentencepiece never": lambda: sentencepiece("never"),
    "sentencepiece always": lambda: sentencepiece("always"),
    "sentencepiece legacy": lambda: sentencepiece("legacy"),
    "unigram": unigram,
}
MISTRAL = ("mistral_instruct_tokenizer_240323.model.v3", "tekken_240911.json")


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return MAKERS[name]()


def mistral_file(name: str) -> Path | None:
    """A tokenizer file of mistral_common's, which vLLM brings along."""
    package = find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "data" / name


FRAGMENTS = (
    *MORE_TEXT.split(" "),
    *" \n\t\r'/.=-_#",
    "  ", "    ", "\n\n", " \n", "\r\n", "\u00a0", "\u200b", "\u3000", "'s", "'LL", "'ve", "n't",
    "👩‍👩‍👧", "🏳️‍🌈", "🚢", "é", "e\u0301", "\u0301", "ñ", "ß", "ǅ", "各", "漢字", "かな", "한국어",
    "\u1112\u1161\u11ab", "ไทย", "हिन्दी", "का", "\u093f", "עברית", "العربية", "Ω", "١٢٣", "Ⅷ", "½",
    "<|endoftext|>", "<|im_end|>", "</s>", "<s>", "[INST]", "<0x41>", "<tool_call>", "<tool_",
    "  \n<x>", "<x>", "▁", "▁▁", "def f(x):\n    return x\n", "HTTPServer", "ABC", "ABCdef",
    "1234567", "==========", "aaaaaaaaaaaaaaaa", "\ufffd", "\ufffe5\uffff", "\x00", "𐐷",
)  # fmt: skip


def random_text(random: random.Random, length: int) -> str:
    """Text of `length` fragments: words of several scripts, code, spaces and look-alikes."""
    return "".join(random.choice(FRAGMENTS) + random.choice(("", " ", "")) for _ in range(length))
