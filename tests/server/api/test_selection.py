from typing import Any

import pytest

from server.api.errors import ApiError
from server.api.selection import Selection, references
from server.api.selection import select as resolve
from server.api.value_guidance import Guidance
from server.choice import Choice, ChosenNetwork
from server.lifecycle.catalog import Catalog
from tests.server.networks import catalog_of, status


@pytest.fixture
async def catalog() -> Catalog:
    return await catalog_of(
        status("qa", scale=0.5),
        status("json"),
        status("qa", version="00000001", state="draining", order=-1),
        status("dead", state="failed", reason="its logits are not finite"),
        status("pair", dynamic=True, scale=0.5),
        status("away", dynamic=True, scale=-1.0),
    )


def guidance(*networks: tuple[str, float | None], **settings: Any) -> Guidance:
    entries = [{"name": name, "scale": scale} for name, scale in networks]
    return Guidance.model_validate({"networks": entries, **settings})


def settings(**settings: Any) -> Guidance:
    return Guidance.model_validate(settings)


def select(
    catalog: Catalog, model: str | None, value_guidance: Any, max_networks: int
) -> Selection:
    """As the route does."""
    references(model, value_guidance, max_networks)
    return resolve(catalog, model, value_guidance)


def refusal(*arguments: Any, max_networks: int = 2) -> ApiError:
    with pytest.raises(ApiError) as refused:
        select(*arguments, max_networks)
    return refused.value


@pytest.mark.parametrize(
    ("model", "value_guidance", "scale"),
    [
        ("qa", None, 0.5),
        ("qa@3f2a91c0", None, 0.5),
        (None, "qa", 0.5),
        (None, "qa@3f2a91c0", 0.5),
        ("a-target", "qa", 0.5),
        ("qa", "qa", 0.5),
        ("qa", "qa@3f2a91c0", 0.5),
        (None, guidance(("qa", None)), 0.5),
        ("qa", guidance(("qa", -2)), -2),
    ],
)
def test_a_network_is_chosen_by_model_or_by_value_guidance(
    catalog: Catalog, model: str | None, value_guidance: Any, scale: float
) -> None:
    chosen = ChosenNetwork("qa", "3f2a91c0", scale)
    assert select(catalog, model, value_guidance, 1).networks == (chosen,)


def test_what_a_request_may_name_is_known_before_it_is_resolved() -> None:
    assert references("t", None, 1) == [("t", "model")]
    assert references(None, "qa@3f2a91c0", 1) == [("qa@3f2a91c0", "value_guidance")]
    both = references("t", guidance(("qa", 0), ("json", None)), 2)
    assert both == [("qa", "value_guidance"), ("json", "value_guidance"), ("t", "model")]


@pytest.mark.parametrize(
    ("model", "value_guidance"), [(None, None), ("t", None), ("t", guidance())]
)
def test_nothing_named_is_nothing_chosen(catalog: Catalog, model: Any, value_guidance: Any) -> None:
    assert select(catalog, model, value_guidance, 1) == Selection((), value_guidance or Guidance())


def test_a_zero_scale_is_named_but_changes_nothing(catalog: Catalog) -> None:
    selection = select(catalog, None, guidance(("qa", 0), ("json", 2)), 2)
    assert [network.name for network in selection.active] == ["json"]
    assert selection.header == "qa@3f2a91c0;scale=0.0, json@3f2a91c0;scale=2.0"


def test_the_answer_names_a_choice_that_repeats_the_request(catalog: Catalog) -> None:
    selection = select(catalog, None, guidance(("qa", None), ("json", 0.1)), 2)
    again = Guidance.model_validate(selection.body)
    assert select(catalog, None, again, 2).networks == selection.networks


@pytest.mark.parametrize(
    "asked",
    [
        {"combine": "dynamic"},
        {"until": {"tokens": 3, "stop": "x"}, "from": "after_reasoning", "explain": True},
        {"until": "x", "min_target_prob": 0.125},
    ],
)
def test_a_choice_with_settings_can_be_repeated_too(
    catalog: Catalog, asked: dict[str, Any]
) -> None:
    selection = select(catalog, "pair", settings(**asked), 1)
    again = select(catalog, "pair", Guidance.model_validate(selection.body), 1)
    assert selection.body == again.body
    assert {name: selection.body[name] for name in asked} == asked
    assert selection.choice(99, (7, 8)) == again.choice(99, (7, 8))


def test_the_default_settings_are_not_repeated(catalog: Catalog) -> None:
    selection = select(catalog, None, guidance(("qa", 1), combine="static", explain=False), 1)
    assert selection.body == {"networks": [{"name": "qa@3f2a91c0", "scale": 1.0}]}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {}),
        ({"combine": "dynamic"}, {"dynamic": True}),
        ({"until": "x"}, {"until_text": "x"}),
        ({"until": {"stop": "x"}}, {"until_text": "x"}),
        ({"until": {"tokens": 3}}, {"until_tokens": 3}),
        ({"until": {"tokens": 3, "stop": "x"}}, {"until_tokens": 3, "until_text": "x"}),
        ({"from": "after_reasoning"}, {"after": (7, 8)}),
        ({"min_target_prob": 0.125}, {"floor": 0.125}),
    ],
)
def test_a_choice_says_what_was_asked_for(
    catalog: Catalog, asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    selection = select(catalog, None, guidance(("pair", 1), ("qa", 0), **asked), 2)
    pair = ChosenNetwork("pair", "3f2a91c0", 1.0)
    assert selection.choice(99, (7, 8)) == Choice((pair,), 99, **expected)


def test_model_names_the_network_that_settings_are_for(catalog: Catalog) -> None:
    selection = select(catalog, "qa", settings(until="x"), 1)
    assert selection.networks == (ChosenNetwork("qa", "3f2a91c0", 0.5),)
    assert selection.guidance.until == "x"


@pytest.mark.parametrize("model", [None, "a-target"])
def test_settings_of_no_network_are_refused(catalog: Catalog, model: str | None) -> None:
    error = refusal(catalog, model, settings(until="x"))
    assert (error.status, error.param) == (400, "value_guidance.networks")
    assert "name them here, or one as model" in error.message


class TestDynamic:
    def test_a_scale_is_the_bound_and_two_by_default_in_the_networks_direction(
        self, catalog: Catalog
    ) -> None:
        asked = guidance(("pair", None), ("away", None), combine="dynamic")
        assert [n.scale for n in select(catalog, None, asked, 2).networks] == [2.0, -2.0]
        asked = guidance(("pair", 0.25), ("away", 3), combine="dynamic")
        assert [n.scale for n in select(catalog, None, asked, 2).networks] == [0.25, 3.0]
        asked = guidance(("pair", None), ("away", None))
        assert [n.scale for n in select(catalog, None, asked, 2).networks] == [0.5, -1.0]

    @pytest.mark.parametrize("model", [None, "qa"])
    def test_networks_that_do_not_know_their_base_are_refused(
        self, catalog: Catalog, model: str | None
    ) -> None:
        asked = settings(combine="dynamic") if model else guidance(("qa", 1), combine="dynamic")
        error = refusal(catalog, model, asked)
        assert (error.status, error.param) == (400, "value_guidance.combine")
        assert "qa@3f2a91c0" in error.message
        assert "trimtab pair" in error.message and "--reference" in error.message

    def test_but_not_those_that_have_no_part(self, catalog: Catalog) -> None:
        asked = guidance(("pair", None), ("qa", 0), combine="dynamic")
        assert [n.name for n in select(catalog, None, asked, 2).active] == ["pair"]


@pytest.mark.parametrize("networks", [(), (("qa", 0),)])
def test_there_is_nothing_to_explain_where_nothing_steers(
    catalog: Catalog, networks: tuple[tuple[str, float], ...]
) -> None:
    error = refusal(catalog, None, guidance(*networks, explain=True))
    assert (error.status, error.param) == (400, "value_guidance.explain")


def test_too_many_and_repeated_networks_are_refused_by_field(catalog: Catalog) -> None:
    for asked in (guidance(("qa", 1), ("qa", 2)), guidance(("qa", 1), ("json", 1), ("dead", 0))):
        assert refusal(catalog, None, asked).param == "value_guidance.networks"


@pytest.mark.parametrize(
    ("model", "value_guidance", "param"),
    [
        (None, "guard", "value_guidance"),
        (None, "qa@00000000", "value_guidance"),
        (None, "qa@00000001", "value_guidance"),  # draining
        (None, guidance(("qa", 1), ("guard", 1)), "value_guidance"),
        ("qa@00000000", None, "model"),
        ("qa@", "qa", "model"),
    ],
)
def test_unknown_networks_and_versions_are_not_found(
    catalog: Catalog, model: str | None, value_guidance: Any, param: str
) -> None:
    error = refusal(catalog, model, value_guidance)
    assert (error.status, error.param) == (404, param)


@pytest.mark.parametrize(
    ("model", "value_guidance", "message"),
    [
        (None, guidance(("qa", 1), ("qa", 2)), "'qa' is named 2 times"),
        (None, guidance(("qa", 1), ("qa@3f2a91c0", 1)), "'qa' is named 2 times"),
        (None, guidance(("qa", 1), ("json", 1), ("dead", 0)), "3 value networks; at most 2"),
        ("qa", "json", "contradict"),
        ("qa", guidance(), "contradict"),
        ("qa", guidance(("qa", 1), ("json", 1)), "contradict"),
    ],
)
def test_repetitions_excess_and_contradictions_are_refused(
    catalog: Catalog, model: str | None, value_guidance: Any, message: str
) -> None:
    error = refusal(catalog, model, value_guidance)
    assert error.status == 400
    assert message in error.message


def test_a_failed_network_is_unavailable_unless_it_has_no_part(catalog: Catalog) -> None:
    for choice in (("dead", None), (None, "dead")):
        error = refusal(catalog, *choice)
        assert error.status == 503
        assert "dead@3f2a91c0 has failed: its logits are not finite" in error.message
    assert select(catalog, None, guidance(("dead", 0)), 1).active == ()
