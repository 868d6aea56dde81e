"""Which value networks a server loads as it starts, and private copies of them.

Those that flags name, which must all load, and of the store those that were loaded when the server
last ran, or at first all. A network of the store that is not sound, or does not fit, is left out
and said to be.
"""

import hashlib
import os
import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from server import run_directory
from server.lifecycle.folders import check_servable
from server.lifecycle.state_file import CorruptStateFile, State, read_state
from server.settings import Settings
from value_models.snapshot import snapshot
from value_models.store import NetworkError, NetworkFolder, Store, check_fits, check_network

BLOCK_TOKENS = 32
TOKENS_PER_TARGET_TOKEN = 4
"""As in `server.worker`, which is not imported here: it brings vLLM's models."""
KVShape = tuple[int, int, int]
OTHER_FILES_BYTES = 1 << 30
"""More than a network's tokenizer and maps may have."""


class LaunchError(ValueError):
    """A flag or a setting of the environment that cannot be honoured."""


class NoRoom(LaunchError):
    """A network does not fit beside those that are already chosen."""


class Plan(NamedTuple):
    """What is to be loaded, as far as flags and the state file tell."""

    flagged: dict[str, Path]
    """name -> folder, given by flags."""
    store: Store | None
    remembered: dict[str, str]
    """name -> folder in the store."""
    state_file: Path | None
    withheld: tuple[str, ...]


class Chosen(NamedTuple):
    """What is loaded, from copies in the run directory."""

    networks: dict[str, NetworkFolder]
    sources: dict[str, str]
    """name -> folder in the store, of those that come from there, loaded or not."""
    unloadable: dict[str, str]
    """name -> why, of those in the store that are not sound, or do not fit."""


class Memory:
    """An estimate of what the networks will take in a worker; the worker measures."""

    def __init__(self, total: int, itemsize: int, ranks: int, longest: int | None) -> None:
        """
        Args:
            total: bytes for all networks.
            itemsize: bytes of a number in the networks' dtype, see `server.worker.precision`.
            ranks: workers that share a network, by tensor parallelism.
            longest: tokens that the target can have in context; None: not known.
        """
        self.total = total
        self._itemsize = itemsize
        self._ranks = ranks
        self._longest = longest
        self._weights = 0
        self._pools: dict[KVShape, int] = {}

    def check(self, network: NetworkFolder, mapped: bool) -> None:
        """Raise `NoRoom` if the network does not fit beside those that were added."""
        needed = self._weights_of(network)
        for shape, pool in self._pools_of(network, mapped).items():
            needed += max(0, pool - self._pools.get(shape, 0))
        free = self.total - self._weights - sum(self._pools.values())
        if needed > free:
            raise NoRoom(
                f"value network {network.name!r} needs about {_gib(needed)}, but of the "
                f"{_gib(self.total)} for value networks {_gib(free)} are free; "
                "give more with --value-memory-gb"
            )

    def add(self, network: NetworkFolder, mapped: bool) -> None:
        """Count a network as loaded."""
        for shape, pool in self._pools_of(network, mapped).items():
            self._pools[shape] = max(pool, self._pools.get(shape, 0))
        self._weights += self._weights_of(network)

    def _weights_of(self, network: NetworkFolder) -> int:
        return network.num_parameters * self._itemsize // self._ranks

    def _pools_of(self, network: NetworkFolder, mapped: bool) -> dict[KVShape, int]:
        """Bytes of KV cache for one full context: a pool, shared by models of one shape, holds at
        least that."""
        if self._longest is None:
            return {}
        limit = self._longest * (TOKENS_PER_TARGET_TOKEN if mapped else 1)
        tokens = (-(-min(network.max_context, limit) // BLOCK_TOKENS) + 1) * BLOCK_TOKENS
        pools = {}
        for model in network.models:
            layers, heads, head_size = model.kv_shape
            per_token = layers * max(1, heads // self._ranks) * head_size * 2 * self._itemsize
            pools[model.kv_shape] = tokens * per_token
        return pools


def plan(args: Namespace, taken: Mapping[str, str], notes: list[str]) -> Plan:
    """Find out what is to be loaded.

    Args:
        args: the flags.
        taken: names that no network can have -> whose they are.
        notes: what a person should know is added here.

    Raises:
        LaunchError, NetworkError: of flags.
    """
    flagged = _flagged(args, taken)
    if args.value_network_dir is None:
        if args.state_file is not None:
            raise LaunchError("--state-file remembers networks of --value-network-dir; give that")
        return Plan(flagged, None, {}, None, ())
    store = Store(Path(args.value_network_dir).absolute())
    state_file = _state_file(args, store)
    if state_file is None:
        notes.append("A restart will load all networks again: there is no home for a --state-file")
    state = _read_state(state_file, notes)
    if state is None:
        remembered, withheld = {name: name for name in store.names()}, frozenset[str]()
    else:
        remembered = {network.name: network.source for network in state.networks}
        withheld = frozenset(state.withheld) - flagged.keys()
    for name in sorted(flagged.keys() & remembered.keys()):
        notes.append(f"--value-network {name} is served, not {name} of {store.directory}")
        del remembered[name]
    return Plan(flagged, store, remembered, state_file, tuple(sorted(withheld)))


def copy_networks(
    plan: Plan, settings: Settings, taken: Mapping[str, str], memory: Memory, notes: list[str]
) -> Chosen:
    """Copy what is to be loaded into the run directory, and check the copies.

    Raises:
        NoRoom, NetworkError: of a network that a flag names.
    """
    assert settings.run_dir is not None
    into = settings.run_dir / run_directory.NETWORKS
    target = settings.tokenizer_fingerprint
    chosen = Chosen({}, {}, {})

    def copy(folder: Path, name: str) -> None:
        facts = check_network(folder, name, with_version=False)
        check_fits(facts, target)
        mapped = facts.manifest.tokenizer_fingerprint != target
        memory.check(facts, mapped)
        network = snapshot(folder, name, into, facts.num_bytes + OTHER_FILES_BYTES)
        try:
            check_servable(network, target)
        except BaseException:
            shutil.rmtree(network.path, ignore_errors=True)
            raise
        memory.add(network, mapped)
        chosen.networks[name] = network

    for name, folder in plan.flagged.items():
        copy(folder, name)
    for name, source in plan.remembered.items():
        assert plan.store is not None
        chosen.sources[name] = source
        try:
            if name in taken:
                raise NetworkError(
                    f"value network {name!r}: the name is {taken[name]} too; rename its folder"
                )
            copy(plan.store.folder(source), name)
        except (NoRoom, NetworkError) as error:
            chosen.unloadable[name] = " ".join(str(error).split())
            notes.append(f"Not loaded: {chosen.unloadable[name]}")
    return chosen


def _flagged(args: Namespace, taken: Mapping[str, str]) -> dict[str, Path]:
    flagged: dict[str, Path] = {}
    for option in args.value_network:
        name, given, folder = option.partition("=")
        if not given or not folder:
            raise LaunchError(f"--value-network {option}: write NAME=DIR, as in qa=./networks/qa")
        owner = "another value network's" if name in flagged else taken.get(name)
        if owner is not None:
            raise LaunchError(
                f"the value network's name {name!r} is {owner} too; clients choose by name, so "
                "give it another"
            )
        check_network(folder, name, with_version=False)
        flagged[name] = Path(folder)
    return flagged


def _state_file(args: Namespace, store: Store) -> Path | None:
    if args.state_file is not None:
        return Path(args.state_file).absolute()
    where = args.uds or f"{args.host}:{args.port}"
    identity = hashlib.sha256(f"{store.directory.resolve()}\0{where}".encode()).hexdigest()[:16]
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home, "trimtab", f"{identity}.json") if os.path.isabs(home) else None


def _read_state(file: Path | None, notes: list[str]) -> State | None:
    if file is None:
        return None
    try:
        return read_state(file)
    except CorruptStateFile as error:
        notes.append(str(error))
    except OSError as error:
        notes.append(
            f"the state file {file} cannot be read ({error.strerror}); the server starts as if "
            "there were none"
        )
    return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3g} GiB"
