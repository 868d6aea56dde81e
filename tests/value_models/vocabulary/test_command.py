"""`trimtab align`, without the process around it."""

import argparse

import pytest

from tests.models import make_network
from tests.value_models.vocabulary.tokenizers import MORE_TEXT, tokenizer
from value_models.vocabulary import command
from value_models.vocabulary.map import VocabularyMap, map_file
from value_models.vocabulary.tokens import Vocabulary


@pytest.fixture
def folders(tmp_path):
    make_network(
        tmp_path / "byte-level", tokenizer=tokenizer("byte-level"), hidden_size=32, heads=1
    )
    tokenizer("sentencepiece legacy").save_pretrained(tmp_path / "sentencepiece legacy")
    (tmp_path / "corpus.txt").write_text(MORE_TEXT)
    return tmp_path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([str(argument) for argument in arguments]))


def test_a_map_is_written_and_described(folders, capsys) -> None:
    value, target = folders / "byte-level", folders / "sentencepiece legacy"
    corpus = folders / "corpus.txt"
    options = ("--value", value, "--target", target, "--corpus", corpus, corpus)
    assert run(*options, "--special", "<s>=") == 0
    output = capsys.readouterr().out
    file = map_file(value, Vocabulary.of(tokenizer("sentencepiece legacy")).fingerprint)
    assert output.splitlines()[-1] == f"Written to {file}"
    report = VocabularyMap.load(file).report
    assert f"{report['tokens']['exact']:,} tokens of equal bytes" in output
    assert f"{2 * len(MORE_TEXT.encode()):,} bytes of text" not in output  # NFC makes some shorter
    assert f"{report['bytes']:,} bytes of text" in output
    assert "Note: the target's chat template has no special tokens" in output
    assert report["tokens"]["special"] == 1
    assert run(*options, "--method", "exact", "--processes", 1) == 0
    output = capsys.readouterr().out
    assert "without counterpart" in output and "aligned" not in output


def test_what_cannot_be_used_is_one_line_and_exit_code_1(folders, capsys) -> None:
    value, corpus = folders / "byte-level", folders / "corpus.txt"
    for wrong in (
        ("--value", folders / "none", "--target", value, "--corpus", corpus),
        ("--value", folders / "sentencepiece legacy", "--target", value, "--corpus", corpus),
        ("--value", value, "--target", folders, "--corpus", corpus),
        ("--value", value, "--target", value, "--corpus", folders / "none"),
        ("--value", value, "--target", value, "--corpus", corpus, "--special", "a=b"),
    ):
        assert run(*wrong) == 1
        error = capsys.readouterr().err
        assert [line for line in error.splitlines() if "align:" not in line][-1].strip()
        assert "Traceback" not in error
    assert not (value / "vocabulary_maps").exists()


def test_a_target_of_the_networks_own_tokenizer_needs_no_map(folders, capsys) -> None:
    value = folders / "byte-level"
    assert run("--value", value, "--target", value, "--corpus", folders / "corpus.txt") == 0
    assert "needs no map" in capsys.readouterr().out
    assert not (value / "vocabulary_maps").exists()


def test_no_processes_are_refused(folders) -> None:
    with pytest.raises(SystemExit):
        run("--value", "a", "--target", "b", "--corpus", "c", "--processes", 0)


def test_a_network_with_fewer_logits_than_tokens_gets_no_map(folders, capsys) -> None:
    few = make_network(
        folders / "few", tokenizer=tokenizer("byte-level"), vocab_size=300, hidden_size=32, heads=1
    )
    options = ("--target", folders / "sentencepiece legacy", "--corpus", folders / "corpus.txt")
    assert run("--value", few, *options) == 1
    assert "fewer than its tokenizer" in capsys.readouterr().err
    assert not (few / "vocabulary_maps").exists()


def test_servers_that_run_as_others_can_read_a_map(folders) -> None:
    value = folders / "byte-level"
    options = ("--target", folders / "sentencepiece legacy", "--corpus", folders / "corpus.txt")
    assert run("--value", value, *options) == 0
    (file,) = (value / "vocabulary_maps").iterdir()
    assert file.stat().st_mode & 0o777 == 0o644
