from value_models.demo.atlas import Writer, create_atlas
from value_models.study.family import newcomers, study_atlas, train_foreign_tokenizer


def test_newcomers_are_new() -> None:
    atlas = study_atlas()
    new = newcomers(atlas)
    everyone = [*atlas.people, *new]
    assert len({person.name for person in everyone}) == len(everyone)
    assert len({person.facts["known_for"] for person in everyone}) == len(everyone)
    assert newcomers(atlas) == new


def test_fewer_demonstrations_leave_the_atlas_as_the_bases_read_it() -> None:
    assert study_atlas().people == create_atlas().people


def test_the_foreign_tokenizer_keeps_all_text_and_cuts_it_elsewhere() -> None:
    atlas = create_atlas()
    tokenizer = train_foreign_tokenizer(atlas, num_documents=2000)
    writer = Writer(atlas, atlas.people, seed=9)
    for text in [*(writer.document() for _ in range(20)), "Žižek 東京 🚢\n\n  x"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.tokenize("born in 1931") != list("born in 1931")
    assert any("193" in token for token in tokenizer.tokenize("born in 1931."))
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert {str(token) for token in special} == {
        "<unk>",
        "<s>",
        "<|im_end|>",
        "<|im_start|>",
        "<pad>",
    }
