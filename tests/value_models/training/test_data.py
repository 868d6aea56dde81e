import json
from collections import Counter

import pytest
from transformers import AutoTokenizer

from tests.models import make_tokenizer
from value_models.training import TrainingError
from value_models.training.conversation import Conversation
from value_models.training.data import (
    IGNORED,
    Example,
    Examples,
    encode,
    load_demonstrations,
)

USER = {"role": "user", "content": "Where was Ana Kovac born?"}
ASSISTANT = {"role": "assistant", "content": "Ana Kovac was born in Velenje."}


def write(file, *lines):
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def line(*messages, **others):
    return json.dumps({"messages": list(messages), **others})


def encoded(*messages, max_length=10_000, tokenizer=None):
    conversation = Conversation.model_validate({"messages": list(messages)})
    dropped = Counter()
    return encode(conversation, tokenizer or make_tokenizer(), max_length, dropped), dropped


def labelled_text(example: Example) -> str:
    return make_tokenizer().decode([label for label in example.labels if label != IGNORED])


def test_only_the_response_and_its_end_carry_labels():
    example, dropped = encoded({"role": "system", "content": "Be brief."}, USER, ASSISTANT)
    assert labelled_text(example) == ASSISTANT["content"] + "<|eos|>"
    assert all(
        label in (IGNORED, token)
        for token, label in zip(example.input_ids, example.labels, strict=True)
    )
    assert not dropped


def test_the_prompt_is_what_a_server_renders():
    example, _ = encoded(USER, ASSISTANT)
    prompt = make_tokenizer().apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=False
    )
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert IGNORED not in example.labels[len(prompt) :]


def test_every_assistant_turn_carries_labels():
    second = {"role": "assistant", "content": "In 1931."}
    example, _ = encoded(USER, ASSISTANT, {"role": "user", "content": "When?"}, second)
    assert labelled_text(example) == "Ana Kovac was born in Velenje.<|eos|>In 1931.<|eos|>"


def test_what_follows_the_last_response_is_left_out():
    with_tail, _ = encoded(USER, ASSISTANT, {"role": "user", "content": "When?"})
    without, _ = encoded(USER, ASSISTANT)
    assert with_tail == without


def test_text_parts_are_joined():
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": t} for t in ("Where was Ana ", "Kovac born?")],
    }
    assert encoded(parts, ASSISTANT) == encoded(USER, ASSISTANT)


def test_turns_beyond_the_limit_are_cut_whole_and_counted():
    first, _ = encoded(USER, ASSISTANT)
    limit = len(first.input_ids)
    cut, dropped = encoded(USER, ASSISTANT, USER, ASSISTANT, max_length=limit)
    assert cut == first
    assert dropped == {f"cut before a turn that ends beyond {limit} tokens": 1}
    assert encoded(USER, ASSISTANT, max_length=limit - 1)[0] is None


def test_a_template_that_rewrites_earlier_turns_never_mislabels(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not loop.last or m['role'] == 'user' %}{{ m['role'] }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    example, dropped = encoded(USER, ASSISTANT, tokenizer=tokenizer)
    assert example is None
    assert sum(dropped.values()) == 1


def test_a_file_is_read_and_what_was_left_out_is_reported(tmp_path):
    file = write(tmp_path / "a.jsonl", line(USER, ASSISTANT), "", line(USER), line(USER, ASSISTANT))
    data = load_demonstrations(file, make_tokenizer(), 10_000)
    assert (data.num_conversations, len(data.examples)) == (3, 2)
    assert data.dropped == {"without an assistant message": 1}
    assert "3 conversations read, 2 used" in data.report()
    assert "1 without an assistant message" in data.report()


def test_the_fingerprint_is_of_the_content(tmp_path):
    a = write(tmp_path / "a.jsonl", line(USER, ASSISTANT))
    b = write(tmp_path / "b.jsonl", line(USER, ASSISTANT))
    c = write(tmp_path / "c.jsonl", line(USER, ASSISTANT), line(USER, ASSISTANT))
    prints = [load_demonstrations(f, make_tokenizer(), 99).fingerprint for f in (a, b, c)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        "null",
        "[" * 100_000,
        "{}",
        '{"messages": []}',
        line({"role": "user"}),
        line({"role": "wizard", "content": "x"}),
        line({"role": "assistant", "content": None}),
        line({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
        line(USER, ASSISTANT | {"tool_calls": []}),
        line(USER, ASSISTANT, tools=[]),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad):
    file = write(tmp_path / "bad.jsonl", line(USER, ASSISTANT), line(USER, ASSISTANT), bad)
    with pytest.raises(TrainingError) as caught:
        load_demonstrations(file, make_tokenizer(), 10_000)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(TrainingError, match=r"bad\.jsonl:1: "):
        load_demonstrations(tmp_path / "bad.jsonl", make_tokenizer(), 10_000)


def test_a_line_that_the_template_refuses_is_named(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = write(tmp_path / "a.jsonl", line(USER, ASSISTANT))
    with pytest.raises(TrainingError, match=r"a\.jsonl:1: .*roles must alternate"):
        load_demonstrations(file, tokenizer, 10_000)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TrainingError, match="cannot be read"):
        load_demonstrations(tmp_path / "none.jsonl", make_tokenizer(), 10_000)


def test_nothing_to_learn_from(tmp_path):
    with pytest.raises(TrainingError, match="nothing to learn from"):
        load_demonstrations(write(tmp_path / "a.jsonl", line(USER)), make_tokenizer(), 10_000)


def test_no_chat_template(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(TrainingError, match="--chat-template"):
        load_demonstrations(write(tmp_path / "a.jsonl", line(USER, ASSISTANT)), tokenizer, 99)


def test_both_formats_may_stand_in_one_file(tmp_path):
    shared = [{"from": "human", "value": USER["content"]}]
    shared += [{"from": "gpt", "value": ASSISTANT["content"]}]
    file = write(tmp_path / "a.jsonl", line(USER, ASSISTANT), json.dumps({"conversations": shared}))
    first, second = load_demonstrations(file, make_tokenizer(), 10_000).examples
    assert first == second


def test_a_response_to_nothing_is_left_out_and_counted():
    example, dropped = encoded(ASSISTANT, USER, ASSISTANT)
    assert example == encoded(USER, ASSISTANT)[0]
    assert dropped == {"with leading turns of the assistant, which answer nothing": 1}
    assert encoded(ASSISTANT)[0] is None


def test_examples_come_back_as_they_went_in():
    whole = [Example([1, 2, 3], [IGNORED, 2, 3]), Example([], []), Example([4], [4])]
    examples = Examples(whole)
    assert list(examples) == whole
    assert [examples.num_tokens(index) for index in range(3)] == [3, 0, 1]
    assert examples.num_response_tokens == 3
    assert list(examples[1:]) == whole[1:]
    assert examples[-1] == whole[-1]


def test_a_share_is_held_out_the_same_way_each_time(tmp_path):
    turns = [USER | {"content": f"{USER['content']} {number}"} for number in range(40)]
    file = write(tmp_path / "a.jsonl", *(line(turn, ASSISTANT) for turn in turns))
    data = load_demonstrations(file, make_tokenizer(), 10_000)
    kept, held_out = data.split(0.25, seed=1)
    assert (len(kept), len(held_out)) == (30, 10)
    key = [tuple(example.input_ids) for example in [*kept, *held_out]]
    assert sorted(key) == sorted(tuple(example.input_ids) for example in data.examples)
    assert list(data.split(0.25, seed=1)[1]) == list(held_out)
    assert list(data.split(0.25, seed=2)[1]) != list(held_out)
    with pytest.raises(TrainingError, match="none to train on"):
        data.split(0.999, seed=1)


def test_a_response_that_adds_no_token_is_left_out_and_counted(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    silent = ASSISTANT | {"content": ""}
    example, dropped = encoded(USER, silent, tokenizer=tokenizer)
    assert example is None
    assert dropped == {"with empty responses only": 1}
    example, dropped = encoded(USER, silent, USER, ASSISTANT, tokenizer=tokenizer)
    assert labelled_text(example) == ASSISTANT["content"]
    assert not dropped
