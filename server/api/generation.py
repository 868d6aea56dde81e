"""The door that every generation passes: checks a guided request, and ends a failed one clearly.

vLLM's handlers all call `engine_client.generate`, after the prompt is tokenized and before a
response has begun. What the route knows and they do not carry along travels in `CURRENT`.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from server.api.errors import ApiError, bad_request
from server.api.selection import failure_message
from server.catalog import Catalog, WorkerError
from server.choice import EXTRA_ARG, Choice, ChosenNetwork, unseal


@dataclass
class GuidedRequest:
    """A request that names value networks, for as long as it is answered."""

    networks: tuple[ChosenNetwork, ...]
    """Those that change its logits."""
    model: str | None
    """The network's name that the client gave as `model`, to be put back into the response."""
    max_tokens: int | None
    """The output that the client asked for; None: as much as fits."""
    limit_name: str = "max_tokens"
    """What the endpoint calls that limit."""
    error: Exception | None = None
    """Why generation ended, for a stream that lost it."""


CURRENT: ContextVar[GuidedRequest | None] = ContextVar("guided_request", default=None)

Generate = Callable[..., AsyncGenerator[Any, None]]


class GenerationDoor:
    """Stands before vLLM's `generate`."""

    def __init__(
        self,
        generate: Generate,
        catalog: Catalog,
        key: str,
        max_model_len: int,
        failed: Callable[[str], Exception],
    ) -> None:
        """`failed` makes the exception that vLLM's handlers report as an internal error."""
        self._generate = generate
        self._catalog = catalog
        self._key = key
        self._max_model_len = max_model_len
        self._failed = failed

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's `AsyncLLM.generate`. Refusals are raised here and now, not on iteration: most of
        its callers have not yet sent a status then.

        Raises:
            ApiError: a choice that no route sealed, or a prompt that a network cannot read.
        """
        sealed = (sampling_params.extra_args or {}).get(EXTRA_ARG)
        if sealed is None:
            return self._generate(prompt, sampling_params, request_id, **options)
        try:
            choice = unseal(sealed, self._key)
        except ValueError as error:
            raise bad_request(str(error), "vllm_xargs") from None
        request = CURRENT.get() or GuidedRequest(choice.networks, None, sampling_params.max_tokens)
        try:
            if request.max_tokens is not None:
                # vLLM has its own caps, from the target's generation_config.
                request.max_tokens = min(request.max_tokens, sampling_params.max_tokens)
            room = self._room(request, prompt)
            self._refuse_empty_choice(choice, sampling_params.allowed_token_ids)
            if sampling_params.min_tokens > room:
                raise bad_request(
                    f"min_tokens is {sampling_params.min_tokens}, but the value network has room "
                    f"for {room} tokens after this prompt",
                    "min_tokens",
                )
            sampling_params.max_tokens = min(sampling_params.max_tokens, room)
            # A client that asks for them was refused; vLLM also computes them for any echo.
            sampling_params.prompt_logprobs = None
        except ApiError as error:
            request.error = error
            raise
        outputs = self._generate(prompt, sampling_params, request_id, **options)
        return self._watch(outputs, choice, request)

    def check(self, prompt: Any) -> None:
        """Check the prompt of the current request, for a handler that generates only after it has
        sent a status. Raises `ApiError`."""
        request = CURRENT.get()
        if request is not None and request.networks:
            self._room(request, prompt)

    def _room(self, request: GuidedRequest, prompt: Any) -> int:
        """Return how many tokens the networks can read after `prompt`, if that is enough."""
        token_ids = prompt.get("prompt_token_ids")
        if token_ids is None or prompt.get("type", "token") != "token":
            raise bad_request(
                "a prompt of embeddings, images or sound cannot be guided: value networks read "
                "tokens; leave out the value networks, or send text"
            )
        length = len(token_ids)
        network = min(
            (self._catalog.find(str(chosen)) for chosen in request.networks),
            key=lambda network: network.max_context,
        )
        room = network.max_context - length
        # vLLM itself shortens what does not fit the target, so only that much is really asked for.
        asked = min(request.max_tokens or 1, self._max_model_len - length)
        if asked > room:
            raise bad_request(
                f"value network {network} reads at most {network.max_context} tokens, but this "
                f"request has {length} in the prompt and asks for {asked} more, "
                f"{length + asked} in all; shorten the prompt or lower {request.limit_name}",
                request.limit_name,
            )
        return room

    def _refuse_empty_choice(self, choice: Choice, allowed: list[int] | None) -> None:
        """Refuse `allowed_token_ids` of which guidance leaves none: the sampler would emit id 0."""
        if allowed is None:
            return
        known = min(self._catalog.find(chosen.name).vocab_size for chosen in choice.networks)
        if not any(token < known and token != choice.failure_token_id for token in allowed):
            raise bad_request(
                "allowed_token_ids names no token that the value network can score; "
                f"its ids are below {known}",
                "allowed_token_ids",
            )

    async def _watch(
        self, outputs: AsyncGenerator[Any, None], choice: Choice, request: GuidedRequest
    ) -> AsyncGenerator[Any, None]:
        async with aclosing(outputs):
            async for output in outputs:
                if any(done.stop_reason == choice.failure_token_id for done in output.outputs):
                    request.error = self._failed(await self._reason(choice))
                    raise request.error
                yield output

    async def _reason(self, choice: Choice) -> str:
        names = ", ".join(map(str, choice.networks))
        try:
            await self._catalog.refresh()
        except WorkerError as error:
            return f"value network {names} has failed; its reason cannot be had ({error})"
        networks = [self._catalog.find(chosen.name) for chosen in choice.networks]
        failed = [network for network in networks if network.state == "failed"]
        if not failed:
            return f"value network {names} has failed for this request"
        return "; ".join(map(failure_message, failed))
