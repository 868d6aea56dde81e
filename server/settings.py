"""What `trimtab serve` hands to vLLM's processes.

vLLM spawns its engine core and workers itself, so settings travel through the environment. vLLM's
own `additional_config` would do too, but it is part of the key of vLLM's compile cache: another set
of networks would recompile the target.
"""

import hashlib
import os
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

ENVIRONMENT_VARIABLE = "TRIMTAB_SETTINGS"


class Settings(BaseModel):
    """One server's value networks and limits; the same in each of its processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    networks: dict[str, Path] = Field(description="name -> folder of each value network to load")
    key: str = Field(description="signs choices; see server.choice", repr=False)
    tokenizer_fingerprint: str = Field(description="of the target's tokenizer")
    value_cache_gb: float = Field(
        default=1.0, gt=0, description="GiB of KV cache for all value networks of a worker"
    )
    prefix_caching: bool = Field(default=True, description="share KV blocks of equal prefixes")
    max_networks: int = Field(default=1, ge=1, description="value networks that a request may name")
    max_body_bytes: int = Field(default=8 << 20, gt=0, description="largest request body")

    def export(self) -> None:
        """Publish to this process' environment, for the processes that it starts."""
        os.environ[ENVIRONMENT_VARIABLE] = self.model_dump_json()

    @classmethod
    def load(cls) -> "Settings":
        """Read what `export` published.

        Raises:
            RuntimeError: nothing was published; vLLM was not started by `trimtab serve`.
        """
        exported = os.environ.get(ENVIRONMENT_VARIABLE)
        if exported is None:
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE} is not set: start with `trimtab serve`")
        return cls.model_validate_json(exported)


def instance_id(key: str) -> str:
    """A public name for the server whose processes share `key`."""
    return hashlib.sha256(b"instance " + key.encode()).hexdigest()[:16]


def cut_off_marker(key: str) -> Path:
    """The file by which any of a server's processes says that requests were not finished."""
    return Path(tempfile.gettempdir()) / f"trimtab-{instance_id(key)}.cut-off"
