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
ADMIN_KEY_VARIABLE = "TRIMTAB_ADMIN_API_KEY"
KEY_VARIABLES = ("VLLM_API_KEY", ADMIN_KEY_VARIABLE)
"""Not for a process that needs no keys."""
STATUS_PATH = "/health/value_networks"
"""Where a server says which instance it is, and which networks it has."""


class Settings(BaseModel):
    """One server's value networks and limits; the same in each of its processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    networks: dict[str, Path] = Field(
        description="name -> folder of each value network to load at start: a snapshot, in run_dir"
    )
    sources: dict[str, str] = Field(
        default_factory=dict,
        description="name -> its folder in the store, of those networks that came from there; the "
        "others were given by a flag, and the server does not start without them",
    )
    key: str = Field(description="signs choices; see server.choice", repr=False)
    tokenizer_fingerprint: str = Field(description="of the target's tokenizer")
    store: Path | None = Field(default=None, description="the directory of value networks")
    run_dir: Path | None = Field(
        default=None,
        description="private to this server, and gone with it; see server.run_directory",
    )
    value_memory_gb: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="GiB in each worker for the weights and KV cache of all value networks",
    )
    prefix_caching: bool = Field(default=True, description="share KV blocks of equal prefixes")
    max_networks: int = Field(
        default=4,
        ge=1,
        le=8,  # dynamic fusion tries all corners of the weights' bounds: two to the power of this
        description="value networks that a request may name",
    )
    token_bytes: Path | None = Field(
        default=None,
        description="what the target's tokens spell, see server.token_bytes; None: not known",
    )
    max_body_bytes: int = Field(default=8 << 20, gt=0, description="largest request body")
    evict_idle: bool = Field(
        default=False, description="whether a load may make room by unloading idle networks"
    )
    load_on_demand: bool = Field(
        default=True, description="whether a request may load a network that is in the store only"
    )
    load_timeout: float = Field(
        default=30.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds that a request waits for a network that is loaded for it",
    )
    state_file: Path | None = Field(
        default=None, description="remembers over restarts what is resident"
    )
    withheld: tuple[str, ...] = Field(
        default=(), description="networks that an operator unloaded: not loaded on demand"
    )
    unloadable: dict[str, str] = Field(
        default_factory=dict,
        description="name -> why, of networks of the store that could not be loaded at start",
    )
    admin_key_digest: str | None = Field(
        default=None, repr=False, description="`key_digest` of the key to management, if it has one"
    )
    client_key_digests: tuple[str, ...] = Field(
        default=(), repr=False, description="`key_digest` of each key that clients may have"
    )

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


def key_digest(key: str) -> str:
    """What is kept of a key: enough to recognise it, useless to whoever reads it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def instance_id(key: str) -> str:
    """A public name for the server whose processes share `key`."""
    return hashlib.sha256(b"instance " + key.encode()).hexdigest()[:16]


def cut_off_marker(key: str) -> Path:
    """The file by which any of a server's processes says that requests were not finished."""
    return Path(tempfile.gettempdir()) / f"trimtab-{instance_id(key)}.cut-off"
