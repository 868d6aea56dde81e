from typing import Any

import pytest

from server.api.errors import ApiError
from server.api.selection import Selection, references
from server.api.selection import select as resolve
from server.api.value_guidance import GuidingNetworks
from server.choice import ChosenNetwork
from server.lifecycle.catalog import Catalog
from tests.server.networks import catalog_of, status


@pytest.fixture
async def catalog() -> Catalog:
    return await catalog_of(
        status("qa", scale=0.5),
        status("json"),
        status("qa", version="00000001", state="draining", order=-1),
        status("dead", state="failed", reason="its logits are not finite"),
    )


def guidance(*networks: tuple[str, float | None]) -> GuidingNetworks:
    entries = [{"name": name, "scale": scale} for name, scale in networks]
    return GuidingNetworks.model_validate({"networks": entries})


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
    assert select(catalog, model, value_guidance, 1) == Selection((chosen,))


def test_what_a_request_may_name_is_known_before_it_is_resolved() -> None:
    assert references("t", None, 1) == [("t", "model")]
    assert references(None, "qa@3f2a91c0", 1) == [("qa@3f2a91c0", "value_guidance")]
    both = references("t", guidance(("qa", 0), ("json", None)), 2)
    assert both == [("qa", "value_guidance"), ("json", "value_guidance"), ("t", "model")]


@pytest.mark.parametrize(
    ("model", "value_guidance"), [(None, None), ("t", None), ("t", guidance())]
)
def test_nothing_named_is_nothing_chosen(catalog: Catalog, model: Any, value_guidance: Any) -> None:
    assert select(catalog, model, value_guidance, 1) == Selection(())


def test_a_zero_scale_is_named_but_changes_nothing(catalog: Catalog) -> None:
    selection = select(catalog, None, guidance(("qa", 0), ("json", 2)), 2)
    assert [network.name for network in selection.active] == ["json"]
    assert selection.header == "qa@3f2a91c0;scale=0.0, json@3f2a91c0;scale=2.0"


def test_the_answer_names_a_choice_that_repeats_the_request(catalog: Catalog) -> None:
    selection = select(catalog, None, guidance(("qa", None), ("json", 0.1)), 2)
    again = GuidingNetworks.model_validate(selection.body)
    assert select(catalog, None, again, 2) == selection


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
        (None, guidance(("qa", 1), ("qa", 2)), "'qa' 2 times"),
        (None, guidance(("qa", 1), ("qa@3f2a91c0", 1)), "'qa' 2 times"),
        (None, guidance(("qa", 1), ("json", 1), ("dead", 0)), "names 3 value networks; at most 2"),
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
