"""The command, with a question that answers at once."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.bench import __main__ as bench
from deploy.bench import report
from deploy.bench.report import Answer, Table


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """What "quick" answers, under "answer"."""
    given = {"answer": Answer([Table("Found", [{"batch": 1, "guided": 1.5}])])}

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=3)

    def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
        assert folder.is_dir()
        return given["answer"]

    quick = SimpleNamespace(__doc__="Quick.", add_arguments=add_arguments, ask=ask)
    monkeypatch.setitem(bench.QUESTIONS, "quick", quick)
    return given


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["deploy.bench", *map(str, arguments)])
    bench.main()


def test_an_answer_is_printed_written_and_shown_again(
    asked: dict[str, Answer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(report, "environment", lambda: ["OMP_NUM_THREADS=1"])
    run(monkeypatch, "quick", "--out", tmp_path / "quick.json", "--rounds", 5)
    printed = capsys.readouterr().out
    assert "Found" in printed and "1.5" in printed
    found = json.loads((tmp_path / "quick.json").read_text())
    assert (found["question"], found["settings"]) == ("quick", {"rounds": 5})
    assert found["command"].startswith("OMP_NUM_THREADS=1 python -m deploy.bench quick --out")
    run(monkeypatch, "show", tmp_path / "quick.json")
    assert capsys.readouterr().out == printed


def test_figures_that_are_not_to_be_trusted_fail_the_command(
    asked: dict[str, Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked["answer"].failed = "too far apart"
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "quick", "--out", tmp_path / "quick.json")
    assert ended.value.code == 1
    assert json.loads((tmp_path / "quick.json").read_text())["failed"] == "too far apart"


def test_what_is_no_result_cannot_be_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    for name in ("other.json", "missing.json"):
        with pytest.raises(SystemExit, match=name):
            run(monkeypatch, "show", tmp_path / name)
