"""What guidance did to each token of a response, from the workers' records to the client.

For each call of vLLM's `generate` there is one file in the run directory: a worker appends a line
for each token before that token leaves it (see `server.worker.explanations`), and the door reads
them as it passes the token on.
"""

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from functools import lru_cache
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, BinaryIO, Self

from server.choice import ChosenNetwork

FIELD = "value_explanation"
SOLVED_NATS = 1e-3
"""How far from the distance that it wants a solved weight may end."""
LINES_AT_ONCE = 128
"""Read in a few milliseconds."""

Tokens = list[dict[str, Any]]
"""Explained tokens of one choice, in the order in which they were generated."""


class Spelling:
    """The strings of the target's tokens; each is decoded once."""

    def __init__(self, decode: Callable[[int], str]) -> None:
        self.of = lru_cache(maxsize=1 << 16)(decode)


class Explanation:
    """What guidance did to the tokens of one response."""

    def __init__(
        self,
        folder: Path,
        spelling: Spelling,
        networks: Sequence[ChosenNetwork],
        *,
        choice_per_call: bool,
    ) -> None:
        """
        Args:
            folder: of the records.
            networks: in the order of the sealed choice.
            choice_per_call: whether each call of `generate` makes choices of its own, as several
                prompts do; otherwise they continue each other.
        """
        self._folder = folder
        self._spelling = spelling
        self._networks = [str(network) for network in networks]
        self._choice_per_call = choice_per_call
        self._num_choices = 0
        self._untold: dict[int, Tokens] = defaultdict(list)

    def begin(self, n: int) -> "Record":
        """Return the record of the next call of `generate`, which samples `n` answers."""
        first = self._num_choices if self._choice_per_call else 0
        self._num_choices += n
        return Record(self._folder / token_hex(16), n, lambda i, line: self._add(first + i, line))

    def take(self, choice: int) -> list[dict[str, Any]]:
        """Return what is new about one choice: a value for a chunk's `value_explanation`."""
        tokens = self._untold.pop(choice, None)
        return [{"index": choice, "tokens": tokens}] if tokens else []

    def take_all(self) -> list[dict[str, Any]]:
        """Return what is new about all choices."""
        return [entry for choice in sorted(self._untold) for entry in self.take(choice)]

    def _add(self, choice: int, line: dict[str, Any]) -> None:
        self._untold[choice].append(self._describe(line))

    def _describe(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return a line of the record as a client sees it."""
        fields = {
            **self._token(line["token"], line["guided_probability"]),
            "target_probability": line["target_probability"],
            "kl": line["kl"],
            "guided": line["active"],
            "grammar": line["masked"],
            "target_top": [self._token(*entry) for entry in line["target"]],
            "guided_top": [self._token(*entry) for entry in line["guided"]],
            "networks": [
                {"name": self._networks[index], "weight": weight, "contribution": contribution}
                for index, weight, contribution in line["networks"]
            ],
        }
        wanted, reached = line["wanted"], line["reached"]
        if wanted is not None and reached is not None:
            solved = abs(wanted - reached) <= SOLVED_NATS
            fields["distance"] = {"wanted": wanted, "reached": reached, "solved": solved}
        return fields

    def _token(self, token_id: int, probability: float) -> dict[str, Any]:
        return {
            "token": self._spelling.of(token_id),
            "token_id": token_id,
            "probability": probability,
        }


class Record:
    """The file of one call of `generate`; with `with`, which makes and removes it."""

    def __init__(self, file: Path, n: int, add: Callable[[int, dict[str, Any]], None]) -> None:
        """`add` takes the lines of tokens that have been generated, each with the index of its
        answer."""
        self._file = file
        self._n = n
        self._add = add
        self._partial = b""
        self._found: list[dict[int, dict[str, Any]]] = [{} for _ in range(n)]
        self._num_passed = [0] * n

    @property
    def name(self) -> str:
        return self._file.name

    def __enter__(self) -> Self:
        flags = os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._lines: BinaryIO = os.fdopen(os.open(self._file, flags, 0o600), "rb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._file.unlink(missing_ok=True)

    async def passed(self, output: Any) -> None:
        """Add the lines of the tokens of one of vLLM's outputs, which holds what is new."""
        await self._read()
        for completion in output.outputs:
            index = completion.index
            start = self._num_passed[index]
            self._num_passed[index] = stop = start + len(completion.token_ids)
            for position in range(start, stop):
                line = self._found[index].pop(position, None)
                if line is not None:
                    self._add(index, line)

    async def _read(self) -> None:
        """Take up what the workers have written. Of a token that they computed twice, the later
        line counts."""
        *lines, self._partial = (self._partial + self._lines.read()).split(b"\n")
        for number, line in enumerate(lines, start=1):
            if number % LINES_AT_ONCE == 0:  # a long answer's, all at its end: let others go on
                await asyncio.sleep(0)
            try:
                fields = json.loads(line, parse_float=_as_float32, parse_constant=_no_number)
            except ValueError:
                continue  # a full disk took a part of it: the worker's log says so
            self._found[self._index(fields["request"])][fields["position"]] = fields

    def _index(self, request_id: str) -> int:
        """The index of an answer, which vLLM puts before the request's id if there are several."""
        return int(request_id.partition("_")[0]) if self._n > 1 else 0


def _as_float32(literal: str) -> float:
    """The workers compute in float32: what a scale of 0.7 has behind its 7th digit is noise."""
    return float(f"{float(literal):.7g}")


def _no_number(_literal: str) -> None:
    """JSON has no infinities, though Python writes them."""


async def explain_stream(
    events: AsyncIterable[Any], explanation: Explanation
) -> AsyncIterator[Any]:
    """Add to the events of a stream what is new when each is sent."""
    async for event in events:
        yield _explain_event(event, explanation) if isinstance(event, str) else event


def _explain_event(event: str, explanation: Explanation) -> str:
    head, marker, data = event.partition("data: ")
    if not data.startswith("{"):  # the end of the stream
        return event
    fields = json.loads(data)
    if entries := [entry for i in _choices_of(fields) for entry in explanation.take(i)]:
        fields[FIELD] = entries
        return f"{head}{marker}{json.dumps(fields, ensure_ascii=False)}\n\n"
    return event


def _choices_of(fields: dict[str, Any]) -> list[int]:
    """The choices whose tokens an event carries."""
    if fields.get("type") in ("response.output_text.delta", "response.completed"):
        return [0]
    choices = fields.get("choices") or []
    # The first chunk of a chat is sent with the first token in hand, but carries only the role.
    return [choice["index"] for choice in choices if "role" not in choice.get("delta", {})]
