"""The door that every generation passes: checks a guided request, and ends a failed one clearly.

vLLM's handlers all call `engine_client.generate`, after the prompt is tokenized and before a
response has begun. What the route knows and they do not carry along travels in `CURRENT`.
"""

import math
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing, nullcontext
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from server.api.errors import ApiError, bad_request
from server.api.explanation import Explanation, Record
from server.api.metrics import count_tokens
from server.api.reasoning import Reasoning
from server.api.selection import failure_message
from server.api.vocabularies import Vocabularies
from server.choice import EXTRA_ARG, Choice, ChosenNetwork, seal, unseal
from server.lifecycle.catalog import Catalog, Network, UnknownNetwork, WorkerError
from server.lifecycle.leases import Lease, Leases


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
    lease: Lease | None = None
    """Holds those networks."""
    explanation: Explanation | None = None
    """What it did to each token, if the client asked."""
    admitted: list[Any] = field(default_factory=list)
    """Prompts that its networks of another vocabulary can read."""


CURRENT: ContextVar[GuidedRequest | None] = ContextVar("guided_request", default=None)

Generate = Callable[..., AsyncGenerator[Any, None]]


class GenerationDoor:
    """Stands before vLLM's `generate`."""

    def __init__(
        self,
        generate: Generate,
        catalog: Catalog,
        leases: Leases,
        vocabularies: Vocabularies,
        key: str,
        max_model_len: int,
        failed: Callable[[str], Exception],
        reasoning: Reasoning | None = None,
    ) -> None:
        """
        Args:
            failed: makes the exception that vLLM's handlers report as an internal error.
            reasoning: the target's, if the server knows how it ends.
        """
        self._generate = generate
        self._catalog = catalog
        self._leases = leases
        self._vocabularies = vocabularies
        self._key = key
        self._max_model_len = max_model_len
        self._failed = failed
        self._reasoning = reasoning

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
            if choice.after or choice.until_tokens is not None or choice.until_text is not None:
                # A client that asks for them was refused; vLLM also computes them for any echo.
                sampling_params.prompt_logprobs = None
        except ApiError as error:
            request.error = error
            raise
        explanation = request.explanation
        record = None if explanation is None else explanation.begin(sampling_params.n)
        settled = choice._replace(
            after=self._begin_after(choice, prompt, options.get("reasoning_parser_kwargs")),
            explain=None if record is None else record.name,
        )
        if settled != choice:
            # A handler may generate again with these: what is of this prompt stays out of them.
            sampling_params = copy(sampling_params)
            sampling_params.extra_args = {
                **sampling_params.extra_args,
                EXTRA_ARG: seal(settled, self._key),
            }
        outputs = self._generate(prompt, sampling_params, request_id, **options)
        return self._watch(outputs, choice, request, record)

    def check(self, prompt: Any) -> None:
        """Check the prompt of the current request, for a handler that generates only after it has
        sent a status. Raises `ApiError`."""
        request = CURRENT.get()
        if request is not None and request.networks:
            self._room(request, prompt)

    async def admit(self, prompt: Any) -> None:
        """Check the prompt of the current request against networks of another vocabulary.

        `generate` would do it too, but it cannot leave the event loop for a long prompt.

        Raises:
            ApiError: the prompt is longer than a network reads.
        """
        request = CURRENT.get()
        if request is None:
            return
        for network in self._networks(request.networks):
            if network.mapped:
                length = await self._vocabularies.count_in_background(network, _token_ids(prompt))
                _refuse_long(network, length)
        request.admitted.append(prompt)

    def _networks(self, chosen: Iterable[ChosenNetwork]) -> list[Network]:
        """Return the very versions that a request was accepted with. Raises `ApiError`."""
        try:
            return [self._catalog.resident(str(network)) for network in chosen]
        except UnknownNetwork as error:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}; send it again") from None

    def _room(self, request: GuidedRequest, prompt: Any) -> int:
        """Return how many tokens the networks can read after `prompt`, if that is enough.

        How many tokens an answer takes in another vocabulary shows as it is made: networks that
        have one leave as much room as the target does.
        """
        token_ids = _token_ids(prompt)
        length = len(token_ids)
        # vLLM itself shortens what does not fit the target, so only that much is really asked for.
        room = self._max_model_len - length
        asked = min(request.max_tokens or 1, room)
        for network in self._networks(request.networks):
            if network.mapped:
                if not any(prompt is admitted for admitted in request.admitted):
                    _refuse_long(network, self._vocabularies.count(network, token_ids))
                continue
            if asked > network.max_context - length:
                raise bad_request(
                    f"value network {network} reads at most {network.max_context} tokens, but this "
                    f"request has {length} in the prompt and asks for {asked} more, "
                    f"{length + asked} in all; shorten the prompt or lower {request.limit_name}",
                    request.limit_name,
                )
            room = min(room, network.max_context - length)
        return room

    def _refuse_empty_choice(self, choice: Choice, allowed: list[int] | None) -> None:
        """Refuse `allowed_token_ids` of which guidance leaves none: the sampler would emit id 0."""
        if allowed is None:
            return
        networks = self._networks(choice.networks)
        if not any(
            token != choice.failure_token_id
            and all(self._scores(network, token) for network in networks)
            for token in allowed
        ):
            raise bad_request(
                "allowed_token_ids names no token that the value network can score",
                "allowed_token_ids",
            )

    def _begin_after(
        self, choice: Choice, prompt: Any, parser_kwargs: Mapping[str, Any] | None
    ) -> tuple[int, ...]:
        """Return `choice.after`, or nothing if the prompt has left reasoning behind."""
        if not choice.after or self._reasoning is None:
            return choice.after
        ended = self._reasoning.has_ended(_token_ids(prompt), parser_kwargs)
        return () if ended else choice.after

    def _scores(self, network: Network, token_id: int) -> bool:
        if network.mapped:
            return self._vocabularies.scores(network, token_id)
        return token_id < network.vocab_size

    async def _watch(
        self,
        outputs: AsyncGenerator[Any, None],
        choice: Choice,
        request: GuidedRequest,
        record: Record | None,
    ) -> AsyncGenerator[Any, None]:
        # vLLM gives up a request whose client has left in a task of its own, which may outlive the
        # call that holds the route's lease.
        if request.lease is not None and not request.lease.released:
            lease = request.lease.share()
        else:
            lease = self._leases.take(map(str, choice.networks))
        num_tokens = 0
        try:
            # A generator that nobody iterates never ends: the record's file is made only now.
            with record or nullcontext():
                async with aclosing(outputs):
                    async for output in outputs:
                        await self._end_failed(output, choice, request)
                        if record is not None:
                            await record.passed(output)
                        # Handlers ask for what is new, or for all at the end.
                        num_tokens += sum(len(done.token_ids) for done in output.outputs)
                        yield output
        finally:
            lease.release()
            for network in choice.networks:
                count_tokens(network.name, network.version, num_tokens)

    async def _end_failed(self, output: Any, choice: Choice, request: GuidedRequest) -> None:
        """End completions whose networks could read no more.

        Raises:
            Exception: for vLLM's handlers, which says that a network has failed.
        """
        ended = [o for o in output.outputs if o.stop_reason == choice.failure_token_id]
        unscored = _is_unscored(output)
        if not (ended or unscored):
            return
        failure = await self._failure(choice, outgrown=not unscored)
        if failure is not None:
            request.error = self._failed(failure)
            raise request.error
        for completion in ended:
            _end_at_length(completion)

    async def _failure(self, choice: Choice, *, outgrown: bool) -> str | None:
        """Say why the networks have ended a request, or None if one has read all that it can,
        which `outgrown` says is possible."""
        names = ", ".join(map(str, choice.networks))
        try:
            await self._catalog.refresh()
            networks = self._networks(choice.networks)
        except (WorkerError, ApiError) as error:
            return f"value network {names} has failed; its reason cannot be had ({error})"
        # One that is draining by now has kept its reason.
        failed = [network for network in networks if network.reason is not None]
        if not failed and outgrown and any(network.mapped for network in networks):
            return None
        if not failed:
            return f"value network {names} has failed for this request"
        return "; ".join(map(failure_message, failed))


def _token_ids(prompt: Any) -> list[int]:
    token_ids = prompt.get("prompt_token_ids")
    if token_ids is None or prompt.get("type", "token") != "token":
        raise bad_request(
            "a prompt of embeddings, images or sound cannot be guided: value networks read "
            "tokens; leave out the value networks, or send text"
        )
    return list(token_ids)


def _is_unscored(output: Any) -> bool:
    """Whether the networks failed to score the prompt: their scores are then no numbers."""
    return any(
        math.isnan(next(iter(scores.values())).logprob)
        for scores in output.prompt_logprobs or ()
        if scores
    )


def _refuse_long(network: Network, length: int) -> None:
    if length > network.max_context:
        raise bad_request(
            f"value network {network} reads at most {network.max_context} tokens, but this prompt "
            f"has {length} in that network's own vocabulary; shorten the prompt"
        )


def _end_at_length(completion: Any) -> None:
    """Have a completion end where its network could read no more, without the failure token."""
    completion.token_ids = completion.token_ids[:-1]
    if completion.logprobs is not None:
        completion.logprobs = completion.logprobs[:-1]
    completion.finish_reason, completion.stop_reason = "length", None
