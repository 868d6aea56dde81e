"""The field `value_guidance` of a request: which value networks steer it, and how strongly."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator

from server.api.errors import bad_request
from value_models.manifest import NAME_PATTERN, SCALE_LIMIT

REFERENCE_PATTERN = rf"^{NAME_PATTERN}(@[0-9a-f]{{8}})?$"

NetworkReference = Annotated[
    str,
    Field(
        strict=True,
        pattern=REFERENCE_PATTERN,
        description="A value network's name, optionally pinned to a version.",
        examples=["qa", "qa@3f2a91c0"],
    ),
]


class GuidingNetwork(BaseModel):
    """One value network, and the factor on its logits."""

    model_config = ConfigDict(extra="forbid")

    name: NetworkReference
    scale: float | None = Field(
        default=None,
        strict=True,
        ge=-SCALE_LIMIT,
        le=SCALE_LIMIT,
        allow_inf_nan=False,
        description="Factor on the network's logits; by default the network's own, usually 1. "
        "0 is exactly unguided, a negative one steers away.",
    )


class GuidingNetworks(BaseModel):
    """The value networks whose logits are added to the model's, token by token."""

    model_config = ConfigDict(extra="forbid")

    networks: list[GuidingNetwork] = Field(
        max_length=64, description="The networks to add; none is exactly the model alone."
    )


ALLOWED = (
    'value_guidance is a network\'s name ("qa" or "qa@3f2a91c0") or '
    '{"networks": [{"name": "qa", "scale": 0.8}]} with a finite scale between '
    f"-{SCALE_LIMIT:g} and {SCALE_LIMIT:g}"
)


def _explain(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Replace pydantic's list of errors, one per branch of the union, by one that names the field.

    The branch is chosen by what the client sent: errors about the other are noise.
    """
    try:
        return GuidingNetworks.model_validate(value) if isinstance(value, dict) else validate(value)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        location = fault["loc"] if isinstance(value, dict) else ()
        field = ".".join(["value_guidance", *(str(part)[:80] for part in location)])
        if isinstance(value, dict | str):
            problem = fault["msg"][0].lower() + fault["msg"][1:]
        else:
            problem = "input should be a string or an object"
        raise bad_request(f"{field}: {problem}. {ALLOWED}.", field) from None


ValueGuidance = Annotated[NetworkReference | GuidingNetworks, WrapValidator(_explain)]
