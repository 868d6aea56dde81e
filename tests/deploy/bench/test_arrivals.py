import pytest

from deploy.bench.arrivals import READY, STARTING, Arrivals, make_tables
from deploy.bench.rounds import GUIDED, PLAIN, UNGUIDED


def test_what_counts_is_the_last_first_token_and_the_worst_round() -> None:
    quick = Arrivals([0.2, 0.3, 0.4], [6.0, 6.0, 6.0])
    one_by_one = Arrivals([0.2, 6.0, 12.0], [6.0, 12.0, 18.0])
    alike = {PLAIN: quick, UNGUIDED: quick, GUIDED: quick}
    rounds = {STARTING: [alike, *[alike | {PLAIN: one_by_one}] * 2], READY: [alike]}
    starting, ready = make_tables(rounds)
    plain, _, guided = starting.rows
    assert (plain["of the last"], guided["of the last"]) == (12.0, 0.4)
    assert plain["first token, median"] == 6.0
    assert plain["of the last, in the worst round"] == 12.0
    assert guided["against plain"] == pytest.approx(6 / 18, abs=1e-4)
    assert [line["of the last"] for line in ready.rows] == [0.4] * 3
