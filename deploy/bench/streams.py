"""Clients that stream completions without pause and note when each token arrived.

They run in one process of their own and read the wire themselves, so that measuring takes as little
as possible of the cores that the server needs.
"""

import asyncio
import itertools
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Any, NamedTuple

EVENT = b"data: {"
"""How each event that carries tokens begins: one token, or more if the server is behind."""
FINISHED = b'"finish_reason":"length"'
"""In the last of them, of a response that has as many tokens as were asked for."""


class Gap(NamedTuple):
    """Two events of one response that came one after the other."""

    start: float  # seconds on this machine's monotonic clock
    end: float


class Streams:
    """Clients, one for each of `requests`, that send theirs again whenever it has been answered."""

    def __init__(self, host: str, port: int, requests: list[dict[str, Any]]) -> None:
        """`requests`: bodies for `/v1/completions`, without `stream`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._stopped = context.Event()
        self._process = context.Process(
            target=_run, args=(theirs, self._stopped, host, port, requests)
        )
        self._process.start()
        theirs.close()

    def stop(self) -> list[Gap]:
        """Let the running requests end. Returns all gaps.

        Raises:
            RuntimeError: the server refused a request, or broke one off.
        """
        self._stopped.set()
        result: list[Gap] | str = self._pipe.recv()
        if isinstance(result, str):
            raise RuntimeError(result)
        return [Gap(*gap) for gap in result]

    def __enter__(self) -> "Streams":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()


class _Response(asyncio.Protocol):
    """One response: when its events came, and its bytes to the end."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.arrivals: list[float] = []
        self.chunks: list[bytes] = []
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if EVENT in data:
            self.arrivals.append(time.monotonic())
        self.chunks.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


def _run(
    pipe: Connection, stopped: Event, host: str, port: int, requests: list[dict[str, Any]]
) -> None:
    try:
        gaps = asyncio.run(_stream_all(stopped, host, port, requests))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    else:
        pipe.send(gaps)


async def _stream_all(
    stopped: Event, host: str, port: int, requests: list[dict[str, Any]]
) -> list[tuple[float, float]]:
    gaps: list[tuple[float, float]] = []

    async def stream(fields: dict[str, Any]) -> None:
        request = _encode(host, port, fields | {"stream": True})
        while True:
            _, response = await asyncio.get_running_loop().create_connection(
                lambda: _Response(request), host, port
            )
            await response.ended
            _check(b"".join(response.chunks))
            gaps.extend(itertools.pairwise(response.arrivals))
            if stopped.is_set():
                return

    await asyncio.gather(*map(stream, requests))
    return gaps


def _encode(host: str, port: int, fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _check(response: bytes) -> None:
    """Raise `RuntimeError` for a response that is not all the tokens that were asked for."""
    if b" 200 " not in response.partition(b"\r\n")[0] or b"data: [DONE]" not in response:
        raise RuntimeError(f"a stream was refused or broke off: {response[-500:]!r}")
    if FINISHED not in response:
        raise RuntimeError(f"a stream ended early: {response[-500:]!r}")
