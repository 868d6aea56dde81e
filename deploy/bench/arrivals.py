"""How soon requests that come together begin, where steps take a few milliseconds.

Clients in a process of their own send a request each to vLLM's server at its defaults, or to
`trimtab serve`, both of a small target. What is compared is when the last of them has its first
token. Clients that start then have work of their own before they can send: each makes an HTTP
client while the requests of others run already. On few cores, a server that spins while it waits
leaves whoever else has work no time to run. Clients that are ready send all within milliseconds.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from deploy.bench.arguments import add_rounds, within
from deploy.bench.checkpoints import NETWORK, Checkpoints
from deploy.bench.report import Answer, Cell, Table, rounded, say
from deploy.bench.rounds import (
    GUIDED,
    PLAIN,
    UNGUIDED,
    Round,
    Rounds,
    median,
    ratio,
    runs_of,
    take_turns,
)
from deploy.bench.startup import plain_server, running
from tests.models import make_model, make_network
from tests.server.serving import TARGET, trimtab

SMALL = NETWORK | {"hidden_size": 128, "layers": 2, "heads": 2, "kv_heads": 2, "vocab_size": 544}
"""Of the target, a step of which takes a few milliseconds, and of the network."""
POSITIONS = 2048
GUIDING = "guiding"
CONFIGURATIONS = (PLAIN, UNGUIDED, GUIDED)
STARTING, READY = "clients that start then", "clients that are ready"


class Arrivals(NamedTuple):
    """What the clients saw, in seconds since the first of them could have been sent."""

    first_tokens: list[float]
    ends: list[float]

    @property
    def last_first_token(self) -> float:
        return max(self.first_tokens)

    @property
    def end(self) -> float:
        return max(self.ends)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rounds(parser, 5)
    parser.add_argument("--clients", type=within(1), default=8, help="(8)")
    parser.add_argument(
        "--tokens", type=within(1, POSITIONS - 8), default=1600, help="of each request (1600)"
    )


def ask(arguments: argparse.Namespace, folder: Path) -> Answer:
    say("making random checkpoints")
    shape = SMALL | {"max_position_embeddings": POSITIONS}
    target = make_model(folder / TARGET, **shape)
    network = make_network(folder / "store" / GUIDING, **shape, seed=1)
    flags = ["--dtype", "float32", "--served-model-name", TARGET, "--enforce-eager"]
    guiding = trimtab("serve", target, "--value-network-dir", network.parent)
    guiding += ["--state-file", str(folder / "state.json")]
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, command in {PLAIN: plain_server(target), GUIDED: guiding}.items():
            place = folder / f"server-{len(urls)}"
            place.mkdir()
            say(f"starting {'vLLM' if name == PLAIN else 'trimtab'}")
            urls[name], _, _ = stack.enter_context(running(command, flags, place))
        urls[UNGUIDED] = urls[GUIDED]

        def measure(name: str, case: str, number: int) -> Arrivals:
            model = GUIDING if name == GUIDED else TARGET
            ready = case == READY
            return send_together(urls[name], model, arguments.clients, arguments.tokens, ready)

        rounds = take_turns((STARTING, READY), CONFIGURATIONS, arguments.rounds, measure)
    return Answer(
        tables=make_tables(rounds),
        models=Checkpoints(target, {GUIDING: network}, "float32").describe(),
        runs=runs_of(rounds, first_tokens=lambda a: a.first_tokens, ends=lambda a: a.ends),
    )


def send_together(url: str, model: str, clients: int, tokens: int, ready: bool) -> Arrivals:
    """Stream a completion for each of `clients`, all at once, from a process of their own.

    Args:
        ready: they have made their HTTP clients before.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, url, model, clients, tokens, ready))
    process.start()
    theirs.close()
    try:
        return Arrivals(*pipe.recv())
    except EOFError:
        raise RuntimeError("the clients failed: above, why") from None
    finally:
        process.join()


def _run(pipe: Connection, url: str, model: str, clients: int, tokens: int, ready: bool) -> None:
    os.setsid()  # as a client elsewhere on the machine: in no session with a server

    def make() -> httpx.Client:
        return httpx.Client(base_url=url, timeout=600)

    made = [make() for _ in range(clients)] if ready else None
    start = time.monotonic()

    def stream(number: int) -> tuple[float, float]:
        request: dict[str, Any] = {
            "model": model,
            "prompt": [8 + number],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        with (
            made[number] if made else make() as client,
            client.stream("POST", "/v1/completions", json=request) as response,
        ):
            response.raise_for_status()
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data: {"))
            first = time.monotonic() - start
            *_, done = (line for line in lines if line)
            if done != "data: [DONE]":
                raise RuntimeError(f"a stream broke off: {done}")
        return first, time.monotonic() - start

    with ThreadPoolExecutor(clients) as executor:
        found = list(executor.map(stream, range(clients)))
    pipe.send([list(times) for times in zip(*found, strict=True)])


def make_tables(rounds: Rounds[str, Arrivals]) -> list[Table]:
    return [
        Table(
            f"Seconds since all began, {case}: median of the rounds",
            [row(found, name) for name in CONFIGURATIONS],
        )
        for case, found in rounds.items()
    ]


def row(found: Sequence[Round[Arrivals]], name: str) -> dict[str, Cell]:
    def of(value: Callable[[Arrivals], float]) -> float | None:
        return rounded(median(found, name, value))

    return {
        "": name,
        "first token, median": of(lambda a: statistics.median(a.first_tokens)),
        "of the last": of(lambda a: a.last_first_token),
        "of the last, in the worst round": rounded(max(m[name].last_first_token for m in found)),
        "all have ended": of(lambda a: a.end),
        "against plain": rounded(ratio(found, name, PLAIN, lambda a: a.end)),
    }
