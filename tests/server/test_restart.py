"""A server that starts again has the networks that it had, whether it was stopped or killed."""

import itertools
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.models import make_model, make_network
from tests.server.conftest import SMALL
from tests.server.dying import start
from tests.server.generating import Request, RequestFailed, complete
from tests.server.operator import Operator
from tests.server.serving import Served, serving
from value_models.store import check_network

SWAPPED = "swapped"
STORE = ("kept", "renamed", "retired", "unused", "one", "other")


def asking(model: str) -> Request:
    prompt = "Where was Ana Kovac born?"
    return {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}


def swap_until_killed(served: Served, sources: tuple[str, ...], seconds: float) -> None:
    """Replace `swapped` again and again, and kill the server in the middle of it."""

    def swap() -> None:
        with httpx.Client(base_url=served.url, timeout=60) as client, suppress(httpx.HTTPError):
            for source in itertools.cycle(sources):
                Operator(client).load(SWAPPED, source)

    swapping = threading.Thread(target=swap)
    swapping.start()
    time.sleep(seconds)  # it may be at any point of a swap then
    assert swapping.is_alive()
    kill(served)
    swapping.join()


def kill(served: Served) -> None:
    """Kill every process of the server; none has a moment to tidy up."""
    parent = psutil.Process(served.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()  # or the first to die would be noticed by the others
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    served.process.wait()
    psutil.wait_procs(processes)


def test_a_server_that_was_stopped_or_killed_has_what_it_had(tmp_path: Path) -> None:
    target, store = make_model(tmp_path / "target", vocab_size=544), tmp_path / "store"
    for seed, name in enumerate(STORE):
        make_network(store / name, **SMALL, seed=seed)
    versions = {source: check_network(store / source).version for source in ("one", "other")}
    flags = ("--value-network-dir", store, "--state-file", tmp_path / "state.json")

    with serving(tmp_path / "first", target, *flags) as served:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            operator = Operator(client)
            operator.load("alias", "renamed")
            for name in ("renamed", "retired"):
                operator.unload(name)
            before = operator.resident()
            assert set(before) == {"alias", *STORE} - {"renamed", "retired"}
            shutil.rmtree(store / "unused")
            expected = complete(client, asking("alias"))
        run_dir = served.run_dir
        assert served.stop() == 0
    assert not run_dir.exists()
    make_network(store / "published-meanwhile", **SMALL, seed=30)

    answers = {}
    with serving(tmp_path / "stopped", target, *flags) as served:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            operator = Operator(client)
            del before["unused"]
            assert operator.resident() == before
            assert complete(client, asking("alias")) == expected
            withheld = {n["name"] for n in operator.overview()["data"] if n["withheld"]}
            assert withheld == {"renamed", "retired"}
            assert client.post("/v1/completions", json=asking("retired")).status_code == 404
            assert operator.describe("unused")["state"] == "failed"
            assert complete(client, asking("published-meanwhile")).networks
            with pytest.raises(RequestFailed):
                complete(client, asking("unused"))
            for source, version in versions.items():
                operator.swap(SWAPPED, source)
                answers[version] = complete(client, asking(SWAPPED)).token_ids
            assert len({tuple(answer) for answer in answers.values()}) == 2
            before = operator.resident()
        run_dir = served.run_dir
        swap_until_killed(served, tuple(versions), 1.1)
    assert run_dir.exists()  # nobody was left to remove it

    with (
        serving(tmp_path / "killed", target, *flags) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        assert not run_dir.exists()
        operator = Operator(client)
        resident = operator.resident()
        (swapped,) = resident[SWAPPED]
        assert resident == before | {SWAPPED: [swapped]}
        assert complete(client, asking(SWAPPED)).token_ids == answers[swapped]
        info = operator.describe(SWAPPED)
        assert (info["state"], info["load"]) == ("ready", None)
        swap_until_killed(served, tuple(versions), 0.4)

    back = check_network(make_network(store / "unused", **SMALL, seed=31)).version
    networks, held = start(target, *flags)
    assert networks.pop(SWAPPED) in answers
    del resident[SWAPPED]
    kept = {name: version for name, (version,) in resident.items()}
    assert networks == kept | {"unused": back}  # it was not forgotten while it was missing
    assert set(held) == {"renamed", "retired"}
