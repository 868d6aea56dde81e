import json

import pytest
from pydantic import BaseModel, TypeAdapter

from server.api.errors import ApiError
from server.api.value_guidance import GuidingNetwork, GuidingNetworks, ValueGuidance

FIELD: TypeAdapter[str | GuidingNetworks] = TypeAdapter(ValueGuidance)


def refusal(value: object) -> ApiError:
    with pytest.raises(ApiError) as refused:
        FIELD.validate_python(value)
    return refused.value


@pytest.mark.parametrize("name", ["qa", "qa@3f2a91c0", "A.b_c-9", "x" * 64])
def test_a_string_names_one_network(name: str) -> None:
    assert FIELD.validate_python(name) == name


def test_an_object_names_networks_with_scales() -> None:
    value = {"networks": [{"name": "qa", "scale": 0.8}, {"name": "json"}]}
    assert FIELD.validate_python(value) == GuidingNetworks(
        networks=[GuidingNetwork(name="qa", scale=0.8), GuidingNetwork(name="json", scale=None)]
    )


@pytest.mark.parametrize("scale", [-8, 8, 0, -0.0, 1, 1e-9])
def test_scales_up_to_eight_are_allowed(scale: float) -> None:
    value = FIELD.validate_python({"networks": [{"name": "qa", "scale": scale}]})
    assert isinstance(value, GuidingNetworks)
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
        ({}, "value_guidance.networks"),
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


def test_a_refusal_does_not_repeat_megabytes() -> None:
    huge = "x" * 10_000_000
    for value in (huge, {huge: 1}, {"networks": [{"name": huge}]}, {"networks": [{huge: 1}]}):
        assert len(refusal(value).message) < 1000


def test_the_schema_is_typed() -> None:
    class Request(BaseModel):
        value_guidance: ValueGuidance | None = None

    schema = Request.model_json_schema()
    branches = schema["properties"]["value_guidance"]["anyOf"]
    assert {"$ref": "#/$defs/GuidingNetworks"} in branches
    assert any(branch.get("type") == "string" and "pattern" in branch for branch in branches)
    network = schema["$defs"]["GuidingNetwork"]
    assert network["additionalProperties"] is False
    assert network["properties"]["scale"]["anyOf"][0]["maximum"] == 8
