"""`trimtab networks`: what an operator does with a running server's value networks."""

import argparse
import os
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from server.api.resources import (
    NETWORKS_PATH,
    LoadInfo,
    LoadRequest,
    MemoryInfo,
    NetworkInfo,
    Overview,
    VersionInfo,
)

SERVER_VARIABLE = "TRIMTAB_SERVER"
KEY_VARIABLE = "TRIMTAB_ADMIN_API_KEY"
DEFAULT_SERVER = "http://127.0.0.1:8000"
UNIX_SOCKET = "unix:"
POLL_SECONDS = 0.5
TIMEOUT_SECONDS = 60
"""The server reads a manifest from its store before it answers a load."""

DESCRIPTION = "See, load and unload the value networks of a running server."
EPILOG = f"""\
environment:
  {SERVER_VARIABLE}          the server, as --server
  {KEY_VARIABLE}   its admin key, as --admin-api-key; unlike that, other users cannot see it

Exits with 0 when it is done, 1 when the server refused it, failed or could not be reached, 2 when
the command itself is wrong.
"""

Resource = TypeVar("Resource", bound=BaseModel)


class CommandError(Exception):
    """What was asked for did not happen, and why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--server",
        metavar="URL",
        default=os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER,
        help=f"its address, or {UNIX_SOCKET}PATH of its Unix socket (default: {DEFAULT_SERVER})",
    )
    common.add_argument(
        "--admin-api-key", metavar="KEY", help=f"its admin key (default: {KEY_VARIABLE})"
    )
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    commands.add_parser("ls", parents=[common], help="list value networks, states and memory")
    load = commands.add_parser(
        "load", parents=[common], help="load a network from the store, or replace it"
    )
    load.add_argument("name", metavar="NAME")
    load.add_argument(
        "--source", metavar="FOLDER", help="its folder's name in the store (default: NAME)"
    )
    load.add_argument(
        "--no-wait", action="store_true", help="do not wait until it is ready or has failed"
    )
    unload = commands.add_parser(
        "unload", parents=[common], help="stop new requests to a network, then free it"
    )
    unload.add_argument("name", metavar="NAME", help="or NAME@VERSION")
    remove = commands.add_parser(
        "rm", parents=[common], help="unload a network, and delete its folder from the store"
    )
    remove.add_argument("name", metavar="NAME")


def main(options: argparse.Namespace) -> int:
    """Do what the arguments say. Returns the exit code."""
    try:
        server = Server(options.server, options.admin_api_key or os.environ.get(KEY_VARIABLE))
    except ValueError as error:
        print(f"trimtab networks: {error}", file=sys.stderr)
        return 2
    # What goes to a file or a program is not broken into lines of 80 columns.
    width = None if sys.stdout.isatty() else 1000
    console = Console(highlight=False, markup=False, width=width)
    try:
        match options.action:
            case "ls":
                show(server.overview(), server.now, console)
            case "load":
                load(server, options.name, options.source, not options.no_wait, console)
            case "unload":
                unload(server, options.name, False, console)
            case "rm":
                unload(server, options.name, True, console)
    except CommandError as error:
        print(f"trimtab networks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("trimtab networks: interrupted; what was begun goes on", file=sys.stderr)
        return 1
    finally:
        server.close()
    return 0


class Server:
    """Management of one server, over HTTP."""

    def __init__(self, address: str, key: str | None) -> None:
        """Raises `ValueError` if the address or the key cannot be used."""
        uds = address.removeprefix(UNIX_SOCKET) if address.startswith(UNIX_SOCKET) else None
        url = _url(DEFAULT_SERVER if uds else address)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("the admin key has characters that no HTTP header can carry")
        self.address = address
        self.has_key = key is not None
        self.now = time.time()
        # The environment's proxies have no business with the admin key.
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            transport=httpx.HTTPTransport(
                uds=uds, verify=ssl.create_default_context() if url.scheme == "https" else False
            ),
            timeout=TIMEOUT_SECONDS,
            trust_env=False,
        )

    def close(self) -> None:
        self._client.close()

    def overview(self) -> Overview:
        return self._read(Overview, self._ask("GET", NETWORKS_PATH))

    def describe(self, reference: str) -> NetworkInfo | None:
        """One network; None if there is none of that name."""
        try:
            return self._read(NetworkInfo, self._ask("GET", _path(reference)))
        except NotFound:
            return None

    def load(self, name: str, source: str | None) -> NetworkInfo:
        body = LoadRequest.model_construct(source=source).model_dump(exclude_none=True)
        return self._read(NetworkInfo, self._ask("PUT", _path(name), json=body))

    def unload(self, reference: str, from_store: bool) -> NetworkInfo | None:
        """Returns the network while running requests keep it, None if it is gone."""
        params = {"from_store": "true"} if from_store else {}
        response = self._ask("DELETE", _path(reference), params=params)
        if response.status_code == HTTPStatus.NO_CONTENT:
            return None
        return self._read(NetworkInfo, response)

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._client.request(method, path, **options)
        except httpx.TransportError as error:
            raise CommandError(
                f"no answer from {self.address}: {error or type(error).__name__}; "
                f"--server URL or {SERVER_VARIABLE} says where the server is"
            ) from error
        self.now = _date(response)
        if not response.is_success:
            raise self._refusal(response)
        return response

    def _refusal(self, response: httpx.Response) -> CommandError:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, LookupError, TypeError):
            return CommandError(
                f"{self.address} has no management of value networks (HTTP "
                f"{response.status_code}): is it a `trimtab serve`?"
            )
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            message = f"the server wants its admin key: --admin-api-key KEY or {KEY_VARIABLE}"
        elif response.status_code == HTTPStatus.FORBIDDEN and self.has_key:
            message += f"; the key came from --admin-api-key or {KEY_VARIABLE}"
        elif response.status_code == HTTPStatus.NOT_FOUND:
            return NotFound(message)
        return CommandError(message)

    def _read(self, resource: type[Resource], response: httpx.Response) -> Resource:
        try:
            return resource.model_validate_json(response.content)
        except ValidationError as error:
            raise CommandError(
                f"{self.address} answers otherwise than this version of trimtab expects "
                f"({error.error_count()} fields): is it a `trimtab serve`, and of this version?"
            ) from error


class NotFound(CommandError):
    """The server knows no such network."""


def _url(address: str) -> httpx.URL:
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"--server {address}: give a URL, as in {DEFAULT_SERVER}")
    return url


def _path(reference: str) -> str:
    """Where a network is; what is no name, as `..`, is for the server to refuse."""
    return f"{NETWORKS_PATH}/{quote(reference, safe='@').replace('.', '%2E')}"


def _date(response: httpx.Response) -> float:
    """The server's time, to which its times are compared; this machine's if it says none."""
    try:
        return parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return time.time()


def load(server: Server, name: str, source: str | None, wait: bool, console: Console) -> None:
    """Load a network and say how it went. Raises `CommandError`."""
    began = time.monotonic()
    info = server.load(name, source)
    ours = info.load
    if ours is None:
        console.print(f"{name}@{info.version} is ready")
        return
    if not wait:
        console.print(f"{name} is loading; `trimtab networks ls` shows when it is ready")
        return
    with _waiting(console, f"{name} is loading ..."):
        ended = _wait(server, name, ours)
    if ended is not None and ended.load is not None:
        if ended.load.id != ours.id:
            raise CommandError(f"another load of {name} has taken the place of this one")
        serving = f"; {name}@{ended.version} goes on serving" if ended.version else ""
        raise CommandError(f"{name} could not be loaded: {ended.load.reason}{serving}")
    if ended is None or ended.version is None:
        raise CommandError(f"{name} was unloaded while it was loading")
    newest = next(v for v in ended.versions if v.version == ended.version)
    if newest.loaded_at < ours.started_at:
        console.print(f"{name}@{ended.version} is ready: its files are those that were loaded")
        return
    seconds = time.monotonic() - began
    weights = binary(newest.weights_bytes)
    console.print(f"{name}@{ended.version} is ready after {seconds:.1f} s, {weights} of weights")


def _wait(server: Server, name: str, load: LoadInfo) -> NetworkInfo | None:
    """Return the network once that load of it has ended; None if it is gone."""
    while True:
        info = server.describe(name)
        if info is None or info.load is None or info.load.id != load.id:
            return info
        if info.load.state != "loading":
            return info
        time.sleep(POLL_SECONDS)


@contextmanager
def _waiting(console: Console, what: str) -> Iterator[None]:
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def unload(server: Server, reference: str, from_store: bool, console: Console) -> None:
    """Unload a network, and say what is left of it. Raises `CommandError`."""
    info = server.unload(reference, from_store)
    done = "is deleted from the store and unloaded" if from_store else "is unloaded"
    if info is None:
        console.print(f"{reference} {done}")
        return
    draining = [version for version in info.versions if version.state == "draining"]
    running = sum(version.use.running_requests for version in draining)
    requests = "1 running request has" if running == 1 else f"{running} running requests have"
    console.print(
        f"{reference} {done}: no new requests; its memory is freed "
        f"{f'when {requests} ended' if running else 'in a moment'}"
    )


def show(overview: Overview, now: float, console: Console) -> None:
    """Print the networks as a table, and below it the memory and what is wrong.

    `now` is the server's Unix time.
    """
    if overview.data:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("NAME", "STATE", "VERSION"):
            table.add_column(column, overflow="fold")
        table.add_column("MEMORY", justify="right", no_wrap=True)
        table.add_column("REQUESTS", justify="right", no_wrap=True)
        table.add_column("LAST USED", no_wrap=True)
        table.add_column("SOURCE", overflow="fold")
        for network in overview.data:
            for cells in rows(network, now):
                table.add_row(*cells)
        console.print(table)
    else:
        console.print("There is no value network, in the store or loaded.")
    console.print()
    console.print(memory_line(overview.memory))
    for problem in problems(overview):
        console.print(problem)


def rows(network: NetworkInfo, now: float) -> Iterator[tuple[str, ...]]:
    """A network's lines in the table: its load, its versions, or that it is in the store only."""
    if network.load is not None:
        yield _load_row(network.name, network.load)
    for version in network.versions:
        yield _version_row(network.name, version, now)
    if network.load is None and not network.versions:
        state = "unloaded" if network.withheld else "not loaded"
        yield (network.name, state, "-", "-", "-", "-", network.name if network.in_store else "-")


def _load_row(name: str, load: LoadInfo) -> tuple[str, ...]:
    state = "loading" if load.state == "loading" else "load failed"
    return (name, state, "-", "-", "-", "-", load.source)


def _version_row(name: str, version: VersionInfo, now: float) -> tuple[str, ...]:
    return (
        name,
        version.state,
        version.version,
        binary(version.weights_bytes),
        str(version.use.running_requests),
        age(version.use.last_used, now),
        version.source or "a flag",
    )


def memory_line(memory: MemoryInfo) -> str:
    parts = [
        f"{binary(memory.weights_bytes)} weights",
        f"{binary(memory.kv_cache_bytes)} KV cache",
        f"{binary(memory.loading_bytes)} loading" if memory.loading_bytes else "",
        f"{binary(memory.free_bytes)} free",
    ]
    used = ", ".join(part for part in parts if part)
    return f"Memory, each worker: {binary(memory.total_bytes)}: {used}"


def problems(overview: Overview) -> Iterator[str]:
    """What an operator should know besides, one line each."""
    for network in overview.data:
        if network.load is not None and network.load.state == "failed":
            yield f"{network.name}: its load failed: {network.load.reason}"
        for version in network.versions:
            if version.state == "failed":
                yield f"{network.name}@{version.version} failed: {version.reason}"
    if overview.store.error:
        yield f"The store: {overview.store.error}"
    if overview.state_file.error:
        yield f"The state file {overview.state_file.path}: {overview.state_file.error}"


def binary(num_bytes: float) -> str:
    """A size in binary units, to three digits or so."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000 or unit == "GiB":
            break
        num_bytes /= 1024
    return (
        f"{num_bytes:.0f} {unit}" if num_bytes >= 100 or unit == "B" else f"{num_bytes:.1f} {unit}"
    )


def age(then: float | None, now: float) -> str:
    """How long ago something was."""
    if then is None:
        return "never"
    seconds = max(0.0, now - then)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago" if seconds >= 2 else "now"
