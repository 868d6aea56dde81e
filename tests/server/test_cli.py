"""The command as people and container runtimes use it, on real engines."""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest

from server import zygote
from tests.models import OTHER_TEXT, make_network, make_tokenizer
from tests.server.conftest import SMALL
from tests.server.serving import TARGET, Served, serving, trimtab

GREEDY = {"temperature": 0}


def run(*arguments: object) -> tuple[int, str, str]:
    ended = subprocess.run(trimtab(*arguments), capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


def test_help_explains_serve() -> None:
    code, output, _ = run("serve", "--help")
    assert code == 0
    assert "--value-network NAME=DIR" in output and "any flag of `vllm serve`" in output
    assert run("--help")[0] == 0


def test_an_unknown_command_is_refused() -> None:
    code, _, errors = run("dance")
    assert code == 2
    assert "serve" in errors


def test_check_describes_a_network_or_says_what_is_wrong(checkpoints: Path) -> None:
    network = checkpoints / "networks" / "qa"
    code, output, _ = run("check", network)
    assert code == 0
    assert output.startswith("qa@") and "sound" in output and "residual" in output
    assert re.search(r"KV cache +[1-9][0-9,]* bytes per token", output)
    code, output, _ = run("check", network, "--target", checkpoints / "target")
    assert code == 0
    assert "fits, through its own tokenizer" in output
    code, _, errors = run("check", checkpoints / "target")
    assert code == 2
    assert "without a manifest" in errors and len(errors.splitlines()) == 1
    code, output, errors = run("check", network, "--target", checkpoints / "nothing")
    assert (code, output) == (2, "")
    assert "no tokenizer can be loaded" in errors and len(errors.splitlines()) == 1


def test_check_says_what_a_network_can_be_used_for(checkpoints: Path, tmp_path: Path) -> None:
    _, output, _ = run("check", checkpoints / "networks" / "qa")
    assert re.search("dynamic +no", output)
    moved = make_network(tmp_path / "moved", **SMALL, reference={"seed": 1})
    code, output, _ = run("check", moved)
    assert code == 0
    assert re.search("dynamic +yes", output)
    assert re.search(r"parameters ([0-9,]+)\n +[0-9,]+ value\n +[0-9,]+ reference\n", output)


def test_a_pair_is_made_and_checked(checkpoints: Path, tmp_path: Path) -> None:
    pair = ("--expert", checkpoints / "target", "--antiexpert", checkpoints / "networks" / "qa")
    out = tmp_path / "proxy"
    code, output, errors = run("pair", *pair, "--out", out, "--link", "--scale", 0.5)
    assert (code, errors) == (0, "")
    assert re.match(r"proxy@[0-9a-f]{8}: sound\n", output)
    assert "contrast" in output and re.search(r"[0-9,]+ expert\n +[0-9,]+ antiexpert\n", output)
    assert re.search("dynamic +yes", output)
    assert f"trimtab serve TARGET --value-network proxy={out}" in output.splitlines()[-1]
    code, checked, _ = run("check", out, "--target", checkpoints / "target")
    assert code == 0 and checked.startswith(output.rpartition("Serve")[0])
    code, output, errors = run("pair", *pair, "--out", out)
    assert (code, output) == (2, "")
    assert "already there" in errors and len(errors.splitlines()) == 1
    code, output, _ = run("pair", "--help")
    assert code == 0
    assert "must not be changed in place" in " ".join(output.split())


def test_publish_puts_a_network_into_a_store(checkpoints: Path, tmp_path: Path) -> None:
    network = checkpoints / "networks" / "qa"
    code, output, _ = run("publish", network, "--store", tmp_path, "--name", "qa-2026-11")
    assert code == 0
    assert re.match(r"qa-2026-11@[0-9a-f]{8} is in ", output)
    assert "trimtab networks load qa-2026-11" in output
    assert run("publish", network, "--store", tmp_path)[0] == 0
    assert {entry.name for entry in tmp_path.iterdir() if entry.name[0] != "."} == {
        "qa",
        "qa-2026-11",
    }
    code, checked, _ = run("check", tmp_path / "qa-2026-11")
    assert code == 0 and checked.partition(":")[0] == output.partition(" ")[0]


def test_publish_refuses_in_one_line(checkpoints: Path, tmp_path: Path) -> None:
    network = checkpoints / "networks" / "qa"
    for arguments, word in (
        ((checkpoints / "target", "--store", tmp_path), "without a manifest"),
        ((network, "--store", tmp_path, "--name", "../qa"), "letters"),
        ((network, "--store", tmp_path / "nothing"), "nothing"),
    ):
        code, output, errors = run("publish", *arguments)
        assert (code, output) == (2, "")
        assert word in errors and len(errors.splitlines()) == 1
    assert not [entry for entry in tmp_path.iterdir() if entry.name[0] != "."]


def test_networks_needs_a_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{free.getsockname()[1]}"
        code, output, errors = run("networks", "ls", "--server", server)
    assert (code, output) == (1, "")
    assert server in errors and len(errors.splitlines()) == 1
    assert run("networks")[0] == 2
    code, output, _ = run("networks", "--help")
    assert code == 0
    assert all(action in output for action in ("ls", "load", "unload", "rm"))


def test_align_lets_a_network_fit_another_tokenizer(checkpoints: Path, tmp_path: Path) -> None:
    network = tmp_path / "qa"
    shutil.copytree(checkpoints / "networks" / "qa", network)
    target, corpus = tmp_path / "target", tmp_path / "corpus.txt"
    make_tokenizer(OTHER_TEXT).save_pretrained(target)
    corpus.write_text(OTHER_TEXT)
    code, _, errors = run("check", network, "--target", target)
    assert code == 2
    assert "trimtab align" in errors and len(errors.splitlines()) == 1
    code, output, _ = run("align", "--value", network, "--target", target, "--corpus", corpus)
    assert code == 0
    assert "tokens of equal bytes" in output and "special, paired by meaning" in output
    code, output, _ = run("check", network, "--target", target)
    assert code == 0
    assert "fits, through a vocabulary map" in output


def test_align_refuses_what_it_cannot_use_in_one_line(checkpoints: Path, tmp_path: Path) -> None:
    network = checkpoints / "networks" / "qa"
    for corpus in (tmp_path, tmp_path / "nothing.txt"):
        code, output, errors = run(
            "align", "--value", network, "--target", network, "--corpus", corpus
        )
        assert (code, output) == (1, "")
        assert str(corpus) in errors and len(errors.splitlines()) == 1


def test_a_bad_network_is_refused_in_one_line(checkpoints: Path) -> None:
    target = checkpoints / "target"
    code, output, errors = run("serve", target, "--value-network", f"qa={target}")
    assert (code, output) == (2, "")
    assert "without a manifest" in errors and len(errors.splitlines()) == 1


def test_who_reads_networks_folders_is_there_before_the_engine(server: Served) -> None:
    reader, engine = (named(server, name) for name in ("server.lifecycle.folders", "EngineCore"))
    assert reader.create_time() < engine.create_time()


@pytest.mark.skipif(not zygote.is_possible(), reason="vLLM starts them by itself")
def test_engine_and_worker_are_forked_from_who_has_imported_vllm(server: Served) -> None:
    parent, engine, worker = (named(server, name) for name in ("Zygote", "EngineCore", "Worker"))
    assert engine.parent() == worker.parent() == parent
    # That is where OpenMP, which binds its processes, is set up for the worker.
    assert engine.cpu_affinity() == psutil.Process(server.process.pid).cpu_affinity()


def test_sigterm_finishes_running_requests(checkpoints: Path, tmp_path: Path) -> None:
    """With several API processes, which vLLM itself would end at once, and a key."""
    network = f"qa={checkpoints / 'networks' / 'qa'}"
    flags = ("--value-network", network, "--api-server-count", 2, "--api-key", "sesame")
    asked = {"model": "qa", "prompt": "Where", "max_tokens": 400, "ignore_eos": True}
    with (
        serving(tmp_path, checkpoints / "target", *flags) as served,
        httpx.Client(base_url=served.url, timeout=None) as client,
    ):
        (launched,) = children(served.process.pid)
        beside = " ".join(map(command, children(launched)))
        assert not re.search(r"server\.lifecycle\.folders|Zygote|forkserver", beside)
        denied = client.post("/v1/completions", json=asked)
        assert (denied.status_code, denied.json()) == (401, {"error": "Unauthorized"})
        client.headers["Authorization"] = "Bearer sesame"
        short = asked | GREEDY | {"max_tokens": 40}
        answers = {client.post("/v1/completions", json=short).text for _ in range(6)}
        assert len({json.loads(answer)["choices"][0]["text"] for answer in answers}) == 1

        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["usage"]["completion_tokens"] == 400
        assert served.process.wait() == 0
    assert "Stopped." in served.output.read_text()


def test_a_dead_engine_is_no_clean_exit(checkpoints: Path, tmp_path: Path) -> None:
    with serving(tmp_path, checkpoints / "target") as served:
        assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"] == TARGET
        named(served, "EngineCore").kill()
        assert served.process.wait() == 1
        assert "ended by itself (exit code 0)" in served.output.read_text()


def test_nothing_outlives_the_command(checkpoints: Path, tmp_path: Path) -> None:
    """Even if it is killed while it starts."""
    process = subprocess.Popen(
        trimtab("serve", checkpoints / "target", "--log-file", tmp_path / "log")
    )
    # vLLM's server, and what it has started by then.
    while len(started := psutil.Process(process.pid).children(recursive=True)) < 3:
        time.sleep(0.05)
    process.kill()
    process.wait()
    patience = time.monotonic() + 60
    while any(command(child.pid) for child in started) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(command(child.pid) for child in started)


def named(server: Served, name: str) -> psutil.Process:
    """The one process of a server with this in its command line."""
    started = psutil.Process(server.process.pid).children(recursive=True)
    (process,) = (child for child in started if name in " ".join(child.cmdline()))
    return process


def children(parent: int) -> list[int]:
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in listed.split()]


def command(pid: int) -> str:
    """The command line of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except FileNotFoundError:
        return ""
