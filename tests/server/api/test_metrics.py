"""What `/metrics` says, through vLLM's own route and its plugin mechanism."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

from server.api import metrics
from server.api.metrics import count_load, count_request, count_tokens, extend_metrics

Statuses = Sequence[Sequence[dict[str, Any]]]
Labels = frozenset[tuple[str, str]]
QA = {"network": "qa", "version": "3f2a91c0"}


def network(name: str = "qa", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "version": "3f2a91c0",
        "state": "ready",
        "weights_bytes": 4000,
        "forward_seconds": 1.5,
        "forward_tokens": 100,
        "prefix_queries": 64,
        "prefix_hits": 32,
        "kv_tokens": 70,
        "rows": 3,
        "pool": {"id": "1x64", "kv_cache_bytes": 9000, "tokens": 200, "used_tokens": 50},
        **changes,
    }


def worker(*networks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    memory = {
        "total_bytes": 100,
        "weights_bytes": 40,
        "kv_cache_bytes": 30,
        "loading_bytes": 10,
        "free_bytes": 20,
    }
    return {"networks": list(networks), "loads": [], "memory": memory, "withheld": [], **changes}


class Workers:
    """Workers that report what a test has them report."""

    def __init__(self, *engines: list[dict[str, Any]]) -> None:
        self.statuses: Statuses = engines
        self.calls = 0
        self.error: Exception | None = None
        self.busy: asyncio.Event | None = None

    async def __call__(self) -> Statuses:
        self.calls += 1
        if self.busy:
            await self.busy.wait()
        if self.error:
            raise self.error
        return self.statuses


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    """Leave no trace of vLLM's instrumentation: it registers itself with each application."""
    before = set(REGISTRY._collector_to_names)
    yield
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def application(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """Metrics as vLLM wires them, with the plugin that extends them."""
    app = FastAPI()
    attach_router(app)
    plugin = SimpleNamespace(attach_router=lambda app: extend_metrics(app, workers))
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda _: [plugin])
    attach_endpoint_plugins(app, ("generate",))
    return app


async def scrape(app: FastAPI) -> str:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return response.text


def samples(text: str) -> dict[str, dict[Labels, float]]:
    """Every sample; there is one for a name and labels, and one family of a name."""
    found: dict[str, dict[Labels, float]] = {}
    families = [family.name for family in text_string_to_metric_families(text)]
    assert len(set(families)) == len(families)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in values
            values[labels] = sample.value
    return found


Show = Callable[[Workers], dict[str, dict[Labels, float]]]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Show:
    return lambda workers: samples(asyncio.run(scrape(application(workers, monkeypatch))))


def value(found: dict[str, dict[Labels, float]], name: str, **labels: str) -> float:
    return found[name][frozenset(labels.items())]


def test_vllms_own_metrics_stay(show: Show) -> None:
    found = show(Workers([worker(network())]))
    assert "python_info" in found and "trimtab_forward_seconds_total" in found


def test_a_networks_work(show: Show) -> None:
    found = show(Workers([worker(network())]))
    assert value(found, "trimtab_forward_seconds_total", **QA) == 1.5
    assert value(found, "trimtab_forward_tokens_total", **QA) == 100
    assert value(found, "trimtab_prefix_cache_queries_total", **QA) == 64
    assert value(found, "trimtab_prefix_cache_hits_total", **QA) == 32
    assert value(found, "trimtab_running_requests", **QA) == 3
    assert value(found, "trimtab_kv_cache_tokens", **QA) == 70
    assert value(found, "trimtab_weights_bytes", **QA) == 4000


def test_the_workers_of_an_engine_share_its_work(show: Show) -> None:
    slow = network(forward_seconds=2.0)
    found = show(Workers([worker(network()), worker(slow)], [worker(network()), worker(network())]))
    assert value(found, "trimtab_forward_seconds_total", **QA) == 3.5
    assert value(found, "trimtab_forward_tokens_total", **QA) == 200
    assert value(found, "trimtab_running_requests", **QA) == 6
    assert value(found, "trimtab_weights_bytes", **QA) == 4000


def test_memory_is_that_of_the_fullest_worker(show: Show) -> None:
    full = {
        "total_bytes": 100,
        "weights_bytes": 50,
        "kv_cache_bytes": 35,
        "loading_bytes": 5,
        "free_bytes": 10,
    }
    found = show(Workers([worker(network())], [worker(network(), memory=full)]))
    kinds = {dict(labels)["kind"]: v for labels, v in found["trimtab_value_memory_bytes"].items()}
    assert kinds == {"weights": 50, "kv_cache": 35, "loading": 5, "free": 10}


def test_networks_of_one_shape_share_a_pool(show: Show) -> None:
    other = {"id": "2x64", "kv_cache_bytes": 1, "tokens": 0, "used_tokens": 0}
    found = show(Workers([worker(network(), network("json"), network("wide", pool=other))]))
    assert found["trimtab_kv_cache_usage_ratio"] == {
        frozenset({("pool", "1x64")}): 0.25,
        frozenset({("pool", "2x64")}): 0.0,
    }


def test_states(show: Show) -> None:
    loads = [
        {"name": "new", "state": "loading"},
        {"name": "bad", "state": "failed"},
    ]
    old = network(version="00000000", state="draining")
    broken = network("broken", state="failed")
    first = worker(network(), old, network("broken"), loads=loads)
    found = show(Workers([first, worker(network(), old, broken, loads=loads)]))
    assert found["trimtab_network_state"] == {
        frozenset({("network", name), ("version", version), ("state", state)}): 1
        for name, version, state in (
            ("qa", "3f2a91c0", "ready"),
            ("qa", "00000000", "draining"),
            ("broken", "3f2a91c0", "failed"),
            ("new", "", "loading"),
            ("bad", "", "failed"),
        )
    }


def test_names_cannot_break_the_format(show: Show) -> None:
    found = show(Workers([worker(network('a"b\\c\nd'))]))
    assert value(found, "trimtab_running_requests", network='a"b\\c\nd', version="3f2a91c0") == 3


def test_what_api_processes_count(show: Show) -> None:
    before = show(Workers())
    count_request("counted", "3f2a91c0")
    count_request("counted", "3f2a91c0")
    count_tokens("counted", "3f2a91c0", 40)
    count_load("ready", 3.0)
    count_load("failed", None)
    found = show(Workers())
    labels = {"network": "counted", "version": "3f2a91c0"}
    assert value(found, "trimtab_requests_total", **labels) == 2
    assert value(found, "trimtab_generation_tokens_total", **labels) == 40

    def rise(name: str, **labels: str) -> float:
        return value(found, name, **labels) - value(before, name, **labels)

    # Results that have not been met are there, as 0.
    rises = {result: rise("trimtab_loads_total", result=result) for result in metrics.LOAD_RESULTS}
    assert rises == {"ready": 1, "failed": 1, "refused": 0}
    assert rise("trimtab_load_seconds_count") == 1
    assert rise("trimtab_load_seconds_sum") == 3
    assert rise("trimtab_load_seconds_bucket", le="2.5") == 0
    assert rise("trimtab_load_seconds_bucket", le="5.0") == 1


@pytest.mark.parametrize(
    "statuses",
    [(), [[]], [[{"error": "gone"}]], [["nonsense"]], None, [[worker({"name": "half"})]]],
)
def test_a_scrape_survives_what_workers_say(show: Show, statuses: Any) -> None:
    workers = Workers()
    workers.statuses = statuses
    found = show(workers)
    assert "trimtab_loads_total" in found and "trimtab_running_requests" not in found


async def test_a_scrape_survives_workers_that_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "POLL_SECONDS", 0)
    workers = Workers([worker(network())])
    app = application(workers, monkeypatch)
    await scrape(app)
    workers.error = Exception("the engine is gone")
    assert "trimtab_running_requests" in samples(await scrape(app))  # what was known
    assert "the engine is gone" in caplog.text
    workers.error, workers.statuses = None, [[worker(network(rows=5))]]
    assert value(samples(await scrape(app)), "trimtab_running_requests", **QA) == 5


async def test_a_scrape_does_not_wait_for_workers_that_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(metrics, "POLL_SECONDS", 0)
    workers = Workers([worker(network())])
    app = application(workers, monkeypatch)
    workers.busy = asyncio.Event()
    for _ in range(3):
        assert "trimtab_running_requests" not in samples(await scrape(app))
    assert workers.calls == 1  # one question at a time
    workers.busy.set()
    assert "trimtab_running_requests" in samples(await scrape(app))


async def test_many_scrapes_are_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "POLL_SECONDS", 3600)
    workers = Workers([worker(network())])
    app = application(workers, monkeypatch)
    texts = await asyncio.gather(*(scrape(app) for _ in range(10)))
    assert workers.calls == 1
    for text in (*texts, await scrape(app)):
        assert "trimtab_running_requests" in samples(text)
    assert workers.calls == 1


def test_without_vllms_route_there_is_nothing_to_extend() -> None:
    with pytest.raises(LookupError, match="/metrics"):
        extend_metrics(FastAPI(), Workers())


COUNTING = """
from server.api.metrics import count_load, count_request, count_tokens
count_request("qa", "3f2a91c0")
count_tokens("qa", "3f2a91c0", 5)
count_load("ready", 1.0)
"""
COLLECTING = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_several_api_processes_count_together(tmp_path: Path) -> None:
    """As vLLM has it: a directory that all of them write to, and any of them collects."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def run(script: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    run(COUNTING)
    run(COUNTING)
    found = samples(run(COUNTING + COLLECTING))
    assert value(found, "trimtab_requests_total", **QA) == 3
    assert value(found, "trimtab_generation_tokens_total", **QA) == 15
    assert value(found, "trimtab_loads_total", result="ready") == 3
    assert value(found, "trimtab_load_seconds_count") == 3
