"""What management answers: value networks as an operator sees them.

`GET /admin/value_networks` answers an `Overview`; every other call on one network a `NetworkInfo`.
"""

from typing import Literal

from pydantic import BaseModel, Field

NETWORKS_PATH = "/admin/value_networks"

State = Literal["loading", "ready", "draining", "failed", "not_loaded"]


class Use(BaseModel):
    """What a version has been used for since it was loaded; the sum over all workers' engines."""

    running_requests: int = Field(description="requests that hold a lease on it, queued ones too")
    last_used: float | None = Field(description="when it last ran, Unix time; null: never")
    forward_seconds: float = Field(description="time in its forward passes, of the slowest worker")
    forward_tokens: int = Field(description="tokens that it computed")
    prefix_cache_queries: int = Field(description="tokens looked up in its prefix cache")
    prefix_cache_hits: int = Field(description="tokens found there")
    kv_cache_tokens: int = Field(description="tokens of running requests in its KV cache")


class VersionInfo(BaseModel):
    """One version of a network in the workers."""

    version: str = Field(description="8 hex digits over the contents of its files")
    state: Literal["ready", "draining", "failed"]
    reason: str | None = Field(description="why it failed")
    source: str | None = Field(description="its folder in the store; null: given by a flag")
    kind: str
    scale: float = Field(description="factor on its logits where a request names none")
    num_parameters: int
    max_context: int = Field(description="longest sequence that it reads, in its own tokens")
    mapped: bool = Field(description="whether it reads through a vocabulary map")
    weights_bytes: int = Field(description="memory of its weights in one worker")
    loaded_at: float = Field(description="Unix time")
    load_seconds: float = Field(description="from the request to ready")
    use: Use


class LoadInfo(BaseModel):
    """The latest load of a network, while it runs or after it failed."""

    id: str
    state: Literal["loading", "failed"]
    source: str
    reason: str | None = Field(description="why it failed")
    started_at: float = Field(description="Unix time")


class NetworkInfo(BaseModel):
    """One value network: in the store, in the workers, or both."""

    name: str
    state: State = Field(
        description="of its newest version; of its load where nothing of it is resident. "
        "not_loaded: in the store only"
    )
    version: str | None = Field(description="what its bare name means now; null: nothing is ready")
    reason: str | None = Field(description="why it, or its latest load, failed")
    in_store: bool
    withheld: bool = Field(description="unloaded by an operator: not loaded on demand until a PUT")
    versions: list[VersionInfo] = Field(description="what is resident, newest first")
    load: LoadInfo | None


class MemoryInfo(BaseModel):
    """The budget of all value networks in one worker, in bytes."""

    total_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    loading_bytes: int = Field(description="promised to loads that have not ended")
    free_bytes: int


class StoreInfo(BaseModel):
    """The directory that holds value networks on disk."""

    configured: bool
    error: str | None = Field(description="why it cannot be read now")


class StateFileInfo(BaseModel):
    """The file that remembers what is resident over a restart."""

    path: str | None = Field(description="null: nothing is remembered")
    error: str | None = Field(description="why it could not be written last time")


class Overview(BaseModel):
    """Everything that management knows."""

    object: Literal["list"] = "list"
    data: list[NetworkInfo]
    memory: MemoryInfo
    store: StoreInfo
    state_file: StateFileInfo


class LoadRequest(BaseModel):
    """The body of `PUT /admin/value_networks/{name}`."""

    model_config = {"extra": "forbid"}

    source: str | None = Field(
        default=None,
        strict=True,
        max_length=64,
        description="Name of a folder in the store, never a path; by default the network's name.",
        examples=["qa-2026-11"],
    )
