"""One server, with small random models, for all tests that only ask it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.models import make_model, make_network
from tests.server.serving import Served, serving

SMALL = {"hidden_size": 32, "layers": 1, "heads": 1, "kv_heads": 1}
BROKEN = (
    "broken-chat",
    "broken-stream",
    "broken-completion",
    "broken-response",
    "broken-n",
    "broken-grammar",
    "broken-scores-whole",
    "broken-scores-stream",
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, whose vocabulary is padded, and `networks/`: a store of its value networks.

    `qa` and `json` are sound, `short` reads 64 tokens only, and those in `BROKEN` load well but
    turn non-finite as soon as they run.
    """
    directory = tmp_path_factory.mktemp("checkpoints")
    make_model(directory / "target", vocab_size=544)
    networks = directory / "networks"
    make_network(networks / "qa", **SMALL, seed=1, default_scale=0.5)
    make_network(networks / "json", **SMALL, seed=2)
    make_network(networks / "short", **SMALL, seed=3, max_position_embeddings=64)
    for seed, name in enumerate(BROKEN, start=4):
        make_network(networks / name, **SMALL, seed=seed)
        weights = load_file(networks / name / "model.safetensors")
        for tensor in weights:
            if "down_proj" in tensor:
                weights[tensor][:] = float("inf")
        save_file(weights, networks / name / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def server(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("server")
    store = checkpoints / "networks"
    with serving(directory, checkpoints / "target", "--value-network-dir", store) as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=None) as client:
        yield client
