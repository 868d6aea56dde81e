import pytest

from deploy.bench.report import (
    CACHED,
    GUIDED,
    MAPPED,
    PLAIN,
    UNCACHED,
    UNGUIDED,
    show,
    summarise,
)

MEASURED = {
    # The second round fell on a slow moment: each ratio compares runs of one round.
    PLAIN: {16: [400.0, 200.0, 400.0]},
    UNGUIDED: {16: [400.0, 200.0, 320.0]},
    GUIDED: {16: [364.0, 180.0, 360.0]},
    MAPPED: {16: [320.0, 160.0, 330.0]},
    CACHED: {16: [150.0]},
    UNCACHED: {16: [9.0]},
}


def test_ratios_are_taken_within_rounds() -> None:
    (ratios,) = summarise(MEASURED, limit=1.055)["ratios"]
    assert ratios["guided_overhead"] == pytest.approx(400 / 360, abs=1e-4)
    assert ratios["mapped_overhead"] == 1.25
    assert ratios["unguided_overhead"] == 1.0
    assert ratios["overhead_efficiency"] == pytest.approx((400 / 360 - 1) / 0.055, abs=0.01)


def test_every_configuration_is_reported_with_its_runs() -> None:
    rows = summarise(MEASURED, limit=1.055)["tokens_per_second"]
    assert [(row["configuration"], row["median"]) for row in rows] == [
        (PLAIN, 400.0),
        (UNGUIDED, 320.0),
        (GUIDED, 360.0),
        (MAPPED, 320.0),
        (CACHED, 150.0),
        (UNCACHED, 9.0),
    ]
    assert rows[2]["runs"] == [364.0, 180.0, 360.0]


def test_the_tables_name_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"median_microseconds": 17.4, "p99_microseconds": 85.2, "worst_microseconds": 900.0}
    show(
        {
            "models": {"dtype": "float32", "target_parameters": 1e8, "network_parameters": 5e6},
            "settings": {"batch_sizes": [16], "rounds": 3},
            "retokenization": [{"network": "small", "target": "large", "steps": 10, **steps}],
            **summarise(MEASURED, limit=1.055),
        }
    )
    printed = capsys.readouterr().out
    for part in (PLAIN, "1.250", "small", "large", "17", "85"):
        assert part in printed
