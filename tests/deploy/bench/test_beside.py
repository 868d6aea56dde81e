import pytest

from deploy.bench.beside import MIXES, equal_plain, make_tables, unguided_rows
from deploy.bench.engine import Run
from deploy.bench.rounds import ALIKE, Rounds
from tests.deploy.bench.runs import make_run

NOTHING, _, HALF, _ = MIXES


def rounds(unguided: int) -> Rounds[int, Run]:
    """Two of four rows guided; `unguided`: a token of a row beside them."""
    return {
        4: [
            {
                ALIKE: make_run([1, 1], [2, 2], [3, 3], [4, 4], step=0.1),
                NOTHING: make_run([1, 1], [2, 2], [3, 3], [4, 4], step=0.102),
                HALF: make_run([1, 1], [2, unguided], [8, 8], [9, 9], step=0.12),
            }
        ]
    }


def test_mixes_are_quarters_of_a_batch() -> None:
    assert [mix.guided(16) for mix in MIXES.values()] == [0, 4, 8, 12]
    assert [mix.guided(1) for mix in MIXES.values()] == [0, 0, 0, 0]


def test_only_unguided_rows_count() -> None:
    (measured,) = unguided_rows(rounds(2))[4]
    assert [len(measured[name].streams) for name in (ALIKE, NOTHING, HALF)] == [4, 4, 2]


def test_unguided_rows_are_compared_with_plain_vllms() -> None:
    assert equal_plain(rounds(2), unguided_rows(rounds(2)))
    assert not equal_plain(rounds(7), unguided_rows(rounds(7)))


def test_ratios_are_against_plain_vllm() -> None:
    _, steps, whole = make_tables(rounds(2), unguided_rows(rounds(2)))
    assert [row["batch 4"] for row in steps.rows] == [
        pytest.approx(1.02),
        None,
        pytest.approx(1.2),
        None,
    ]
    assert whole.rows[0]["unguided / plain"] == pytest.approx(1.02)
