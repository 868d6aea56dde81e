"""`trimtab networks` against management's real routes, over real HTTP."""

import argparse
import io
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Response
from rich.console import Console

from server import networks_command
from server.api.errors import ApiError
from server.api.resources import NetworkInfo, Overview, StateFileInfo, StoreInfo
from server.networks_command import age, binary, show
from server.settings import key_digest
from tests.server.management import (
    LOADING,
    Manager,
    application,
    load_info,
    network_info,
    overview,
    version_info,
)

NOW = 10_000.0


class Scripted(Manager):
    """Gives one answer after another, and the last one for ever."""

    def __init__(self, *answers: Any) -> None:
        super().__init__()
        self.answers = list(answers)

    def _asked(self, *call: Any) -> NetworkInfo | None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.error = answer if isinstance(answer, ApiError) else None
        self.answer = None if self.error else answer
        return super()._asked(*call)


@contextmanager
def listening(app: FastAPI, uds: Path | None = None) -> Iterator[str]:
    """Serve `app` on a free port, or a Unix socket; yields what `--server` takes."""
    with socket.socket(socket.AF_UNIX if uds else socket.AF_INET) as listener:
        listener.bind(str(uds) if uds else ("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", date_header=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"unix:{uds}" if uds else f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    networks_command.add_arguments(parser)
    return parser.parse_args(arguments)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command to its end: exit code, output, errors."""
    for variable in (networks_command.SERVER_VARIABLE, networks_command.KEY_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(networks_command, "POLL_SECONDS", 0)
    # Neither is for this command.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = networks_command.main(parse(*arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def refused(status: int, message: str = "because") -> ApiError:
    return ApiError(HTTPStatus(status), message)


def test_ls(run: Run) -> None:
    with listening(application(Manager())) as server:
        code, output, errors = run("ls", "--server", server)
    assert (code, errors) == (0, "")
    header, row, _, memory = output.splitlines()
    assert header.split() == [
        "NAME",
        "STATE",
        "VERSION",
        "MEMORY",
        "REQUESTS",
        "LAST",
        "USED",
        "SOURCE",
    ]
    assert row.split()[:6] == ["qa", "ready", "3f2a91c0", "3.9", "KiB", "2"]
    assert row.split()[-1] == "qa"
    assert memory.startswith("Memory, each worker: 2.0 GiB")


def test_ages_are_by_the_servers_clock(run: Run) -> None:
    app = application(Manager())

    @app.middleware("http")
    async def clock(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["date"] = "Thu, 01 Jan 1970 00:17:10 GMT"  # half a minute after its use
        return response

    with listening(app) as server:
        assert "30 s ago" in run("ls", "--server", server)[1]


def test_the_environment_names_the_server(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(application(Manager())) as server:
        monkeypatch.setenv(networks_command.SERVER_VARIABLE, server)
        assert run("ls")[0] == 0


def test_a_unix_socket(run: Run, tmp_path: Path) -> None:
    with listening(application(Manager()), tmp_path / "socket") as server:
        assert run("ls", "--server", server)[0] == 0


class TestLoad:
    def load(self, run: Run, *answers: Any, arguments: tuple[str, ...] = ()) -> Any:
        self.manager = Scripted(*answers)
        with listening(application(self.manager)) as server:
            return run("load", "qa", "--server", server, *arguments)

    def test_it_waits_until_ready(self, run: Run) -> None:
        code, output, errors = self.load(run, LOADING, LOADING, LOADING, network_info())
        assert (code, errors) == (0, "")
        ready = network_info(versions=[version_info(loaded_at=951.0)])
        code, output, errors = self.load(run, LOADING, LOADING, ready)
        assert re.fullmatch(r"qa@3f2a91c0 is ready after \d+\.\d s, 3\.9 KiB of weights\n", output)
        assert [call[0] for call in self.manager.calls] == ["load", "describe", "describe"]

    def test_it_names_the_source(self, run: Run) -> None:
        self.load(run, network_info(), arguments=("--source", "qa-2"))
        assert self.manager.calls[0][:3] == ("load", "qa", "qa-2")

    def test_a_replacement_waits_for_the_new_version(self, run: Run) -> None:
        replacing = network_info(load=load_info())
        new = version_info(version="00000000", loaded_at=960.0, weights_bytes=5 << 20)
        old = version_info(state="draining")
        done = network_info(version="00000000", versions=[new, old])
        code, output, _ = self.load(run, replacing, replacing, done)
        assert code == 0
        assert output.startswith("qa@00000000 is ready") and "5.0 MiB" in output

    def test_a_load_may_have_ended_already(self, run: Run) -> None:
        assert self.load(run, network_info()) == (0, "qa@3f2a91c0 is ready\n", "")

    def test_the_same_version_is_no_news(self, run: Run) -> None:
        code, output, _ = self.load(run, LOADING, network_info())
        assert code == 0
        assert "its files are those that were loaded" in output

    def test_it_need_not_wait(self, run: Run) -> None:
        code, output, _ = self.load(run, LOADING, arguments=("--no-wait",))
        assert (code, len(self.manager.calls)) == (0, 1)
        assert "is loading" in output

    def test_a_failure_tells_why(self, run: Run) -> None:
        failed = load_info(state="failed", reason="the weights are cut off")
        nothing = network_info(state="failed", version=None, versions=[], load=failed)
        code, output, errors = self.load(run, LOADING, nothing)
        assert (code, output) == (1, "")
        assert "could not be loaded: the weights are cut off" in errors
        assert "goes on" not in errors

    def test_a_failed_replacement_tells_what_serves(self, run: Run) -> None:
        failed = load_info(state="failed", reason="no")
        code, _, errors = self.load(run, LOADING, network_info(load=failed))
        assert code == 1
        assert errors.endswith("no; qa@3f2a91c0 goes on serving\n")

    def test_another_load_takes_its_place(self, run: Run) -> None:
        code, _, errors = self.load(run, LOADING, network_info(load=load_info(id="2e")))
        assert code == 1
        assert "another load" in errors

    @pytest.mark.parametrize(
        "after", [refused(404), network_info(state="not_loaded", version=None, versions=[])]
    )
    def test_it_is_unloaded_meanwhile(self, run: Run, after: Any) -> None:
        code, _, errors = self.load(run, LOADING, after)
        assert code == 1
        assert "unloaded while it was loading" in errors

    @pytest.mark.parametrize("status", [400, 404, 409, 503, 507])
    def test_a_refusal_is_passed_on(self, run: Run, status: int) -> None:
        code, output, errors = self.load(run, refused(status))
        assert (code, output, errors) == (1, "", "trimtab networks: because\n")

    def test_a_server_that_goes_away_while_it_waits(self, run: Run) -> None:
        code, _, errors = self.load(run, LOADING, LOADING, refused(503, "shutting down"))
        assert (code, errors) == (1, "trimtab networks: shutting down\n")


class TestUnload:
    @pytest.mark.parametrize(("action", "removes"), [("unload", False), ("rm", True)])
    def test_running_requests_finish(self, run: Run, action: str, removes: bool) -> None:
        versions = [version_info(state="draining")]
        manager = Scripted(network_info(state="draining", version=None, versions=versions))
        with listening(application(manager)) as server:
            code, output, errors = run(action, "qa", "--server", server)
        assert (code, errors) == (0, "")
        assert "2 running requests have ended" in output
        assert ("deleted from the store" in output) is removes
        assert manager.calls[0][:3] == ("unload", "qa", removes)

    def test_nothing_runs(self, run: Run) -> None:
        with listening(application(Scripted(None))) as server:
            assert run("unload", "qa@3f2a91c0", "--server", server) == (
                0,
                "qa@3f2a91c0 is unloaded\n",
                "",
            )
            assert "qa is deleted from the store" in run("rm", "qa", "--server", server)[1]

    def test_there_is_none(self, run: Run) -> None:
        with listening(application(Scripted(refused(404, "there is no qa")))) as server:
            for action in ("unload", "rm"):
                code, _, errors = run(action, "qa", "--server", server)
                assert (code, errors) == (1, "trimtab networks: there is no qa\n")

    @pytest.mark.parametrize("name", ["..", "a/b", "a b", "a?from_store=true", "qa#x", "ä", ""])
    @pytest.mark.parametrize("action", ["load", "unload", "rm"])
    def test_a_name_stays_a_name(self, run: Run, action: str, name: str) -> None:
        manager = Manager()
        with listening(application(manager)) as server:
            code, _, errors = run(action, name, "--server", server)
        assert code == 1 and not manager.calls
        assert "[A-Za-z0-9]" in errors


class TestKeys:
    @pytest.fixture
    def server(self) -> Iterator[str]:
        keys = {
            "admin_key_digest": key_digest("sesame"),
            "client_key_digests": (key_digest("client"),),
        }
        with listening(application(Manager(), **keys)) as server:
            yield server

    def test_without_a_key_it_says_how_to_give_one(self, run: Run, server: str) -> None:
        code, _, errors = run("ls", "--server", server)
        assert code == 1
        assert "--admin-api-key" in errors and "TRIMTAB_ADMIN_API_KEY" in errors

    @pytest.mark.parametrize("key", ["client", "x"])
    def test_another_key_is_told_apart(self, run: Run, server: str, key: str) -> None:
        code, _, errors = run("ls", "--server", server, "--admin-api-key", key)
        assert code == 1
        assert ("client's key" in errors) is (key == "client")
        assert "--admin-api-key or TRIMTAB_ADMIN_API_KEY" in errors
        assert f" {key} " not in errors

    def test_the_option_goes_before_the_environment(
        self, run: Run, server: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(networks_command.KEY_VARIABLE, "sesame")
        assert run("ls", "--server", server)[0] == 0
        assert run("ls", "--server", server, "--admin-api-key", "x")[0] == 1
        monkeypatch.setenv(networks_command.KEY_VARIABLE, "x")
        assert run("ls", "--server", server, "--admin-api-key", "sesame")[0] == 0

    def test_a_key_for_a_server_without_one(self, run: Run) -> None:
        with listening(application(Manager())) as server:
            code, _, errors = run("ls", "--server", server, "--admin-api-key", "sesame")
        assert code == 1
        assert "without an admin key" in errors

    def test_the_help_shows_no_key(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(networks_command.KEY_VARIABLE, "sesame")
        with pytest.raises(SystemExit):
            parse("ls", "--help")
        assert "sesame" not in capsys.readouterr().out


class TestUnreachable:
    def test_connection_refused(self, run: Run) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            server = f"http://127.0.0.1:{free.getsockname()[1]}"
            code, output, errors = run("ls", "--server", server)
        assert (code, output) == (1, "")
        assert server in errors and "refused" in errors and "--server" in errors
        assert len(errors.splitlines()) == 1

    def test_no_such_socket(self, run: Run, tmp_path: Path) -> None:
        code, _, errors = run("ls", "--server", f"unix:{tmp_path}/none")
        assert code == 1 and "none" in errors

    def test_another_server(self, run: Run) -> None:
        with listening(FastAPI()) as server:
            code, _, errors = run("ls", "--server", server)
        assert code == 1
        assert "is it a `trimtab serve`?" in errors

    @pytest.mark.parametrize("content", ["[]", "<html>", '{"data": 5}'])
    def test_a_server_that_says_something_else(self, run: Run, content: str) -> None:
        app = FastAPI()
        app.add_api_route("/admin/value_networks", lambda: Response(content))
        with listening(app) as server:
            code, _, errors = run("ls", "--server", server)
        assert code == 1
        assert "is it a `trimtab serve`, and of this version?" in errors

    @pytest.mark.parametrize(
        "address", ["", "127.0.0.1:8000", "ftp://llm", "http://", "http://llm:port", "unix:"]
    )
    def test_an_address_that_is_none(self, run: Run, address: str) -> None:
        code, _, errors = run("ls", "--server", address)
        assert code == 2
        assert "http://127.0.0.1:8000" in errors

    def test_a_key_that_is_none(self, run: Run) -> None:
        code, _, errors = run("ls", "--admin-api-key", "a\nb")
        assert code == 2 and "header" in errors

    @pytest.mark.parametrize("arguments", [(), ("dance",), ("load",), ("ls", "qa")])
    def test_wrong_use_is_exit_code_2(self, arguments: tuple[str, ...]) -> None:
        with pytest.raises(SystemExit) as ended:
            parse(*arguments)
        assert ended.value.code == 2


def shown(listed: Overview, width: int = 80) -> str:
    file = io.StringIO()
    show(listed, NOW, Console(file=file, width=width, highlight=False, markup=False))
    return file.getvalue()


class TestTable:
    def many(self) -> Overview:
        failed = load_info(state="failed", reason="model.safetensors is cut off", source="qa-2")
        old = version_info(version="00000000", state="draining")
        old.use.last_used = None
        versions = [version_info(weights_bytes=1_500_000_000), old]
        broken = version_info(state="failed", reason="its logits are not finite", source=None)
        absent = {"state": "not_loaded", "version": None, "versions": []}
        listed = overview(
            network_info(versions=versions, load=failed),
            network_info(name="json-objects-2026-11", state="failed", versions=[broken]),
            network_info(name="new", **{**absent, "state": "loading"}, load=load_info()),
            network_info(name="stored", **absent),
            network_info(name="withheld", **absent, withheld=True),
        )
        listed.store = StoreInfo(configured=True, error="the store is gone")
        listed.state_file = StateFileInfo(path="/state.json", error="no space left")
        listed.memory.loading_bytes = 30 << 20
        return listed

    def test_every_version_and_load_has_a_line(self) -> None:
        table = shown(self.many(), width=1000).split("\n\n")[0].splitlines()
        cells = [re.split(r"  +", line.strip()) for line in table]
        assert cells == [
            ["NAME", "STATE", "VERSION", "MEMORY", "REQUESTS", "LAST USED", "SOURCE"],
            ["qa", "load failed", "-", "-", "-", "-", "qa-2"],
            ["qa", "ready", "3f2a91c0", "1.4 GiB", "2", "2 h ago", "qa"],
            ["qa", "draining", "00000000", "3.9 KiB", "2", "never", "qa"],
            ["json-objects-2026-11", "failed", "3f2a91c0", "3.9 KiB", "2", "2 h ago", "a flag"],
            ["new", "loading", "-", "-", "-", "-", "qa"],
            ["stored", "not loaded", "-", "-", "-", "-", "stored"],
            ["withheld", "unloaded", "-", "-", "-", "-", "withheld"],
        ]

    def test_below_it_is_what_is_wrong(self) -> None:
        memory, *problems = shown(self.many(), width=1000).split("\n\n")[1].splitlines()
        assert memory == (
            "Memory, each worker: 2.0 GiB: 1.0 GiB weights, 512 MiB KV cache, 30.0 MiB loading, "
            "512 MiB free"
        )
        assert problems == [
            "qa: its load failed: model.safetensors is cut off",
            "json-objects-2026-11@3f2a91c0 failed: its logits are not finite",
            "The store: the store is gone",
            "The state file /state.json: no space left",
        ]

    def test_it_fits_80_columns(self) -> None:
        assert max(map(len, shown(self.many()).splitlines())) <= 80

    def test_long_names_are_whole(self) -> None:
        name = "n" * 64
        table = shown(overview(network_info(name=name)))
        assert max(map(len, table.splitlines())) <= 80
        assert re.sub(r"[^n]", "", table.split("SOURCE")[1].split("\n\n")[0]).count("n") == 64

    def test_there_is_none(self) -> None:
        assert shown(overview()).startswith("There is no value network")

    @pytest.mark.parametrize(
        ("num_bytes", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 KiB"),
            (64 << 10, "64.0 KiB"),
            (1023 << 10, "1.0 MiB"),
            (512 << 20, "512 MiB"),
            (3 << 29, "1.5 GiB"),
            (2000 << 30, "2000 GiB"),
        ],
    )
    def test_sizes(self, num_bytes: int, text: str) -> None:
        assert binary(num_bytes) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (-5, "now"),
            (1, "now"),
            (59, "59 s ago"),
            (60, "1 min ago"),
            (7199, "1 h ago"),
            (200_000, "2 d ago"),
        ],
    )
    def test_ages(self, seconds: float, text: str) -> None:
        assert age(NOW - seconds, NOW) == text
        assert age(None, NOW) == "never"
