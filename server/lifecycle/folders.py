"""The child that `server.lifecycle.staging` asks: it reads, checks and copies networks' folders.

It reads requests from its standard input, a line of JSON each, and answers on its standard
output, in any order: `{"id", "method", ...}` -> `{"id", "result"}` or
`{"id", "refused", "because"}`. The first line, which nobody asked for, says that it has imported
what checks need. It ends with its parent: by the kernel, or when its input ends.

It works at nice 19: where decoding keeps the cores busy it gets about a seventieth of them, and
where decoding leaves gaps it gets those. SCHED_IDLE would get a fifth of that, too little for a
load to end while requests wait for it. It copies in pieces of 1 MiB, between which it can be put
aside.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from server.lifecycle.staging import READY, ModelFacts, NetworkFacts
from server.run_directory import NETWORKS
from server.settings import Settings
from value_models.publish import remove
from value_models.snapshot import remove_unfinished, snapshot
from value_models.store import (
    DirectoryError,
    NetworkError,
    NetworkFolder,
    NoSuchNetwork,
    Role,
    Store,
    check_fits,
    check_name,
    check_tokenizer,
    model_path,
)


def check_servable(network: NetworkFolder, target_fingerprint: str) -> None:
    """Check that a network can steer the target, and that what it needs for that can be read.

    Raises:
        NetworkError: it cannot.
    """
    check_fits(network, target_fingerprint)
    if is_mapped(network, target_fingerprint):
        from value_models.vocabulary.reading import Reader
        from value_models.vocabulary.tokens import VocabularyError

        try:
            Reader.load(network.path, target_fingerprint)
        except VocabularyError as error:
            raise NetworkError(f"value network {network.name!r}: {error}") from error


def is_mapped(network: NetworkFolder, target_fingerprint: str) -> bool:
    """Whether a network has another vocabulary than the target."""
    return network.manifest.tokenizer_fingerprint != target_fingerprint


class Folders:
    """What the child does: a method for each request, called with its arguments."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        assert settings.run_dir is not None
        self._snapshots = settings.run_dir / NETWORKS
        remove_unfinished(self._snapshots)

    def inspect(self, source: str, name: str) -> dict[str, Any]:
        network = self._store().check(source, with_version=False).named(check_name(name))
        check_servable(network, self._settings.tokenizer_fingerprint)
        check_tokenizer(network)
        return self._facts(network, source)

    def stage(self, source: str, name: str, max_bytes: int) -> dict[str, Any]:
        network = snapshot(self._store().folder(source), name, self._snapshots, max_bytes)
        try:
            check_servable(network, self._settings.tokenizer_fingerprint)
        except BaseException:
            shutil.rmtree(network.path, ignore_errors=True)
            raise
        facts = self._facts(network, source)
        return facts | {"version": network.version, "folder": str(network.path)}

    def list(self) -> list[str]:
        return self._store().names() if self._settings.store else []

    def remove(self, source: str) -> None:
        remove(self._store().directory, source)

    def discard(self, folder: str, weights_only: bool) -> None:
        path = Path(folder)
        if path.parent != self._snapshots or path.name.startswith("."):
            raise DirectoryError(f"{folder} is no snapshot of a network")
        if weights_only:
            for role in get_args(Role):
                for file in model_path(path, role).glob("*.safetensors"):
                    file.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)

    def _store(self) -> Store:
        if self._settings.store is None:
            raise DirectoryError("there is no store; start the server with --value-network-dir")
        return Store(self._settings.store)

    def _facts(self, network: NetworkFolder, source: str) -> dict[str, Any]:
        return NetworkFacts(
            name=network.name,
            source=source,
            kind=network.manifest.kind,
            scale=network.manifest.default_scale,
            vocab_size=network.vocab_size,
            max_context=network.max_context,
            num_bytes=network.num_bytes,
            models=tuple(
                ModelFacts(
                    role=model.role,
                    num_parameters=model.num_parameters,
                    kv_shape=model.kv_shape,
                    vocab_size=model.vocab_size,
                    max_context=model.max_context,
                )
                for model in network.models
            ),
            mapped=is_mapped(network, self._settings.tokenizer_fingerprint),
        ).model_dump()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what was asked. Whatever goes wrong is an answer too."""
        identity, method = request.pop("id"), request.pop("method")
        try:
            return {"id": identity, "result": getattr(self, method)(**request)}
        except NetworkError as error:
            return {"id": identity, "refused": _refusal(error, method), "because": str(error)}
        except Exception as error:
            reason = f"{method} failed: {type(error).__name__}: {error}"
            return {"id": identity, "refused": "staging", "because": reason[:500]}


def _refusal(error: NetworkError, method: str) -> str:
    if isinstance(error, NoSuchNetwork):
        return "missing"
    # That the store is read-only is an answer to who wants to delete from it.
    return "staging" if isinstance(error, DirectoryError) and method != "remove" else "network"


def main() -> None:
    """Be the child."""
    _be_humble()
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # whatever a library prints is no answer
    writing = threading.Lock()

    def write(answer: dict[str, Any]) -> None:
        with writing:
            answers.write(json.dumps(answer).encode() + b"\n")

    def preload() -> None:
        _preload()
        write({"id": READY, "result": None})

    folders = Folders(Settings.load())
    # What is quick does not wait behind a copy.
    lanes = {method: ThreadPoolExecutor(1) for method in ("stage", "inspect", "list")}
    lanes |= {"remove": lanes["stage"], "discard": lanes["inspect"]}
    lanes["stage"].submit(lanes["inspect"].submit(preload).result)

    def answer(request: dict[str, Any]) -> None:
        _step_back()
        write(folders.answer(request))

    for line in sys.stdin.buffer:
        request = json.loads(line)
        lanes[request["method"]].submit(answer, request)
    os._exit(0)  # the parent is gone, or wants no answers


def _preload() -> None:
    """Import what checks need, which takes seconds, before the first is asked for."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import value_models.vocabulary.reading  # noqa: F401


def _be_humble() -> None:
    """Get out of the way of decoding, and be the first to go when memory is short.

    Threads keep the priority at which they were started, so this one is for importing: seconds of
    work that the first requests wait for. `_step_back` is for all that follows.
    """
    os.nice(10)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _step_back() -> None:
    """Take the lowest priority, for this thread."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)


def _die_with_parent() -> None:
    """The end of the input comes late where a process forked off the parent holds its pipe."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
