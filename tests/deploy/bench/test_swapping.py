from deploy.bench.streams import Gap
from deploy.bench.swapping import QUIET, Window, make_requests, summarise

WINDOWS = [
    Window(QUIET, 0, 10),
    Window("load 6M", 10, 12),
    Window("unload 6M", 12, 13),
    Window(QUIET, 13, 20),
    Window("load 6M", 20, 24),
]


def gaps(*pairs: tuple[float, float]) -> list[Gap]:
    return [Gap(start, start + seconds) for start, seconds in pairs]


def test_a_gap_counts_for_what_it_overlaps() -> None:
    during, allowed = summarise(
        WINDOWS,
        gaps(
            (1, 0.02),
            (14, 0.04),
            (9.99, 0.05),  # begun in the quiet, ended by the load
            (11.99, 0.03),  # on the border of two changes
            (12.5, 0.08),
            (30, 5),  # after all
        ),
    ).tables
    rows = {row["during"]: row for row in during.rows}
    assert {name: row["gaps"] for name, row in rows.items()} == {
        QUIET: 2,
        "load 6M": 2,
        "unload 6M": 2,
        "all changes": 3,
    }
    assert (rows[QUIET]["p50"], rows[QUIET]["max"]) == (20, 40)
    assert rows["load 6M"]["takes, s"] == 3
    assert [row["found"] for row in allowed.rows] == [2, 80]


def test_half_of_the_streams_are_guided() -> None:
    requests = make_requests(16)
    assert [request["model"] for request in requests].count("guiding") == 8
    assert len({len(request["prompt"]) for request in requests}) == 1
