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
    found = summarise(
        WINDOWS,
        gaps(
            (1, 0.02),
            (14, 0.04),
            (9.99, 0.05),  # begun in the quiet, ended by the load
            (11.99, 0.03),  # on the border of two changes
            (12.5, 0.08),
            (30, 5),  # after all
        ),
    )
    rows = {row["during"]: row for row in found["inter_token_latency"]}
    assert {name: row["gaps"] for name, row in rows.items()} == {
        QUIET: 2,
        "load 6M": 2,
        "unload 6M": 2,
    }
    assert (rows[QUIET]["p50_ms"], rows[QUIET]["max_ms"]) == (20, 40)
    assert rows["load 6M"]["median_seconds"] == 3
    assert found["during_changes"]["gaps"] == 3
    assert found["longest_gap_ms"] == 80
    assert found["p99_ratio"] == found["worst_p99_ratio"] == 2


def test_a_percentile_is_a_gap_that_was_seen() -> None:
    quiet = [(index / 1000, (index + 1) / 1000) for index in range(200)]
    loading = [(11, 0.5)] + [(11, 0.1)] * 200
    found = summarise(WINDOWS, gaps(*quiet, *loading))
    rows = {row["during"]: row for row in found["inter_token_latency"]}
    assert (rows[QUIET]["p50_ms"], rows[QUIET]["p99_ms"]) == (100, 198)
    assert (rows["load 6M"]["p99_ms"], rows["load 6M"]["max_ms"]) == (100, 500)
    assert found["p99_ratio"] == round(100 / 198, 2)


def test_half_of_the_streams_are_guided() -> None:
    requests = make_requests(16)
    assert [request["model"] for request in requests].count("guiding") == 8
    assert len({len(request["prompt"]) for request in requests}) == 1
