"""The measuring clients against a server that says what a test wants."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy.bench.streams import Streams

REQUEST = {"model": "target", "prompt": "a", "max_tokens": 3}
LAST = '{"a":3,"finish_reason":"length"}'


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, int]]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fields = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert fields == REQUEST | {"stream": True}
            answer(self)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield "127.0.0.1", server.server_port
    finally:
        server.shutdown()
        server.server_close()


def write(handler: BaseHTTPRequestHandler, *events: str, status: int = 200) -> None:
    handler.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    handler.send_response(status)
    handler.end_headers()
    for event in events:
        handler.wfile.write(f"data: {event}\n\n".encode())
        handler.wfile.flush()


def test_each_streams_gaps_are_noted_until_it_is_stopped() -> None:
    answered = threading.Semaphore(0)
    steps = threading.Event()  # never set: only waited for

    def answer(handler: BaseHTTPRequestHandler) -> None:
        write(handler)
        for event in ('{"a": 1}', '{"a": 2}', LAST, "[DONE]"):
            steps.wait(0.02)
            handler.wfile.write(f"data: {event}\n\n".encode())
            handler.wfile.flush()
        answered.release()

    with answering(answer) as (host, port), Streams(host, port, [REQUEST, REQUEST]) as streams:
        for _ in range(6):
            answered.acquire()
        gaps = streams.stop()
    assert len(gaps) >= 6 and len(gaps) % 2 == 0
    assert all(gap.end > gap.start for gap in gaps)


def test_tokens_may_come_together() -> None:
    """As they do from a server that is behind: that is no error."""
    with (
        answering(lambda handler: write(handler, '{"a": 1}', LAST, "[DONE]")) as (host, port),
        Streams(host, port, [REQUEST]) as streams,
    ):
        assert all(gap.end > gap.start for gap in streams.stop())


@pytest.mark.parametrize(
    ("status", "events"),
    [
        (404, ['{"error": 1}', "[DONE]"]),
        (200, ['{"a": 1}', "[DONE]"]),
        (200, ['{"a": 1,"finish_reason":"stop"}', "[DONE]"]),
        (200, ['{"a": 1}', '{"a": 2}', LAST]),
    ],
)
def test_a_stream_that_is_not_what_was_asked_for_is_an_error(
    status: int, events: list[str]
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        write(handler, *events, status=status)

    with (
        answering(answer) as (host, port),
        Streams(host, port, [REQUEST]) as streams,
        pytest.raises(RuntimeError, match="a stream"),
    ):
        streams.stop()
