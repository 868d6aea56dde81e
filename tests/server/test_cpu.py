import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from server import cpu
from server.cpu import RESERVED_FROM, settle_cores, settle_cpu

SETTLED = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_NUM_OF_RESERVED_CPU", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Nothing is set that could be settled."""
    with mock.patch.dict(os.environ):
        for variable in (*SETTLED, "OMP_WAIT_POLICY", "LD_PRELOAD"):
            os.environ.pop(variable, None)
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two cores."""
    monkeypatch.setattr(cpu, "num_cores", lambda: 2)


def flags(**given: Any) -> Namespace:
    """Return flags as vLLM reads them."""
    return Namespace(
        **{
            "kv_cache_memory_bytes": None,
            "enforce_eager": False,
            "tensor_parallel_size": 1,
            "data_parallel_size": 1,
            "kv_transfer_config": None,
            **given,
        }
    )


def settled(**given: Any) -> dict[str, str]:
    """Return what is set, or stays set, with these flags of vLLM's."""
    settle_cpu(flags(**given))
    return {name: os.environ[name] for name in SETTLED if name in os.environ}


@pytest.mark.usefixtures("small")
def test_the_worker_of_a_small_machine_computes_on_all_cores() -> None:
    found = settled()
    assert found["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert int(found["GOMP_SPINCOUNT"]) > 0


def test_a_large_machine_leaves_a_core_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "num_cores", lambda: RESERVED_FROM)
    assert list(settled()) == ["VLLM_CPU_KVCACHE_SPACE"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "given",
    [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}, {"kv_transfer_config": object()}],
)
def test_who_needs_cores_for_more_than_one_worker_decides_about_them(given: dict[str, Any]) -> None:
    assert list(settled(**given)) == ["VLLM_CPU_KVCACHE_SPACE"]


@pytest.mark.usefixtures("small")
def test_intels_threads_spin_as_vllm_says_so_a_core_stays_free() -> None:
    os.environ["LD_PRELOAD"] = "/opt/lib/libiomp5.so"
    assert list(settled()) == ["VLLM_CPU_KVCACHE_SPACE"]


@pytest.mark.usefixtures("small")
def test_what_the_user_has_settled_stays() -> None:
    os.environ["OMP_WAIT_POLICY"] = "active"
    assert "GOMP_SPINCOUNT" not in settled()
    chosen = dict.fromkeys(SETTLED, "7")
    os.environ.update(chosen)
    assert settled() == chosen


def test_cores_that_the_process_may_not_use_do_not_count() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cpu.num_cores() == 1
        settle_cores()
    finally:
        os.sched_setaffinity(0, allowed)
    assert os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"


def test_memory_for_the_target_is_a_flag_or_two_gib() -> None:
    assert settled()["VLLM_CPU_KVCACHE_SPACE"] == "2"
    del os.environ["VLLM_CPU_KVCACHE_SPACE"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in settled(kv_cache_memory_bytes=1 << 30)


def test_without_a_compiler_vllm_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    given = flags()
    assert settle_cpu(given) == [] and not given.enforce_eager
    monkeypatch.setenv("CXX", "no-such-compiler")
    (note,) = settle_cpu(given)
    assert "no-such-compiler" in note and given.enforce_eager
    assert settle_cpu(given) == []
