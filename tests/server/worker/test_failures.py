"""A network that fails takes its own requests with it, and nothing else."""

from collections.abc import Iterator
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from vllm import RequestOutput
from vllm.exceptions import VLLMValidationError

from tests.models import make_model, make_network
from tests.server.worker.engine import Ask, GuidedEngine, guided_engine

POISON = 300
"""A token whose embedding is not finite in the networks "poisoned" and "spoiled"."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuidedEngine]:
    root = tmp_path_factory.mktemp("failures")
    networks = {
        "poisoned": make_network(root / "poisoned", seed=2),
        "spoiled": make_network(root / "spoiled", seed=5),
        "throws": make_network(root / "throws", architecture="qwen2", seed=3),
        "sound": make_network(root / "sound", seed=4),
    }
    for name in ("poisoned", "spoiled"):
        weights = load_file(networks[name] / "model.safetensors")
        weights["model.embed_tokens.weight"][POISON] = float("inf")
        save_file(weights, networks[name] / "model.safetensors", metadata={"format": "pt"})
    with guided_engine(
        make_model(root / "target"), networks, value_memory_gb=0.1, max_num_seqs=8
    ) as engine:
        yield engine


def assert_ended_by_failure(engine: GuidedEngine, output: RequestOutput) -> None:
    (completion,) = output.outputs
    assert completion.finish_reason == "stop"
    assert completion.stop_reason == engine.failure_token_id


def others(engine: GuidedEngine) -> list[Ask]:
    return [Ask([30 + i, 40, 50], 40, network) for i, network in enumerate([None, "sound"] * 3)]


def test_what_a_failed_network_left_in_its_blocks_harms_no_other(engine: GuidedEngine) -> None:
    # Its blocks, full of NaN, go to the network that shares its pool, which fills them in part.
    engine.run([Ask([POISON, *range(11, 90)], 40, "spoiled")])
    assert engine.status()["spoiled"]["state"] == "failed"
    asks = [Ask([50 + i, 60], 3, "sound") for i in range(8)]
    engine.assert_exact(asks, engine.run(asks))
    assert engine.status()["sound"]["state"] == "ready"


def test_non_finite_logits_end_only_their_own_requests(engine: GuidedEngine) -> None:
    # The poison comes late: the request has produced sound tokens when its network fails.
    poison = Ask([10, 11, 12], 40, "poisoned", 1.0, {"min_tokens": 40})
    (before,) = engine.run([poison])
    engine.assert_exact([poison], [before])
    doomed = [Ask([POISON, 11, 12], 40, "poisoned", 1.0, {"min_tokens": 40}), poison]
    asks = others(engine)
    outputs = engine.run([*doomed, *asks])
    assert_ended_by_failure(engine, outputs[0])
    assert_ended_by_failure(engine, outputs[1])
    engine.assert_exact(asks, outputs[2:])
    status = engine.status()
    assert status["poisoned"]["state"] == "failed"
    assert "not finite" in status["poisoned"]["reason"]
    assert status["sound"]["state"] == "ready"


def test_a_forward_that_throws_ends_only_its_own_requests(engine: GuidedEngine) -> None:
    def break_forward(worker: Any) -> None:
        residency = worker._processor().steering.residency
        (network,) = [n for n in residency.networks() if n.folder.name == "throws"]

        def forward(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of luck")

        network.models["value"]._forward.head = forward

    sane = Ask([10, 11, 12], 20, "throws")
    engine.assert_exact([sane], engine.run([sane]))
    engine.llm.collective_rpc(break_forward)
    asks = others(engine)
    outputs = engine.run([sane, *asks])
    assert_ended_by_failure(engine, outputs[0])
    engine.assert_exact(asks, outputs[1:])
    assert "out of luck" in engine.status()["throws"]["reason"]


def test_failed_networks_stay_failed(engine: GuidedEngine) -> None:
    outputs = engine.run([Ask([10], 5, "poisoned"), Ask([10], 5, "throws")])
    for output in outputs:
        assert_ended_by_failure(engine, output)


def test_unsigned_choices_are_refused(engine: GuidedEngine) -> None:
    params = engine.params(Ask([10], 5, "sound"))
    params.extra_args = {"trimtab": str(params.extra_args["trimtab"]).replace("1.0", "9.0")}
    with pytest.raises(VLLMValidationError, match="reserved"):
        engine.llm.generate([{"prompt_token_ids": [10]}], [params], use_tqdm=False)
