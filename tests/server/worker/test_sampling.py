"""Whether a worker samples at once; that it does in a real engine, `test_combined` shows."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.worker.sampling import sample_at_once

Values = dict[str, Any]


class Runner:
    """What is used of vLLM's V1 runner."""

    def __init__(self, **differing: Any) -> None:
        settings: Values = {"async_scheduling": False, "pipeline_parallel_size": 1, **differing}
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(async_scheduling=settings["async_scheduling"]),
            parallel_config=SimpleNamespace(
                pipeline_parallel_size=settings["pipeline_parallel_size"]
            ),
            kv_transfer_config=settings.get("kv_transfer_config"),
            ec_transfer_config=settings.get("ec_transfer_config"),
        )
        self.execute_model_state: object | None = None

    def execute_model(self, scheduled: Any, *_: Any) -> str | None:
        self.execute_model_state = scheduled.logits
        return None if scheduled.logits else "nothing to do"

    def sample_tokens(self, grammar: None) -> str:
        self.execute_model_state = None
        return f"sampled with {grammar}"


def step(runner: Runner, logits: str | None = "logits", masked: bool = False) -> str | None:
    scheduled = SimpleNamespace(logits=logits, has_structured_output_requests=masked)
    return runner.execute_model(scheduled, None)


def test_tokens_are_sampled_where_there_are_logits_and_no_mask_is_to_come() -> None:
    runner: Any = Runner()
    sample_at_once(runner)
    assert step(runner) == "sampled with None"
    assert step(runner, masked=True) is None
    assert runner.execute_model_state == "logits"  # and wait
    assert step(runner, logits=None) == "nothing to do"
    assert step(runner) == "sampled with None"


@pytest.mark.parametrize(
    "differing",
    [
        {"async_scheduling": True},
        {"pipeline_parallel_size": 2},
        {"kv_transfer_config": object()},
        {"ec_transfer_config": object()},
    ],
)
def test_an_engine_that_asks_for_tokens_in_any_case_is_left_alone(differing: Values) -> None:
    runner: Any = Runner(**differing)
    sample_at_once(runner)
    assert step(runner) is None
    assert runner.execute_model_state == "logits"
