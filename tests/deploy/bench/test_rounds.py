import pytest

from deploy.bench.rounds import (
    by_case,
    curves,
    gap_figures,
    interval,
    make_prompts,
    make_requests,
    median,
    percentile,
    ratio,
    require_guided,
    runs_of,
    same_tokens,
    take_turns,
    turn_order,
)
from tests.deploy.bench.runs import make_run

# The second round fell on a slow moment.
ROUNDS = [
    {"plain": 1.0, "guided": 1.1},
    {"plain": 2.0, "guided": 2.4, "seldom": 4.0},
    {"plain": 1.1, "guided": 1.0},
]


def test_ratios_are_of_one_round() -> None:
    assert ratio(ROUNDS, "guided", "plain", float) == pytest.approx(1.1)
    assert ratio(ROUNDS, "seldom", "plain", float) == 2.0
    assert ratio(ROUNDS, "never", "plain", float) is None


def test_an_interval_is_of_ratios_that_were_seen_and_takes_rounds_enough() -> None:
    def rounds(count: int) -> list[dict[str, float]]:
        return [{"plain": 2.0, "guided": 2.0 + index} for index in reversed(range(count))]

    assert interval(rounds(5), "guided", "plain", float) == (None, None)
    assert interval(rounds(6), "guided", "plain", float) == (1.0, 3.5)
    # Of 30 rounds, the 10th and the 21st ratio, as tables of the sign test have it.
    assert interval(rounds(30), "guided", "plain", float) == (5.5, 11.0)
    assert interval([{"plain": 1.0}] * 30, "guided", "plain", float) == (None, None)


def test_medians_are_over_the_rounds_that_there_are() -> None:
    assert median(ROUNDS, "plain", float) == 1.1
    assert median(ROUNDS, "seldom", float) == 4.0
    assert median(ROUNDS, "never", float) is None


def test_every_configuration_takes_its_turn_and_the_first_round_is_not_kept() -> None:
    asked: list[tuple[str, int, int]] = []

    def measure(name: str, case: int, number: int) -> float | None:
        asked.append((name, case, number))
        return None if name == "seldom" and number > 1 else float(number)

    names = ["plain", "guided", "seldom"]
    found = take_turns([1, 4], names, 2, measure)
    assert found[4] == [
        {"plain": 1.0, "guided": 1.0, "seldom": 1.0},
        {"plain": 2.0, "guided": 2.0},
    ]
    assert sorted(asked) == sorted((n, c, r) for n in names for c in (1, 4) for r in range(3))
    # All of a case are measured before the next case, so that they are close in time.
    assert [case for _, case, _ in asked[:6]] == [1, 1, 1, 4, 4, 4]


def test_the_order_changes_so_that_no_configuration_always_follows_another() -> None:
    names = ["a", "b", "c", "d"]
    orders = [turn_order(names, number) for number in range(8)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names)
    before_b = {order[order.index("b") - 1] for order in orders if order[0] != "b"}
    assert before_b == {"a", "c"}


def test_a_percentile_is_a_value_that_was_seen() -> None:
    values = [index / 100 for index in range(1, 201)]
    assert percentile(values, 0.5) == 1.0
    assert percentile(values, 0.99) == 1.98
    assert percentile([3.0], 0.99) == 3.0


def test_gaps_are_those_of_all_streams_and_rounds() -> None:
    rounds = [{"plain": make_run([1, 2, 3], [1, 2, 3])}, {"plain": make_run([1, 2], step=0.5)}]
    assert gap_figures(rounds, "plain") == "100.0 / 500.0"
    assert gap_figures(rounds, "never") is None


def test_a_table_has_a_column_for_each_case() -> None:
    rows = by_case(
        {1: ROUNDS, 16: ROUNDS[1:2]},
        ["guided", "seldom"],
        lambda found, name: median(found, name, float),
    )
    assert rows == [
        {"": "guided", "batch 1": 1.1, "batch 16": 2.4},
        {"": "seldom", "batch 1": 4.0, "batch 16": 4.0},
    ]


def test_a_curve_leaves_out_what_was_not_measured() -> None:
    drawn = curves(
        {16: ROUNDS[:1], 1: ROUNDS},
        ["guided", "seldom", "never"],
        lambda found, name: median(found, name, float),
    )
    assert drawn == {"guided": [(1, 1.1), (16, 1.1)], "seldom": [(1, 4.0)]}


def test_runs_are_kept_round_by_round() -> None:
    assert runs_of({4: ROUNDS}, seconds=float)[0] == {
        "case": 4,
        "configuration": "guided",
        "seconds": [1.1, 2.4, 1.0],
    }


def test_tokens_are_compared_within_each_round() -> None:
    same = {"plain": make_run([1, 2]), "unguided": make_run([1, 2]), "guided": make_run([1, 3])}
    other = {"plain": make_run([1, 2]), "unguided": make_run([2, 2]), "guided": make_run([1, 2])}
    assert same_tokens({1: [same]}, "plain", "unguided")
    assert not same_tokens({1: [same], 4: [same, other]}, "plain", "unguided")
    require_guided({1: [same]}, ["guided", "left out"], "plain")
    with pytest.raises(SystemExit, match="guided"):
        require_guided({1: [same, other]}, ["guided"], "plain")


def test_prompts_are_the_same_for_the_same_seed_only() -> None:
    assert make_prompts(4, 32, 1) == make_prompts(4, 32, 1)
    assert make_prompts(4, 32, 1) != make_prompts(4, 32, 2)
    assert make_prompts(1, 32, 1)[0] != make_prompts(4, 32, 1)[0]
    requests = make_requests(4, 8, 1, "qa", length=5)
    assert [len(request.prompt) for request in requests] == [5] * 4
    assert all(request.networks == ("qa",) and request.num_tokens == 8 for request in requests)
