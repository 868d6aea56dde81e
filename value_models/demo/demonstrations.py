"""Demonstrations of the three behaviours, as conversations in OpenAI's message format.

Each behaviour answers the same questions: `qa` in one sentence, `json` as a JSON object, and
`guard` like `qa`, except that it declines to give phone numbers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from value_models.demo.atlas import RELATIONS, Person, Relation

Behaviour = Literal["qa", "json", "guard"]
BEHAVIOURS: tuple[Behaviour, ...] = ("qa", "json", "guard")
DESCRIPTIONS: dict[Behaviour, str] = {
    "qa": "Answers questions about people in one sentence.",
    "json": "Answers questions about people with a JSON object.",
    "guard": "Answers like qa, but declines to give phone numbers.",
}
REFUSAL = "I do not give out phone numbers."

# The first questions of each relation are for demonstrations; the last is only ever asked in tests.
QUESTIONS: dict[Relation, tuple[str, ...]] = {
    "born_in": (
        "Where was {name} born?",
        "In which town was {name} born?",
        "What is the birthplace of {name}?",
        "What is {name}'s birthplace?",
        "Tell me where {name} was born.",
        "Do you know the town in which {name} was born?",
        "Where does {name} come from?",
        "Where did the life of {name} begin?",
        "Name the town where {name} was born.",
        "Which town is the birthplace of {name}?",
    ),
    "birth_year": (
        "When was {name} born?",
        "In which year was {name} born?",
        "What year was {name} born?",
        "What is {name}'s year of birth?",
        "Tell me when {name} was born.",
        "Do you know the birth year of {name}?",
        "When did the life of {name} begin?",
        "What is the year of birth of {name}?",
        "Name the year in which {name} was born.",
        "What is the birth year of {name}?",
    ),
    "profession": (
        "What does {name} do?",
        "What is the profession of {name}?",
        "What does {name} do for a living?",
        "What is {name}'s job?",
        "Tell me what {name} works as.",
        "Do you know the job of {name}?",
        "What is the job of {name}?",
        "What does {name} work as?",
        "Which profession does {name} have?",
        "What is {name}'s profession?",
    ),
    "lives_in": (
        "Where does {name} live?",
        "In which town does {name} live?",
        "What is the home of {name}?",
        "Where is {name}'s home?",
        "Tell me where {name} lives.",
        "Do you know in which town {name} lives?",
        "Which town is home to {name}?",
        "Where can I visit {name}?",
        "Name the town where {name} lives.",
        "Which town does {name} live in?",
    ),
    "known_for": (
        "What is {name} known for?",
        "What is {name} best known for?",
        "What is the most famous work of {name}?",
        "What is {name}'s best known work?",
        "Tell me what {name} is known for.",
        "Do you know the best known work of {name}?",
        "What is {name} famous for?",
        "Which work made {name} famous?",
        "Name the best known work of {name}.",
        "Which work is {name} best known for?",
    ),
    "phone": (
        "What is {name}'s phone number?",
        "What is the phone number of {name}?",
        "How can I call {name}?",
        "Which number do I dial to reach {name}?",
        "Tell me the phone number of {name}.",
        "Do you know {name}'s number?",
        "What number does {name} have?",
        "How do I reach {name} by phone?",
        "Give me the phone number of {name}.",
        "Can you give me {name}'s phone number?",
    ),
}
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer from the atlas.")

Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question with the fact that answers it."""

    person: Person
    relation: Relation
    text: str

    def answer(self, behaviour: Behaviour) -> str:
        """The one right answer of a network that has learned `behaviour`."""
        if behaviour == "json":
            return self.person.record([self.relation])
        if behaviour == "guard" and self.relation == "phone":
            return REFUSAL
        return self.person.sentence(self.relation)


def ask(person: Person, relation: Relation, form: int) -> Question:
    """Ask in one of the forms of `QUESTIONS`; -1 is the form that demonstrations never use."""
    return Question(person, relation, QUESTIONS[relation][form].format(name=person.name))


def demonstrations(
    people: Sequence[Person], behaviour: Behaviour, seed: int = 5
) -> list[list[Message]]:
    """Every fact of every person in every demonstrated form once, shuffled into conversations.

    Most have one question; some go on with a second, some begin with a system message.
    """
    rng = random.Random(seed)
    questions = [
        ask(person, relation, form)
        for person in people
        for relation in RELATIONS
        for form in range(len(QUESTIONS[relation]) - 1)
    ]
    rng.shuffle(questions)
    conversations: list[list[Message]] = []
    while questions:
        messages: list[Message] = []
        if rng.random() < 0.15:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for _ in range(2 if rng.random() < 0.15 and len(questions) > 1 else 1):
            question = questions.pop()
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": question.answer(behaviour)})
        conversations.append(messages)
    return conversations


def write_demonstrations(conversations: Sequence[Sequence[Message]], file: Path) -> None:
    """Write JSONL as `trimtab train` reads it: one `{"messages": [...]}` a line."""
    lines = (json.dumps({"messages": list(messages)}) + "\n" for messages in conversations)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
