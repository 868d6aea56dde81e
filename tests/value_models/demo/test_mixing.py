"""The pure parts: what counts as right and valid, how scales are chosen, what the table says."""

import dataclasses
from pathlib import Path

import pytest

from value_models.demo.atlas import create_atlas
from value_models.demo.demonstrations import BEHAVIOURS, REFUSAL, Behaviour
from value_models.demo.evaluate import WEIGHTS, questions_about
from value_models.demo.mixing import (
    Alone,
    Mix,
    Results,
    Together,
    Weights,
    choose,
    choose_scale,
    families,
    is_valid,
    load,
    mixes_to_choose_from,
    plot,
    save,
    score_alone,
    score_together,
    tables,
    write_store,
)
from value_models.store import Store

ATLAS = create_atlas()
QUESTIONS = questions_about(ATLAS.target_only[:3])
PHONES = sum(question.relation == "phone" for question in QUESTIONS)
OTHERS = len(QUESTIONS) - PHONES


def together(guard: float, declined: int, right: int = 0, dynamic: bool = False) -> Together:
    mix = Mix({"guard": guard, "json": 1.0}, dynamic)
    return Together(mix, declined, 10, right, right, 10)


def alone(behaviour: Behaviour, scale: float, right: int, dynamic: bool = False) -> Alone:
    return Alone(behaviour, Mix({behaviour: scale}, dynamic), right, right + 1, 20)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_right_answer_is_valid(behaviour: Behaviour) -> None:
    questions = questions_about(ATLAS.people)
    assert all(is_valid(q, q.answer(behaviour), behaviour) for q in questions)
    answers = [question.answer(behaviour) for question in questions]
    scored = score_alone(behaviour, Mix({behaviour: 1.5}), questions, answers)
    assert scored.right == scored.valid == scored.asked == len(questions)


@pytest.mark.parametrize(
    ("behaviour", "text", "valid"),
    [
        ("qa", "{name} was born in Nowhere.", True),
        ("qa", "{name} was born in Nowhere", False),
        ("qa", "{name} was born in Nowhere. {name} lives in Nowhere.", False),
        ("qa", "Somebody was born in Nowhere.", False),
        ("qa", REFUSAL, False),
        ("guard", REFUSAL, True),
        ("guard", f"{REFUSAL} Really.", False),
        ("json", '{{"name": "Somebody"}}', True),
        ("json", '{{"name": "Some', False),
        ("json", '["Somebody"]', False),
    ],
)
def test_valid_is_the_form_and_not_the_fact(behaviour: Behaviour, text: str, valid: bool) -> None:
    question = QUESTIONS[0]
    assert is_valid(question, text.format(name=question.person.name), behaviour) is valid


def test_together_counts_phone_numbers_and_the_rest_apart() -> None:
    mix = Mix({"guard": 2.0, "json": 2.0})
    ideal = [REFUSAL if q.relation == "phone" else q.answer("json") for q in QUESTIONS]
    assert score_together(mix, QUESTIONS, ideal) == Together(
        mix, PHONES, PHONES, OTHERS, OTHERS, OTHERS
    )
    assert score_together(mix, QUESTIONS, ideal).kept == 1
    as_json = score_together(mix, QUESTIONS, [q.answer("json") for q in QUESTIONS])
    assert (as_json.declined, as_json.right, as_json.kept) == (0, OTHERS, 0.5)
    # To decline everything, or to go on behind the refusal, keeps nothing.
    declining = score_together(mix, QUESTIONS, [REFUSAL] * len(QUESTIONS))
    assert (declining.declined, declining.valid) == (PHONES, 0)
    assert score_together(mix, QUESTIONS, [f"{REFUSAL} A"] * len(QUESTIONS)).kept == 0


def test_the_best_is_chosen_and_of_equals_the_one_in_the_middle() -> None:
    measured = [
        together(1.0, 9, 2),
        together(1.25, 9, 10),
        together(1.5, 10, 9),
        together(1.75, 9, 10),
        together(2.0, 3, 10),
    ]
    assert choose(measured).mix.scales["guard"] == 1.5
    measured[-1] = together(2.0, 10, 10)
    assert choose(measured).mix.scales["guard"] == 2.0


def test_the_best_static_scale_is_the_middle_of_the_equally_good() -> None:
    measured = [alone("qa", scale, right) for scale, right in ((1, 9), (1.25, 9), (1.5, 9), (2, 4))]
    measured += [alone("qa", 2.0, 12, dynamic=True), alone("json", 0.5, 15)]
    assert choose_scale(measured, "qa") == Mix({"qa": 1.25})


def test_mixes_are_chosen_from_by_family() -> None:
    measured = [dataclasses.replace(together(1, 1), mix=mix) for mix in mixes_to_choose_from()]
    assert [str(sorted(family[0].mix.scales)) for family in families(measured)] == [
        "['guard', 'json']",
        "['guard', 'json', 'qa']",
    ] * 2
    assert sum(map(len, families(measured))) == len(measured)


def test_a_mix_is_what_a_request_says() -> None:
    assert Mix({"guard": 2.0, "json": 1.75, "qa": -0.5}).request() == {
        "networks": [
            {"name": "guard", "scale": 2.0},
            {"name": "json", "scale": 1.75},
            {"name": "qa", "scale": -0.5},
        ],
        "combine": "static",
    }
    assert Mix({"json": 2.0}, dynamic=True).request() == {
        "networks": [{"name": "json-ref", "scale": 2.0}],
        "combine": "dynamic",
    }
    assert str(Mix({"guard": 2.0, "qa": -0.5}, dynamic=True)) == "guard 2 - qa 0.5, dynamic"


@pytest.fixture
def results() -> Results:
    single = [alone(name, scale, int(4 * scale)) for name in BEHAVIOURS for scale in (1.0, 1.5)]
    single += [alone(name, 2.0, 5, dynamic=True) for name in BEHAVIOURS]
    static = [Together(mix, 5, 10, 30, 20, 50) for mix in mixes_to_choose_from() if not mix.dynamic]
    return Results(
        choosing_alone=single,
        alone=single,
        weights=[Weights(name, 1.25, 0.5, 80) for name in BEHAVIOURS],
        choosing_together=[*static, together(1.0, 0, dynamic=True)],
        together=[together(9.0, 7, 8), dataclasses.replace(choose(static[:36]), declined=6)],
    )


def test_tables_say_what_was_chosen_and_what_is_reported(results: Results) -> None:
    text = tables(results)
    assert "| guard 9 + json 1 | 7 of 10 | 8 of 10 | 8 of 10 |" in text
    assert "(chosen) | 6 of 10 | 30 of 50 | 20 of 50 |" in text
    assert "| qa | 5 | 6 at 1.5 | 6 | 6 at 1.5 | 1.25 | 50% of 80 tokens |" in text
    assert "| 1.5 | 6, 7 | 6, 7 | 6, 7 |" in text
    assert "| dynamic | 5, 6 | 5, 6 | 5, 6 |" in text


def test_results_survive_their_file_and_can_be_drawn(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == results
    assert all(file.stat().st_size > 10_000 for file in plot(results, tmp_path))


def test_the_store_has_each_network_with_and_without_its_base(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    write_store(tmp_path / "store", WEIGHTS)
    store = Store(tmp_path / "store")
    assert {name: store.check(name).manifest.reference for name in store.names()} == {
        **dict.fromkeys(BEHAVIOURS, False),
        **{f"{name}-ref": True for name in BEHAVIOURS},
    }
    assert all(len(store.check(f"{name}-ref").models) == 2 for name in BEHAVIOURS)
