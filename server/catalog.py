"""The value networks that a server knows: names, versions and states.

The worker is the truth for what is loaded; a catalog is what one API process last heard of it.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

CallWorkers = Callable[[str], Awaitable[list[Any]]]
"""Calls a method of the worker extension in every worker and returns their replies."""


class Network(BaseModel):
    """One value network as the workers report it."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    state: Literal["ready", "failed"]
    reason: str | None
    """Why it failed."""
    scale: float
    """The factor on its logits where a request names none."""
    vocab_size: int
    """Its own token ids are below this."""
    mapped: bool
    """Whether it has another vocabulary than the target, and reads through a map."""
    max_context: int
    """The longest sequence it reads, prompt and output together, in tokens of its own."""
    num_parameters: int
    kind: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class _Report(BaseModel):
    """A worker's reply."""

    networks: list[Network]


class UnknownNetwork(LookupError):
    """No network, or no version of one, goes by that name."""


class WorkerError(RuntimeError):
    """The workers could not answer, or do not agree."""


class Catalog:
    """Value networks by name, as of the last answer from the workers."""

    def __init__(self, call_workers: CallWorkers) -> None:
        self._call_workers = call_workers
        self._networks: dict[str, Network] = {}

    async def attach(self) -> None:
        """Have every worker make its networks ready, and learn which there are.

        Raises:
            WorkerError: some worker could not.
        """
        await self._ask("trimtab_attach")

    async def refresh(self) -> None:
        """Learn the networks' states anew. Raises `WorkerError`."""
        await self._ask("trimtab_networks")

    def __iter__(self) -> Iterator[Network]:
        return iter(self._networks.values())

    def __contains__(self, reference: str) -> bool:
        """Whether `reference`, `name` or `name@version`, names a network of any version."""
        return reference.partition("@")[0] in self._networks

    def find(self, reference: str) -> Network:
        """Return the network that `name` or `name@version` means.

        Raises:
            UnknownNetwork: there is none.
        """
        name, pinned, version = reference.partition("@")
        network = self._networks.get(name)
        if network is None:
            known = ", ".join(self._networks) or "none"
            raise UnknownNetwork(f"there is no value network {name!r}; there is: {known}")
        if pinned and version != network.version:
            raise UnknownNetwork(
                f"value network {name!r} has no version {version!r}; there is: {network.version}"
            )
        return network

    async def _ask(self, method: str) -> None:
        try:
            replies = await self._call_workers(method)
        except Exception as error:  # remote calls fail with a bare Exception
            raise WorkerError(f"{method} failed: {error}") from error
        for reply in replies:
            if isinstance(reply, dict) and "error" in reply:
                raise WorkerError(reply["error"])
        try:
            self._learn([_Report.model_validate(reply).networks for reply in replies])
        except ValidationError as error:
            raise WorkerError(f"a worker's reply to {method} is malformed: {error}") from error

    def _learn(self, reports: list[list[Network]]) -> None:
        """Merge what each worker said; a network that failed in one has failed."""
        if len({frozenset(map(str, report)) for report in reports}) != 1:
            raise WorkerError("the workers hold different value networks")
        merged = {network.name: network for network in reports[0]}
        for network in (network for report in reports[1:] for network in report):
            if network.state == "failed":
                merged[network.name] = network
        self._networks = merged
