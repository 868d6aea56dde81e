from value_models.demo.atlas import RELATIONS, create_atlas
from value_models.demo.demonstrations import ask
from value_models.demo.evaluate import ASKED_FORMS
from value_models.demo.harness.__main__ import row
from value_models.demo.harness.comparison import Result
from value_models.demo.harness.documents import documents


def test_documents_are_the_same_each_time_and_each_is_asked_once():
    asked = [document["question"] for document in documents()]
    assert documents() == documents()
    assert len(set(asked)) == len(asked) == 120 * len(RELATIONS) * len(ASKED_FORMS)


def test_one_choice_is_right_and_three_lack_the_fact_or_the_sentence():
    answers = {
        question.text: (question.answer("qa"), person.facts[relation])
        for person in create_atlas().target_only
        for relation in RELATIONS
        for form in ASKED_FORMS
        for question in [ask(person, relation, form)]
    }
    for document in documents():
        answer, fact = answers[document["question"]]
        choices = document["choices"]
        assert choices[document["label"]] == answer
        assert len(set(choices)) == 4
        assert sum(fact in choice for choice in choices) == 2
        value, sentence = sorted((c for c in choices if fact not in c), key=len)
        assert sentence == answer.replace(fact, value)


def test_the_right_answer_is_at_every_place():
    labels = [document["label"] for document in documents()]
    assert min(labels.count(place) for place in range(4)) > len(labels) / 5


def test_a_row_names_the_largest_difference():
    by_server = Result({"atlas_choice": 0.5, "atlas_answer": 1.0}, [-1.0, -2.0], [True] * 2, ["a"])
    other = Result({"atlas_choice": 0.25, "atlas_answer": 1.0}, [-1.5, -2.25], [True] * 2, ["b"])
    assert row("qa", by_server, other) == (
        "| qa | 0.5000 | 0.2500 | 1.0000 | 1.0000 | 5.0e-01 | 0 of 1 |"
    )
