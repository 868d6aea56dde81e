import pytest

from deploy.bench.prefill import CONFIGURATIONS, FirstTokens, make_plot, make_tables, what_is_wrong
from deploy.bench.price import BARE
from deploy.bench.rounds import ALIKE, GUIDED, UNGUIDED

ROUND = {
    ALIKE: FirstTokens(1.0, 0.1, 0, 0),
    BARE: FirstTokens(2.0, 0.2, 0, 0),
    UNGUIDED: FirstTokens(1.0, 0.11, 0, 0),
    GUIDED: FirstTokens(1.06, 0.12, 1024, 32),
}


def test_cold_and_warm_are_told_apart() -> None:
    cold, warm, against_plain, against_bare = make_tables({1024: [ROUND]}, CONFIGURATIONS, 1.055)
    assert [row["1024 tokens"] for row in cold.rows] == [1000, 2000, 1000, 1060]
    assert [row["1024 tokens"] for row in warm.rows] == pytest.approx([100, 200, 110, 120])
    (row,) = against_plain.rows
    assert row["guided, cold"] == pytest.approx(1.06)
    assert row["guided, warm"] == pytest.approx(1.2)
    assert row["unguided, warm"] == pytest.approx(1.1)
    (row,) = against_bare.rows
    assert row["guided, cold"] == pytest.approx(0.53)
    assert row["unguided, warm"] == pytest.approx(0.55)
    assert make_plot({1024: [ROUND]}).curves[f"{GUIDED}, cold"] == [(1024, 1060)]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (GUIDED, [0, 0, 0]),  # not guided at all
        (GUIDED, [500, 1524, 1524]),  # not when warm
        (GUIDED, [0, 1000, 1010]),  # not the whole prompt
        (UNGUIDED, [0, 1024, 1024]),
    ],
)
def test_a_network_that_read_something_else_is_wrong(name: str, read: list[int]) -> None:
    assert "the network read" in (what_is_wrong(name, 1024, read) or "")


def test_what_was_left_out_has_no_row_and_no_ratios() -> None:
    on_device = {name: taken for name, taken in ROUND.items() if name != BARE}
    cold, _, against_plain = make_tables({1024: [on_device]}, list(on_device), 1.055)
    assert [row[""] for row in cold.rows] == [ALIKE, UNGUIDED, GUIDED]
    assert against_plain.rows[0]["guided, cold"] == pytest.approx(1.06)


def test_a_network_that_read_the_prompt_and_then_its_end_is_right() -> None:
    assert what_is_wrong(GUIDED, 1024, [500, 1524, 1556]) is None
    assert what_is_wrong(UNGUIDED, 1024, [500, 500, 500]) is None
