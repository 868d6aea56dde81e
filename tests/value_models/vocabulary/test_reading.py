"""The growing history against the whole-sequence definition, for text that is hard to read."""

import functools
import random

import pytest
import torch

from tests.value_models.vocabulary.tokenizers import (
    MAKERS,
    MISTRAL,
    mistral_file,
    random_text,
    tokenizer,
)
from value_models.vocabulary.map import VocabularyMap
from value_models.vocabulary.reading import Reader
from value_models.vocabulary.stream import START, special
from value_models.vocabulary.structure import Rule
from value_models.vocabulary.tokens import Vocabulary, VocabularyError, load_vocabulary


def make_map(target: Vocabulary, value: Vocabulary, *rules: Rule, **fields) -> VocabularyMap:
    return VocabularyMap(
        target_fingerprint=target.fingerprint,
        value_fingerprint=value.fingerprint,
        columns=torch.zeros(1, len(target.tokens), dtype=torch.int64),
        num_value_ids=len(value.tokens),
        tokens=target.tokens,
        dummy_space=target.dummy_space,
        prefix=target.prefix,
        value_prefix=value.prefix,
        placeholder=value.bos if value.bos is not None else value.eos or 0,
        rules=rules,
        **fields,
    )


def make_reader(target: Vocabulary, value: Vocabulary, *rules: Rule, **fields) -> Reader:
    return Reader(make_map(target, value, *rules, **fields), value.tokenizer)


def turn_rules(target: Vocabulary, value: Vocabulary) -> tuple[Rule, ...]:
    """Structure of every kind: nested patterns, text at either end, nothing at all."""
    first, *others = target.specials
    last = others[-1]
    bos = next(iter(value.specials))
    return (
        Rule(special(first), (bos,)),
        Rule(special(last) + "user\n", (bos, "user: ")),
        Rule(special(last) + "\n" + special(last) + "assistant\n", ("\n", bos, bos)),
        Rule(special(last) + "\n", ("\n\n",)),
        Rule(START + special(last) + "user\n", ("Be kind. ", bos)),
    )


def random_ids(target: Vocabulary, chance: random.Random) -> list[int]:
    """Text as the tokenizer has it, turn markers, and garbage."""
    ids: list[int] = list(target.prefix) if chance.random() < 0.5 else []
    for _ in range(chance.randint(1, 5)):
        match chance.randrange(6):
            case 0:
                ids += [chance.randrange(len(target.tokens) + 3) for _ in range(12)]
            case 1:
                last = list(target.specials)[-1]
                marker = chance.choice(["user\n", "\n", "assistant\n", "us", "x"])
                for part in ([last], encode(target, marker)) * chance.randint(1, 2):
                    ids += part
            case _:
                ids += encode(target, random_text(chance, chance.randint(1, 60)))
    return ids


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]


def check_follows(reader: Reader, ids: list[int], chance: random.Random) -> None:
    """A history fed in chunks equals the whole read at every step, and keeps what is stable."""
    history = reader.follow()
    position = 0
    stable: list[int] = []
    while position < len(ids):
        step = chance.choice((1, 1, 1, 2, 7, 50))
        reading = history.extend(ids[position : position + step])
        position += step
        whole = reader.read(ids[:position])
        assert list(reading.ids) == list(whole.ids)
        assert (reading.waiting, reading.at_start) == (whole.waiting, whole.at_start)
        assert list(reading.ids[: len(stable)]) == stable
        assert list(whole.ids[: whole.num_stable]) == list(reading.ids[: whole.num_stable])
        stable = list(reading.ids[: reading.num_stable])


@pytest.mark.parametrize("value", MAKERS)
@pytest.mark.parametrize("target", ["byte-level", "sentencepiece legacy", "sentencepiece first"])
def test_a_growing_history_is_read_as_the_whole(target: str, value: str) -> None:
    there, here = Vocabulary.of(tokenizer(target)), Vocabulary.of(tokenizer(value))
    reader = make_reader(there, here, *turn_rules(there, here), shift="strip")
    for seed in range(12):
        chance = random.Random(f"{target} {value} {seed}")
        check_follows(reader, random_ids(there, chance), chance)


@pytest.mark.parametrize(("target", "value"), [MISTRAL, MISTRAL[::-1]])
def test_real_vocabularies_are_followed(target: str, value: str) -> None:
    there, here = real(target), real(value)
    reader = make_reader(there, here, *turn_rules(there, here))
    for seed in range(20):
        chance = random.Random(f"{target} {seed}")
        check_follows(reader, random_ids(there, chance), chance)


@functools.cache
def real(name: str) -> Vocabulary:
    file = mistral_file(name)
    if file is None:
        pytest.skip("mistral_common is not installed")
    return load_vocabulary(file)


@pytest.mark.parametrize("value", MAKERS)
def test_text_is_read_in_the_networks_own_tokens(value: str) -> None:
    """Plain text, behind whatever each tokenizer puts in front of it."""
    there, here = Vocabulary.of(tokenizer("gpt2")), Vocabulary.of(tokenizer(value))
    text = "Where was Ana Kovac born? In Velenje, 東京, café 🚢. It's 1931,\n\n  you see"
    reading = make_reader(there, here).read(encode(there, text))
    assert list(reading.ids) == here.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("target", ["sentencepiece legacy", "sentencepiece first"])
def test_a_targets_bos_and_dummy_space_are_not_read(target: str) -> None:
    there, here = Vocabulary.of(tokenizer(target)), Vocabulary.of(tokenizer("byte-level"))
    ids = there.tokenizer("Ana was born")["input_ids"]
    assert there.tokens[ids[1]].startswith(b" ")
    reading = make_reader(there, here).read(ids)
    assert list(reading.ids) == here.tokenizer("Ana was born")["input_ids"]


def test_spelled_special_tokens_stay_text() -> None:
    there = Vocabulary.of(tokenizer("gpt2"))
    text = "</s> <s> <|endoftext|> <|im_end|>"
    there.tokenizer.backend_tokenizer.encode_special_tokens = True
    ids = encode(there, text)
    there.tokenizer.backend_tokenizer.encode_special_tokens = False
    for value in MAKERS:
        here = Vocabulary.of(tokenizer(value))
        read = make_reader(there, here).read(ids).ids[len(here.prefix) :]
        assert read
        if value != "unigram":  # which has no other word for "<" than <unk>
            assert not here.specials.keys() & set(read)


def test_a_history_waits_within_a_character() -> None:
    there, here = Vocabulary.of(tokenizer("gpt2")), Vocabulary.of(tokenizer("sentencepiece never"))
    reader = make_reader(there, here)
    ship = [there.tokens.index(bytes([byte])) for byte in "🚢".encode()]
    history = reader.follow()
    before = list(history.extend(encode(there, "A ship: ")).ids)
    for token_id in ship[:3]:
        reading = history.extend([token_id])
        assert reading.waiting
        assert list(reading.ids) == before
    reading = history.extend(ship[3:])
    assert not reading.waiting
    assert list(reading.ids) == here.tokenizer("A ship: 🚢")["input_ids"]


def test_an_unfinished_character_is_replaced_where_its_run_ends() -> None:
    there, here = Vocabulary.of(tokenizer("gpt2")), Vocabulary.of(tokenizer("byte-level"))
    broken = there.tokens.index(b"\xf0")
    end = next(iter(there.specials))
    reading = make_reader(there, here).read([*encode(there, "so"), broken, end])
    assert list(reading.ids) == here.tokenizer("so\ufffd")["input_ids"]


def test_a_history_waits_for_what_may_become_a_marker() -> None:
    there, here = Vocabulary.of(tokenizer("qwen")), Vocabulary.of(tokenizer("byte-level"))
    end, start = (there.tokenizer.convert_tokens_to_ids(f"<|im_{at}|>") for at in ("end", "start"))
    turn = special(end) + "\n" + special(start) + "user\n"
    reader = make_reader(there, here, Rule(special(end), (1,)), Rule(turn, (1, 4)))
    history = reader.follow()
    history.extend(encode(there, "Yes."))
    assert history.extend([end]).waiting
    assert history.extend(encode(there, "\n")).waiting
    reading = history.extend([start, *encode(there, "user\n")])
    assert not reading.waiting
    assert list(reading.ids) == [*here.tokenizer("Yes.")["input_ids"], 1, 4]

    history = reader.follow()
    history.extend([*encode(there, "Yes."), end, *encode(there, "\n")])
    reading = history.extend(encode(there, "No."))
    assert not reading.waiting
    expected = [*here.tokenizer("Yes.")["input_ids"], 1, *encode(here, "\nNo.")]
    assert list(reading.ids) == expected


def test_nothing_is_read_as_a_placeholder() -> None:
    there, here = Vocabulary.of(tokenizer("qwen")), Vocabulary.of(tokenizer("qwen"))
    reader = make_reader(there, here)
    assert list(reader.read([]).ids) == [here.eos]
    assert list(reader.follow().extend([]).ids) == [here.eos]
    start = there.tokenizer.convert_tokens_to_ids("<|im_start|>")
    history = reader.follow()
    assert list(history.extend([start]).ids) == [here.eos]
    assert list(history.extend(encode(there, "Hi")).ids) == encode(here, "Hi")


def test_the_columns_of_a_runs_start_are_used_there_only() -> None:
    there = Vocabulary.of(tokenizer("sentencepiece legacy"))
    here = Vocabulary.of(tokenizer("byte-level"))
    reader = make_reader(there, here, Rule(special(there.eos), (1,)), shift="strip")
    ids = there.tokenizer("Ana was")["input_ids"]
    seen = [reader.read(ids[:end]).at_start for end in range(1, len(ids) + 1)]
    assert seen == [True, *[False] * (len(ids) - 1)]
    assert reader.read([*ids, there.eos]).at_start
    assert not make_reader(there, here).read([there.bos]).at_start

    reader = make_reader(here, there, Rule(special(1), (there.eos,)), shift="add")
    assert reader.read([0, *encode(here, "Hi"), 1]).at_start
    assert not reader.read([0, *encode(here, "Hi")]).at_start


def test_a_long_history_is_cut_so_that_steps_stay_cheap() -> None:
    """What may still change is a few words, not the whole run."""
    there = Vocabulary.of(tokenizer("gpt2"))
    ids = encode(there, "The quick brown fox jumps over the lazy dog. " * 40)
    for value in ("gpt2", "llama3", "qwen", "tekken", "byte-level", "sentencepiece legacy"):
        history = make_reader(there, Vocabulary.of(tokenizer(value))).follow()
        for token_id in ids:
            reading = history.extend([token_id])
            assert len(reading.ids) - reading.num_stable < 100


def test_a_map_of_other_tokenizers_is_refused(tmp_path) -> None:
    there, here = Vocabulary.of(tokenizer("qwen")), Vocabulary.of(tokenizer("byte-level"))
    here.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match="trimtab align"):
        Reader.load(tmp_path, there.fingerprint)
    made = make_map(there, here)
    made.save(tmp_path)
    ids = encode(there, "Where was Ana born?")
    loaded = Reader.load(tmp_path, there.fingerprint)
    assert loaded.read(ids) == Reader(made, here.tokenizer).read(ids)
    Vocabulary.of(tokenizer("tekken")).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match="other tokenizers"):
        Reader.load(tmp_path, there.fingerprint)
