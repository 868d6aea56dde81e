import pytest

from deploy.bench.report import CACHED, GUIDED, PLAIN, UNCACHED, UNGUIDED, summarise

MEASURED = {
    # The second round fell on a slow moment: each ratio compares runs of one round.
    PLAIN: {16: [400.0, 200.0, 400.0]},
    UNGUIDED: {16: [400.0, 200.0, 320.0]},
    GUIDED: {16: [364.0, 180.0, 360.0]},
    CACHED: {16: [150.0]},
    UNCACHED: {16: [9.0]},
}


def test_ratios_are_taken_within_rounds() -> None:
    (ratios,) = summarise(MEASURED, limit=1.055)["ratios"]
    assert ratios["guided_overhead"] == pytest.approx(400 / 360, abs=1e-4)
    assert ratios["unguided_overhead"] == 1.0
    assert ratios["overhead_efficiency"] == pytest.approx((400 / 360 - 1) / 0.055, abs=0.01)


def test_every_configuration_is_reported_with_its_runs() -> None:
    rows = summarise(MEASURED, limit=1.055)["tokens_per_second"]
    assert [(row["configuration"], row["median"]) for row in rows] == [
        (PLAIN, 400.0),
        (UNGUIDED, 320.0),
        (GUIDED, 360.0),
        (CACHED, 150.0),
        (UNCACHED, 9.0),
    ]
    assert rows[2]["runs"] == [364.0, 180.0, 360.0]
