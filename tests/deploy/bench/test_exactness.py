from pathlib import Path

import pytest
import torch

from deploy.bench.checkpoints import Checkpoints
from deploy.bench.engine import Request, Stream
from deploy.bench.exactness import Compared, Reference, compare
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
    assert found.engine.shape == (15,) and float(found.engine.max()) < 1e-6
    # These tokens were made up: none is the likeliest.
    sampled = right[range(3), TOKENS]
    assert found.behind == pytest.approx(float((right.amax(-1) - sampled).max()))

    wrong = right.clone()
    wrong[1] += 0.25
    off = compare(reference, [(asked, answered(right)), (asked, answered(wrong))])
    assert float(off.engine.max()) == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize(
    ("engine", "behind", "exact"),
    [
        ([0.10, 0.01, 0.01], 0.0, True),
        ([0.25, 0.01, 0.01], 0.0, False),  # one token is too far off
        ([0.15, 0.15, 0.15], 0.0, False),  # all are somewhat
        ([0.10, 0.01, 0.01], 0.3, False),  # not the likeliest was sampled
        ([0.10, 0.01, float("nan")], 0.0, False),
    ],
)
def test_an_engine_may_be_twice_as_far_off_as_rounding(
    engine: list[float], behind: float, exact: bool
) -> None:
    found = Compared(torch.tensor(engine), torch.tensor([0.1, 0.02, 0.03]), behind)
    assert found.is_exact == exact


def test_the_tolerance_is_never_nothing() -> None:
    close = torch.tensor([1e-5, 1e-4])
    assert Compared(close, torch.zeros(2), 0.0).is_exact
    assert not Compared(100 * close, torch.zeros(2), 0.0).is_exact
