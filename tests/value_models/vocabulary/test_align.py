"""Maps between vocabularies: which counterpart each token gets, and why."""

import dataclasses
from collections import Counter
from itertools import permutations
from unicodedata import normalize

import pytest
import torch

from tests.value_models.vocabulary.tokenizers import MORE_TEXT, tokenizer
from value_models.vocabulary.align import align, align_vocabularies
from value_models.vocabulary.map import VocabularyMap
from value_models.vocabulary.stream import special
from value_models.vocabulary.text import TextTokenizer
from value_models.vocabulary.tokens import Vocabulary, VocabularyError

NAMES = ("byte-level", "qwen", "tekken", "sentencepiece legacy", "sentencepiece first")
PAIRS = list(permutations(NAMES, 2))


def sides(target: str, value: str) -> tuple[Vocabulary, Vocabulary]:
    return Vocabulary.of(tokenizer(target)), Vocabulary.of(tokenizer(value))


def begins(vocabulary: Vocabulary, text: str) -> dict[int, int]:
    """Which token begins at each byte of a text."""
    place, found = 0, {}
    for token_id in TextTokenizer(vocabulary.tokenizer).encode(text).ids:
        found[place] = token_id
        place += len(vocabulary.tokens[token_id] or b"")
    return found


def build(target: str, value: str, **options) -> VocabularyMap:
    there, here = sides(target, value)
    return align_vocabularies(here, there, [MORE_TEXT], **options)


@pytest.mark.parametrize(("target", "value"), PAIRS)
def test_counterparts_begin_most_often_in_the_same_place(target: str, value: str) -> None:
    there, here = sides(target, value)
    text = normalize("NFC", MORE_TEXT)
    paired: dict[int, Counter[int]] = {}
    starts = begins(here, text)
    for place, target_id in begins(there, text).items():
        if place in starts:
            paired.setdefault(target_id, Counter())[starts[place]] += 1
    columns = build(target, value).columns[0].tolist()
    assert paired
    for target_id, counts in paired.items():
        often = max(counts.values())
        assert counts[columns[target_id]] == often
        same = [i for i, count in counts.items() if count == often]
        if there.tokens[target_id] in [here.tokens[i] for i in same]:
            assert here.tokens[columns[target_id]] == there.tokens[target_id]


def test_what_the_network_says_there_beats_equal_bytes() -> None:
    """Such as "'" of the target, where the network has that token too, but says "'s"."""
    there, here = sides("byte-level", "tekken")
    start, warping = (build("byte-level", "tekken", method=m) for m in ("start", "warping"))
    differ = [
        (token, here.tokens[column])
        for token, column, warped in zip(
            there.tokens, start.columns[0].tolist(), warping.columns[0].tolist(), strict=True
        )
        if token in here.tokens and token and column != warped
    ]
    assert differ
    assert all(said != token and said.startswith(token) for token, said in differ)


@pytest.mark.parametrize(("target", "value"), PAIRS)
def test_warping_takes_equal_bytes_first(target: str, value: str) -> None:
    there, here = sides(target, value)
    columns = build(target, value, method="warping").columns[0].tolist()
    known = {token for token in here.tokens if token}
    for token, column in zip(there.tokens, columns, strict=True):
        if token in known:
            assert here.tokens[column] == token
            others = {i for i, other in enumerate(here.tokens) if other == token}
            assert column == min(others - here.byte_tokens or others)


@pytest.mark.parametrize(("target", "value"), PAIRS)
def test_every_text_token_has_a_counterpart(target: str, value: str) -> None:
    there, here = sides(target, value)
    built = build(target, value)
    for token, column in zip(there.tokens, built.columns[0].tolist(), strict=True):
        if token:
            assert here.tokens[column] is not None


@pytest.mark.parametrize(("target", "value"), PAIRS)
def test_exact_only(target: str, value: str) -> None:
    there, here = sides(target, value)
    full, exact = (build(target, value, method=method) for method in ("warping", "exact"))
    for token, column, other in zip(
        there.tokens, exact.columns[0].tolist(), full.columns[0].tolist(), strict=True
    ):
        if token is None:
            assert column == other
        else:
            assert column == (other if here.tokens[other] == token else -1)


def test_the_same_vocabulary_maps_to_itself() -> None:
    built = build("qwen", "qwen")
    texts = [i for i, token in enumerate(built.tokens) if token is not None]
    assert built.columns[0, texts].tolist() == texts
    assert built.report["tokens"]["exact"] == len(texts)


def test_an_unseen_token_takes_its_longest_beginning() -> None:
    there, here = sides("tekken", "byte-level")
    built = align_vocabularies(here, there, [])
    known = {token for token in here.tokens if token}
    for token, column in zip(there.tokens, built.columns[0].tolist(), strict=True):
        if token and token not in known:
            match = here.tokens[column]
            assert token.startswith(match)
            assert not any(token[:end] in known for end in range(len(match) + 1, len(token)))


def test_a_token_spelled_in_several_takes_the_first() -> None:
    """All of them are aligned as often; the first is what the network would say next."""
    there, here = sides("tekken", "byte-level")
    token = next(
        token
        for token in there.tokens
        if token and token.isalpha() and len(encode(here, token.decode())) == 2
    )
    built = align_vocabularies(here, there, [token.decode()] * 3)
    column = built.columns[0, there.tokens.index(token)]
    assert column == encode(here, token.decode())[0]


def test_a_runs_start_has_columns_of_its_own() -> None:
    there, here = sides("sentencepiece legacy", "byte-level")
    built = build("sentencepiece legacy", "byte-level")
    assert built.shift == "strip"
    for token, column in zip(there.tokens, built.columns[1].tolist(), strict=True):
        if token and len(token) > 1 and token.removeprefix(b" ") in here.tokens:
            assert here.tokens[column] == token.removeprefix(b" ")

    there, here = sides("byte-level", "sentencepiece legacy")
    built = build("byte-level", "sentencepiece legacy")
    assert built.shift == "add"
    for token, column in zip(there.tokens, built.columns[1].tolist(), strict=True):
        if token and b" " + token in here.tokens:
            assert here.tokens[column] == b" " + token


def test_runs_that_begin_alike_need_no_columns_of_their_own() -> None:
    assert build("qwen", "tekken").columns.shape[0] == 1
    assert build("qwen", "tekken").shift == "none"


def test_specials_are_paired_by_meaning() -> None:
    there, here = sides("qwen", "byte-level")
    built = build("qwen", "byte-level")
    end_of_turn = there.tokenizer.convert_tokens_to_ids("<|im_end|>")
    begin = there.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert built.columns[0, end_of_turn] == here.eos
    assert built.columns[0, there.eos] == here.eos
    assert built.columns[0, begin] == -1
    assert built.report["tokens"]["unused"] == 1
    built = build("byte-level", "qwen")
    assert built.columns[0, here.eos] == end_of_turn  # its EOS ends its turns


def test_pairs_of_specials_can_be_overridden() -> None:
    there, here = sides("qwen", "byte-level")
    end_of_turn = there.tokenizer.convert_tokens_to_ids("<|im_end|>")
    built = build("qwen", "byte-level", specials=["<|im_end|>=<|tool|>", "<|endoftext|>="])
    tool = here.tokenizer.convert_tokens_to_ids("<|tool|>")
    assert built.columns[0, [end_of_turn, there.eos]].tolist() == [tool, -1]
    outputs = {rule.pattern: rule.output for rule in built.rules}
    assert outputs[special(end_of_turn)] == (tool,)
    assert special(there.eos) not in outputs


@pytest.mark.parametrize("pair", ["", "=", "<|im_end|>", "<|im_end|>=nothing", "x=<|eos|>"])
def test_a_pair_of_unknown_specials_is_refused(pair: str) -> None:
    with pytest.raises(VocabularyError, match="does not pair a special token"):
        build("qwen", "byte-level", specials=[pair])


def test_the_report_counts_what_the_map_does() -> None:
    built = build("byte-level", "tekken", method="warping")
    report = built.report
    assert sum(report["tokens"].values()) == len(built.tokens)
    assert report["tokens"]["exact"] > report["tokens"]["aligned"] > 0
    assert sum(report["occurrences"].values()) == len(
        encode(sides("byte-level", "tekken")[0], normalize("NFC", MORE_TEXT))
    )
    exact = build("byte-level", "tekken", method="exact").report
    assert exact["occurrences"]["none"] == report["occurrences"]["aligned"]
    assert exact["examples"]["none"]


def test_files_are_aligned_alike_in_any_number_of_processes(tmp_path) -> None:
    tokenizer("byte-level").save_pretrained(tmp_path / "value")
    tokenizer("tekken").save_pretrained(tmp_path / "target")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(MORE_TEXT * 40)
    one, two = (
        align(tmp_path / "value", tmp_path / "target", [corpus], processes=processes)
        for processes in (1, 2)
    )
    assert torch.equal(one.columns, two.columns)
    assert dataclasses.replace(one, columns=two.columns) == two
    assert one.report["corpus"]["files"] == ["corpus.txt"]
    content = one.save(tmp_path / "value").read_bytes()
    assert two.save(tmp_path / "value").read_bytes() == content


def test_what_is_missing_is_refused_in_one_line(tmp_path) -> None:
    tokenizer("byte-level").save_pretrained(tmp_path / "value")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("text")
    good = (tmp_path / "value", tmp_path / "value", [corpus])
    for place, wrong in ((0, tmp_path / "none"), (1, tmp_path), (2, [tmp_path / "none.txt"])):
        arguments = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(VocabularyError) as caught:
            align(*arguments)
        assert "\n" not in str(caught.value)


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]
