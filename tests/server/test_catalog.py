from typing import Any

import pytest

from server.catalog import Catalog, UnknownNetwork, WorkerError
from tests.server.networks import Workers, catalog_of, status


async def test_networks_are_found_by_name_and_by_version() -> None:
    catalog = await catalog_of(status("qa"), status("json", version="00000001"))
    assert str(catalog.find("qa")) == "qa@3f2a91c0"
    assert catalog.find("qa@3f2a91c0") is catalog.find("qa")
    assert [network.name for network in catalog] == ["qa", "json"]
    assert "json" in catalog and "json@feedbeef" in catalog and "guard" not in catalog


@pytest.mark.parametrize("reference", ["guard", "qa@00000001", "qa@", "@3f2a91c0", ""])
async def test_unknown_names_and_versions_are_told_what_there_is(reference: str) -> None:
    catalog = await catalog_of(status("qa"))
    with pytest.raises(UnknownNetwork, match=r"there is: (qa|3f2a91c0)"):
        catalog.find(reference)


async def test_a_network_that_failed_in_one_worker_has_failed() -> None:
    failed = status("qa", state="failed", reason="its logits are not finite")
    workers = Workers([status("qa"), status("json")], [failed, status("json")])
    catalog = Catalog(workers.call)
    await catalog.attach()
    assert catalog.find("qa").reason == "its logits are not finite"
    assert catalog.find("json").state == "ready"


async def test_states_are_learned_anew() -> None:
    workers = Workers([status("qa")])
    catalog = Catalog(workers.call)
    await catalog.attach()
    workers.replies = [{"networks": [status("qa", state="failed", reason="it threw")]}]
    await catalog.refresh()
    assert catalog.find("qa").state == "failed"
    assert workers.calls == ["trimtab_attach", "trimtab_networks"]


@pytest.mark.parametrize(
    "replies",
    [
        [{"error": "no processor"}],
        [{"networks": [status("qa")]}, {"error": "no processor"}],
        [{"networks": [status("qa")]}, {"networks": [status("qa", version="00000001")]}],
        [{"networks": [{"name": "qa"}]}],
        [None],
    ],
)
async def test_workers_that_fail_or_disagree_are_an_error(replies: list[Any]) -> None:
    workers = Workers()
    workers.replies = replies
    with pytest.raises(WorkerError):
        await Catalog(workers.call).attach()


async def test_a_failed_remote_call_is_a_worker_error() -> None:
    async def call(method: str) -> list[Any]:
        raise Exception("the engine is gone")

    with pytest.raises(WorkerError, match=r"trimtab_attach.*the engine is gone"):
        await Catalog(call).attach()
