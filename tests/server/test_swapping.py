"""Value networks come and go, over HTTP, on a real engine, while others generate.

Each test brings networks of its own; `steady` stays, and guides half of those who generate.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.models import (
    OTHER_TEXT,
    TEXT,
    make_mapped_network,
    make_model,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)
from tests.server.conftest import SMALL
from tests.server.generating import Answer, Generating, Request, complete
from tests.server.operator import LoadFailed, Operator
from tests.server.serving import TARGET, Served, serving
from value_models.publish import publish

pytestmark = pytest.mark.alone  # requests must outlast what is done meanwhile

STREAMS = 16
CYCLES = 100
MEASURED_CYCLES = 30
MAX_GROWTH = 16 << 20
"""Bytes that the workers may grow in the measured cycles, whose networks have several times that.
Allocators do not give back all that they are given back."""
CYCLED: dict[str, Any] = {
    "hidden_size": 256,
    "layers": 1,
    "heads": 2,
    "kv_heads": 2,
    "max_position_embeddings": 2048,
}
"""A network of 1 MB or more, so that any that is not freed shows."""
LONG = 1600
"""Tokens of a request that still runs when a test has done several things in the meantime."""
PROMPTS = [line for line in TEXT.splitlines() if line]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swapping")


@pytest.fixture(scope="module")
def store(directory: Path) -> Path:
    """A store that holds `steady`."""
    make_network(directory / "store" / "steady", **SMALL, seed=1, default_scale=0.5)
    return directory / "store"


@pytest.fixture(scope="module")
def target(directory: Path) -> Path:
    return make_model(directory / "target", vocab_size=544, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def swapping(directory: Path, target: Path, store: Path) -> Iterator[Served]:
    # Caches so small that all of their memory is in use soon: what grows then is a leak.
    caches = ("--kv-cache-memory-bytes", 16 << 20, "--value-memory-gb", 0.0625)
    flags = ("--value-network-dir", store, "--max-model-len", 2048, *caches)
    with serving(directory / "server", target, *flags) as served:
        yield served


@pytest.fixture
def client(swapping: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=swapping.url, timeout=60) as client:
        yield client


@pytest.fixture
def operator(client: httpx.Client) -> Operator:
    return Operator(client)


def asking(model: str, prompt: str = PROMPTS[0], max_tokens: int = 24) -> Request:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def requests_of_many() -> list[Request]:
    """Every other one is guided, and no two are alike."""
    return [
        asking("steady" if index % 2 else TARGET, PROMPTS[index % len(PROMPTS)][: 20 + index], 40)
        for index in range(STREAMS)
    ]


def wait_until(condition: Callable[[], Any]) -> Any:
    """Return what `condition` does as soon as that is true; fails after far too long."""
    deadline = time.monotonic() + 30
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.02)
    return result


@contextmanager
def running(url: str, request: Request, num_clients: int) -> Iterator[list[Future[Answer]]]:
    """Have clients send `request`; the body runs when each of them has got a token."""
    tokens = [threading.Event() for _ in range(num_clients)]

    def stream(token: threading.Event) -> Answer:
        with httpx.Client(base_url=url, timeout=None) as client:
            return complete(client, request, token.set)

    with ThreadPoolExecutor(num_clients) as pool:
        answers = [pool.submit(stream, token) for token in tokens]
        wait_until(lambda: all(token.is_set() for token in tokens))
        yield answers


def error_of(response: httpx.Response) -> Any:
    """The error in an answer, which has the shape of all errors."""
    fields = response.json()["error"]
    assert set(fields) == {"message", "type", "param", "code"}
    assert fields["code"] == response.status_code
    return fields


def workers_memory(served: Served) -> int:
    """Bytes that belong to the workers alone."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    workers = [child for child in children if "Worker" in child.name() + " ".join(child.cmdline())]
    assert workers
    return sum(worker.memory_full_info().uss for worker in workers)


def loads_that_ended(client: httpx.Client) -> float:
    metrics = client.get("/metrics").text
    return sum(
        float(count)
        for count in re.findall(
            r'^trimtab_loads_total\{[^}]*result="ready"[^}]*\} (\S+)', metrics, re.M
        )
    )


def test_100_swaps_under_load_change_no_token_and_leave_nothing_behind(
    swapping: Served, store: Path, client: httpx.Client, operator: Operator
) -> None:
    make_network(store / "cycled", **CYCLED, seed=2)
    make_network(store / "cycled-next", **CYCLED, seed=3)

    def cycle() -> None:
        operator.swap("cycled")
        operator.swap("cycled", "cycled-next")
        operator.unload("cycled")

    snapshots = swapping.run_dir / "networks"
    with Generating(swapping.url, requests_of_many()) as generating:
        for number in range(1, CYCLES + 1):
            cycle()
            assert not generating.failures
            if number == 1:
                memory = operator.overview()["memory"]
        assert operator.overview()["memory"] == memory
        answers = generating.num_answers
    assert answers > 2 * STREAMS
    wait_until(lambda: [folder.name[:6] for folder in snapshots.iterdir()] == ["steady"])

    # Nobody generates now: what vLLM takes into use for the first time would count as well.
    before = workers_memory(swapping)
    for _ in range(MEASURED_CYCLES):
        cycle()
    assert workers_memory(swapping) - before < MAX_GROWTH


class TestWhileOthersGenerate:
    """What users of run-time adapters report of other servers."""

    def test_a_load_disturbs_nobody(
        self, swapping: Served, store: Path, client: httpx.Client, operator: Operator
    ) -> None:
        make_network(store / "joining", **CYCLED, seed=4)
        with Generating(swapping.url, requests_of_many()) as generating:
            wait_until(lambda: generating.num_answers)
            info = operator.load("joining")
            guided = complete(client, asking("joining"))
            seen = generating.num_answers
            wait_until(lambda: generating.num_answers > seen + STREAMS)
        assert guided.networks == f"joining@{info['version']};scale=1.0"
        assert guided.token_ids != complete(client, asking(TARGET)).token_ids
        operator.unload("joining")

    def test_a_running_request_keeps_the_version_it_began_with(
        self, swapping: Served, store: Path, client: httpx.Client, operator: Operator
    ) -> None:
        make_network(store / "first", **CYCLED, seed=5)
        make_network(store / "second", **CYCLED, seed=6)
        old = operator.load("swapped", "first")["version"]
        expected_old = complete(client, asking("swapped", max_tokens=LONG))
        assert expected_old.networks == f"swapped@{old};scale=1.0"
        operator.load("other", "second")
        expected_new = complete(client, asking("other", max_tokens=24))

        with running(swapping.url, asking("swapped", max_tokens=LONG), 4) as answers:
            new = operator.load("swapped", "second")["version"]
            assert new != old
            answer = complete(client, asking("swapped", max_tokens=24))
            assert answer.networks == f"swapped@{new};scale=1.0"
            assert answer.token_ids == expected_new.token_ids
            # Else the replacement was not one of a version in use, and nothing was tested.
            states = {v["version"]: v["state"] for v in operator.describe("swapped")["versions"]}
            assert states == {new: "ready", old: "draining"}
            pinned = client.post("/v1/completions", json=asking(f"swapped@{old}"))
            assert pinned.status_code == 404
            assert all(answer.result() == expected_old for answer in answers)
        wait_until(lambda: len(operator.describe("swapped")["versions"]) == 1)
        again = complete(client, asking("swapped", max_tokens=24))
        assert again.token_ids == expected_new.token_ids
        operator.unload("swapped")
        operator.unload("other")

    def test_an_unload_lets_running_requests_finish(
        self, swapping: Served, store: Path, client: httpx.Client, operator: Operator
    ) -> None:
        make_network(store / "leaving", **CYCLED, seed=7)
        operator.load("leaving")
        request = asking("leaving", max_tokens=LONG)
        expected = complete(client, request)
        with running(swapping.url, request, 4) as answers:
            response = operator.delete("leaving")
            assert (response.status_code, response.json()["state"]) == (202, "draining")
            assert client.post("/v1/completions", json=request).status_code == 404
            assert all(answer.result() == expected for answer in answers)
        wait_until(lambda: not operator.describe("leaving")["versions"])


class TestOneLoad:
    def test_a_running_request_is_counted_once(
        self, swapping: Served, store: Path, operator: Operator
    ) -> None:
        make_network(store / "counted", **CYCLED, seed=18)
        operator.load("counted")
        with running(swapping.url, asking("counted", max_tokens=LONG), 1) as (answer,):
            (version,) = operator.describe("counted")["versions"]
            assert not answer.done()
            assert version["use"]["running_requests"] == 1
        operator.unload("counted")

    def test_weights_are_never_read_again(
        self, swapping: Served, store: Path, client: httpx.Client, operator: Operator
    ) -> None:
        make_network(store / "unplugged", **SMALL, seed=8)
        operator.load("unplugged")
        expected = complete(client, asking("unplugged"))
        shutil.rmtree(store / "unplugged")
        snapshots = swapping.run_dir / "networks"
        wait_until(lambda: not list(snapshots.glob("*/*.safetensors")))
        for prompt in PROMPTS[1:4]:
            complete(client, asking("unplugged", prompt))
        assert complete(client, asking("unplugged")) == expected
        assert operator.describe("unplugged")["in_store"] is False
        operator.unload("unplugged")
        assert client.post("/v1/completions", json=asking("unplugged")).status_code == 404

    def test_requests_for_the_same_network_load_it_once(
        self, swapping: Served, store: Path, client: httpx.Client, operator: Operator
    ) -> None:
        make_network(store / "wanted", **SMALL, seed=10)
        wait_until(lambda: operator.describe("wanted"))
        before = loads_that_ended(client)
        with ThreadPoolExecutor(8) as pool:

            def ask(_: int) -> Any:
                with httpx.Client(base_url=swapping.url, timeout=None) as own:
                    return complete(own, asking("wanted"))

            answers = list(pool.map(ask, range(8)))
        assert answers[0].networks is not None and answers[0].networks.startswith("wanted@")
        assert all(answer == answers[0] for answer in answers)
        assert loads_that_ended(client) == before + 1
        operator.unload("wanted")

    def test_a_mapped_network_is_swapped_too(
        self, store: Path, client: httpx.Client, operator: Operator
    ) -> None:
        make_mapped_network(
            store / "mapped", make_tokenizer(), **SMALL, tokenizer=make_sentencepiece_tokenizer()
        )
        first = operator.load("mapped")
        assert first["versions"][0]["mapped"]
        expected = complete(client, asking("mapped"))
        assert expected.token_ids != complete(client, asking(TARGET)).token_ids
        operator.unload("mapped")
        operator.load("mapped")
        assert complete(client, asking("mapped")) == expected
        operator.unload("mapped")


class TestTheStore:
    def test_what_is_published_appears_and_what_is_published_again_replaces(
        self, store: Path, tmp_path: Path, client: httpx.Client, operator: Operator
    ) -> None:
        assert operator.describe("news") is None
        old = publish(make_network(tmp_path / "old", **SMALL, seed=11), store, "news").version
        info = wait_until(lambda: operator.describe("news"))
        assert (info["state"], info["in_store"], info["versions"]) == ("not_loaded", True, [])
        listed = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert "news" not in listed and "steady" in listed
        assert complete(client, asking("news")).networks == f"news@{old};scale=1.0"
        listed = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert "news" in listed

        new = publish(make_network(tmp_path / "new", **SMALL, seed=12), store, "news").version
        assert complete(client, asking("news")).networks == f"news@{old};scale=1.0"
        operator.swap("news")
        assert complete(client, asking("news")).networks == f"news@{new};scale=1.0"

        operator.delete("news", from_store=True).raise_for_status()
        wait_until(lambda: operator.describe("news") is None)
        assert not (store / "news").exists()

    def test_what_an_operator_unloaded_stays_away(
        self, store: Path, client: httpx.Client, operator: Operator
    ) -> None:
        make_network(store / "retired", **SMALL, seed=13)
        operator.load("retired")
        expected = complete(client, asking("retired"))
        operator.unload("retired")
        info = operator.describe("retired")
        assert (info["state"], info["withheld"], info["in_store"]) == ("not_loaded", True, True)
        assert error_of(client.post("/v1/completions", json=asking("retired")))["code"] == 404
        assert "retired" not in operator.resident()
        assert operator.load("retired")["withheld"] is False
        assert complete(client, asking("retired")) == expected
        operator.unload("retired")


def make_huge(folder: Path) -> Path:
    """A network with 10 GB of weights, of which no byte is on the disk."""
    make_network(folder, **SMALL, seed=14)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = max(tensor["data_offsets"][1] for name, tensor in header.items() if "data" in str(tensor))
    rows, columns = 2_500_000, 1000
    header["model.layers.0.mlp.huge.weight"] = {
        "dtype": "F32",
        "shape": [rows, columns],
        "data_offsets": [end, end + 4 * rows * columns],
    }
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    with weights.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described + content[8 + length :])
        file.truncate(8 + len(described) + end + 4 * rows * columns)
    return folder


class TestWrongInput:
    """Each is answered with what is wrong, and changes nothing."""

    @pytest.fixture(autouse=True)
    def unchanged(self, operator: Operator) -> Iterator[None]:
        resident, memory = operator.resident(), operator.overview()["memory"]
        yield
        assert (operator.resident(), operator.overview()["memory"]) == (resident, memory)

    @pytest.mark.parametrize("source", ["../outside", "/etc", "..", "a/b", "", "." * 3, "-x"])
    def test_sources_are_names_and_never_paths(self, operator: Operator, source: str) -> None:
        error = error_of(operator.put("bad", source))
        assert error["code"] == 400 and "[A-Za-z0-9]" in error["message"]

    @pytest.mark.parametrize("name", ["-bad", "%2e%2e", "a%20b", "a%2fb", "x" * 65])
    def test_names_are_names(self, operator: Operator, name: str) -> None:
        error = error_of(operator.put(name, "steady"))
        assert error["code"] == 400 and "[A-Za-z0-9]" in error["message"]

    def test_there_must_be_such_a_folder(self, operator: Operator, store: Path) -> None:
        assert error_of(operator.put("absent"))["code"] == 404
        assert error_of(operator.delete("absent"))["code"] == 404
        assert error_of(operator.delete("steady@00000000"))["code"] == 404
        (store / "no-network").mkdir()
        assert "manifest" in error_of(operator.put("no-network"))["message"]

    def test_the_targets_name_is_taken(self, operator: Operator) -> None:
        error = error_of(operator.put(TARGET, "steady"))
        assert error["code"] == 409 and TARGET in error["message"]

    def test_a_link_out_of_the_store_is_not_followed(
        self, operator: Operator, store: Path, tmp_path: Path
    ) -> None:
        network = make_network(tmp_path / "network", **SMALL)
        (store / "link").symlink_to(network)
        assert error_of(operator.put("link"))["code"] in (400, 404)
        shutil.copytree(network, store / "linked")
        (store / "linked" / "config.json").unlink()
        (store / "linked" / "config.json").symlink_to(network / "config.json")
        assert "link" in error_of(operator.put("linked"))["message"]
        for name in ("link", "linked"):
            assert complete_is_refused(operator, name)

    def test_another_tokenizer(self, operator: Operator, store: Path) -> None:
        make_network(store / "foreign", **SMALL, tokenizer=make_tokenizer(OTHER_TEXT, 400))
        error = error_of(operator.put("foreign"))
        assert error["code"] == 400 and "trimtab align" in error["message"]

    @pytest.mark.parametrize("fault", ["truncated", "pickled", "lies", "manifest"])
    def test_folders_that_are_not_sound(self, operator: Operator, store: Path, fault: str) -> None:
        folder = make_network(store / f"unsound-{fault}", **SMALL)
        weights = folder / "model.safetensors"
        if fault == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif fault == "pickled":
            weights.rename(folder / "pytorch_model.bin")
        elif fault == "lies":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
        else:
            (folder / "value_network.json").write_text("{")
        error = error_of(operator.put(folder.name))
        assert error["code"] == 400 and folder.name in error["message"]
        assert complete_is_refused(operator, folder.name)

    def test_weights_that_are_not_what_the_configuration_says_fail_alone(
        self, operator: Operator, store: Path
    ) -> None:
        folder = make_network(store / "incomplete", **SMALL)
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.0.mlp.down_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((LoadFailed, httpx.HTTPStatusError)) as failed:
            operator.load("incomplete")
        if isinstance(failed.value, LoadFailed):
            info = operator.describe("incomplete")
            assert (info["state"], info["versions"]) == ("failed", [])
            assert info["reason"] == str(failed.value)
        assert complete_is_refused(operator, "incomplete")

    def test_a_failed_replacement_leaves_the_old_version(
        self, operator: Operator, client: httpx.Client, store: Path
    ) -> None:
        make_network(store / "broken", **SMALL, seed=15)
        weights = load_file(store / "broken" / "model.safetensors")
        for name in weights:
            if "down_proj" in name:
                weights[name][:] = float("nan")
        save_file(weights, store / "broken" / "model.safetensors", metadata={"format": "pt"})
        expected = complete(client, asking("steady"))
        with pytest.raises((LoadFailed, httpx.HTTPStatusError)):
            operator.load("steady", "broken")
        assert complete(client, asking("steady")) == expected
        assert operator.describe("steady")["state"] == "ready"

    def test_what_does_not_fit_is_refused_with_the_numbers(
        self, operator: Operator, client: httpx.Client, store: Path
    ) -> None:
        make_huge(store / "huge")
        memory = operator.overview()["memory"]
        response = operator.put("huge")
        error = error_of(response)
        assert (response.status_code, error["type"]) == (507, "InsufficientStorageError")
        assert "needs" in error["message"] and "steady" in error["message"]
        assert operator.overview()["memory"] == memory
        refused = client.post("/v1/completions", json=asking("huge"))
        assert refused.status_code == 507 and error_of(refused)["param"] == "model"
        shutil.rmtree(store / "huge")


def complete_is_refused(operator: Operator, name: str) -> bool:
    """Whether a request that names an unusable network gets an error, and no answer."""
    response = operator._client.post("/v1/completions", json=asking(name))
    error = error_of(response)
    assert error["code"] in (404, 503), error
    assert error["code"] != 503 or "retry-after" in response.headers
    return True


def test_two_operators_get_definite_answers_and_one_of_two_ends(
    store: Path, swapping: Served, operator: Operator
) -> None:
    make_network(store / "fought-over", **SMALL, seed=16)
    make_network(store / "fought-over-2", **SMALL, seed=17)
    names = {
        operator.load("fought-over", source)["version"]: source
        for source in ("fought-over", "fought-over-2")
    }

    def act(change: Callable[[Operator], httpx.Response]) -> int:
        with httpx.Client(base_url=swapping.url, timeout=60) as own:
            return change(Operator(own)).status_code

    def settled() -> Any:
        info = operator.describe("fought-over")
        loading = info["load"] is not None and info["load"]["state"] == "loading"
        states = [version["state"] for version in info["versions"]]
        return None if loading or "draining" in states else info

    with ThreadPoolExecutor(2) as pool:
        for _ in range(8):
            put_and_delete: list[Callable[[Operator], httpx.Response]] = [
                lambda own: own.put("fought-over"),
                lambda own: own.delete("fought-over"),
            ]
            loaded, unloaded = pool.map(act, put_and_delete)
            assert loaded in (200, 202, 409) and unloaded in (202, 204, 404)
            info = wait_until(settled)
            if info["withheld"]:
                assert not info["versions"]
            else:
                assert info["state"] == "ready" and info["versions"][0]["source"] == "fought-over"

            two_puts: list[Callable[[Operator], httpx.Response]] = [
                lambda own: own.put("fought-over", "fought-over"),
                lambda own: own.put("fought-over", "fought-over-2"),
            ]
            for status in pool.map(act, two_puts):
                assert status in (200, 202, 409)
            info = wait_until(settled)
            (version,) = info["versions"]
            assert version["state"] == "ready" and version["source"] == names[version["version"]]
    operator.unload("fought-over")
