from pathlib import Path

import pytest
import torch

from deploy.bench.baseline import Baseline, load_model
from deploy.bench.rounds import make_requests
from tests.models import make_model, make_network
from value_models.guided import NetworkGuide, decode


@pytest.mark.parametrize("cached", [True, False])
def test_both_ways_generate_what_guidance_means(tmp_path: Path, cached: bool) -> None:
    target = make_model(tmp_path / "target", seed=1)
    network = make_network(tmp_path / "network", seed=2, layers=1, vocab_size=544)
    baseline = Baseline(target, network, "float32")
    requests = make_requests(2, 12, "seed", length=9)
    run = baseline.run(requests, cached)
    guide = NetworkGuide(load_model(network, "float32", "cpu"), 1.0)
    prompts = [request.prompt for request in requests]
    assert run.tokens == decode(load_model(target, "float32", "cpu"), [guide], prompts, 12, [])
    (gaps, _) = (stream.gaps for stream in run.streams)
    assert len(gaps) == 11 and all(gap > 0 for gap in gaps)


@pytest.mark.parametrize("cached", [True, False])
def test_padding_changes_no_token(tmp_path: Path, cached: bool) -> None:
    target = make_model(tmp_path / "target", seed=1)
    network = make_network(tmp_path / "network", seed=2, layers=1, vocab_size=544)
    baseline = Baseline(target, network, "float32")
    requests = [
        request
        for length, num_tokens in ((3, 12), (17, 4), (9, 7))
        for request in make_requests(1, num_tokens, length, length=length)
    ]
    run = baseline.run(requests, cached)
    alone = [baseline.run([request], cached).tokens[0] for request in requests]
    assert run.tokens == alone
    assert [len(stream.arrivals) for stream in run.streams] == [12, 4, 7]


def test_a_target_without_weights_gets_some(tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path, with_weights=False), "bfloat16", "cpu")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.dtype == torch.bfloat16
