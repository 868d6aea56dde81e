"""Management's routes and gate as vLLM serves them, in front of a double of what manages."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from server.api.admin import AdminGate, attach_admin
from server.api.errors import ApiError, respond
from server.api.resources import (
    LoadInfo,
    MemoryInfo,
    NetworkInfo,
    Overview,
    StateFileInfo,
    StoreInfo,
    Use,
    VersionInfo,
)
from server.settings import Settings


def version_info(**changes: Any) -> VersionInfo:
    use = Use(
        running_requests=2,
        last_used=1000.0,
        forward_seconds=1.5,
        forward_tokens=100,
        prefix_cache_queries=10,
        prefix_cache_hits=5,
        kv_cache_tokens=7,
    )
    fields: dict[str, Any] = {
        "version": "3f2a91c0",
        "state": "ready",
        "reason": None,
        "source": "qa",
        "kind": "residual",
        "scale": 1.0,
        "num_parameters": 1000,
        "max_context": 512,
        "mapped": False,
        "weights_bytes": 4000,
        "loaded_at": 900.0,
        "load_seconds": 1.25,
        "use": use,
    }
    return VersionInfo(**{**fields, **changes})


def network_info(**changes: Any) -> NetworkInfo:
    fields: dict[str, Any] = {
        "name": "qa",
        "state": "ready",
        "version": "3f2a91c0",
        "reason": None,
        "in_store": True,
        "withheld": False,
        "versions": [version_info()],
        "load": None,
    }
    return NetworkInfo(**{**fields, **changes})


def load_info(**changes: Any) -> LoadInfo:
    fields: dict[str, Any] = {
        "id": "1f",
        "state": "loading",
        "source": "qa",
        "reason": None,
        "started_at": 950.0,
    }
    return LoadInfo(**{**fields, **changes})


LOADING = network_info(state="loading", version=None, versions=[], load=load_info())


def overview(*networks: NetworkInfo) -> Overview:
    return Overview(
        data=list(networks),
        memory=MemoryInfo(
            total_bytes=2 << 30,
            weights_bytes=1 << 30,
            kv_cache_bytes=512 << 20,
            loading_bytes=0,
            free_bytes=512 << 20,
        ),
        store=StoreInfo(configured=True, error=None),
        state_file=StateFileInfo(path="/state.json", error=None),
    )


class Manager:
    """Answers as `Lifecycle` would, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.answer: NetworkInfo | None = network_info()
        self.error: ApiError | None = None
        self.calls: list[tuple[Any, ...]] = []

    async def overview(self) -> Overview:
        assert self._asked("overview") is not None
        return overview(network_info())

    async def describe(self, reference: str) -> NetworkInfo:
        info = self._asked("describe", reference)
        assert info is not None
        return info

    async def load(self, name: str, source: str | None, request_id: str) -> NetworkInfo:
        info = self._asked("load", name, source, request_id)
        assert info is not None
        return info

    async def unload(self, reference: str, remove: bool, request_id: str) -> NetworkInfo | None:
        return self._asked("unload", reference, remove, request_id)

    def _asked(self, *call: Any) -> NetworkInfo | None:
        self.calls.append(call)
        if self.error:
            raise self.error
        return self.answer


def application(manager: Any, **settings: Any) -> FastAPI:
    app = FastAPI()
    service: Any = SimpleNamespace(lifecycle=manager)
    attach_admin(app, lambda: service)
    init_exception_handler(app)
    app.state.args = Namespace(log_error_stack=False)
    app.add_exception_handler(ApiError, respond)
    app.add_middleware(AdminGate, settings=settings_of(**settings))
    return app


def settings_of(**changes: Any) -> Settings:
    return Settings(networks={}, key="key", tokenizer_fingerprint="sha256:0", **changes)
