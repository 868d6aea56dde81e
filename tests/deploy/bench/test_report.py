from pathlib import Path

import pytest

from deploy.bench.report import Answer, Plot, Table, compose, environment, read, show, write

ANSWER = Answer(
    tables=[
        Table("Overhead", [{"batch": 1, "guided": 1.0944}, {"batch": 16, "cached": 12345.6}]),
        Table("Notes", [{"": "p99", "found": None}]),
    ],
    plots=[Plot("overhead", "Overhead", "batch", "time", {"guided": [(1, 1.1), (16, 1.05)]})],
    checks={"unguided_tokens_equal_plain": True},
    failed="too far apart",
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    found = compose("sizes", "python -m deploy.bench sizes", {"rounds": 3}, ANSWER)
    write(found, tmp_path / "results" / "sizes.json")
    return tmp_path / "results" / "sizes.json"


def test_a_result_says_how_it_was_found(written: Path) -> None:
    found = read(written)
    assert found["question"] == "sizes"
    assert found["command"] == "python -m deploy.bench sizes"
    assert found["settings"] == {"rounds": 3}
    assert found["machine"]["cores"] >= 1 and found["versions"]["torch"]


def test_what_the_environment_sets_is_part_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    assert "VLLM_CPU_OMP_THREADS_BIND=0-1" in environment()
    assert not any(setting.startswith("PATH=") for setting in environment())


def test_a_result_file_can_be_shown_again(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(read(written))
    printed = capsys.readouterr().out
    for part in ("Overhead", "batch", "guided", "1.094", "12,346", "p99", "True", "FAILED: too"):
        assert part in printed
    assert "None" not in printed.partition("machine")[0]


def test_curves_are_drawn_beside_the_result(written: Path) -> None:
    assert (written.parent / "sizes-overhead.svg").read_text().count("<svg") == 1


def test_another_file_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"seconds": []}')
    with pytest.raises(ValueError, match="not a result"):
        read(tmp_path / "other.json")
