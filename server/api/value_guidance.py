"""The field `value_guidance` of a request: which value networks steer it, and how."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.api.errors import bad_request
from value_models.manifest import NAME_PATTERN, SCALE_LIMIT

REFERENCE_PATTERN = rf"^{NAME_PATTERN}(@[0-9a-f]{{8}})?$"
MAX_TOKENS = 2**31 - 1
MAX_STOP_CHARACTERS = 256

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
        "0 is exactly unguided, a negative one steers away. Of dynamic weights it is the bound, "
        "by default 2.",
    )


StopText = Annotated[
    str,
    Field(
        strict=True,
        min_length=1,
        max_length=MAX_STOP_CHARACTERS,
        description="Guidance ends when this text has been generated since it began.",
    ),
]


class Until(BaseModel):
    """Where guidance ends; of two conditions, whichever comes first."""

    model_config = ConfigDict(extra="forbid")

    tokens: int | None = Field(
        default=None,
        strict=True,
        ge=1,
        le=MAX_TOKENS,
        description="Guidance ends when it has guided so many tokens.",
    )
    stop: StopText | None = None

    @model_validator(mode="after")
    def refuse_no_condition(self) -> "Until":
        if self.tokens is None and self.stop is None:
            raise PydanticCustomError("until_empty", "it names neither tokens nor stop")
        return self


_STOP_TEXT: TypeAdapter[str] = TypeAdapter(StopText)


def _until(value: Any, _validate: Callable[[Any], Any]) -> Any:
    """Validate the branch of `until` that the client chose, as `_guidance` does."""
    if isinstance(value, dict | Until):
        return Until.model_validate(value)
    if isinstance(value, str):
        return _STOP_TEXT.validate_python(value)
    raise PydanticCustomError("until_type", "input should be a string or an object")


class Guidance(BaseModel):
    """The value networks that steer a request token by token, and how they are combined."""

    model_config = ConfigDict(extra="forbid")

    networks: list[GuidingNetwork] | None = Field(
        default=None,
        max_length=64,
        description="The networks to add; an empty list is exactly the model alone. Without this "
        "field, `model` names the network.",
    )
    combine: Literal["static", "dynamic"] = Field(
        default="static",
        description="static: each network's logits, times its scale, are added. dynamic: the "
        "weights are solved for at every token, with the scales as bounds, so that the model "
        "moves as far as the networks moved from their own bases.",
    )
    until: Annotated[StopText | Until, WrapValidator(_until)] | None = Field(
        default=None,
        description="Where guidance ends: at a text, or after so many tokens; the model goes on "
        "alone.",
        examples=["\n\n", {"tokens": 64}, {"tokens": 64, "stop": "\n\n"}],
    )
    begin: Literal["first_token", "after_reasoning"] = Field(
        default="first_token",
        alias="from",
        description="Where guidance begins: at once, or when the model has ended its reasoning.",
    )
    min_target_prob: float | None = Field(
        default=None,
        strict=True,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="Guidance makes no token likelier to which the model itself gives less than "
        "this probability.",
    )
    explain: bool = Field(
        default=False,
        strict=True,
        description="Whether the response says, in `value_explanation`, what guidance did to each "
        "token.",
    )

    @property
    def until_tokens(self) -> int | None:
        return self.until.tokens if isinstance(self.until, Until) else None

    @property
    def until_text(self) -> str | None:
        return self.until.stop if isinstance(self.until, Until) else self.until

    @property
    def settings(self) -> dict[str, Any]:
        """The fields besides `networks` that are not as by default, as a client would send them."""
        return self.model_dump(
            mode="json", by_alias=True, exclude_defaults=True, exclude={"networks"}
        )


ALLOWED = {
    "networks": 'networks are given as in {"networks": [{"name": "qa", "scale": 0.8}]}, each with '
    f"a finite scale between -{SCALE_LIMIT:g} and {SCALE_LIMIT:g}",
    "combine": 'combine is "static" or "dynamic"',
    "until": f"until is a text of 1 to {MAX_STOP_CHARACTERS} characters at which guidance ends, "
    'or {"tokens": 64}, {"stop": "a text"}, or both in one object',
    "from": 'from is "first_token" or "after_reasoning"',
    "min_target_prob": "min_target_prob is a probability above 0 and below 1, such as 0.0001",
    "explain": "explain is true or false",
}
"""What each field may be."""
ALLOWED_SHAPES = (
    'value_guidance is a network\'s name ("qa" or "qa@3f2a91c0") or '
    '{"networks": [{"name": "qa", "scale": 0.8}]}, which may also have '
    f"{', '.join(field for field in ALLOWED if field != 'networks')}"
)


def _guidance(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Replace pydantic's list of errors, one per branch of the union, by one that names the field.

    The branch is chosen by what the client sent: errors about the other are noise.
    """
    try:
        return Guidance.model_validate(value) if isinstance(value, dict) else validate(value)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
        location = [str(part)[:80] for part in fault["loc"]] if isinstance(value, dict) else []
        field = ".".join(["value_guidance", *location])
        if isinstance(value, dict | str):
            problem = fault["msg"][0].lower() + fault["msg"][1:]
        else:
            problem = "input should be a string or an object"
        allowed = ALLOWED.get(location[0], ALLOWED_SHAPES) if location else ALLOWED_SHAPES
        raise bad_request(f"{field}: {problem}. {allowed}.", field) from None


ValueGuidance = Annotated[NetworkReference | Guidance, WrapValidator(_guidance)]
