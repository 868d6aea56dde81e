"""lm-eval reads the same numbers from a server as from transformers, of one guided model."""

from collections.abc import Iterator

import pytest

from tests.server.serving import TARGET, Served, serving
from value_models.demo.evaluate import WEIGHTS
from value_models.demo.harness.comparison import Result, reference, served

LIMIT = 20


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the demo family, in float32."""
    directory = tmp_path_factory.mktemp("demo")
    with serving(
        directory, WEIGHTS / "target", "--value-network-dir", WEIGHTS / "networks"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def references() -> dict[str, Result]:
    """What transformers scores, by the name of the model at the server."""
    return {TARGET: reference(None, LIMIT), "qa": reference("qa", LIMIT)}


def test_the_tasks_tell_the_guided_model_from_the_target(references: dict[str, Result]) -> None:
    alone, guided = references[TARGET], references["qa"]
    assert guided.accuracy["atlas_choice"] > alone.accuracy["atlas_choice"] + 0.25
    assert guided.accuracy["atlas_answer"] > alone.accuracy["atlas_answer"] + 0.75
    apart = [a - b for a, b in zip(guided.loglikelihoods, alone.loglikelihoods, strict=True)]
    assert min(map(abs, apart)) > 0.01
    assert any(guided.greedy) and not any(alone.greedy)


@pytest.mark.parametrize("model", [TARGET, "qa"])
def test_the_harness_reads_what_transformers_computes(
    demo: Served, references: dict[str, Result], model: str
) -> None:
    result, expected = served(demo.url, model, LIMIT), references[model]
    assert result.accuracy == expected.accuracy
    assert result.loglikelihoods == pytest.approx(expected.loglikelihoods, rel=0, abs=1e-3)
    assert result.greedy == expected.greedy
    assert result.answers == expected.answers
