import pytest

from deploy.bench.__main__ import make_parser, settings_of
from deploy.bench.questions import QUESTIONS, summary


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_has_defaults_and_a_line_that_says_what_it_is(
    question: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = make_parser().parse_args([question, "--out", "found.json"])
    assert arguments.question == question and arguments.out.name == "found.json"
    assert 20 < len(summary(QUESTIONS[question])) < 90
    with pytest.raises(SystemExit, match="0"):
        make_parser().parse_args([question, "--help"])
    assert summary(QUESTIONS[question])[:30] in capsys.readouterr().out


def test_batches_are_1_to_64() -> None:
    parser = make_parser()
    arguments = parser.parse_args(["throughput", "--batch-sizes", "1", "64"])
    assert arguments.batch_sizes == [1, 64]
    assert parser.parse_args(["throughput"]).batch_sizes == [1, 4, 16]
    for wrong in ("0", "65", "many"):
        with pytest.raises(SystemExit):
            parser.parse_args(["throughput", "--batch-sizes", wrong])


def test_settings_are_what_was_asked_for() -> None:
    arguments = make_parser().parse_args(["stall", "--rounds", "3", "--length", "99"])
    settings = {"rounds": 3, "tokens": 48, "length": 99, "chunk": 512, "size": 0.055}
    assert settings_of(arguments) == settings | {"dtype": "bfloat16"}


def test_no_question_is_an_error() -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args([])
