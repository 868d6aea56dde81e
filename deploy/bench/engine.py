"""A vLLM engine in a process group of its own, which stands still while another one is measured."""

import contextlib
import itertools
import multiprocessing
import os
import secrets
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from server.choice import EXTRA_ARG, Choice, ChosenNetwork, seal
from server.cpu import settle_cores
from server.settings import ENVIRONMENT_VARIABLE, Settings
from value_models.manifest import tokenizer_fingerprint
from value_models.store import check_network

if TYPE_CHECKING:
    from vllm import SamplingParams


class Request(NamedTuple):
    """A prompt that is continued greedily."""

    prompt: list[int]
    num_tokens: int
    networks: tuple[str, ...] = ()  # that guide it, each with a scale of 1
    choice: Mapping[str, Any] = {}  # more of `server.choice.Choice`
    logprobs: int | None = None  # of how many tokens at each position
    joins_after: int = 0  # sent when all requests before it have so many tokens


class Stream(NamedTuple):
    """What came back for one request; times are seconds since the run began."""

    tokens: list[int]
    sent: float
    arrivals: list[float]  # of each token
    logprobs: list[dict[int, float]] | None = None  # of each token

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between two tokens."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals)]


class Run(NamedTuple):
    """One batch of requests, sent together: a stream of each."""

    streams: list[Stream]

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(stream.arrivals[-1] for stream in self.streams)

    def seconds_until(self, num_tokens: int) -> float:
        """From the first request until every stream has so many tokens."""
        return max(stream.arrivals[num_tokens - 1] for stream in self.streams)

    @property
    def tokens(self) -> list[list[int]]:
        return [stream.tokens for stream in self.streams]

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def gaps(self) -> list[float]:
        """Between two tokens of a stream, of all streams."""
        return [gap for stream in self.streams for gap in stream.gaps]

    @property
    def step_seconds(self) -> float:
        """Of the median decoding step."""
        return statistics.median(self.gaps)


class Engine:
    """vLLM at its defaults, or with trimtab's plug points where it is given value networks.

    Between calls all its processes are stopped (SIGSTOP): an idle vLLM scheduler spins on a core.

    Attributes:
        description: what vLLM made of its options: `dtype`, `max_num_seqs`, ...
    """

    def __init__(
        self,
        target: Path,
        networks: dict[str, Path],
        log: Path,
        *,
        value_memory_gb: float = 2.0,
        set_up_alike: bool = False,
        environment: Mapping[str, str] = {},
        **options: Any,
    ) -> None:
        """
        Args:
            networks: resident value networks by name; none: plain vLLM.
            log: a file for what the engine prints; trimtab's own files go beside it.
            value_memory_gb: GiB for the networks and their KV caches.
            set_up_alike: on a CPU, let plain vLLM share cores and wait as trimtab's server does.
            environment: more variables of the engine's processes.
            options: of `vllm.LLM`, where they are not to be its defaults.
        """
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(
            target=_run,
            args=(
                theirs,
                target,
                networks,
                log,
                value_memory_gb,
                set_up_alike,
                dict(environment),
                options,
            ),
        )
        self._process.start()
        theirs.close()
        self._log = log
        try:
            self.description: dict[str, Any] = self._receive()
        except BaseException:  # the program is told to end, say
            self._end()
            raise
        self._signal(signal.SIGSTOP)

    def run(
        self, requests: Sequence[Request], warm: bool = False, at_once: int | None = None
    ) -> Run:
        """Send requests, all together but for `joins_after`, and take their tokens.

        Args:
            warm: let the target find prefixes that earlier runs have read. What is compared often
                has the same prompts on one engine.
            at_once: send the next only when fewer than so many run.

        Raises:
            RuntimeError: one ended early, because its network failed.
        """
        run: Run = self._ask("run", list(requests), warm, at_once or len(requests))
        for request, stream in zip(requests, run.streams, strict=True):
            if len(stream.tokens) != request.num_tokens:
                raise RuntimeError(f"a request ended early; see {self._log}")
        return run

    def call(self, function: str | Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of vLLM's worker by name, or a function, which gets the worker first.

        Args:
            function: one that can be imported by its name, or that name.

        Returns:
            The first worker's reply.
        """
        return self._ask("call", function, arguments)

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
        self._end()

    def _end(self) -> None:
        """Kill whatever is left of it."""
        self._process.kill()
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of `_Served`."""
        self._signal(signal.SIGCONT)
        self._pipe.send((method, arguments))
        reply = self._receive()
        self._signal(signal.SIGSTOP)
        return reply

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            sys.exit(f"The engine died; the end of its log:\n{self._log.read_text()[-12000:]}")

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid or 0, number)


def _run(
    pipe: Connection,
    target: Path,
    networks: dict[str, Path],
    log: Path,
    value_memory_gb: float,
    set_up_alike: bool,
    environment: dict[str, str],
    options: dict[str, Any],
) -> None:
    """Serve `Engine` until its end of the pipe closes. Runs in a process of its own."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `Engine.call` may send functions
    os.environ.pop(ENVIRONMENT_VARIABLE, None)  # whoever started this may have a server's
    if set_up_alike:
        os.environ[ENVIRONMENT_VARIABLE] = ""  # its presence counts: server/worker/waiting.py
    os.environ.update(environment)
    if networks or set_up_alike:
        settle_cores()
    served = _Served(target, networks, log.with_suffix(""), value_memory_gb, options)
    pipe.send(served.description)
    try:
        with contextlib.suppress(EOFError):
            while True:
                method, arguments = pipe.recv()
                pipe.send(getattr(served, method)(*arguments))
    finally:  # also where a call throws: this process would wait for vLLM's
        served.shut_down()


class _Served:
    """vLLM's `LLM` in the engine's process, and how its requests choose networks."""

    def __init__(
        self,
        target: Path,
        networks: dict[str, Path],
        run_dir: Path,
        value_memory_gb: float,
        options: dict[str, Any],
    ) -> None:
        self._key = secrets.token_hex()
        self._run_dir = run_dir
        self._numbers = itertools.count()
        if networks:
            options = options | self._plug_in(target, networks, value_memory_gb)
        from vllm import LLM
        from vllm.platforms import current_platform

        # Several engines share the machine, so none may take all of its memory for its KV cache.
        options = {"kv_cache_memory_bytes": 1 << 30} | options
        if current_platform.is_cuda():
            # The share that must be free at the start; it has no other meaning beside the above.
            options = {"gpu_memory_utilization": 0.1} | options
        self._llm = LLM(str(target), **options)
        if networks:
            for reply in self._llm.collective_rpc("trimtab_attach"):
                if "error" in reply:
                    raise RuntimeError(reply["error"])
        self._versions = {name: check_network(path).version for name, path in networks.items()}
        config = self._llm.llm_engine.vllm_config
        self._failure_token_id = config.model_config.get_vocab_size() - 1
        self.description = {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "v2_model_runner": config.use_v2_model_runner,
        }

    def shut_down(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def call(self, function: str | Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return self._llm.collective_rpc(function, args=arguments)[0]

    def run(self, requests: Sequence[Request], warm: bool, at_once: int) -> Run:
        """Do what `LLM.generate` does, and note when each token arrives."""
        engine = self._llm.llm_engine
        if not warm and not engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use, though nothing runs")
        numbers = itertools.islice(self._numbers, len(requests))
        waiting = deque(zip(map(str, numbers), requests, map(self._params, requests), strict=True))
        streams: dict[str, Stream] = {}
        start = time.perf_counter()
        while waiting or engine.has_unfinished_requests():
            fewest = min((len(stream.tokens) for stream in streams.values()), default=0)
            while (
                waiting
                and waiting[0][1].joins_after <= fewest
                and engine.get_num_unfinished_requests() < at_once
            ):
                number, request, params = waiting.popleft()
                keeps = None if request.logprobs is None else []
                streams[number] = Stream([], time.perf_counter() - start, [], keeps)
                engine.add_request(number, {"prompt_token_ids": request.prompt}, params)
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                stream, completion = streams[output.request_id], output.outputs[0]
                stream.tokens.extend(completion.token_ids)
                stream.arrivals.extend([now] * len(completion.token_ids))
                if stream.logprobs is not None:
                    stream.logprobs.extend(
                        {token: found.logprob for token, found in position.items()}
                        for position in completion.logprobs
                    )
        return Run(list(streams.values()))

    def _plug_in(
        self, target: Path, networks: dict[str, Path], value_memory_gb: float
    ) -> dict[str, Any]:
        """Export trimtab's settings. Returns the options that put it into vLLM."""
        from server.plugin import LOGITS_PROCESSOR, WORKER_EXTENSION
        from server.run_directory import EXPLAIN

        self._explanations = self._run_dir / EXPLAIN
        self._explanations.mkdir(parents=True)
        Settings(
            networks=networks,
            key=self._key,
            tokenizer_fingerprint=tokenizer_fingerprint(
                PreTrainedTokenizerFast.from_pretrained(target)
            ),
            run_dir=self._run_dir,
            value_memory_gb=value_memory_gb,
        ).export()
        return {"logits_processors": [LOGITS_PROCESSOR], "worker_extension_cls": WORKER_EXTENSION}

    def _params(self, request: Request) -> "SamplingParams":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        guided: dict[str, Any] = {}
        if request.networks:
            chosen = [ChosenNetwork(n, self._versions[n], 1.0) for n in request.networks]
            choice = Choice(tuple(chosen), self._failure_token_id, **request.choice)
            if choice.explain is not None:
                (self._explanations / choice.explain).touch()
            guided = {
                "extra_args": {EXTRA_ARG: seal(choice, self._key)},
                "stop_token_ids": [self._failure_token_id],
            }
        return SamplingParams(
            temperature=0,
            max_tokens=request.num_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=request.logprobs,
            output_kind=RequestOutputKind.DELTA,
            **guided,
        )
