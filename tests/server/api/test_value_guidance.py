import json
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from server.api.errors import ApiError
from server.api.value_guidance import Guidance, GuidingNetwork, ValueGuidance

FIELD: TypeAdapter[str | Guidance] = TypeAdapter(ValueGuidance)


def refusal(value: object) -> ApiError:
    with pytest.raises(ApiError) as refused:
        FIELD.validate_python(value)
    return refused.value


@pytest.mark.parametrize("name", ["qa", "qa@3f2a91c0", "A.b_c-9", "x" * 64])
def test_a_string_names_one_network(name: str) -> None:
    assert FIELD.validate_python(name) == name


def test_an_object_names_networks_with_scales() -> None:
    value = {"networks": [{"name": "qa", "scale": 0.8}, {"name": "json"}]}
    assert FIELD.validate_python(value) == Guidance(
        networks=[GuidingNetwork(name="qa", scale=0.8), GuidingNetwork(name="json", scale=None)]
    )


@pytest.mark.parametrize("scale", [-8, 8, 0, -0.0, 1, 1e-9])
def test_scales_up_to_eight_are_allowed(scale: float) -> None:
    value = FIELD.validate_python({"networks": [{"name": "qa", "scale": scale}]})
    assert isinstance(value, Guidance) and value.networks is not None
    assert value.networks[0].scale == scale


@pytest.mark.parametrize(
    "scale", ["NaN", "Infinity", "-Infinity", "8.001", "-9", '"1"', "true", "[]", "1" + "0" * 400]
)
def test_other_scales_are_refused_by_field_with_what_is_allowed(scale: str) -> None:
    value = json.loads(f'{{"networks": [{{"name": "qa"}}, {{"name": "json", "scale": {scale}}}]}}')
    error = refusal(value)
    assert error.status == 400
    assert error.param == "value_guidance.networks.1.scale"
    assert "finite scale between -8 and 8" in error.message


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"networks": "qa"}, "value_guidance.networks"),
        ({"networks": [{"name": "qa"}] * 65}, "value_guidance.networks"),
        ({"networks": ["qa"]}, "value_guidance.networks.0"),
        ({"networks": [{"scale": 1}]}, "value_guidance.networks.0.name"),
        ({"networks": [{"name": 5}]}, "value_guidance.networks.0.name"),
        ({"networks": [{"name": "qa", "sclae": 1}]}, "value_guidance.networks.0.sclae"),
        ({"networks": [], "mode": "max"}, "value_guidance.mode"),
        (["qa"], "value_guidance"),
        (5, "value_guidance"),
        (True, "value_guidance"),
        ("", "value_guidance"),
        ("two words", "value_guidance"),
        ("../qa", "value_guidance"),
        ("qa@latest", "value_guidance"),
        ("qa\n", "value_guidance"),
        ("\ud800", "value_guidance"),
        ("x" * 65, "value_guidance"),
    ],
)
def test_other_shapes_are_refused_by_field(value: object, param: str) -> None:
    error = refusal(value)
    assert error.status == 400
    assert error.param == param
    assert '{"networks": [{"name": "qa", "scale": 0.8}]}' in error.message


SETTINGS: list[dict[str, Any]] = [
    {},
    {"combine": "dynamic"},
    {"until": "\n\n"},
    {"until": {"tokens": 64}},
    {"until": {"stop": "}"}},
    {"until": {"tokens": 1, "stop": "x" * 256}},
    {"from": "after_reasoning"},
    {"min_target_prob": 1e-4},
    {"explain": True},
    {"combine": "dynamic", "until": "ž", "from": "after_reasoning", "explain": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_are_kept_as_they_were_sent(settings: dict[str, Any]) -> None:
    value = FIELD.validate_python(settings)
    assert isinstance(value, Guidance)
    assert value.networks is None
    assert value.settings == settings


def test_settings_that_are_as_by_default_are_left_out() -> None:
    value = FIELD.validate_python(
        {
            "networks": [{"name": "qa"}],
            "combine": "static",
            "until": None,
            "from": "first_token",
            "min_target_prob": None,
            "explain": False,
        }
    )
    assert isinstance(value, Guidance)
    assert value.settings == {}


@pytest.mark.parametrize(
    ("until", "tokens", "text"),
    [
        (None, None, None),
        ("ab", None, "ab"),
        ({"stop": "ab"}, None, "ab"),
        ({"tokens": 3}, 3, None),
        ({"tokens": 3, "stop": "ab"}, 3, "ab"),
    ],
)
def test_guidance_ends_at_a_text_or_after_tokens(
    until: object, tokens: int | None, text: str | None
) -> None:
    value = FIELD.validate_python({"until": until})
    assert isinstance(value, Guidance)
    assert (value.until_tokens, value.until_text) == (tokens, text)


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"combine": "sum"}, "combine", 'combine is "static" or "dynamic"'),
        ({"combine": None}, "combine", "'static' or 'dynamic'"),
        ({"until": ""}, "until", "at least 1 character"),
        ({"until": "x" * 257}, "until", "at most 256 characters"),
        ({"until": "\ud800"}, "until", "unicode"),
        ({"until": 64}, "until", "input should be a string or an object"),
        ({"until": ["x"]}, "until", "input should be a string or an object"),
        ({"until": {}}, "until", "names neither tokens nor stop"),
        ({"until": {"tokens": None}}, "until", "names neither tokens nor stop"),
        ({"until": {"tokens": 0}}, "until.tokens", "greater than or equal to 1"),
        ({"until": {"tokens": 2**31}}, "until.tokens", "less than or equal to"),
        ({"until": {"tokens": True}}, "until.tokens", "valid integer"),
        ({"until": {"tokens": "64"}}, "until.tokens", "valid integer"),
        ({"until": {"tokens": 6.5}}, "until.tokens", "valid integer"),
        ({"until": {"stop": ""}}, "until.stop", "at least 1 character"),
        ({"until": {"stop": "\ud800"}}, "until.stop", "unicode"),
        ({"until": {"token": 64}}, "until.token", '{"tokens": 64}, {"stop": "a text"}, or both'),
        ({"from": "reasoning"}, "from", 'from is "first_token" or "after_reasoning"'),
        ({"begin": "first_token"}, "begin", "not permitted"),
        ({"min_target_prob": 0}, "min_target_prob", "above 0 and below 1"),
        ({"min_target_prob": 1}, "min_target_prob", "above 0 and below 1"),
        ({"min_target_prob": float("nan")}, "min_target_prob", "finite"),
        ({"min_target_prob": "0.1"}, "min_target_prob", "valid number"),
        ({"min_target_prob": True}, "min_target_prob", "valid number"),
        ({"explain": 1}, "explain", "explain is true or false"),
        ({"explain": "yes"}, "explain", "explain is true or false"),
    ],
)
def test_other_settings_are_refused_by_field_with_what_is_allowed(
    settings: dict[str, Any], param: str, message: str
) -> None:
    error = refusal({"networks": [{"name": "qa"}], **settings})
    assert (error.status, error.param) == (400, f"value_guidance.{param}")
    assert error.message.startswith(f"value_guidance.{param}: ")
    assert message in error.message


def test_a_refusal_does_not_repeat_megabytes() -> None:
    huge = "x" * 10_000_000
    for value in (
        huge,
        {huge: 1},
        {"networks": [{"name": huge}]},
        {"networks": [{huge: 1}]},
        {"until": huge},
        {"until": {huge: 1}},
        {"combine": huge},
    ):
        assert len(refusal(value).message) < 1000


def test_the_schema_is_typed() -> None:
    class Request(BaseModel):
        value_guidance: ValueGuidance | None = None

    schema = Request.model_json_schema()
    branches = schema["properties"]["value_guidance"]["anyOf"]
    assert {"$ref": "#/$defs/Guidance"} in branches
    assert any(branch.get("type") == "string" and "pattern" in branch for branch in branches)
    network = schema["$defs"]["GuidingNetwork"]
    assert network["additionalProperties"] is False
    assert network["properties"]["scale"]["anyOf"][0]["maximum"] == 8
    settings = schema["$defs"]["Guidance"]["properties"]
    assert settings["from"]["enum"] == ["first_token", "after_reasoning"]
    assert {"$ref": "#/$defs/Until"} in settings["until"]["anyOf"]
