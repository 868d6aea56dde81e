"""What `GET /metrics` says of value networks, after vLLM's own metrics.

What API processes count themselves is in prometheus_client's default registry, which vLLM collects,
with several API processes too (prometheus_client's multiprocess mode). What the workers know is
asked for when `/metrics` is read, and appended.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool

METRICS_PATH = "/metrics"
POLL_SECONDS = 1.0
"""The workers are asked at most this often."""
PATIENCE_SECONDS = 3.0
"""How long a scrape waits for them; Prometheus itself gives up after 10 unless told otherwise."""

LoadResult = Literal["ready", "failed", "refused"]
LOAD_RESULTS: tuple[LoadResult, ...] = ("ready", "failed", "refused")

Status = Mapping[str, Any]
"""What one worker reports; see `server.worker.extension`."""
WorkerStatus = Callable[[], Awaitable[Sequence[Sequence[Status]]]]
"""Asks for the statuses: for each engine, those of its workers."""

log = logging.getLogger("trimtab")

_network_version = ("network", "version")
_requests = Counter(
    "trimtab_requests", "Requests that were accepted with a value network", _network_version
)
_generation_tokens = Counter(
    "trimtab_generation_tokens", "Tokens generated under a value network", _network_version
)
_loads = Counter("trimtab_loads", "Loads of value networks by how they ended", ["result"])
_load_seconds = Histogram(
    "trimtab_load_seconds",
    "Time from a load's request until the network was ready",
    buckets=(0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320),
)
for _result in LOAD_RESULTS:
    _loads.labels(_result)  # a rate needs the 0 before the first


def count_request(network: str, version: str) -> None:
    """Count a request that was accepted with a network."""
    _requests.labels(network, version).inc()


def count_tokens(network: str, version: str, n: int) -> None:
    """Count `n` tokens that were generated under a network."""
    _generation_tokens.labels(network, version).inc(n)


def count_load(result: LoadResult, seconds: float | None) -> None:
    """Count a load that ended; `seconds` from its request until it was ready, if it was."""
    _loads.labels(result).inc()
    if seconds is not None:
        _load_seconds.observe(seconds)


def extend_metrics(app: FastAPI, worker_status: WorkerStatus) -> None:
    """Take over vLLM's `GET /metrics`, and append what the workers report to its answer.

    Raises:
        LookupError: vLLM has no such route.
    """
    original = next(
        (r for r in app.routes if isinstance(r, APIRoute) and r.path == METRICS_PATH), None
    )
    if original is None:
        raise LookupError(f"vLLM has no route {METRICS_PATH}")
    vllms_own = original.endpoint
    reports = _Reports(worker_status)

    async def metrics(request: Request) -> Response:
        """Metrics in Prometheus' text format: vLLM's own, then those of value networks."""
        statuses = await reports.latest()
        # Over several processes it reads many files.
        response: Response = await run_in_threadpool(vllms_own, request)
        body = bytes(response.body) + await run_in_threadpool(_render, statuses)
        return Response(body, response.status_code, media_type=response.headers["content-type"])

    app.add_api_route(
        METRICS_PATH,
        metrics,
        methods=["GET"],
        name=original.name,
        response_class=original.response_class,
        response_model=None,
    )


class _Reports:
    """The workers' latest statuses, however many scrapes ask for them at once.

    A remote call takes its turn between two steps of the engine, so it is not made more often than
    `POLL_SECONDS`, and a scrape that would wait too long for it gets what the last one got.
    """

    def __init__(self, worker_status: WorkerStatus) -> None:
        self._worker_status = worker_status
        self._statuses: Sequence[Sequence[Status]] = ()
        self._asked_at = -POLL_SECONDS
        self._asking: asyncio.Task[None] | None = None

    async def latest(self) -> Sequence[Sequence[Status]]:
        if self._asking is None and time.monotonic() - self._asked_at >= POLL_SECONDS:
            self._asked_at = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=PATIENCE_SECONDS)
        return self._statuses

    async def _ask(self) -> None:
        try:
            self._statuses = await self._worker_status()
        except Exception as error:
            log.warning("the workers' metrics cannot be read: %s", error)
        finally:
            self._asking = None


def _render(statuses: Sequence[Sequence[Status]]) -> bytes:
    """The workers' statuses as text; nothing where they are not as they should be."""
    registry = CollectorRegistry()
    try:
        registry.register(_WorkerMetrics(statuses))
        return generate_latest(registry)
    except Exception as error:
        log.warning("the workers' metrics cannot be shown: %r", error)
        return b""


_WORK = (
    (
        "forward_seconds",
        CounterMetricFamily,
        "trimtab_forward_seconds",
        "Time in forward passes of a value network, of the slowest worker",
    ),
    (
        "forward_tokens",
        CounterMetricFamily,
        "trimtab_forward_tokens",
        "Tokens that a value network computed",
    ),
    (
        "prefix_queries",
        CounterMetricFamily,
        "trimtab_prefix_cache_queries",
        "Tokens looked up in a value network's prefix cache",
    ),
    (
        "prefix_hits",
        CounterMetricFamily,
        "trimtab_prefix_cache_hits",
        "Tokens found in a value network's prefix cache",
    ),
    (
        "rows",
        GaugeMetricFamily,
        "trimtab_running_requests",
        "Requests in the batch that a value network steers",
    ),
    (
        "kv_tokens",
        GaugeMetricFamily,
        "trimtab_kv_cache_tokens",
        "Tokens of running requests in a value network's KV cache",
    ),
)
"""A worker's fields for each version, and the metrics that they become."""


class _WorkerMetrics(Collector):
    """The statuses of one moment as metrics.

    The workers of one engine do the same work on their shares of it, so they are not added up: the
    one that did most speaks for its engine. Engines work side by side and are added up, except
    for memory, where the fullest worker of all is what counts.
    """

    def __init__(self, statuses: Sequence[Sequence[Status]]) -> None:
        self._engines = [engine for engine in statuses if engine]

    def collect(self) -> Iterable[Metric]:
        if self._engines:
            yield from self._work()
            yield from self._memory()
            yield self._states()

    def _work(self) -> Iterable[Metric]:
        for field, family, name, documentation in _WORK:
            metric = family(name, documentation, labels=_network_version)
            for labels, value in self._added_up(field).items():
                metric.add_metric(labels, value)
            yield metric

    def _added_up(self, field: str) -> dict[tuple[str, str], float]:
        """A field of each version: the most of an engine's workers, added up over the engines."""
        total: dict[tuple[str, str], float] = {}
        for engine in self._engines:
            most: dict[tuple[str, str], float] = {}
            for network in _networks(engine):
                labels = (network["name"], network["version"])
                most[labels] = max(most.get(labels, 0), network[field])
            for labels, value in most.items():
                total[labels] = total.get(labels, 0) + value
        return total

    def _memory(self) -> Iterable[Metric]:
        workers = [worker for engine in self._engines for worker in engine]
        weights = GaugeMetricFamily(
            "trimtab_weights_bytes",
            "Memory of a value network's weights in one worker",
            labels=_network_version,
        )
        usage = GaugeMetricFamily(
            "trimtab_kv_cache_usage_ratio",
            "Share of a KV cache that is in use; networks of one shape share one",
            labels=["pool"],
        )
        sizes: dict[tuple[str, str], int] = {}
        shares: dict[str, float] = {}
        for network in _networks(workers):
            labels = (network["name"], network["version"])
            sizes[labels] = max(sizes.get(labels, 0), network["weights_bytes"])
            pool = network["pool"]
            share = pool["used_tokens"] / pool["tokens"] if pool["tokens"] else 0.0
            shares[pool["id"]] = max(shares.get(pool["id"], 0.0), share)
        for labels, size in sizes.items():
            weights.add_metric(labels, size)
        for pool_id, share in shares.items():
            usage.add_metric([pool_id], share)
        yield weights
        yield usage

        budget = GaugeMetricFamily(
            "trimtab_value_memory_bytes",
            "The memory for value networks in one worker, by what it is for; the sum is all of it",
            labels=["kind"],
        )
        fullest = min((worker["memory"] for worker in workers), key=lambda m: m["free_bytes"])
        for kind in ("weights", "kv_cache", "loading", "free"):
            budget.add_metric([kind], fullest[f"{kind}_bytes"])
        yield budget

    def _states(self) -> Metric:
        metric = GaugeMetricFamily(
            "trimtab_network_state",
            "1 for the state that a version is in; a load has no version yet",
            labels=[*_network_version, "state"],
        )
        states: dict[tuple[str, str], str] = {}
        for worker in (worker for engine in self._engines for worker in engine):
            for load in worker["loads"]:
                states[load["name"], ""] = load["state"]
            for network in worker["networks"]:
                labels = (network["name"], network["version"])
                # What failed in one worker has failed.
                if states.get(labels) != "failed":
                    states[labels] = network["state"]
        for (name, version), state in states.items():
            metric.add_metric([name, version, state], 1)
        return metric


def _networks(workers: Iterable[Status]) -> Iterable[Mapping[str, Any]]:
    return (network for worker in workers for network in worker["networks"])
