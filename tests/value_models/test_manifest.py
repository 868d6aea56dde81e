import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from tests.models import OTHER_TEXT, make_tokenizer
from value_models.manifest import Manifest, tokenizer_fingerprint

FIELDS = {"format_version": 1, "kind": "residual", "tokenizer_fingerprint": "sha256:" + "0" * 64}


def test_a_manifest_survives_its_own_json():
    manifest = Manifest(**FIELDS, default_scale=0.5, base="small", training={"steps": 3})
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize(
    "wrong",
    [
        {"format_version": 2},
        {"kind": "magic"},
        {"default_scale": float("nan")},
        {"default_scale": float("inf")},
        {"default_scale": 8.001},
        {"tokenizer_fingerprint": "abc"},
        {"scale": 1.0},
    ],
)
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(ValidationError):
        Manifest.model_validate(FIELDS | wrong)


def test_the_fingerprint_survives_saving_and_loading(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "a")
    once = AutoTokenizer.from_pretrained(tmp_path / "a")
    once.save_pretrained(tmp_path / "b")
    twice = AutoTokenizer.from_pretrained(tmp_path / "b")
    fingerprints = {tokenizer_fingerprint(t) for t in (tokenizer, once, twice)}
    assert len(fingerprints) == 1
    assert fingerprints.pop().startswith("sha256:")


class FixedVocabulary:
    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def test_the_fingerprint_tells_vocabularies_apart():
    vocabularies = [
        {"a": 0, "b": 1},
        {"a": 1, "b": 0},
        {"a": 0, "b": 1, "c": 2},
        {"a": 0, "b": 2},
        {"a 1 1 b": 0},
    ]
    fingerprints = {tokenizer_fingerprint(FixedVocabulary(v)) for v in vocabularies}
    assert len(fingerprints) == len(vocabularies)
    assert tokenizer_fingerprint(make_tokenizer()) != tokenizer_fingerprint(
        make_tokenizer(OTHER_TEXT)
    )


def test_the_fingerprint_ignores_the_order_of_insertion():
    assert tokenizer_fingerprint(FixedVocabulary({"a": 0, "b": 1})) == tokenizer_fingerprint(
        FixedVocabulary({"b": 1, "a": 0})
    )


def test_an_added_token_changes_the_fingerprint(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["<|new|>"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_reference_is_of_residual_networks_only():
    assert Manifest(**FIELDS, reference=True).reference
    for kind in ("contrast", "cascade", "cascade+"):
        with pytest.raises(ValidationError, match="only kind 'residual' has a reference"):
            Manifest(**{**FIELDS, "kind": kind}, reference=True)


def test_a_manifest_without_a_reference_does_not_speak_of_one():
    """Else the versions of networks would be others than before there were references."""
    assert "reference" not in Manifest(**FIELDS).model_dump_json()
    written = Manifest(**FIELDS, reference=True).model_dump_json()
    assert Manifest.model_validate_json(written).reference
