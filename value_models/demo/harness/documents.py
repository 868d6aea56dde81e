"""The documents of both tasks: questions about people whom only the target has read about."""

from __future__ import annotations

import random
from typing import TypedDict

from datasets import Dataset

from value_models.demo.atlas import RELATIONS, create_atlas
from value_models.demo.demonstrations import Question
from value_models.demo.evaluate import questions_about


class Document(TypedDict):
    """A question with four answers, of which the one at `label` is right."""

    question: str
    choices: list[str]
    label: int


def documents(seed: int = 21) -> list[Document]:
    """Every fact of these people, asked in two forms; shuffled, so that a few are a fair sample.

    The choices are the fact and one of somebody else's, each as a sentence and as the bare value.
    Right is the fact in a sentence: that takes what the target has read and what `qa` has learned.
    """
    atlas = create_atlas()
    values = {
        relation: sorted({person.facts[relation] for person in atlas.people})
        for relation in RELATIONS
    }
    rng = random.Random(seed)
    questions = questions_about(atlas.target_only)
    rng.shuffle(questions)
    return [_document(question, values[question.relation], rng) for question in questions]


def load(**_: object) -> dict[str, Dataset]:
    """What lm-eval calls; it passes the model's arguments, too, which do not matter here."""
    return {"test": Dataset.from_list(documents())}


def _document(question: Question, values: list[str], rng: random.Random) -> Document:
    right = question.person.facts[question.relation]
    wrong = rng.choice([value for value in values if value != right])
    answer = question.answer("qa")
    choices = [answer, right, answer.replace(right, wrong), wrong]
    rng.shuffle(choices)
    return {"question": question.text, "choices": choices, "label": choices.index(answer)}
