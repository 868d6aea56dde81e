import asyncio
from typing import Any

import pytest

from server.lifecycle.catalog import Catalog, UnknownNetwork, WorkerError, WorkersRefused
from tests.server.networks import MEMORY, Workers, catalog_of, report, status

OLD = "0000000a"


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


async def test_a_name_means_its_newest_ready_version() -> None:
    catalog = await catalog_of(
        status("qa", version=OLD, order=1),
        status("qa", order=3, state="failed", reason="it threw"),
        status("qa", version="0000000b", order=2),
    )
    assert catalog.find("qa").version == "0000000b"
    assert catalog.find(f"qa@{OLD}").version == OLD
    assert [network.order for network in catalog.versions("qa")] == [3, 2, 1]
    assert [str(network) for network in catalog.ready()] == ["qa@0000000b"]


async def test_a_name_with_no_ready_version_means_the_failed_one() -> None:
    catalog = await catalog_of(
        status("qa", version=OLD, state="draining", order=2),
        status("qa", state="failed", reason="it threw"),
    )
    assert catalog.find("qa").reason == "it threw"


async def test_what_is_draining_is_for_those_who_hold_it_only() -> None:
    catalog = await catalog_of(status("qa", state="draining"))
    for reference in ("qa", "qa@3f2a91c0"):
        with pytest.raises(UnknownNetwork):
            catalog.find(reference)
    assert catalog.resident("qa@3f2a91c0").name == "qa"
    assert catalog.ready() == []
    with pytest.raises(UnknownNetwork, match="qa@0000000a is not resident"):
        catalog.resident(f"qa@{OLD}")


async def test_a_network_that_failed_in_one_worker_has_failed() -> None:
    failed = status("qa", state="failed", reason="its logits are not finite")
    workers = Workers([status("qa"), status("json")], [failed, status("json")])
    catalog = Catalog(workers.call)
    await catalog.attach()
    assert catalog.find("qa").reason == "its logits are not finite"
    assert catalog.find("qa").state == "failed"
    assert catalog.find("json").state == "ready"


async def test_seconds_are_the_slowest_workers_and_tokens_each_engines() -> None:
    workers = Workers()
    pool = {"id": "0", "kv_cache_bytes": 5, "tokens": 100, "used_tokens": 7}
    numbers = [(1.0, 10, None), (3.0, 10, 5.0), (2.0, 30, 4.0), (1.5, 30, None)]
    a, b, c, d = (
        status("qa", forward_seconds=seconds, forward_tokens=tokens, last_used=used, pool=pool)
        for seconds, tokens, used in numbers
    )
    less = MEMORY | {"free_bytes": 1}
    workers.replies = [[report(a), report(b)], [report(c, memory=less), report(d)]]
    catalog = Catalog(workers.call)
    await catalog.refresh()
    network = catalog.find("qa")
    assert (network.forward_seconds, network.forward_tokens, network.last_used) == (3.0, 40, 5.0)
    assert (network.pool.tokens, network.pool.used_tokens) == (200, 14)
    assert catalog.memory is not None and catalog.memory.free_bytes == 1


async def test_states_are_learned_anew() -> None:
    workers = Workers([status("qa")])
    catalog = Catalog(workers.call)
    await catalog.attach()
    learnt: list[str] = []
    catalog.subscribe(lambda: learnt.append(catalog.find("qa").state))
    workers.replies = [[report(status("qa", state="failed", reason="it threw"))]]
    await catalog.refresh()
    assert catalog.find("qa").state == "failed"
    assert workers.calls == ["trimtab_attach", "trimtab_networks"]
    assert learnt == ["failed"]


async def test_an_answer_that_comes_late_does_not_undo_a_newer_one() -> None:
    answers: list[asyncio.Future[Any]] = []

    async def call(method: str, *args: Any) -> list[list[Any]]:
        answers.append(asyncio.get_running_loop().create_future())
        reply: list[list[Any]] = await answers[-1]
        return reply

    catalog = Catalog(call)
    older = asyncio.create_task(catalog.refresh())
    newer = asyncio.create_task(catalog.refresh())
    await asyncio.sleep(0)
    answers[1].set_result([[report(status("qa", state="draining"))]])
    await newer
    answers[0].set_result([[report(status("qa"))]])
    await older
    assert catalog.resident("qa@3f2a91c0").state == "draining"


async def test_loads_and_withheld_names_are_everybodys() -> None:
    load = {"id": "1", "name": "qa", "source": "qa", "owner": "p", "started_at": 1.0}
    running = report(loads=[{**load, "state": "loading", "reason": None}], withheld=["json"])
    failed = report(loads=[{**load, "state": "failed", "reason": "no"}])
    workers = Workers()
    for replies in ([[running], [failed]], [[failed], [running]]):
        workers.replies = replies
        catalog = Catalog(workers.call)
        await catalog.attach()
        assert catalog.loads["1"].reason == "no"
        assert catalog.withheld == {"json"}


async def test_workers_in_the_midst_of_a_change_are_asked_again() -> None:
    new = status("qa", version=OLD, order=1)
    workers = Workers()
    steps = [
        [[report(status("qa", state="draining"), new)], [report(status("qa"))]],
        [[report(status("qa", state="draining"), new)]] * 2,
    ]

    async def call(method: str, *args: Any) -> list[list[Any]]:
        workers.replies = steps.pop(0)
        return workers.replies

    catalog = Catalog(call)
    await catalog.refresh()
    assert catalog.find("qa").version == OLD
    assert steps == []


async def test_what_not_all_workers_hold_is_for_no_new_request() -> None:
    for reports in (
        ([status("qa"), status("json")], [status("qa")]),
        ([status("qa")], [status("qa"), status("json")]),
    ):
        catalog = Catalog(Workers(*reports).call)
        await catalog.refresh()
        assert [network.name for network in catalog.ready()] == ["qa"]
        assert catalog.resident("json@3f2a91c0").state == "draining"


@pytest.mark.parametrize(
    "replies",
    [
        [[{"error": "no processor"}]],
        [[report(status("qa"))], [{"error": "no processor"}]],
        [[report(status("qa")), {"error": "no processor"}]],
        [[report(status("qa"))], [report(status("qa", version="00000001"))]],
        [[report({"name": "qa"})]],
        [[None]],
        [[]],
        [],
    ],
)
async def test_workers_that_fail_or_disagree_are_an_error(replies: list[Any]) -> None:
    workers = Workers()
    workers.replies = replies
    with pytest.raises(WorkerError):
        await Catalog(workers.call).attach()


async def test_a_failed_remote_call_is_a_worker_error() -> None:
    async def call(method: str, *args: Any) -> list[list[Any]]:
        raise Exception("the engine is gone")

    with pytest.raises(WorkerError, match=r"trimtab_attach.*the engine is gone"):
        await Catalog(call).attach()


async def test_a_change_is_learnt_unless_a_worker_declines_it() -> None:
    workers = Workers([status("qa")], [status("qa")])
    catalog = Catalog(workers.call)
    await catalog.change("trimtab_commit", "1")
    assert catalog.find("qa")
    workers.replies = [[report()], [{"refused": "memory", "needed": 5, **report()}]]
    with pytest.raises(WorkersRefused) as refused:
        await catalog.change("trimtab_begin", {})
    assert [reply["needed"] for reply in refused.value.replies] == [5]
    assert catalog.find("qa")


async def test_networks_that_know_their_base_are_told_apart() -> None:
    catalog = await catalog_of(status("qa"), status("proxy", dynamic=True))
    assert not catalog.find("qa").dynamic
    assert catalog.find("proxy").dynamic
