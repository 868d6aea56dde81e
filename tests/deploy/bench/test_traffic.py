from pathlib import Path

import pytest

from deploy.bench.baseline import Baseline
from deploy.bench.engine import Request
from deploy.bench.rounds import ALIKE, GUIDED, PLAIN
from deploy.bench.throughput import CACHED
from deploy.bench.traffic import (
    ANSWERS,
    PROMPTS,
    make_tables,
    make_traffic,
    run_in_batches,
    share_of_same,
)
from tests.deploy.bench.runs import make_run, timed
from tests.models import make_model, make_network

ROUND = {PLAIN: timed(0.100), ALIKE: timed(0.080), GUIDED: timed(0.110), CACHED: timed(0.220)}


def test_lengths_differ_and_are_the_same_for_all_configurations() -> None:
    plain, guided = make_traffic(64, "seed"), make_traffic(64, "seed", "network")
    assert [request._replace(networks=()) for request in guided] == plain
    assert make_traffic(64, "another") != plain
    for (least, most), lengths in (
        (PROMPTS, [len(request.prompt) for request in plain]),
        (ANSWERS, [request.num_tokens for request in plain]),
    ):
        assert least <= min(lengths) < max(lengths) <= most
        assert sum(lengths) / 64 == pytest.approx((least + most) / 2, rel=0.2)


def test_a_batch_begins_when_the_longest_of_the_one_before_has_ended(tmp_path: Path) -> None:
    target = make_model(tmp_path / "target", seed=1)
    network = make_network(tmp_path / "network", seed=2, layers=1, vocab_size=544)
    requests = [Request([8] * length, 2 * length) for length in (2, 5, 3)]
    run = run_in_batches(Baseline(target, network, "float32"), requests, 2)
    first, second, third = run.streams
    assert first.arrivals[-1] < second.arrivals[-1] < third.arrivals[0]
    assert [len(stream.tokens) for stream in run.streams] == [4, 10, 6]
    assert run.seconds == third.arrivals[-1]


def test_speed_is_against_transformers_and_time_against_vllm() -> None:
    rates, gaps, table = make_tables({16: [ROUND]}, limit=1.05)
    assert [row[""] for row in rates.rows] == [row[""] for row in gaps.rows] == list(ROUND)
    assert table.rows == [
        {
            "at once": 16,
            "guided / plain": pytest.approx(1.1),
            "guided / plain set up alike": pytest.approx(1.375),
            "limit": 1.05,
            "times as fast as transformers": pytest.approx(2.0),
            "plain set up alike, times as fast": pytest.approx(2.75),
        }
    ]


def test_an_answer_counts_as_the_same_to_its_last_token() -> None:
    ours, theirs = make_run([1, 2], [3, 4], [5, 6]), make_run([1, 2], [3, 5], [5, 6])
    assert share_of_same({4: [{GUIDED: ours, CACHED: theirs}]}) == pytest.approx(2 / 3)
