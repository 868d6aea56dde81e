"""API processes of one server, over simulated workers and a simulated store."""

import asyncio
import json
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from server.api.errors import ApiError
from server.api.resources import NetworkInfo
from server.lifecycle import loader, state_record, store_listing
from server.lifecycle.catalog import Catalog, Network, WorkerError
from server.lifecycle.changes import WATCH_SECONDS
from server.lifecycle.leases import Lease, Leases
from server.lifecycle.lifecycle import Lifecycle
from server.lifecycle.refusals import RETRY_SECONDS
from server.lifecycle.staging import ModelFacts, NetworkFacts, StagedNetwork, StagingError
from server.lifecycle.state_file import State, read_state
from server.settings import Settings
from tests.server.networks import Engines, Worker, status
from value_models.store import NetworkError, NoSuchNetwork

V1, V2, V3 = "00000001", "00000002", "00000003"


class Store:
    """A store of networks, each only a version and a size, and the processes that stage them."""

    def __init__(self, run_dir: Path) -> None:
        self.snapshots = run_dir / "networks"
        self.folders: dict[str, tuple[str, int]] = {}
        self.broken: dict[str, str] = {}
        self.gone = False
        self.read_only = False
        self.inspected: list[str] = []
        self.staged: list[str] = []
        self.on_stage: Callable[[str], Awaitable[None]] | None = None
        self._count = 0

    async def inspect(self, source: str, name: str) -> NetworkFacts:
        await asyncio.sleep(0)
        self.inspected.append(source)
        return self._facts(source, name)

    async def stage(self, source: str, name: str, max_bytes: int) -> StagedNetwork:
        self.staged.append(source)
        if self.on_stage is not None:
            await self.on_stage(source)
        facts = self._facts(source, name)
        if facts.num_bytes > max_bytes:
            raise NetworkError("too large")
        version = self.folders[source][0]
        self._count += 1
        folder = self.snapshots / f"{name}@{version}-{self._count:02x}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        (folder / "tokenizer.json").touch()
        return StagedNetwork(**facts.model_dump(), version=version, folder=folder)

    async def list(self) -> list[str]:
        if self.gone:
            raise StagingError("the store cannot be read")
        return sorted([*self.folders, *self.broken])

    async def remove(self, source: str) -> None:
        if self.read_only:
            raise NetworkError(f"{source} cannot be deleted: read-only")
        if source not in self.folders:
            raise NoSuchNetwork(f"no {source}")
        del self.folders[source]

    async def discard(self, folder: Path, weights_only: bool) -> None:
        if weights_only:
            (folder / "model.safetensors").unlink(missing_ok=True)
        else:
            shutil.rmtree(folder)

    def _facts(self, source: str, name: str) -> NetworkFacts:
        if self.gone:
            raise StagingError("the store cannot be read")
        if source in self.broken:
            raise NetworkError(f"/srv/store/{source}: {self.broken[source]}")
        if source not in self.folders:
            raise NoSuchNetwork(f"/srv/store/{source}: there is no such folder")
        size = self.folders[source][1]
        return NetworkFacts(
            name=name,
            source=source,
            kind="residual",
            scale=1.0,
            vocab_size=512,
            max_context=64,
            num_bytes=2 * size,
            models=(
                ModelFacts(
                    role="value",
                    num_parameters=size,
                    kv_shape=(1, 1, 32),
                    vocab_size=512,
                    max_context=64,
                ),
            ),
            mapped=False,
        )


class Process:
    """An API process."""

    def __init__(self, settings: Settings, engines: Engines, store: Any) -> None:
        assert settings.run_dir is not None
        self.dead = False
        self.catalog = Catalog(engines.call)
        self.leases = Leases(settings.run_dir)
        self.lifecycle = Lifecycle(settings, self.catalog, self.leases, store, ["target"])

    async def accept(self, reference: str) -> tuple[Network, Lease]:
        """Do what a route does with a guided request."""
        await self.lifecycle.ensure(reference)
        network = self.catalog.find(reference)
        return network, self.leases.take([str(network)])

    async def die(self) -> None:
        """End as a killed process does: nothing is tidied up, but the kernel frees its locks."""
        file = self.leases._run_dir / self.leases.owner
        kept = file.read_bytes()
        await self.lifecycle.close()
        self.dead = True
        file.write_bytes(kept)


class Server:
    """API processes that share workers, a run directory and a store."""

    def __init__(self, directory: Path, *engines: list[Worker], **settings: Any) -> None:
        self.run_dir = directory / "run"
        (self.run_dir / "networks").mkdir(parents=True, exist_ok=True)
        self.store = Store(self.run_dir)
        self.engines = Engines(*(engines or ([Worker()],)))
        self.state_file = directory / "state.json"
        self.settings = Settings(
            networks={},
            key="",
            tokenizer_fingerprint="",
            store=directory / "store",
            run_dir=self.run_dir,
            **{"state_file": self.state_file, **settings},
        )
        self.processes: list[Process] = []

    @property
    def worker(self) -> Worker:
        return self.engines.workers[0]

    @property
    def state(self) -> State:
        return read_state(self.state_file) or State()

    @property
    def snapshots(self) -> dict[str, list[str]]:
        """name@version -> the files of its snapshot."""
        folders = (self.run_dir / "networks").iterdir()
        return {f.name.partition("-")[0]: sorted(g.name for g in f.iterdir()) for f in folders}

    async def start(self) -> Process:
        process = Process(self.settings, self.engines, self.store)
        await process.lifecycle.start()
        self.processes.append(process)
        return process

    async def close(self) -> None:
        for process in self.processes:
            if not process.dead:
                await process.lifecycle.close()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(*engines: list[Worker], **settings: Any) -> Server:
        servers.append(Server(tmp_path, *engines, **settings))
        servers[-1].store.folders.update(qa=(V1, 1000), json=(V2, 1000))
        return servers[-1]

    yield make
    for server in servers:
        await server.close()


@pytest.fixture
async def server(make: Callable[..., Server]) -> Server:
    return make()


async def until(what: Callable[[], Any]) -> None:
    """Wait until something holds; the limit only ends a test that would wait for ever."""
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.005)


async def loaded(process: Process, name: str, source: str | None = None) -> NetworkInfo:
    """Load a network, and wait for the end of it."""
    await process.lifecycle.load(name, source, "r")
    while True:
        info = await process.lifecycle.describe(name)
        if info.load is None or info.load.state == "failed":
            return info
        await asyncio.sleep(0.005)


async def refusal(work: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as refused:
        await work
    return refused.value


def held(server: Server) -> list[dict[str, str]]:
    """What each worker holds: name@version -> state."""
    return [
        {f"{name}@{version}": network["state"] for (name, version), network in w.networks.items()}
        for w in server.engines.workers
    ]


class TestLoading:
    async def test_a_network_is_loaded_from_the_store(self, server: Server) -> None:
        process = await server.start()
        info = await process.lifecycle.load("qa", None, "r")
        assert (info.state, info.version, info.in_store) == ("loading", None, True)
        assert info.load is not None and info.load.source == "qa"
        info = await loaded(process, "qa")
        assert (info.state, info.version, info.load) == ("ready", V1, None)
        assert str(process.catalog.find("qa")) == f"qa@{V1}"
        assert server.state.networks[0].model_dump() == {
            "name": "qa",
            "source": "qa",
            "version": V1,
        }

    async def test_only_what_api_processes_read_is_kept_of_its_files(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        await until(lambda: server.snapshots == {f"qa@{V1}": ["tokenizer.json"]})
        await process.lifecycle.unload("qa", False, "r")
        await until(lambda: server.snapshots == {})

    async def test_every_process_knows_at_its_next_request(self, server: Server) -> None:
        here, there = await server.start(), await server.start()
        await loaded(here, "qa")
        network, lease = await there.accept("qa")
        assert network.version == V1
        lease.release()

    async def test_a_replaced_version_serves_until_the_new_one_is_ready(
        self, server: Server
    ) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.store.folders["qa-next"] = (V3, 1000)
        versions: list[str] = []
        server.engines.before = lambda method: versions.append(process.catalog.find("qa").version)
        info = await loaded(process, "qa", "qa-next")
        assert (info.version, info.versions[0].source) == (V3, "qa-next")
        assert set(versions) == {V1, V3}
        assert server.state.networks[0].source == "qa-next"
        await until(lambda: held(server) == [{f"qa@{V3}": "ready"}])

    async def test_the_same_content_again_is_not_built_again(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.engines.calls.clear()
        assert (await loaded(process, "qa")).version == V1
        assert "trimtab_advance" not in server.engines.calls
        assert held(server) == [{f"qa@{V1}": "ready"}]
        await until(lambda: server.snapshots == {f"qa@{V1}": ["tokenizer.json"]})

    async def test_a_version_that_is_draining_is_taken_back(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        _, lease = await process.accept("qa")
        await process.lifecycle.unload("qa", False, "r")
        assert held(server) == [{f"qa@{V1}": "draining"}]
        await loaded(process, "qa")
        lease.release()
        await asyncio.sleep(3 * WATCH_SECONDS)
        assert held(server) == [{f"qa@{V1}": "ready"}]
        assert server.worker.unloaded == []

    async def test_a_failed_network_is_replaced_by_the_same_version(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.worker.networks["qa", V1].update(state="failed", reason="it threw")
        assert (await process.lifecycle.describe("qa")).state == "failed"
        info = await loaded(process, "qa")
        assert (info.state, info.reason) == ("ready", None)
        await until(lambda: server.snapshots == {f"qa@{V1}": ["tokenizer.json"]})
        assert len(list((server.run_dir / "networks").iterdir())) == 1

    @pytest.mark.parametrize(
        ("name", "source", "status", "message"),
        [
            ("../qa", None, 400, r"\[A-Za-z0-9\]"),
            ("qa", "../qa", 400, r"never a path"),
            ("qa", "/etc", 400, r"never a path"),
            ("a" * 65, None, 400, r"\{0,63\}"),
            ("target", "qa", 409, "the target's own name"),
            ("guard", None, 404, "no such folder"),
            ("bad", None, 400, "pickled weights"),
            ("huge", None, 507, "needs 20,000 bytes, but 8,000 of the 10,000 bytes"),
        ],
    )
    async def test_wrong_input_changes_nothing(
        self, server: Server, name: str, source: str | None, status: int, message: str
    ) -> None:
        server.store.broken["bad"] = "pickled weights"
        server.store.folders["huge"] = (V3, 10_000)
        process = await server.start()
        await loaded(process, "qa")
        before = server.state_file.read_text()
        error = await refusal(process.lifecycle.load(name, source, "r"))
        assert error.status == status
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(error.message)
        assert held(server) == [{f"qa@{V1}": "ready"}]
        assert server.worker.loads == {}
        assert server.store.staged == ["qa"], "weights were read of what was refused"
        assert server.state_file.read_text() == before

    async def test_what_does_not_fit_says_what_could_go(self, server: Server) -> None:
        server.store.folders["large"] = (V3, 3500)
        process = await server.start()
        for name in ("qa", "json"):
            await loaded(process, name)
        _, lease = await process.accept("qa")
        error = await refusal(process.lifecycle.load("large", None, "r"))
        assert error.message.endswith(
            "these could be unloaded: json (2,000 bytes, idle), qa (2,000 bytes, in use)"
        )
        lease.release()

    async def test_a_store_that_is_gone_is_unavailable(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.store.gone = True
        error = await refusal(process.lifecycle.load("qa", None, "r"))
        assert (error.status, error.message) == (503, "the store cannot be read")
        overview = await process.lifecycle.overview()
        assert overview.store.error == "the store cannot be read"
        assert [info.state for info in overview.data if info.versions] == ["ready"]

    async def test_without_a_store_nothing_is_loaded(self, make: Callable[..., Server]) -> None:
        server = make()
        server.settings = server.settings.model_copy(update={"store": None})
        process = await server.start()
        error = await refusal(process.lifecycle.load("qa", None, "r"))
        assert (error.status, "--value-network-dir" in error.message) == (409, True)

    async def test_a_folder_that_is_replaced_while_it_is_read_fails(self, server: Server) -> None:
        async def replace(source: str) -> None:
            server.store.folders["qa"] = (V3, 1500)

        process = await server.start()
        server.store.on_stage = replace
        info = await loaded(process, "qa")
        assert info.state == "failed" and "replaced meanwhile" in (info.reason or "")
        assert server.snapshots == {}

    @pytest.mark.parametrize("method", ["build", "advance", "warm_up"])
    async def test_a_failed_load_leaves_the_old_version_serving(
        self, server: Server, method: str
    ) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.store.folders["qa"] = (V3, 1000)
        server.worker.fails_at = f"trimtab_{method}"
        info = await loaded(process, "qa")
        assert (info.state, info.version) == ("ready", V1)
        assert info.load is not None
        assert (info.load.state, info.load.reason) == ("failed", "it does not run")
        await until(lambda: list(server.snapshots) == [f"qa@{V1}"])
        assert server.state.networks[0].version == V1
        server.worker.fails_at = None
        assert (await loaded(process, "qa")).version == V3

    async def test_what_crashes_the_stager_fails_that_load_only(self, server: Server) -> None:
        async def crash(source: str) -> None:
            raise StagingError("the child died")

        process = await server.start()
        server.store.on_stage = crash
        assert (await loaded(process, "qa")).reason == "the child died"
        server.store.on_stage = None
        assert (await loaded(process, "json")).state == "ready"

    async def test_one_network_is_built_at_a_time(self, server: Server) -> None:
        here, there = await server.start(), await server.start()
        steps: list[str] = []
        call = server.engines.call

        async def watched(method: str, *args: Any) -> list[list[Any]]:
            if method in ("trimtab_advance", "trimtab_warm_up"):
                steps.append(args[0])
            return await call(method, *args)

        here.catalog._call_workers = there.catalog._call_workers = watched  # type: ignore
        await asyncio.gather(loaded(here, "qa"), loaded(there, "json"))
        first, second = dict.fromkeys(steps)
        assert steps == [first] * steps.count(first) + [second] * steps.count(second)

    async def test_an_operator_who_leaves_does_not_cut_a_load_short(self, server: Server) -> None:
        process = await server.start()
        begun, go = asyncio.Event(), asyncio.Event()

        async def wait(method: str) -> None:
            if method == "trimtab_begin":
                begun.set()
                await go.wait()

        server.engines.before = wait
        asking = asyncio.create_task(process.lifecycle.load("qa", None, "r"))
        await begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        go.set()
        await until(lambda: process.catalog.ready())

    async def test_what_is_shown_as_ready_is_remembered(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed right after, the server has it again at its next start."""
        write = state_record.write_state

        def slowly(file: Path, state: State) -> None:
            time.sleep(0.1)
            write(file, state)

        monkeypatch.setattr(state_record, "write_state", slowly)
        process = await server.start()
        assert (await loaded(process, "qa")).state == "ready"
        assert [n.name for n in server.state.networks] == ["qa"]

    async def test_loads_are_counted_and_logged(
        self, server: Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        def counted(result: str) -> float:
            return REGISTRY.get_sample_value("trimtab_loads_total", {"result": result}) or 0.0

        process = await server.start()
        before = {result: counted(result) for result in ("ready", "failed", "refused")}
        with caplog.at_level(logging.INFO, "trimtab"):
            await process.lifecycle.load("qa", None, 'a"b\nc')
            await until(lambda: any(process.catalog.ready()))
            await until(lambda: server.snapshots.get(f"qa@{V1}") == ["tokenizer.json"])
            server.worker.fails_at = "trimtab_build"
            await loaded(process, "json")
            await refusal(process.lifecycle.load("guard", None, "r"))
        after = {result: counted(result) - before[result] for result in before}
        assert after == {"ready": 1, "failed": 1, "refused": 1}
        lines = [record.getMessage() for record in caplog.records]
        assert lines[0] == (r'value_network name=qa state=loading source=qa request_id="a\"b\nc"')
        assert lines[1].startswith(f"value_network name=qa state=ready version={V1} source=qa load")
        assert all("\n" not in line for line in lines)


class TestManyWorkers:
    """Two engines (data parallelism) of two workers (tensor parallelism)."""

    @pytest.fixture
    async def server(self, make: Callable[..., Server]) -> Server:
        return make([Worker(), Worker()], [Worker(), Worker()])

    async def test_a_load_reaches_all(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        assert held(server) == [{f"qa@{V1}": "ready"}] * 4

    @pytest.mark.parametrize("how", ["fails_at", "breaks_at"])
    @pytest.mark.parametrize("method", ["build", "advance", "warm_up"])
    @pytest.mark.parametrize("culprit", [0, 1, 2])
    async def test_one_that_cannot_load_it_leaves_none_with_it(
        self, server: Server, how: str, method: str, culprit: int
    ) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.store.folders["qa"] = (V3, 1000)
        setattr(server.engines.workers[culprit], how, f"trimtab_{method}")
        info = await loaded(process, "qa")
        assert (info.version, info.load and info.load.state) == (V1, "failed")
        assert held(server) == [{f"qa@{V1}": "ready"}] * 4
        await until(lambda: not any(worker.needed for worker in server.engines.workers))

    @pytest.mark.parametrize("culprit", [0, 1, 2])
    async def test_one_that_has_no_room_keeps_all_from_loading(
        self, server: Server, culprit: int
    ) -> None:
        server.engines.workers[culprit].total_bytes = 3000
        process = await server.start()
        await loaded(process, "qa")
        error = await refusal(process.lifecycle.load("json", None, "r"))
        assert "needs 2,000 bytes, but 1,000 of the 3,000 bytes" in error.message
        assert all(worker.loads == {} and not worker.needed for worker in server.engines.workers)

    @pytest.mark.parametrize("culprit", [0, 2])
    async def test_one_that_cannot_begin_keeps_all_from_it(
        self, server: Server, culprit: int
    ) -> None:
        server.engines.workers[culprit].breaks_at = "trimtab_begin"
        process = await server.start()
        error = await refusal(process.lifecycle.load("qa", None, "r"))
        assert (error.status, "it broke" in error.message) == (503, True)
        assert all(worker.loads == {} and not worker.needed for worker in server.engines.workers)

    @pytest.mark.parametrize("culprit", [0, 2])
    async def test_one_that_does_not_switch_switches_all_back(
        self, server: Server, culprit: int
    ) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.store.folders["qa"] = (V3, 1000)
        server.engines.workers[culprit].breaks_at = "trimtab_commit"
        info = await loaded(process, "qa")
        assert info.version == V1
        await until(lambda: held(server) == [{f"qa@{V1}": "ready"}] * 4)
        assert server.state.networks[0].version == V1
        assert (await loaded(process, "qa")).version == V3

    async def test_a_load_that_one_has_given_up_is_given_up_by_all(self, server: Server) -> None:
        process = await server.start()
        last = server.engines.workers[-1]

        def give_up(method: str) -> None:
            if method == "trimtab_warm_up":
                last.loads.clear()
                last.needed.clear()

        server.engines.before = give_up
        await process.lifecycle.load("qa", None, "r")
        await until(lambda: not any(worker.loads for worker in server.engines.workers))
        assert not any(worker.needed for worker in server.engines.workers)
        assert held(server) == [{}] * 4

    @pytest.mark.parametrize("culprit", [0, 3])
    async def test_a_version_that_failed_in_one_is_built_in_all(
        self, server: Server, culprit: int
    ) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.engines.workers[culprit].networks["qa", V1].update(state="failed", reason="it threw")
        info = await loaded(process, "qa")
        assert (info.state, info.reason) == ("ready", None)
        assert held(server) == [{f"qa@{V1}": "ready"}] * 4
        folders = {worker.networks["qa", V1]["folder"] for worker in server.engines.workers}
        (folder,) = folders
        assert Path(folder).exists()

    async def test_workers_that_cannot_answer_are_unavailable(self, server: Server) -> None:
        process = await server.start()
        server.engines.workers[3].breaks_at = "trimtab_networks"
        assert (await refusal(process.lifecycle.overview())).status == 503
        server.engines.workers[3].breaks_at = "trimtab_networks"
        assert (await refusal(process.lifecycle.describe("qa"))).status == 503


class TestUnloading:
    async def test_what_nobody_uses_is_gone_at_once(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        assert await process.lifecycle.unload("qa", False, "r") is None
        assert held(server) == [{}]
        info = await process.lifecycle.describe("qa")
        assert (info.state, info.withheld) == ("not_loaded", True)
        assert server.state == State(withheld=("qa",))

    async def test_running_requests_keep_their_version(self, server: Server) -> None:
        here, there = await server.start(), await server.start()
        await loaded(here, "qa")
        _, lease = await there.accept("qa")
        info = await here.lifecycle.unload("qa", False, "r")
        assert info is not None and info.state == "draining"
        assert info.versions[0].use.running_requests == 1
        for process in (here, there):
            error = await refusal(process.lifecycle.ensure("qa", "model"))
            assert (error.status, error.param) == (404, "model")
            assert "an operator has unloaded it" in error.message
        await asyncio.sleep(3 * WATCH_SECONDS)
        assert held(server) == [{f"qa@{V1}": "draining"}]
        assert there.catalog.resident(f"qa@{V1}").state == "draining"
        lease.release()
        await until(lambda: held(server) == [{}])

    async def test_a_request_between_the_poll_and_the_unloading_is_safe(
        self, server: Server
    ) -> None:
        """A process that has not heard of it yet gives out a lease; nothing is freed under it."""
        here, there = await server.start(), await server.start()
        await loaded(here, "qa")
        await there.lifecycle.ensure("qa")
        asked = asyncio.Event()
        answer = asyncio.Event()

        async def hold_back(method: str) -> None:
            if method == "trimtab_networks":
                asked.set()
                await answer.wait()

        server.engines.before = hold_back
        unloading = asyncio.create_task(here.lifecycle.unload("qa", False, "r"))
        await asked.wait()  # the other process asks what has changed, and waits
        lease = there.leases.take([str(there.catalog.find("qa"))])
        await unloading
        answer.set()
        await asyncio.sleep(3 * WATCH_SECONDS)
        assert held(server) == [{f"qa@{V1}": "draining"}]
        lease.release()
        await until(lambda: held(server) == [{}])

    async def test_a_version_can_be_unloaded_by_itself(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        assert (await refusal(process.lifecycle.unload(f"qa@{V3}", False, "r"))).status == 404
        assert await process.lifecycle.unload(f"qa@{V1}", False, "r") is None
        assert process.catalog.withheld == {"qa"}, "the next request would load it again"

    async def test_an_old_version_leaves_the_new_one_alone(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        _, lease = await process.accept("qa")
        server.store.folders["qa"] = (V3, 1000)
        await loaded(process, "qa")
        info = await process.lifecycle.unload(f"qa@{V1}", False, "r")
        assert info is not None and [v.version for v in info.versions] == [V1]
        assert process.catalog.find("qa").version == V3
        assert process.catalog.withheld == frozenset()
        lease.release()

    async def test_what_is_not_loaded_can_be_withheld(self, server: Server) -> None:
        process = await server.start()
        assert await process.lifecycle.unload("qa", False, "r") is None
        assert (await refusal(process.lifecycle.ensure("qa"))).status == 404
        assert (await refusal(process.lifecycle.unload("guard", False, "r"))).status == 404
        assert (await loaded(process, "qa")).state == "ready"
        assert process.catalog.withheld == frozenset()

    async def test_it_can_be_deleted_from_the_store(self, server: Server) -> None:
        server.store.folders["qa-next"] = (V3, 1000)
        process = await server.start()
        await loaded(process, "qa", "qa-next")
        assert await process.lifecycle.unload("qa", True, "r") is None
        assert sorted(server.store.folders) == ["json", "qa"]
        assert (await process.lifecycle.describe("qa")).withheld
        assert await process.lifecycle.unload("qa", True, "r") is None
        assert list(server.store.folders) == ["json"]
        assert (await refusal(process.lifecycle.describe("qa"))).status == 404

    async def test_what_cannot_be_deleted_is_not_unloaded(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.store.read_only = True
        error = await refusal(process.lifecycle.unload("qa", True, "r"))
        assert (error.status, "read-only" in error.message) == (409, True)
        assert held(server) == [{f"qa@{V1}": "ready"}]
        assert process.catalog.withheld == frozenset()

    async def test_a_failed_load_is_forgotten(self, server: Server) -> None:
        process = await server.start()
        server.worker.fails_at = "trimtab_build"
        await loaded(process, "qa")
        assert await process.lifecycle.unload("qa", False, "r") is None
        assert (await process.lifecycle.describe("qa")).load is None


class TestTwoOperators:
    @pytest.fixture
    async def here(self, server: Server) -> Process:
        return await server.start()

    @pytest.fixture
    async def there(self, server: Server, here: Process) -> Process:
        return await server.start()

    async def test_two_replaces_end_in_one_of_them(
        self, server: Server, here: Process, there: Process
    ) -> None:
        server.store.folders["qa-next"] = (V3, 1000)
        answers = await asyncio.gather(
            here.lifecycle.load("qa", "qa", "1"), there.lifecycle.load("qa", "qa-next", "2")
        )
        assert [info.name for info in answers] == ["qa", "qa"]
        await until(lambda: not server.worker.loads)
        await until(lambda: len(held(server)[0]) == 1)
        assert held(server) in ([{f"qa@{V1}": "ready"}], [{f"qa@{V3}": "ready"}])
        (remembered,) = server.state.networks
        assert held(server) == [{f"qa@{remembered.version}": "ready"}]
        await until(lambda: len(server.snapshots) == 1)

    @pytest.mark.parametrize("method", ["build", "advance", "warm_up", "commit"])
    async def test_delete_during_load_ends_it(
        self,
        server: Server,
        here: Process,
        there: Process,
        method: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO, "trimtab")
        deleting: list[asyncio.Task[Any]] = []

        def delete(called: str) -> None:
            if called == f"trimtab_{method}" and not deleting:
                work = there.lifecycle.unload("qa", False, "2")
                deleting.append(asyncio.create_task(work))

        server.engines.before = delete
        await here.lifecycle.load("qa", None, "1")
        await until(lambda: deleting)
        await deleting[0]
        await until(lambda: held(server) == [{}] and not server.worker.loads)
        assert server.state == State(withheld=("qa",))
        await until(lambda: server.snapshots == {})
        assert (await here.lifecycle.describe("qa")).state == "not_loaded"
        # The load may have been faster; it has not failed.
        assert "state=failed" not in caplog.text

    async def test_a_load_after_a_delete_wins(
        self, server: Server, here: Process, there: Process
    ) -> None:
        await loaded(here, "qa")
        _, lease = await here.accept("qa")
        await asyncio.gather(
            here.lifecycle.unload("qa", False, "1"), there.lifecycle.load("qa", None, "2")
        )
        lease.release()
        await until(lambda: not server.worker.loads)
        await asyncio.sleep(3 * WATCH_SECONDS)
        state = (await here.lifecycle.describe("qa")).state
        assert state == (await there.lifecycle.describe("qa")).state
        withheld = here.catalog.withheld == {"qa"}
        assert (state, withheld) in (("ready", False), ("not_loaded", True))

    async def test_many_at_once_leave_workers_and_state_file_agreed(
        self, server: Server, here: Process, there: Process
    ) -> None:
        server.store.folders["qa-next"] = (V3, 1000)
        work = [
            action
            for process in (here, there)
            for action in (
                process.lifecycle.load("qa", "qa", "r"),
                process.lifecycle.load("qa", "qa-next", "r"),
                process.lifecycle.unload("qa", False, "r"),
                process.lifecycle.load("json", None, "r"),
            )
        ]
        answers = await asyncio.gather(*work, return_exceptions=True)
        for answer in answers:
            assert not isinstance(answer, BaseException) or isinstance(answer, ApiError), answer
        await until(lambda: not server.worker.loads)
        await until(lambda: all(state == "ready" for state in held(server)[0].values()))
        await here.lifecycle.overview()  # a switch is remembered only after the workers made it
        remembered = {f"{n.name}@{n.version}" for n in server.state.networks}
        assert remembered == set(held(server)[0])
        assert ("qa" in server.state.withheld) == (not any("qa@" in ref for ref in remembered))


class TestDeath:
    async def test_leases_of_a_dead_process_hold_nothing(self, server: Server) -> None:
        here, there = await server.start(), await server.start()
        await loaded(here, "qa")
        await there.accept("qa")
        await here.lifecycle.unload("qa", False, "r")
        assert held(server) == [{f"qa@{V1}": "draining"}]
        await there.die()
        await until(lambda: held(server) == [{}])

    async def test_a_load_whose_process_died_is_ended(self, server: Server) -> None:
        here, there = await server.start(), await server.start()
        staged = asyncio.Event()

        async def hang(source: str) -> None:
            (server.run_dir / "networks" / f"qa@{V1}-ff").mkdir()
            staged.set()
            await asyncio.Event().wait()

        server.store.on_stage = hang
        await there.lifecycle.load("qa", None, "r")
        await staged.wait()
        await there.die()
        await until(lambda: server.worker.loads and not server.worker.needed)
        info = await here.lifecycle.describe("qa")
        assert info.load is not None
        assert (info.load.state, "has died" in (info.load.reason or "")) == ("failed", True)
        await until(lambda: server.snapshots == {})
        server.store.on_stage = None
        assert (await loaded(here, "qa")).state == "ready"

    async def test_who_dies_while_building_lets_others_build(self, server: Server) -> None:
        here, there = await server.start(), await server.start()
        building = asyncio.Event()

        async def hang(method: str) -> None:
            if method == "trimtab_advance":
                building.set()
                await asyncio.Event().wait()

        server.engines.before = hang
        await there.lifecycle.load("qa", None, "r")
        await building.wait()
        await here.lifecycle.load("json", None, "r")
        await there.die()
        server.engines.before = lambda method: None
        await until(lambda: held(server) == [{f"json@{V2}": "ready"}])

    async def test_who_dies_between_retiring_and_telling_is_found_out(self, server: Server) -> None:
        here, there = await server.start(), await server.start()
        await loaded(here, "qa")
        await there.lifecycle.ensure("qa")
        there.leases._epoch[0] += 1
        for worker in server.engines.workers:
            worker.retire("qa", False)
        await there.die()
        await until(lambda: held(server) == [{}])
        assert here.catalog.versions("qa") == []


class TestOnDemand:
    async def test_a_request_loads_what_is_in_the_store(self, server: Server) -> None:
        process = await server.start()
        network, lease = await process.accept("qa")
        assert (network.version, network.state) == (V1, "ready")
        lease.release()
        assert [n.name for n in server.state.networks] == ["qa"]

    async def test_many_requests_cause_one_load(self, server: Server) -> None:
        processes = [await server.start() for _ in range(2)]
        accepted = await asyncio.gather(
            *(process.accept("qa") for process in processes for _ in range(20))
        )
        assert {str(network) for network, _ in accepted} == {f"qa@{V1}"}
        assert server.store.staged == ["qa"], "weights were read more than once"
        assert server.engines.calls.count("trimtab_commit") == 1
        assert processes[0].leases.count(f"qa@{V1}") == 40

    async def test_resident_networks_cost_no_remote_call(self, server: Server) -> None:
        process = await server.start()
        await process.accept("qa")
        server.engines.calls.clear()
        server.store.inspected.clear()
        for _ in range(100):
            await process.lifecycle.ensure("qa")
        assert (server.engines.calls, server.store.inspected) == ([], [])

    async def test_a_client_that_leaves_does_not_end_the_load(self, server: Server) -> None:
        process = await server.start()
        started, go = asyncio.Event(), asyncio.Event()

        async def wait(source: str) -> None:
            started.set()
            await go.wait()

        server.store.on_stage = wait
        impatient = asyncio.create_task(process.accept("qa"))
        patient = asyncio.create_task(process.accept("qa"))
        await started.wait()
        impatient.cancel()
        go.set()
        network, _ = await patient
        assert network.version == V1
        assert server.store.staged == ["qa"]

    async def test_who_waits_too_long_is_told_when_to_come_back(
        self, make: Callable[..., Server]
    ) -> None:
        server = make(load_timeout=0.01)
        process = await server.start()
        go = asyncio.Event()

        async def wait(source: str) -> None:
            await go.wait()

        server.store.on_stage = wait
        error = await refusal(process.accept("qa"))
        assert (error.status, "still loading" in error.message) == (503, True)
        assert int(error.headers["Retry-After"]) > 0
        go.set()
        await until(lambda: process.catalog.ready())
        await process.accept("qa")
        assert server.store.staged == ["qa"]

    async def test_it_waits_for_an_operators_load(self, server: Server) -> None:
        here, there = await server.start(), await server.start()
        server.store.folders["qa-next"] = (V3, 1000)
        await here.lifecycle.load("qa", "qa-next", "r")
        network, _ = await there.accept("qa")
        assert network.version == V3
        assert server.store.staged == ["qa-next"]

    @pytest.mark.parametrize("how", ["withheld", "not on demand", "not in the store"])
    async def test_an_operators_load_is_waited_for_where_requests_load_nothing(
        self, make: Callable[..., Server], how: str
    ) -> None:
        server = make(load_on_demand=how != "not on demand")
        process = await server.start()
        name = "answers" if how == "not in the store" else "qa"
        if how == "withheld":
            await process.lifecycle.unload("qa", False, "r")
        await process.lifecycle.load(name, "qa", "r")
        network, _ = await process.accept(name)
        assert network.version == V1
        assert server.store.staged == ["qa"]

    async def test_an_operators_load_that_fails_leaves_a_network_withheld(
        self, server: Server
    ) -> None:
        process = await server.start()
        await process.lifecycle.unload("qa", False, "r")
        server.worker.fails_at = "trimtab_build"
        await process.lifecycle.load("qa", None, "r")
        error = await refusal(process.lifecycle.ensure("qa"))
        assert (error.status, "an operator has unloaded it" in error.message) == (404, True)
        assert server.store.staged == ["qa"]

    async def test_a_load_that_an_operator_ends_is_not_begun_again(self, server: Server) -> None:
        process = await server.start()
        staging, go = asyncio.Event(), asyncio.Event()

        async def wait(source: str) -> None:
            staging.set()
            await go.wait()

        server.store.on_stage = wait
        asking = asyncio.create_task(refusal(process.lifecycle.ensure("qa")))
        await staging.wait()
        await process.lifecycle.unload("qa", False, "r")
        go.set()
        assert "an operator has unloaded it" in (await asking).message
        assert server.store.staged == ["qa"]

    async def test_workers_that_fail_while_a_request_waits_are_asked_again(
        self, server: Server
    ) -> None:
        here, there = await server.start(), await server.start()
        staging, go = asyncio.Event(), asyncio.Event()

        async def wait(source: str) -> None:
            staging.set()
            await go.wait()

        server.store.on_stage = wait
        await here.lifecycle.load("qa", None, "r")
        await staging.wait()
        accepting = asyncio.create_task(there.accept("qa"))
        await asyncio.sleep(3 * WATCH_SECONDS)
        failures: list[str] = []
        catch_up = there.lifecycle._changes.catch_up

        async def failing() -> None:
            if len(failures) < 5:
                failures.append("")
                raise WorkerError("no answer")
            await catch_up()

        there.lifecycle._changes.catch_up = failing  # type: ignore[method-assign]
        await until(lambda: len(failures) == 5)
        go.set()
        assert (await accepting)[0].version == V1

    async def test_what_came_from_another_folder_is_tried_from_there(self, server: Server) -> None:
        """A folder of its own name is another network."""
        server.store.folders["answers"] = (V3, 1000)
        failed = {"id": "s", "name": "answers", "source": "qa", "owner": "", "started_at": 0.0}
        server.worker.loads["s"] = {**failed, "state": "failed", "reason": "did not fit"}
        process = await server.start()
        error = await refusal(process.lifecycle.ensure(f"answers@{V3}"))
        assert (error.status, server.store.staged) == (503, [])
        del server.store.folders["answers"]
        await process.lifecycle.overview()
        assert process.lifecycle.offers("answers")
        network, _ = await process.accept("answers")
        assert (network.version, network.source) == (V1, "qa")

    async def test_it_can_be_turned_off(self, make: Callable[..., Server]) -> None:
        server = make(load_on_demand=False)
        process = await server.start()
        error = await refusal(process.lifecycle.ensure("qa", "model"))
        assert (error.status, "not loaded on this server" in error.message) == (404, True)
        assert not process.lifecycle.offers("qa")

    async def test_an_unknown_name_is_left_to_who_resolves_it(self, server: Server) -> None:
        process = await server.start()
        server.store.folders["target"] = (V3, 1000)
        for reference in ("guard", "target", "../qa", "", "qa@", "qa@latest", f"qa@{V1}@"):
            await process.lifecycle.ensure(reference)
        assert server.engines.calls == ["trimtab_attach"]
        assert not process.lifecycle.offers("target")
        assert not process.lifecycle.offers(f"target@{V3}")
        assert process.lifecycle.offers("qa") and process.lifecycle.offers(f"qa@{V1}")
        assert not process.lifecycle.offers("guard")

    async def test_a_network_published_while_the_server_runs_appears(self, server: Server) -> None:
        process = await server.start()
        await process.lifecycle.ensure("guard")
        server.store.folders["guard"] = (V3, 1000)
        network, _ = await process.accept("guard")
        assert network.version == V3

    async def test_a_store_that_hangs_keeps_no_one_waiting(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_listing, "STORE_PATIENCE_SECONDS", 0.01)
        process = await server.start()
        await loaded(process, "qa")

        async def hang() -> list[str]:
            await asyncio.Event().wait()
            return []

        monkeypatch.setattr(server.store, "list", hang)
        await process.accept("qa")
        await asyncio.gather(*(process.lifecycle.ensure("guard") for _ in range(5)))
        overview = await process.lifecycle.overview()
        assert overview.store.error == "the store does not answer"
        assert process.catalog.find("qa")

    async def test_many_unknown_names_list_the_store_together(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process = await server.start()
        listed: list[int] = []

        async def listing() -> list[str]:
            listed.append(1)
            await asyncio.sleep(0.01)
            return []

        monkeypatch.setattr(server.store, "list", listing)
        await asyncio.gather(*(process.lifecycle.ensure("guard") for _ in range(50)))
        assert len(listed) <= 2

    async def test_a_listing_that_had_begun_before_is_not_trusted(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process = await server.start()
        begun, go = asyncio.Event(), asyncio.Event()
        list_now = server.store.list

        async def slowly() -> list[str]:
            names = await list_now()
            begun.set()
            await go.wait()
            return names

        monkeypatch.setattr(server.store, "list", slowly)
        asking = asyncio.create_task(process.lifecycle.ensure("unknown"))
        await begun.wait()
        server.store.folders["guard"] = (V3, 1000)
        accepting = asyncio.create_task(process.accept("guard"))
        await asyncio.sleep(0)
        go.set()
        assert (await accepting)[0].version == V3
        await asking

    async def test_a_pinned_version_is_loaded_if_the_store_has_it(self, server: Server) -> None:
        process = await server.start()
        for _ in range(3):
            error = await refusal(process.lifecycle.ensure(f"qa@{V3}", "model"))
            assert (error.status, error.param) == (404, "model")
            assert f"there is: {V1}" in error.message
        error = await refusal(process.lifecycle.ensure("qa@feedbeef", "model"))
        assert (error.status, held(server), server.worker.loads) == (404, [{}], {})
        assert server.store.staged == ["qa"], "weights were read for every request"
        assert server.snapshots == {}
        network, _ = await process.accept(f"qa@{V1}")
        assert network.version == V1

    async def test_a_pinned_version_that_is_not_there_keeps_no_other_request_waiting_in_vain(
        self, server: Server
    ) -> None:
        here, there = await server.start(), await server.start()
        staging, go = asyncio.Event(), asyncio.Event()

        async def wait(source: str) -> None:
            staging.set()
            await go.wait()

        server.store.on_stage = wait
        pinned = [
            asyncio.create_task(refusal(here.lifecycle.ensure(f"qa@{version}")))
            for version in (V2, V3)
        ]
        await staging.wait()
        others = [asyncio.create_task(process.accept("qa")) for process in (here, there)]
        await asyncio.sleep(3 * WATCH_SECONDS)
        go.set()
        assert {network.version for network, _ in await asyncio.gather(*others)} == {V1}
        await asyncio.wait(pinned)
        assert len(server.store.staged) == 2, "each version that was wanted was read for"

    async def test_a_pinned_version_does_not_replace_what_is_loaded(self, server: Server) -> None:
        process = await server.start()
        await loaded(process, "qa")
        server.store.folders["qa"] = (V3, 1000)
        await process.lifecycle.ensure(f"qa@{V3}")
        assert held(server) == [{f"qa@{V1}": "ready"}]

    async def test_what_is_broken_is_not_tried_again_for_every_request(
        self, server: Server
    ) -> None:
        """vLLM #41482: weights were read from disk again for every request."""
        process = await server.start()
        server.store.broken["bad"] = "pickled weights"
        server.worker.fails_at = "trimtab_build"
        for name in ("bad", "qa"):
            for _ in range(3):
                error = await refusal(process.lifecycle.ensure(name, "model"))
                assert (error.status, error.param) == (503, "model")
                assert "/srv" not in error.message, "clients learn of the server's folders"
                assert 0 < int(error.headers["Retry-After"]) <= RETRY_SECONDS
        assert (server.store.inspected, server.store.staged) == (["bad", "qa"], ["qa"])
        server.worker.fails_at = None
        await loaded(process, "qa")
        await process.accept("qa")

    @pytest.mark.parametrize("cause", ["the store", "the workers"])
    async def test_clients_do_not_learn_why_nothing_can_be_loaded(
        self, server: Server, monkeypatch: pytest.MonkeyPatch, cause: str
    ) -> None:
        process = await server.start()
        if cause == "the workers":
            server.worker.breaks_at = "trimtab_begin"
        else:

            async def inspect(source: str, name: str) -> NetworkFacts:
                raise StagingError("/srv/store cannot be read")

            monkeypatch.setattr(server.store, "inspect", inspect)
        error = await refusal(process.lifecycle.ensure("qa", "model"))
        assert (error.status, error.param) == (503, "model")
        assert "/srv" not in error.message and "it broke" not in error.message
        assert int(error.headers["Retry-After"]) > 0

    async def test_what_does_not_fit_is_said(self, server: Server) -> None:
        server.store.folders["huge"] = (V3, 10_000)
        process = await server.start()
        await loaded(process, "qa")
        error = await refusal(process.lifecycle.ensure("huge", "model"))
        assert (error.status, error.param) == (507, "model")
        assert "needs 20,000 bytes" in error.message
        assert "could be unloaded" not in error.message, "clients learn of others' networks"


class TestMakingRoom:
    @pytest.fixture
    async def server(self, make: Callable[..., Server]) -> Server:
        server = make(evict_idle=True)
        for number in range(5):
            server.store.folders[f"n{number}"] = (f"0000000{number}", 1000)
        return server

    async def fill(self, server: Server, process: Process) -> None:
        for number in range(5):
            await loaded(process, f"n{number}")
            server.worker.networks[f"n{number}", f"0000000{number}"]["last_used"] = 10.0 - number
        await process.lifecycle.overview()

    async def test_the_least_recently_used_idle_network_goes(self, server: Server) -> None:
        process = await server.start()
        await self.fill(server, process)
        _, lease = await process.accept("n4")
        assert (await loaded(process, "qa")).state == "ready"
        assert server.worker.unloaded == ["n3@00000003"]
        assert "n3" not in process.catalog.withheld, "a request may load it again"
        assert {n.name for n in server.state.networks} == {"n0", "n1", "n2", "n4", "qa"}
        lease.release()

    async def test_no_more_than_needed_goes_and_nothing_in_vain(self, server: Server) -> None:
        process = await server.start()
        await self.fill(server, process)
        server.store.folders.update(large=(V3, 2000), huge=(V3, 6000))
        assert (await refusal(process.lifecycle.load("huge", None, "r"))).status == 507
        assert server.worker.unloaded == []
        await loaded(process, "large")
        assert server.worker.unloaded == ["n4@00000004", "n3@00000003"]

    async def test_networks_in_use_stay(self, server: Server) -> None:
        here, there = await server.start(), await server.start()
        await self.fill(server, here)
        for number in range(5):
            await there.accept(f"n{number}")
        assert (await refusal(here.lifecycle.load("qa", None, "r"))).status == 507
        assert server.worker.unloaded == []

    async def test_what_a_flag_gave_stays(self, server: Server) -> None:
        flagged = status("flag", version=V3, source=None, weights_bytes=9000)
        server.worker.networks["flag", V3] = flagged
        process = await server.start()
        error = await refusal(process.lifecycle.load("qa", None, "r"))
        assert (error.status, "could be unloaded" in error.message) == (507, False)

    async def test_what_came_from_another_folder_stays(self, server: Server) -> None:
        """A request would load it again from the folder of its name, which is another network."""
        process = await server.start()
        for number in range(5):
            await loaded(process, f"m{number}", f"n{number}")
        error = await refusal(process.lifecycle.load("qa", None, "r"))
        assert (error.status, server.worker.unloaded) == (507, [])
        assert "these could be unloaded: m4" in error.message

    async def test_a_version_that_may_not_be_there_is_no_reason_to_unload_another(
        self, server: Server
    ) -> None:
        process = await server.start()
        await self.fill(server, process)
        assert (await refusal(process.accept(f"qa@{V3}"))).status == 507
        assert server.worker.unloaded == []
        assert (await process.accept("qa"))[0].version == V1

    async def test_a_store_that_is_slow_leaves_time_to_make_room(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loader, "EVICTION_SECONDS", 0.2)
        process = await server.start()
        await self.fill(server, process)
        inspect = server.store.inspect

        async def slowly(source: str, name: str) -> NetworkFacts:
            await asyncio.sleep(0.3)
            return await inspect(source, name)

        monkeypatch.setattr(server.store, "inspect", slowly)
        assert (await loaded(process, "qa")).state == "ready"

    async def test_a_request_makes_room_too(self, server: Server) -> None:
        process = await server.start()
        await self.fill(server, process)
        await process.accept("qa")
        assert server.worker.unloaded == ["n4@00000004"]


class TestStart:
    @pytest.fixture
    async def server(self, make: Callable[..., Server]) -> Server:
        server = make()
        folder = server.run_dir / "networks" / f"qa@{V1}-00"
        folder.mkdir()
        for file in ("model.safetensors", "tokenizer.json"):
            (folder / file).touch()
        worker = server.worker
        worker.networks["qa", V1] = status("qa", version=V1, folder=str(folder))
        worker.networks["flag", V2] = status("flag", version=V2, source=None)
        worker.withheld.add("json")
        return server

    async def test_weights_of_what_is_resident_are_deleted(self, server: Server) -> None:
        await server.start()
        await server.start()
        await until(lambda: server.snapshots == {f"qa@{V1}": ["tokenizer.json"]})

    async def test_folders_elsewhere_are_never_deleted(
        self, server: Server, tmp_path: Path
    ) -> None:
        elsewhere = tmp_path / "store" / "flag"
        elsewhere.mkdir(parents=True)
        (elsewhere / "model.safetensors").touch()
        server.worker.networks["flag", V2]["folder"] = str(elsewhere)
        process = await server.start()
        await until(lambda: server.snapshots == {f"qa@{V1}": ["tokenizer.json"]})
        await process.lifecycle.unload("flag", False, "r")
        assert (elsewhere / "model.safetensors").exists()

    async def test_what_is_resident_is_remembered(self, server: Server) -> None:
        await server.start()
        assert [n.name for n in server.state.networks] == ["qa"]
        assert server.state.withheld == ("json",)

    async def test_what_could_not_be_loaded_is_not_forgotten(self, server: Server) -> None:
        remembered = {"name": "guard", "source": "guard-2", "version": V3}
        other = {"name": "gone", "source": "gone", "version": V3}
        state = {"format_version": 1, "networks": [remembered, other], "withheld": []}
        server.state_file.write_text(json.dumps(state))
        failed = {"id": "s", "name": "guard", "source": "guard-2", "owner": "", "started_at": 0.0}
        server.worker.loads["s"] = {**failed, "state": "failed", "reason": "truncated"}
        process = await server.start()
        assert {n.name: n.source for n in server.state.networks} == {
            "qa": "qa",
            "guard": "guard-2",
        }
        info = await process.lifecycle.describe("guard")
        assert (info.state, info.reason) == ("failed", "truncated")

    async def test_what_is_tried_again_is_not_forgotten_meanwhile(self, server: Server) -> None:
        remembered = {"name": "guard", "source": "guard", "version": V3}
        state = {"format_version": 1, "networks": [remembered], "withheld": []}
        server.state_file.write_text(json.dumps(state))
        failed = {"id": "s", "name": "guard", "source": "guard", "owner": "", "started_at": 0.0}
        server.worker.loads["s"] = {**failed, "state": "failed", "reason": "did not fit"}
        server.store.folders["guard"] = (V3, 1000)

        async def wait(source: str) -> None:
            await asyncio.Event().wait()

        process = await server.start()
        server.store.on_stage = wait
        await process.lifecycle.load("guard", None, "r")
        await process.lifecycle.unload("qa", False, "r")
        assert [n.name for n in server.state.networks] == ["guard"]

    async def test_a_state_file_that_cannot_be_written_is_shown(
        self, server: Server, tmp_path: Path
    ) -> None:
        blocked = tmp_path / "file"
        blocked.touch()
        settings = server.settings.model_copy(update={"state_file": blocked / "state.json"})
        server.settings = settings
        process = await server.start()
        overview = await process.lifecycle.overview()
        assert overview.state_file.path == str(blocked / "state.json")
        assert "cannot be written" in (overview.state_file.error or "")
        assert (await loaded(process, "json")).state == "ready"

    async def test_everything_is_listed(self, server: Server) -> None:
        server.store.folders["guard"] = (V3, 1000)
        process = await server.start()
        overview = await process.lifecycle.overview()
        shown = {info.name: (info.state, info.in_store, info.withheld) for info in overview.data}
        assert shown == {
            "flag": ("ready", False, False),
            "guard": ("not_loaded", True, False),
            "json": ("not_loaded", True, True),
            "qa": ("ready", True, False),
        }
        assert overview.memory.total_bytes == 10_000
        assert overview.store.model_dump() == {"configured": True, "error": None}
        statuses = await process.lifecycle.worker_status()
        assert statuses[0][0]["networks"][0]["name"] == "qa"
