from types import SimpleNamespace
from typing import Any

import pytest

from server.api.combinations import refuse_combinations
from server.api.errors import ApiError
from server.api.selection import Selection
from server.api.value_guidance import Guidance
from server.choice import ChosenNetwork

QA = ChosenNetwork("qa", "3f2a91c0", 1.0)
PLAIN: dict[str, Any] = {}
AFTER = {"from": "after_reasoning"}
EXPLAIN = {"explain": True}


def check(
    settings: dict[str, Any], *, reasons: bool = True, reads_text: bool = True, **fields: Any
) -> None:
    refuse_combinations(
        SimpleNamespace(**fields),
        Selection((QA,), Guidance.model_validate(settings)),
        reasons=reasons,
        reads_text=reads_text,
    )


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (PLAIN, {"use_beam_search": False, "background": False, "prompt_logprobs": None}),
        (PLAIN, {"prompt_logprobs": 0}),
        (PLAIN, {"echo": True, "logprobs": 1}),
        ({"combine": "dynamic", "min_target_prob": 0.1} | EXPLAIN, {"prompt_logprobs": 1}),
        ({"until": "x"} | AFTER | EXPLAIN, {"echo": True, "logprobs": None}),
        ({"until": "x"} | AFTER | EXPLAIN, {"echo": True, "logprobs": False}),
        ({"until": "x"} | AFTER | EXPLAIN, {"echo": False, "logprobs": 1}),
        (EXPLAIN, {"include_reasoning": True, "echo": True, "max_tokens": 1}),
        (EXPLAIN, {"include_reasoning": None}),
        (EXPLAIN, {"echo": False, "max_tokens": 0}),
        (PLAIN, {"include_reasoning": False, "echo": True, "max_tokens": 0}),
    ],
)
def test_what_goes_together_passes(settings: dict[str, Any], fields: dict[str, Any]) -> None:
    check(settings, **fields)


@pytest.mark.parametrize(
    ("settings", "fields", "param"),
    [
        (PLAIN, {"use_beam_search": True}, "use_beam_search"),
        (PLAIN, {"background": True}, "background"),
        ({"until": "x"}, {"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"until": {"tokens": 3}}, {"echo": True, "logprobs": 0}, "echo"),
        (AFTER, {"prompt_logprobs": 1}, "prompt_logprobs"),
        (AFTER, {"echo": True, "logprobs": True}, "echo"),
        (EXPLAIN, {"include_reasoning": False}, "include_reasoning"),
        (EXPLAIN, {"echo": True, "max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_does_not_is_refused_by_field_with_what_to_do(
    settings: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as refused:
        check(settings, **fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert "leave out" in refused.value.message


def test_reasoning_has_to_be_known() -> None:
    with pytest.raises(ApiError, match="start it with --reasoning-parser") as refused:
        check(AFTER, reasons=False)
    assert refused.value.param == "value_guidance.from"
    check(PLAIN, reasons=False)


@pytest.mark.parametrize(
    ("until", "param"),
    [
        ("x", "value_guidance.until"),
        ({"stop": "x"}, "value_guidance.until.stop"),
        ({"stop": "x", "tokens": 3}, "value_guidance.until.stop"),
    ],
)
def test_a_text_has_to_be_readable(until: Any, param: str) -> None:
    with pytest.raises(ApiError, match=r'use {"tokens": \.\.\.} instead') as refused:
        check({"until": until}, reads_text=False)
    assert refused.value.param == param
    check({"until": {"tokens": 3}}, reads_text=False)
