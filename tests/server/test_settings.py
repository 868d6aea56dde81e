import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from pydantic import ValidationError

from server.settings import ENVIRONMENT_VARIABLE, Settings, instance_id, key_digest


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
        yield


def test_what_is_published_is_what_other_processes_read() -> None:
    settings = Settings(
        networks={"qa": Path("/run/qa")},
        sources={"qa": "qa-2"},
        key="key",
        tokenizer_fingerprint="sha256:",
        store=Path("/store"),
        run_dir=Path("/run"),
        value_memory_gb=0.5,
        state_file=Path("/state.json"),
        withheld=("json",),
        unloadable={"bad": "it is corrupt"},
        admin_key_digest=key_digest("mine"),
        client_key_digests=(key_digest("theirs"),),
    )
    settings.export()
    assert Settings.load() == settings


def test_little_has_to_be_said() -> None:
    settings = Settings(networks={}, key="key", tokenizer_fingerprint="sha256:")
    assert settings.load_on_demand and not settings.evict_idle
    assert settings.store is settings.run_dir is settings.state_file is None


def test_without_trimtab_serve_there_are_none() -> None:
    with pytest.raises(RuntimeError, match="start with `trimtab serve`"):
        Settings.load()


@pytest.mark.parametrize(
    "changes",
    [
        {"value_memory_gb": 0},
        {"value_memory_gb": float("inf")},
        {"load_timeout": -1},
        {"load_timeout": float("nan")},
        {"unknown": 1},
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(networks={}, key="key", tokenizer_fingerprint="sha256:", **changes)


def test_secrets_are_not_shown() -> None:
    settings = Settings(
        networks={},
        key="the key",
        tokenizer_fingerprint="sha256:",
        admin_key_digest="digest 1",
        client_key_digests=("digest 2",),
    )
    for secret in ("the key", "digest 1", "digest 2"):
        assert secret not in repr(settings) and secret not in str(settings)
        assert secret in json.dumps(settings.model_dump(mode="json"))


def test_a_digest_tells_keys_apart_and_not_what_they_are() -> None:
    assert key_digest("a") != key_digest("b") and len(key_digest("a")) == 64
    assert key_digest(os.fsdecode(b"\xff")) != key_digest("ÿ")  # as an argument may be
    assert instance_id("a") not in key_digest("a")
