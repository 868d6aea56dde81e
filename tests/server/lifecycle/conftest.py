"""A store, and the settings of a server that reads it."""

import os
import shutil
from pathlib import Path

import pytest

from server.settings import Settings
from tests.models import (
    make_mapped_network,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)
from tests.server.conftest import SMALL
from value_models.manifest import tokenizer_fingerprint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `qa` and `mapped`, which nobody has touched for long."""
    store = tmp_path_factory.mktemp("pristine") / "store"
    make_network(store / "qa", **SMALL, default_scale=0.5)
    make_mapped_network(
        store / "mapped", make_tokenizer(), **SMALL, tokenizer=make_sentencepiece_tokenizer()
    )
    for path in store.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return store


def settings_of(directory: Path) -> Settings:
    (directory / "run" / "networks").mkdir(parents=True)
    return Settings(
        networks={},
        key="secret key",
        admin_key_digest="secret digest",
        tokenizer_fingerprint=tokenizer_fingerprint(make_tokenizer()),
        store=directory / "store",
        run_dir=directory / "run",
    )


@pytest.fixture
def settings(pristine: Path, tmp_path: Path) -> Settings:
    shutil.copytree(pristine, tmp_path / "store")
    return settings_of(tmp_path)


@pytest.fixture
def store(settings: Settings) -> Path:
    assert settings.store is not None
    return settings.store


@pytest.fixture
def snapshots(settings: Settings) -> Path:
    assert settings.run_dir is not None
    return settings.run_dir / "networks"
