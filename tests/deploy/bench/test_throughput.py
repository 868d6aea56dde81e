from pathlib import Path

import pytest

from deploy.bench.checkpoints import Checkpoints
from deploy.bench.engine import Run
from deploy.bench.rounds import ALIKE, GUIDED, PLAIN, UNGUIDED
from deploy.bench.throughput import (
    CACHED,
    CONFIGURATIONS,
    MAPPED,
    UNCACHED,
    configurations,
    make_plot,
    make_tables,
)
from tests.deploy.bench.runs import timed

ROUND = {
    PLAIN: timed(0.100),
    ALIKE: timed(0.088),
    UNGUIDED: timed(0.101),
    GUIDED: timed(0.110),
    MAPPED: timed(0.125),
    CACHED: timed(0.220),
}
ROUNDS = {16: [{**ROUND, UNCACHED: timed(5.5)}, ROUND], 64: [ROUND]}


def test_ratios_are_times_against_plain_and_speeds_against_transformers() -> None:
    _, _, table, _ = make_tables(ROUNDS, CONFIGURATIONS, limit=1.05)
    assert table.rows[0] == {
        "batch": 16,
        "guided / plain": pytest.approx(1.1),
        "limit": 1.05,
        "efficiency": pytest.approx(5.0),  # against the one that is set up alike
        "guided / plain set up alike": pytest.approx(1.25),
        "plain set up alike / plain": pytest.approx(0.88),
        "unguided / plain": pytest.approx(1.01),
        "another vocabulary / plain": pytest.approx(1.25),
        "times as fast as cached": pytest.approx(2.0),
        "times as fast as uncached": pytest.approx(50.0),
    }
    assert table.rows[1]["times as fast as uncached"] is None


def test_every_configuration_has_its_rate_and_the_time_between_tokens() -> None:
    rates, gaps, *_ = make_tables(ROUNDS, CONFIGURATIONS, limit=1.05)
    assert [row[""] for row in rates.rows] == list(CONFIGURATIONS)
    assert rates.rows[0]["batch 16"] == pytest.approx(40.0)
    assert gaps.rows[0]["batch 16"] == "100.0 / 100.0"
    assert rates.rows[-1]["batch 64"] is gaps.rows[-1]["batch 64"] is None


def test_curves_run_over_the_batch_sizes() -> None:
    drawn = make_plot(ROUNDS, CONFIGURATIONS).curves
    assert [size for size, _ in drawn[GUIDED]] == [16, 64]
    assert [size for size, _ in drawn[UNCACHED]] == [16]


def test_peers_and_what_is_not_there_are_left_out() -> None:
    networks = {"guiding": Path("guiding"), "mapped": Path("mapped")}
    checkpoints = Checkpoints(Path("target"), networks, "bfloat16")
    on_cpu = {"on_device": False}
    assert configurations(checkpoints, peers=True, uncached=True, **on_cpu) == list(CONFIGURATIONS)
    cached = [name for name in CONFIGURATIONS if name != UNCACHED]
    assert configurations(checkpoints, peers=True, uncached=False, **on_cpu) == cached
    without_peers = [PLAIN, ALIKE, UNGUIDED, GUIDED, MAPPED]
    assert configurations(checkpoints, peers=False, uncached=True, **on_cpu) == without_peers
    on_device = [PLAIN, UNGUIDED, GUIDED, MAPPED]
    assert configurations(checkpoints, peers=False, uncached=True, on_device=True) == on_device
    del networks["mapped"]
    assert configurations(checkpoints, peers=False, uncached=True, **on_cpu) == without_peers[:-1]


def test_ratios_against_peers_that_were_left_out_are_empty() -> None:
    alone = {name: ROUND[name] for name in (PLAIN, UNGUIDED, GUIDED)}
    *_, table = make_tables({16: [alone]}, list(alone), limit=1.05)
    assert table.rows[0]["guided / plain"] == pytest.approx(1.1)
    assert table.rows[0]["times as fast as cached"] is None


def test_speed_against_transformers_is_that_of_answers_of_each_length() -> None:
    """Their first token comes late, and every other as soon as trimtab's."""
    slow = Run(
        [stream._replace(arrivals=[0.3, *stream.arrivals[1:]]) for stream in ROUND[GUIDED].streams]
    )
    *_, lengths = make_tables({4: [{**ROUND, CACHED: slow}]}, CONFIGURATIONS, limit=1.05)
    assert lengths.rows == [
        {"batch": 4, "1": pytest.approx(2.73), "2": 1.0, "4": 1.0, "8": 1.0, "10": 1.0}
    ]
