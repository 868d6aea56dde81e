"""Two workers, each with half of every layer: the same tokens, and networks that come and go."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.device_communicators import shm_broadcast

from tests.models import make_model, make_network
from tests.server.worker.engine import GuidedEngine, guided_engine
from tests.server.worker.test_residency import asks, load, networks_named, run_while, unload


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tensor-parallel")
    make_model(root / "target", max_position_embeddings=256)
    for seed, name in enumerate(("first", "second"), start=1):
        make_network(root / name, seed=seed, max_position_embeddings=256)
    return root


@pytest.fixture(scope="module")
def engine(root: Path) -> Iterator[GuidedEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with guided_engine(
            root / "target",
            {"stays": root / "first"},
            value_memory_gb=0.05,
            max_num_seqs=8,
            tensor_parallel_size=2,
            distributed_executor_backend="mp",
        ) as engine:
            yield engine


def test_tokens_are_those_of_one_worker(engine: GuidedEngine) -> None:
    asked = asks(1, ["stays", None, "stays"])
    engine.assert_exact(asked, engine.run(asked))


def test_networks_come_and_go(engine: GuidedEngine, root: Path) -> None:
    before = engine.call("networks")["memory"]
    asked = asks(2, ["stays", None, "stays"], max_tokens=100)
    outputs = run_while(engine, asked, engine.load("new", root / "second"))
    engine.assert_exact(asked, outputs)
    after = asks(3, ["new", "stays", None])
    engine.assert_exact(after, engine.run(after))
    assert unload(engine, "new")["memory"] == before
    assert not networks_named(engine, "new")
    load(engine, "new", root / "second")
    engine.assert_exact(after, engine.run(after))


def test_its_workers_wait_asleep(engine: GuidedEngine) -> None:
    assert engine.llm.collective_rpc(how_it_waits) == ["nap", "nap"]


def how_it_waits(_worker: Any) -> str:
    return str(shm_broadcast.sched_yield.__name__)
