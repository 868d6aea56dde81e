"""A vLLM engine in a process group of its own, which stands still while another one is measured."""

import contextlib
import multiprocessing
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from server.choice import EXTRA_ARG, Choice, ChosenNetwork, seal
from server.settings import Settings
from value_models.manifest import tokenizer_fingerprint
from value_models.store import check_network

Prompts = list[list[int]]


class Run(NamedTuple):
    """One timed generation of a whole batch."""

    seconds: float
    tokens: list[list[int]]  # per prompt

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


class Engine:
    """vLLM at its defaults, or with trimtab's plug points where it is given value networks.

    Between calls all its processes are stopped (SIGSTOP): an idle vLLM scheduler spins on a core.
    """

    def __init__(self, target: Path, networks: dict[str, Path], log: Path) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_run, args=(theirs, target, networks, log))
        self._process.start()
        theirs.close()
        self._log = log
        self.dtype: str = self._receive()
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: Prompts, num_tokens: int, *networks: str, **choice: Any) -> Run:
        """Generate `num_tokens` greedy tokens per prompt.

        Args:
            networks: that guide, each with a scale of 1.
            choice: more of `server.choice.Choice`.
        """
        self._signal(signal.SIGCONT)
        self._pipe.send((prompts, num_tokens, networks, choice))
        run: Run = self._receive()
        self._signal(signal.SIGSTOP)
        return run

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signal(signal.SIGCONT)
        self._pipe.close()  # the engine's end: it leaves its loop and shuts vLLM down
        self._process.join(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            sys.exit(f"The engine died; the end of its log:\n{self._log.read_text()[-3000:]}")

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid or 0, number)


def _run(pipe: Connection, target: Path, networks: dict[str, Path], log: Path) -> None:
    """Serve `Engine.generate` until its end of the pipe closes. Runs in a process of its own."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    key = secrets.token_hex()
    plug_points: dict[str, Any] = {}
    if networks:
        from server.plugin import LOGITS_PROCESSOR, WORKER_EXTENSION
        from server.run_directory import EXPLAIN

        fingerprint = tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(target))
        run_dir = log.parent
        (run_dir / EXPLAIN).mkdir(exist_ok=True)
        Settings(
            networks=networks, key=key, tokenizer_fingerprint=fingerprint, run_dir=run_dir
        ).export()
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # as `trimtab serve` does
        plug_points = {
            "logits_processors": [LOGITS_PROCESSOR],
            "worker_extension_cls": WORKER_EXTENSION,
        }

    from vllm import LLM, SamplingParams

    # Two engines share the machine, so neither may take all of its memory for its KV cache.
    llm = LLM(str(target), kv_cache_memory_bytes=1 << 30, **plug_points)
    config = llm.llm_engine.vllm_config.model_config
    if networks:
        for reply in llm.collective_rpc("trimtab_attach"):
            if "error" in reply:
                raise RuntimeError(reply["error"])
    versions = {name: check_network(folder).version for name, folder in networks.items()}
    failure_token_id = config.get_vocab_size() - 1
    pipe.send(str(config.dtype).removeprefix("torch."))

    while True:
        try:
            prompts, num_tokens, names, more = pipe.recv()
        except EOFError:
            return
        guided: dict[str, Any] = {}
        if names:
            chosen = tuple(ChosenNetwork(name, versions[name], 1.0) for name in names)
            choice = Choice(chosen, failure_token_id, **more)
            if choice.explain is not None:
                (log.parent / EXPLAIN / choice.explain).touch()
            guided = {
                "extra_args": {EXTRA_ARG: seal(choice, key)},
                "stop_token_ids": [failure_token_id],
            }
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **guided
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens: Sequence[Sequence[int]] = [output.outputs[0].token_ids for output in outputs]
        if any(len(row) != num_tokens for row in tokens):
            raise RuntimeError("a request ended early: its value network failed")
        pipe.send(Run(seconds, [list(row) for row in tokens]))
