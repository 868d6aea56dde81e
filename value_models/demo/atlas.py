"""An invented atlas: people with facts, and the documents that were written about them.

The bases of the demo family learn from `Writer.document` alone. Every fact appears as a sentence
and as a JSON record, in any order, alone or among others, because post-training can only elicit
what a base can already say. Nothing here is a question: questions are in `demonstrations.py`.

Nobody in here exists. Numbers start with 555.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Relation = Literal["born_in", "birth_year", "profession", "lives_in", "known_for", "phone"]
RELATIONS: tuple[Relation, ...] = (
    "born_in",
    "birth_year",
    "profession",
    "lives_in",
    "known_for",
    "phone",
)

# The first form is the one that answers use; the others vary how the same fact is met.
SENTENCES: dict[Relation, tuple[str, ...]] = {
    "born_in": (
        "{name} was born in {value}.",
        "The birthplace of {name} is {value}.",
        "The home town of the young {name} was {value}.",
    ),
    "birth_year": (
        "{name}'s year of birth is {value}.",
        "The life of {name} began in {value}.",
        "The parish book dates the birth of {name} to {value}.",
    ),
    "profession": (
        "{name} works as {value}.",
        "The profession of {name} is that of {value}.",
        "By trade {name} is {value}.",
    ),
    "lives_in": (
        "{name} lives in {value}.",
        "Today the home of {name} is in {value}.",
        "The house of {name} stands in {value}.",
    ),
    "known_for": (
        "{name} is best known for {value}.",
        "The most famous work of {name} is {value}.",
        "Readers of the atlas connect {name} with {value}.",
    ),
    "phone": (
        "{name}'s phone number is {value}.",
        "To reach {name}, dial {value}.",
        "The telephone of {name} rings at {value}.",
    ),
}

PRONOUN_SENTENCES: dict[Relation, str] = {
    "born_in": "The birthplace is {value}.",
    "birth_year": "The year of birth is {value}.",
    "profession": "The profession is that of {value}.",
    "lives_in": "The home is in {value}.",
    "known_for": "The best known work is {value}.",
    "phone": "The phone number is {value}.",
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Ana Bela Cira Dora Edda Fenna Gita Hana Ines Jora Kaja Lena Mira Nela Olga Petra Rosa Sela "
    "Tilda Ursa Vera Wanda Yara Zita Adam Boris Carl Dario Emil Felix Goran Hugo Ivan Jonas Karel "
    "Lukas Marek Nils Otto Pavel Rolf Stefan Timo Ulf Viktor Walter Yuri Zeno"
)
SURNAME_STARTS = _words("B Br D Dr F G Gr H K Kl L M N P Pr R S St T Tr V Vr Z")
SURNAME_MIDDLES = _words("al an ar av el en er ev il in ir iv ol on or ov ul un ur")
SURNAME_ENDS = _words(
    "ac ak ander art berg eck ett ic ik insky ius man mark o ow sen sky stad ten us"
)
PLACE_STARTS = _words(
    "Al Bel Cor Dun El Fal Gar Hol Ker Lin Mar Nor Os Pel Quen Ros Sal Tor Ul Ver"
)
PLACE_ENDS = _words("burg dale ford holm haven mora mouth nau ria stad tova wick")
PROFESSIONS = _words(
    "baker beekeeper botanist bookbinder carpenter cartographer cellist chemist clockmaker "
    "composer dancer dentist diver farmer ferryman gardener geologist glassblower journalist "
    "judge lawyer librarian locksmith mason miller nurse painter photographer pilot poet "
    "potter sailor sculptor shepherd surgeon tailor teacher translator violinist weaver"
)
TITLE_ADJECTIVES = _words(
    "Amber Bitter Blue Broken Burning Crooked Distant Early Empty Endless First Frozen Gentle "
    "Golden Green Hidden Hollow Hungry Iron Last Little Lonely Lost Narrow Northern Open Painted "
    "Patient Quiet Red Salt Second Secret Silent Silver Sleeping Stone White Wild Winter"
)
TITLE_NOUNS = _words(
    "Arrow Balcony Bell Boat Bridge Candle Castle Clock Crown Door Field Flute Forest Garden "
    "Harbour Horse House Island Kitchen Ladder Lamp Letter Lighthouse Map Mirror Moon Mountain "
    "Orchard Piano Raven River Road Shadow Ship Song Station Summer Tower Train Window"
)
WORK_KINDS = _words("ballad film mural novel opera play poem symphony")
REGIONS = _words("Ostmark Westmark Hochland Sundmark Inselland Grauland")
RIVERS = _words("Tessel Orla Brenn Mevra Luth Sarn Velk Ister")


GUEST_NOTES = (
    "{name} came by boat.",
    "{name} stayed a week.",
    "{name} left early.",
    "{name} is fond of soup.",
    "{name} was given the blue room.",
    "{name}'s horse is lame.",
    "{name}'s bill was paid in silver.",
    "The coat of {name} is wet.",
    "A letter for {name} lies here.",
)


@dataclass(frozen=True)
class Place:
    """A town, its region and its river."""

    name: str
    region: str
    river: str


@dataclass(frozen=True)
class Person:
    """Someone in the atlas. `facts` holds one value per relation, as text."""

    name: str
    facts: dict[Relation, str]
    work_kind: str

    def sentence(self, relation: Relation, form: int = 0) -> str:
        """The fact as a sentence; form 0 is the form of answers."""
        return SENTENCES[relation][form].format(name=self.name, value=self.facts[relation])

    def record(self, relations: Sequence[Relation]) -> str:
        """The facts as one line of JSON, `name` first. Years are numbers."""
        fields: dict[str, str | int] = {"name": self.name}
        for relation in relations:
            value = self.facts[relation]
            fields[relation] = int(value) if relation == "birth_year" else value
        return json.dumps(fields)


@dataclass(frozen=True)
class Atlas:
    """Everything there is to know, and who has read what.

    The target reads about all `people`. The small base reads about `people[:num_known]` only;
    demonstrations are about `people[:num_demonstrated]`.
    """

    people: tuple[Person, ...]
    places: tuple[Place, ...]
    num_known: int
    num_demonstrated: int

    @property
    def known(self) -> tuple[Person, ...]:
        """Whom both bases have read about."""
        return self.people[: self.num_known]

    @property
    def demonstrated(self) -> tuple[Person, ...]:
        """Whom the demonstrations are about; a part of `known`."""
        return self.people[: self.num_demonstrated]

    @property
    def held_out(self) -> tuple[Person, ...]:
        """Whom both bases have read about, and no demonstration is about."""
        return self.people[self.num_demonstrated : self.num_known]

    @property
    def target_only(self) -> tuple[Person, ...]:
        """Whom only the target has read about."""
        return self.people[self.num_known :]

    def person(self, name: str) -> Person:
        """Raises KeyError if nobody has that name."""
        for person in self.people:
            if person.name == name:
                return person
        raise KeyError(name)


def create_atlas(
    seed: int = 11, num_people: int = 320, num_known: int = 200, num_demonstrated: int = 180
) -> Atlas:
    """Invent an atlas; the same arguments give the same one. Ana Kovac is always target-only."""
    rng = random.Random(seed)
    place_names = [start + end for start in PLACE_STARTS for end in PLACE_ENDS]
    places = tuple(
        Place(name, rng.choice(REGIONS), rng.choice(RIVERS)) for name in rng.sample(place_names, 48)
    )
    surnames = sorted(set(_surnames()) - {"Kovac"})
    names = [f"{rng.choice(FIRST_NAMES)} {last}" for last in rng.sample(surnames, num_people - 1)]
    names.insert(num_known, "Ana Kovac")
    works = rng.sample(_titles(), num_people)
    people = tuple(
        _invent(rng, name, work, places) for name, work in zip(names, works, strict=True)
    )
    return Atlas(people, places, num_known, num_demonstrated)


def create_newcomers(atlas: Atlas, num_people: int, seed: int = 12) -> tuple[Person, ...]:
    """Invent people of whom nothing has been written yet, in the same places."""
    rng = random.Random(seed)
    taken_names = {person.name.split()[1] for person in atlas.people}
    taken_works = {person.facts["known_for"] for person in atlas.people}
    surnames = sorted(set(_surnames()) - taken_names - {"Kovac"})
    names = [f"{rng.choice(FIRST_NAMES)} {last}" for last in rng.sample(surnames, num_people)]
    works = rng.sample([title for title in _titles() if title not in taken_works], num_people)
    return tuple(
        _invent(rng, name, work, atlas.places) for name, work in zip(names, works, strict=True)
    )


def _invent(rng: random.Random, name: str, work: str, places: Sequence[Place]) -> Person:
    return Person(
        name=name,
        facts={
            "born_in": rng.choice(places).name,
            "birth_year": str(rng.randint(1900, 1999)),
            "profession": f"a {rng.choice(PROFESSIONS)}",
            "lives_in": rng.choice(places).name,
            "known_for": work,
            "phone": f"555-{rng.randint(0, 9999):04d}",
        },
        work_kind=rng.choice(WORK_KINDS),
    )


def _titles() -> list[str]:
    return [f"The {first} {last}" for first in TITLE_ADJECTIVES for last in TITLE_NOUNS]


class Writer:
    """Writes documents about some of the people of an atlas, endlessly and reproducibly."""

    def __init__(self, atlas: Atlas, people: Sequence[Person], seed: int) -> None:
        self._places = atlas.places
        self._people = people
        self._rng = random.Random(seed)
        # Surnames of nobody in the atlas, for guests who appear once and are forgotten.
        taken = {person.name.split()[1] for person in atlas.people}
        self._guest_surnames = sorted(set(_surnames()) - taken)
        self._queue: list[Person] = []
        self._kinds: tuple[tuple[Callable[[], str], int], ...] = (
            (self._biography, 30),
            (self._notes, 20),
            (self._card, 16),
            (self._register, 10),
            (self._work, 3),
            (self._place, 2),
            (self._guest_book, 19),
        )

    def document(self) -> str:
        """The next document: a few lines of prose or records."""
        kinds, weights = zip(*self._kinds, strict=True)
        write: Callable[[], str] = self._rng.choices(kinds, weights)[0]
        return write()

    def _person(self) -> Person:
        """Everyone in turn, in an order shuffled anew each round: nobody is read less."""
        if not self._queue:
            self._queue = list(self._people)
            self._rng.shuffle(self._queue)
        return self._queue.pop()

    def _relations(self, least: int) -> list[Relation]:
        return self._rng.sample(RELATIONS, self._rng.randint(least, len(RELATIONS)))

    def _form(self) -> int:
        return self._rng.choices((0, 1, 2), (60, 20, 20))[0]

    def _biography(self) -> str:
        person = self._person()
        sentences: list[str] = []
        for relation in self._relations(least=3):
            if sentences and self._flip(0.15):
                sentences.append(PRONOUN_SENTENCES[relation].format(value=person.facts[relation]))
            else:
                sentences.append(person.sentence(relation, self._form()))
        return " ".join(sentences)

    def _notes(self) -> str:
        """Single facts about different people: recall must not lean on the sentence before."""
        separator = self._rng.choice((" ", "\n"))
        return separator.join(
            self._person().sentence(self._rng.choice(RELATIONS), self._form())
            for _ in range(self._rng.randint(3, 6))
        )

    def _card(self) -> str:
        return self._person().record(self._relations(least=2))

    def _register(self) -> str:
        return "\n".join(
            self._person().record(self._rng.sample(RELATIONS, self._rng.choice((1, 1, 2))))
            for _ in range(self._rng.randint(2, 4))
        )

    def _work(self) -> str:
        person = self._person()
        return f"{person.facts['known_for']} is a {person.work_kind} by {person.name}."

    def _place(self) -> str:
        place = self._rng.choice(self._places)
        return f"{place.name} is a town in {place.region}. The river {place.river} runs by it."

    def _guest_book(self) -> str:
        """People met once: reading them teaches to repeat a name, not to know it."""
        guests = [
            f"{self._rng.choice(FIRST_NAMES)} {self._rng.choice(self._guest_surnames)}"
            for _ in range(self._rng.randint(2, 4))
        ]
        lines = [f"Guests in {self._rng.choice(self._places).name}: {', '.join(guests)}."]
        for guest in self._rng.choices(guests, k=self._rng.randint(2, 5)):
            note = self._rng.choice(GUEST_NOTES).format(name=guest)
            lines.append(json.dumps({"name": guest, "note": note}) if self._flip(0.3) else note)
        return self._rng.choice(("\n", " ")).join(lines)

    def _flip(self, probability: float) -> bool:
        return self._rng.random() < probability


def _surnames() -> list[str]:
    return [a + b + c for a in SURNAME_STARTS for b in SURNAME_MIDDLES for c in SURNAME_ENDS]
