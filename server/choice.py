"""A request's choice of value networks, on its way from the route to the worker.

The route resolves names to versions and checks limits, then *seals* the result into one string that
vLLM carries in `SamplingParams.extra_args`. vLLM lets any client fill `extra_args` through
`vllm_xargs`, so the string is signed with a key that only the processes of one server share: a
choice that did not pass the route's checks does not verify, on any of vLLM's endpoints.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import NamedTuple

EXTRA_ARG = "trimtab"
"""The key in `SamplingParams.extra_args` under which a sealed choice travels."""


class ChosenNetwork(NamedTuple):
    """One value network of a request, pinned to a version, with the factor on its logits."""

    name: str
    version: str
    scale: float

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Choice(NamedTuple):
    """What a guided request runs with. `networks` is never empty and holds no zero scale."""

    networks: tuple[ChosenNetwork, ...]
    failure_token_id: int  # emitted when a network fails; one of the request's stop_token_ids
    dynamic: bool = False
    """The weights are solved for at every step, and the scales are their bounds."""
    floor: float = 0.0
    """Tokens to which the target gives less than this probability are not made likelier."""
    after: tuple[int, ...] = ()
    """Guidance begins when these token ids have been generated in a row; empty: at once."""
    until_tokens: int | None = None
    """Guidance ends when it has guided so many tokens."""
    until_text: str | None = None
    """Guidance ends when this text has been generated since it began."""
    explain: str | None = None
    """Name of the file in the run directory that gets a line for each token; None: no file."""


def seal(choice: Choice, key: str) -> str:
    """Return `choice` as a signed string, safe to put into `extra_args`."""
    payload = json.dumps(choice, separators=(",", ":"))
    return f"{_signature(payload, key)}.{payload}"


def unseal(sealed: object, key: str) -> Choice:
    """Return the choice inside `sealed`.

    Raises:
        ValueError: `sealed` was not made by `seal` with the same key.
    """
    signature, _, payload = sealed.partition(".") if isinstance(sealed, str) else ("", "", "")
    if not hmac.compare_digest(signature.encode(), _signature(payload, key).encode()):
        raise ValueError(
            f'vllm_xargs["{EXTRA_ARG}"] is reserved; choose value networks with '
            "`model` or `value_guidance`"
        )
    networks, failure_token_id, dynamic, floor, after, *rest = json.loads(payload)
    chosen = tuple(ChosenNetwork(*network) for network in networks)
    return Choice(chosen, failure_token_id, dynamic, floor, tuple(after), *rest)


def carried(extra_args: Mapping[str, object] | None, key: str) -> Choice | None:
    """Return the choice that a request carries in its `extra_args`; None: it is not guided.

    Raises:
        ValueError: a client filled the reserved key itself.
    """
    sealed = (extra_args or {}).get(EXTRA_ARG)
    return None if sealed is None else unseal(sealed, key)


def _signature(payload: str, key: str) -> str:
    return hmac.new(key.encode(), payload.encode(), hashlib.sha256).hexdigest()
