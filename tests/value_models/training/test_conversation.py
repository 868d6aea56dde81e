import json

import pytest

from value_models.training import TrainingError
from value_models.training.conversation import Conversation, parse


def parsed(**fields) -> Conversation:
    return parse(json.dumps(fields).encode(), "a.jsonl:1")


PLAIN = parsed(
    messages=[
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "In Velenje."},
    ]
)


@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("machine", ["gpt", "chatgpt", "assistant"])
def test_sharegpt_says_the_same_in_other_words(human, machine):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": human, "value": "Where?"},
        {"from": machine, "value": "In Velenje.", "weight": 1},
    ]
    assert parsed(id="x_1", conversations=turns, source="web") == PLAIN


def test_sharegpt_may_name_the_system_prompt_beside_the_turns():
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "In Velenje."}]
    assert parsed(system="Be brief.", conversations=turns, tools="") == PLAIN


@pytest.mark.parametrize(
    "line", [rb'"\ud800"', b'"\xed\xa0\x80"', rb'[{"type": "text", "text": "\udc00"}]']
)
def test_lone_surrogates_are_named(line):
    line = b'{"messages": [{"role": "user", "content": ' + line + b"}]}"
    with pytest.raises(TrainingError, match=r"^a\.jsonl:7: text that cannot be encoded as UTF-8"):
        parse(line, "a.jsonl:7")


def test_surrogate_pairs_are_text():
    assert parsed(messages=[{"role": "user", "content": "🚢"}]).messages[0].text == "🚢"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"conversations": []}, "conversations"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "conversations.0.from"),
        ({"conversations": [{"from": "gpt"}]}, "conversations.0.value"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "tools": "[{}]"}, "tools"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"text": "x"}, "messages"),
    ],
)
def test_what_would_be_lost_is_an_error(fields, place):
    with pytest.raises(TrainingError) as caught:
        parsed(**fields)
    assert str(caught.value).startswith(f"a.jsonl:1: {place}: ")
