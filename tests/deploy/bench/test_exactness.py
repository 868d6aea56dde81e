from pathlib import Path

import pytest
import torch

from deploy.bench.checkpoints import Checkpoints
from deploy.bench.engine import Request, Stream
from deploy.bench.exactness import Reference, compare, verdict
from tests.models import make_model, make_network

PROMPT = [5, 9, 300, 41]
TOKENS = [8, 77, 200]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    target = make_model(folder / "target", seed=1)
    networks = {n: make_network(folder / n, seed=s) for s, n in ((2, "first"), (3, "second"))}
    return Reference(Checkpoints(target, networks, "float32"))


def answered(logprobs: torch.Tensor) -> Stream:
    """A stream of `TOKENS` with the five likeliest log probabilities of each."""
    tops = [row.topk(5) for row in logprobs]
    found = [dict(zip(t.indices.tolist(), t.values.tolist(), strict=True)) for t in tops]
    return Stream(TOKENS, 0.0, [0.1, 0.2, 0.3], found)


def test_the_reference_adds_the_networks_logits(reference: Reference) -> None:
    asked = Request(PROMPT, 3, ("first", "second"))
    alone, one, both = (
        reference.logprobs(asked._replace(networks=asked.networks[:n]), TOKENS, "float32")[:, :-1]
        for n in range(3)
    )
    second = reference.logprobs(asked._replace(networks=("second",)), TOKENS, "float32")[:, :-1]
    assert torch.allclose((one + second - alone).log_softmax(-1), both.log_softmax(-1), atol=1e-4)


def test_what_an_engine_returns_is_compared_token_by_token(reference: Reference) -> None:
    asked = Request(PROMPT, 3, ("first",))
    right = reference.logprobs(asked, TOKENS, "float32")
    found = compare(reference, [(asked, answered(right))])
    assert found.to_same.shape == (15,) and float(found.to_same.max()) < 1e-6
    # These tokens were made up: none is the likeliest.
    sampled = right[range(3), TOKENS]
    assert found.behind == pytest.approx(float((right.amax(-1) - sampled).max()))

    wrong = right.clone()
    wrong[1] += 0.25
    off = compare(reference, [(asked, answered(right)), (asked, answered(wrong))])
    assert float(off.to_same.max()) == pytest.approx(0.25, abs=1e-5)


def test_a_difference_beyond_the_tolerance_fails(reference: Reference) -> None:
    asked = Request(PROMPT, 3, ("first",))
    found = compare(reference, [(asked, answered(reference.logprobs(asked, TOKENS, "float32")))])
    near = found._replace(behind=0.0)
    assert verdict({"one network": near}, 1e-3) is None
    for wrong in (found, near._replace(to_same=torch.tensor([0.01, float("nan")]))):
        assert "one network" in str(verdict({"one network": wrong}, 1e-3))
