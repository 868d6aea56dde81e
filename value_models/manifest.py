"""What a value network says about itself: the file `value_network.json` in its folder."""

from __future__ import annotations

import hashlib
import operator
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MANIFEST_FILE = "value_network.json"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
KINDS = ("residual", "cascade", "cascade+", "contrast")
SCALE_LIMIT = 8.0

Scale = Annotated[float, Field(ge=-SCALE_LIMIT, le=SCALE_LIMIT, allow_inf_nan=False)]


class Manifest(BaseModel):
    """The content of `value_network.json`. Unknown keys are errors: a typo is never a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1]
    kind: Literal["residual", "cascade", "cascade+", "contrast"]
    reference: Annotated[bool, Field(exclude_if=operator.not_)] = False
    """Whether the folder holds the base of a residual network too, as `reference/`."""
    default_scale: Scale = 1.0
    """The factor on the network's logits where a request names none."""
    tokenizer_fingerprint: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    """`tokenizer_fingerprint` of the tokenizer whose token ids the network reads and scores."""
    base: str | None = None
    """The base it was trained against, by name or content, for people to read."""
    description: str = ""
    example: str = ""
    """A request that shows what the network is for; `trimtab serve` suggests it."""
    training: dict[str, Any] = Field(default_factory=dict)
    """How it was trained: data fingerprint, settings, versions."""

    @model_validator(mode="after")
    def _only_residual_has_reference(self) -> Self:
        if self.reference and self.kind != "residual":
            raise ValueError(f"only kind 'residual' has a reference, not {self.kind!r}")
        return self


class Vocabulary(Protocol):
    """What a fingerprint needs of a Hugging Face tokenizer."""

    def get_vocab(self) -> dict[str, int]: ...


def tokenizer_fingerprint(tokenizer: Vocabulary) -> str:
    """Return `sha256:<hex>` over the full vocabulary, added tokens included.

    Two models can add their logits only if each id means the same token in both, so the
    fingerprint covers exactly the (id, token) pairs, in the order of ids, and nothing that a
    save and a load may change (file layout, class, template).
    """
    digest = hashlib.sha256()
    for token_id, token in sorted((i, token) for token, i in tokenizer.get_vocab().items()):
        encoded = token.encode("utf-8", "surrogatepass")
        # The length goes in first: a token may itself contain any separator.
        digest.update(b"%d %d " % (token_id, len(encoded)) + encoded)
    return f"sha256:{digest.hexdigest()}"
