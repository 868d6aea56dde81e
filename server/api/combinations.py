"""What cannot be combined with guidance, or with some of its settings: refused, never ignored."""

from typing import Any

from server.api.errors import ApiError, bad_request
from server.api.selection import Selection


def refuse_combinations(
    request: Any, selection: Selection, *, reasons: bool, reads_text: bool
) -> None:
    """Refuse a request that would not get what it asks for.

    Args:
        request: vLLM's request, of any endpoint.
        selection: with at least one active network.
        reasons: whether the server knows how the target's reasoning ends.
        reads_text: whether the workers know what the target's tokens spell.

    Raises:
        ApiError: 400.
    """
    _refuse_unguided(request)
    guidance = selection.guidance
    after_reasoning = guidance.begin == "after_reasoning"
    if after_reasoning and not reasons:
        raise bad_request(
            'value_guidance.from: "after_reasoning" needs a server that knows how its model '
            "reasons; start it with --reasoning-parser, or leave out from",
            "value_guidance.from",
        )
    if guidance.until_text is not None and not reads_text:
        field = f"value_guidance.until{'' if isinstance(guidance.until, str) else '.stop'}"
        raise bad_request(
            f"{field}: guidance cannot end at a text here, as this model's tokenizer cannot be "
            'read in bytes; use {"tokens": ...} instead',
            field,
        )
    if after_reasoning or guidance.until is not None:
        _refuse_scoring(request, "from" if after_reasoning else "until")
    if guidance.explain:
        _refuse_unexplained(request)


def _refuse_unguided(request: Any) -> None:
    """Refuse what would be the target's alone."""
    if getattr(request, "use_beam_search", False):
        raise bad_request(
            "use_beam_search cannot be guided by value networks; leave out one of the two",
            "use_beam_search",
        )
    if getattr(request, "background", None):
        raise bad_request(
            "background: a guided response cannot run in the background yet, where nobody would "
            "be told that its value network failed; leave out background or the value networks",
            "background",
        )


def _refuse_scoring(request: Any, field: str) -> None:
    """Refuse guided scores of a prompt under settings that say where in an answer guidance is."""
    for scoring, asked in (
        ("prompt_logprobs", getattr(request, "prompt_logprobs", None) is not None),
        ("echo", _scores_echo(request)),
    ):
        if asked:
            raise _conflict(
                scoring,
                "scores the whole prompt under guidance, but value_guidance."
                f"{field} limits guidance to a part of the answer",
                f"value_guidance.{field}",
            )


def _scores_echo(request: Any) -> bool:
    logprobs = getattr(request, "logprobs", None)
    return bool(getattr(request, "echo", False)) and logprobs is not None and logprobs is not False


def _refuse_unexplained(request: Any) -> None:
    if getattr(request, "include_reasoning", None) is False:
        raise _conflict(
            "include_reasoning",
            "false hides the tokens of the reasoning, which value_guidance.explain would show",
            "value_guidance.explain",
        )
    if getattr(request, "echo", False) and getattr(request, "max_tokens", None) == 0:
        raise _conflict(
            "max_tokens",
            "0 with echo generates nothing that value_guidance.explain could explain",
            "value_guidance.explain",
        )


def _conflict(field: str, problem: str, other: str) -> ApiError:
    return bad_request(f"{field}: {problem}; leave out {field} or {other}", field)
