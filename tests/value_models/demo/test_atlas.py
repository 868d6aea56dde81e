import json

import pytest

from value_models.demo.atlas import RELATIONS, SENTENCES, Writer, create_atlas


@pytest.fixture(scope="module")
def atlas():
    return create_atlas()


def read(atlas, people, seed=3, num_documents=4000) -> str:
    writer = Writer(atlas, people, seed)
    return "\n".join(writer.document() for _ in range(num_documents))


def test_the_atlas_is_the_same_each_time_and_another_with_another_seed(atlas):
    assert create_atlas() == atlas
    assert create_atlas(seed=1) != atlas


def test_the_parts_cover_everyone_once(atlas):
    parts = (atlas.demonstrated, atlas.held_out, atlas.target_only)
    assert sum(parts, ()) == atlas.people
    assert all(parts)
    assert atlas.known == atlas.demonstrated + atlas.held_out


def test_names_surnames_and_works_are_unique(atlas):
    for values in (
        [person.name for person in atlas.people],
        [person.name.split()[1] for person in atlas.people],
        [person.facts["known_for"] for person in atlas.people],
    ):
        assert len(set(values)) == len(values)


def test_only_the_target_has_read_about_ana_kovac(atlas):
    ana = atlas.person("Ana Kovac")
    assert ana in atlas.target_only
    assert ana.sentence("born_in") in read(atlas, atlas.people)
    assert "Kovac" not in read(atlas, atlas.known)


def test_documents_are_reproducible(atlas):
    assert read(atlas, atlas.people, seed=5) == read(atlas, atlas.people, seed=5)
    assert read(atlas, atlas.people, seed=5) != read(atlas, atlas.people, seed=6)


def test_documents_hold_every_fact_as_sentence_and_as_record(atlas):
    text = read(atlas, atlas.people[:40], num_documents=20_000)
    for person in atlas.people[:40]:
        for relation in RELATIONS:
            assert all(person.sentence(relation, form) in text for form in range(3))
            assert person.record([relation]) in text


def test_documents_never_ask(atlas):
    text = read(atlas, atlas.people)
    assert "?" not in text and "<|" not in text


def test_documents_about_some_name_nobody_else(atlas):
    text = read(atlas, atlas.known)
    assert not any(person.name in text for person in atlas.target_only)


def test_records_are_json(atlas):
    person = atlas.people[0]
    fields = json.loads(person.record(RELATIONS))
    assert list(fields) == ["name", *RELATIONS]
    assert fields["birth_year"] == int(person.facts["birth_year"])


def test_the_form_of_answers_begins_with_the_name_and_ends_with_the_value():
    # `evaluate.knowledge` cuts these sentences before their value.
    for forms in SENTENCES.values():
        assert forms[0].startswith("{name}")
        assert forms[0].endswith(" {value}.")
