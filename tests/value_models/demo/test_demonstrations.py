import json

import pytest

from tests.models import make_tokenizer
from value_models.demo.atlas import RELATIONS, create_atlas
from value_models.demo.demonstrations import (
    BEHAVIOURS,
    QUESTIONS,
    REFUSAL,
    ask,
    demonstrations,
    write_demonstrations,
)
from value_models.training.data import load_demonstrations


@pytest.fixture(scope="module")
def atlas():
    return create_atlas(num_people=12, num_known=8, num_demonstrated=6)


def texts(conversations, role):
    return [m["content"] for messages in conversations for m in messages if m["role"] == role]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_fact_is_asked_once_in_every_demonstrated_form(atlas, behaviour):
    asked = texts(demonstrations(atlas.demonstrated, behaviour), "user")
    expected = [
        ask(person, relation, form).text
        for person in atlas.demonstrated
        for relation in RELATIONS
        for form in range(len(QUESTIONS[relation]) - 1)
    ]
    assert sorted(asked) == sorted(expected)


def test_nothing_is_told_about_anyone_else(atlas):
    conversations = json.dumps(demonstrations(atlas.demonstrated, "qa"))
    assert not any(person.name in conversations for person in atlas.held_out + atlas.target_only)


def test_the_form_for_tests_is_never_demonstrated(atlas):
    asked = texts(demonstrations(atlas.people, "qa"), "user")
    for person in atlas.people:
        for relation in RELATIONS:
            assert ask(person, relation, -1).text not in asked


def test_answers(atlas):
    person = atlas.people[0]
    born, phone = ask(person, "born_in", 0), ask(person, "phone", 0)
    assert born.answer("qa") == f"{person.name} was born in {person.facts['born_in']}."
    assert json.loads(born.answer("json")) == {
        "name": person.name,
        "born_in": person.facts["born_in"],
    }
    assert born.answer("guard") == born.answer("qa")
    assert phone.answer("guard") == REFUSAL
    assert person.facts["phone"] in phone.answer("qa")


def test_guard_demonstrations_never_hold_a_number(atlas):
    assert "555" not in json.dumps(demonstrations(atlas.demonstrated, "guard"))


def test_training_takes_the_file_whole(atlas, tmp_path):
    conversations = demonstrations(atlas.demonstrated, "qa")
    write_demonstrations(conversations, tmp_path / "qa.jsonl")
    data = load_demonstrations(tmp_path / "qa.jsonl", make_tokenizer(), 512)
    assert len(data.examples) == len(conversations)
    assert not data.dropped
    assert conversations == demonstrations(atlas.demonstrated, "qa")
