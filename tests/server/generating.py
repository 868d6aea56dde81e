"""Clients that generate without pause, and notice when anything about an answer changes."""

import json
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import httpx

Request = dict[str, Any]
"""A body for `/v1/completions`; greedy, or the answer would differ by itself."""


class Answer(NamedTuple):
    """What a client got."""

    token_ids: list[int]
    finish_reason: str | None
    networks: str | None  # the header that names them


class RequestFailed(Exception):
    """An answer that is an error, or that broke off."""


def complete(
    client: httpx.Client, request: Request, on_token: Callable[[], object] = lambda: None
) -> Answer:
    """Send a request, and stream its answer to the end; `on_token` is called as it grows.

    Raises:
        RequestFailed: it was refused, or failed on its way.
    """
    body = request | {"stream": True, "return_token_ids": True}
    token_ids: list[int] = []
    finish_reason = None
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise RequestFailed(f"{response.status_code}: {response.read().decode()}")
        ended = False
        for line in response.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RequestFailed(line)
                for choice in event["choices"]:
                    token_ids += choice["token_ids"] or []
                    on_token()
                    finish_reason = choice["finish_reason"] or finish_reason
        if not ended:
            raise RequestFailed(f"broke off after {len(token_ids)} tokens")
        return Answer(token_ids, finish_reason, response.headers.get("x-value-networks"))


class Generating:
    """Clients, one for each request, that send it again and again and compare the answers.

    With `with`; at its end no answer has differed from the first one, which was had before.
    """

    def __init__(self, url: str, requests: list[Request]) -> None:
        self._url = url
        self._stopped = threading.Event()
        with httpx.Client(base_url=url, timeout=None) as client:
            self._expected = [(request, complete(client, request)) for request in requests]
        self._threads = [
            threading.Thread(target=self._repeat, args=expected) for expected in self._expected
        ]
        self.num_answers = 0
        self.failures: list[str] = []

    def _repeat(self, request: Request, expected: Answer) -> None:
        # The server closes a connection that is idle for seconds, as one may be on a busy machine.
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=self._url, timeout=None, limits=limits) as client:
            while not self._stopped.is_set() and not self.failures:
                try:
                    answer = complete(client, request)
                except (RequestFailed, httpx.HTTPError) as error:
                    self.failures.append(f"{request}: {error!r}")
                else:
                    if answer != expected:
                        self.failures.append(f"{request}: {answer}, not {expected}")
                    self.num_answers += 1

    def __enter__(self) -> "Generating":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            assert not self.failures, self.failures[0]
