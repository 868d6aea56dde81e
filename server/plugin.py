"""The points where trimtab plugs into vLLM: wired here, and named in pyproject.toml.

| vLLM's plug point | what trimtab puts there |
| --- | --- |
| `logits_processors` | `LOGITS_PROCESSOR`: one decoding step, guided |
| `worker_extension_cls` | `WORKER_EXTENSION`: calls to value networks in the workers |
| `vllm.endpoint_plugins` | `ValueGuidanceEndpoints`: OpenAI's endpoints that know value networks |
| `vllm.general_plugins` | `server.worker.waiting`: on a CPU, vLLM's processes wait asleep |
| `SamplingParams.extra_args` | `server.choice.EXTRA_ARG`: a request's choice, sealed |

Reads vLLM 0.32's `AsyncLLM`, `OpenAIServingModels`, `OpenAIServingResponses` and
`ReasoningConfig`.
"""

import logging
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sized
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError, VLLMClientError
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from server.api.admin import AdminGate, attach_admin
from server.api.errors import ApiError, respond
from server.api.explanation import Spelling
from server.api.generation import CURRENT, GenerationDoor
from server.api.metrics import extend_metrics
from server.api.middleware import RequestGate, Traffic
from server.api.reasoning import Reasoning
from server.api.robustness import Unbreakable
from server.api.routes import GUIDED_PATHS, Service, take_over
from server.api.vocabularies import Vocabularies
from server.failure_token import choose_failure_token
from server.lifecycle.catalog import Catalog
from server.lifecycle.leases import Leases
from server.lifecycle.lifecycle import Lifecycle
from server.lifecycle.staging import Stager
from server.run_directory import EXPLAIN
from server.settings import Settings, cut_off_marker

LOGITS_PROCESSOR = "server.worker.processor:ValueGuidance"
WORKER_EXTENSION = "server.worker.extension.ValueNetworkWorker"
ENDPOINT_PLUGIN = "trimtab"
"""The name of the entry points, and of the plugins in VLLM_PLUGINS."""

DRAIN_POLL_SECONDS = 0.05
TEARDOWN_SECONDS = 10


class ValueGuidanceEndpoints:
    """vLLM's endpoint plugin: adds the routes, then connects them to the engine."""

    name = ENDPOINT_PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._settings = Settings.load()
        self._service: Service | None = None
        self._traffic = Traffic()

    def attach_router(self, app: FastAPI) -> None:
        app.add_exception_handler(ApiError, respond)
        app.add_middleware(Unbreakable, client_errors=(VLLMClientError, ValueError))
        app.add_middleware(
            RequestGate,
            guided_paths=GUIDED_PATHS,
            offers=lambda name: self._service is not None and self._service.lifecycle.offers(name),
            traffic=self._traffic,
            max_body_bytes=self._settings.max_body_bytes,
        )
        app.add_middleware(AdminGate, settings=self._settings)  # outermost: added last
        take_over(app, self._connected)
        attach_admin(app, self._connected)
        extend_metrics(app, lambda: self._connected().lifecycle.worker_status())

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        assert engine_client is not None  # required_tasks keeps the engineless render server out

        async def call_workers(method: str, *args: Any) -> list[list[Any]]:
            # `engine_client.collective_rpc` answers for the first data-parallel engine only.
            replies: list[list[Any]] = await engine_client.engine_core.call_utility_all_async(
                "collective_rpc", method, None, args, None
            )
            return replies

        _show_log()
        assert self._settings.run_dir is not None  # `trimtab serve` makes one
        catalog, leases = Catalog(call_workers), Leases(self._settings.run_dir)
        stager = Stager(self._settings)
        stager.start()
        reasoning = _reasoning(engine_client)
        names = tuple(path.name for path in state.openai_serving_models.base_model_paths)
        lifecycle = Lifecycle(self._settings, catalog, leases, stager, _reserved_names(state))
        await lifecycle.start()
        door = GenerationDoor(
            engine_client.generate,
            catalog,
            leases,
            Vocabularies(catalog, self._settings.tokenizer_fingerprint),
            self._settings.key,
            engine_client.model_config.max_model_len,
            GenerationError,
            reasoning,
        )
        engine_client.generate = door.generate
        self._drain_before_shutdown(engine_client, state)
        _admit_prompts(engine_client, door)
        _check_before_streaming(state, door)
        _answer_to_networks_names(state)
        self._service = Service(
            settings=self._settings,
            catalog=catalog,
            leases=leases,
            lifecycle=lifecycle,
            target=names[0],
            target_names=names,
            failure_token_id=_failure_token(engine_client),
            explanations=self._settings.run_dir / EXPLAIN,
            spelling=Spelling(_decode(engine_client.get_tokenizer())),
            reasoning=reasoning,
        )
        await stager.ready()

    def _drain_before_shutdown(self, engine_client: Any, state: State) -> None:
        """Let running requests finish before anything they need is taken down.

        vLLM drains its engine, but not its renderer, and with several API processes nothing: those
        close while the engine still runs.
        """
        shutdown = engine_client.shutdown
        responses = state.openai_serving_responses
        background: Sized = responses.background_tasks if responses else ()

        def drain_and_shutdown(timeout: float | None = None) -> None:
            # vLLM shuts down again, in the event loop's thread, which must not wait for itself.
            if timeout is not None and threading.current_thread() is not threading.main_thread():
                self._traffic.closing = True
                # A little less: at the end of the grace period this process may be killed.
                deadline = time.monotonic() + timeout - min(1.0, timeout / 4)
                while (running := self._traffic.running + len(background)) and (
                    time.monotonic() < deadline
                ):
                    time.sleep(DRAIN_POLL_SECONDS)
                if running:
                    cut_off_marker(self._settings.key).touch()
                timeout = 0 if running else TEARDOWN_SECONDS
            shutdown(timeout)

        engine_client.shutdown = drain_and_shutdown

    def _connected(self) -> Service:
        assert self._service is not None  # vLLM serves only after init_state
        return self._service


def _reserved_names(state: State) -> tuple[str, ...]:
    """The names of the target and of the LoRA adapters that are served with it."""
    models = state.openai_serving_models
    return (*(path.name for path in models.base_model_paths), *models.lora_requests)


def _admit_prompts(engine_client: EngineClient, door: GenerationDoor) -> None:
    """Let the door see each prompt while its handler can still wait: long ones take time."""
    renderer = engine_client.renderer
    process = renderer.process_for_engine_async

    async def process_for_engine_async(*args: Any, **kwargs: Any) -> Any:
        engine_input = await process(*args, **kwargs)
        await door.admit(engine_input)
        return engine_input

    renderer.process_for_engine_async = process_for_engine_async


def _check_before_streaming(state: State, door: GenerationDoor) -> None:
    """Let responses be refused before their stream begins: their handler generates only then."""
    serving = state.openai_serving_responses
    if serving is None:
        return
    validate = serving._validate_generator_input

    def validate_generator_input(engine_input: Any) -> Any:
        door.check(engine_input)
        return validate(engine_input)

    serving._validate_generator_input = validate_generator_input


def _answer_to_networks_names(state: State) -> None:
    """Have vLLM's handlers put the name that the client used into their responses."""
    models = state.openai_serving_models
    served_name = models.model_name

    def model_name(lora_request: Any = None) -> str:
        request = CURRENT.get()
        return (request and request.model) or served_name(lora_request)

    models.model_name = model_name


def _failure_token(engine_client: EngineClient) -> int:
    model_config = engine_client.model_config
    stop = model_config.try_get_generation_config().get("eos_token_id")
    tokenizer = engine_client.get_tokenizer()
    stop_token_ids = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])}
    return choose_failure_token(tokenizer, model_config.get_vocab_size(), stop_token_ids)


def _reasoning(engine_client: EngineClient) -> Reasoning | None:
    """How the target's reasoning ends, if the server was started with a parser for it."""
    config = engine_client.vllm_config.reasoning_config
    if config is None or not (config.reasoning_parser and config.natural_reasoning_end_token_ids):
        return None
    parser = ReasoningParserManager.get_reasoning_parser(config.reasoning_parser)
    tokenizer = engine_client.get_tokenizer()
    return Reasoning(config.natural_reasoning_end_token_ids, partial(parser, tokenizer))


def _decode(tokenizer: Any) -> Callable[[int], str]:
    """Spells single tokens as vLLM does in log-probabilities."""

    def decode(token_id: int) -> str:
        if tokenizer.convert_ids_to_tokens([token_id]) == [None]:
            return ""  # a row of a padded vocabulary
        (token,) = convert_ids_list_to_tokens(tokenizer, [token_id])
        return str(token)

    return decode


def _show_log() -> None:
    """Put trimtab's own lines where vLLM's are, and as they are."""
    ours, vllms = logging.getLogger("trimtab"), logging.getLogger("vllm")
    ours.handlers, ours.propagate = vllms.handlers, vllms.propagate
    ours.setLevel(logging.INFO)


def endpoint_plugin() -> ValueGuidanceEndpoints:
    """What the entry point `trimtab` in `vllm.endpoint_plugins` names."""
    return ValueGuidanceEndpoints()
