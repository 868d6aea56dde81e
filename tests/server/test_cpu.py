import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from server import cpu
from server.cpu import settle_cores, settle_cpu

SETTLED = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_NUM_OF_RESERVED_CPU", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Nothing is set that could be settled."""
    with mock.patch.dict(os.environ):
        for variable in SETTLED:
            os.environ.pop(variable, None)
        yield


def settled(**flags: Any) -> dict[str, str]:
    """Return what is set, or stays set, with these flags of vLLM's."""
    arguments = {
        "kv_cache_memory_bytes": None,
        "enforce_eager": False,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
    }
    settle_cpu(Namespace(**arguments | flags))
    return {name: os.environ[name] for name in SETTLED if name in os.environ}


def test_workers_of_a_small_machine_compute_on_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_num_cores", lambda: 2)
    found = settled()
    assert found["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert int(found["GOMP_SPINCOUNT"]) > 0


def test_a_large_machine_leaves_a_core_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_num_cores", lambda: 8)
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" not in settled()


def test_who_places_several_workers_decides_about_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_num_cores", lambda: 2)
    assert list(settled(tensor_parallel_size=2)) == ["VLLM_CPU_KVCACHE_SPACE"]
    assert list(settled(data_parallel_size=2)) == ["VLLM_CPU_KVCACHE_SPACE"]


def test_what_the_user_has_settled_stays() -> None:
    chosen = dict.fromkeys(SETTLED, "7")
    os.environ.update(chosen)
    assert settled() == chosen


def test_cores_that_the_process_may_not_use_do_not_count() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cpu._num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    settle_cores()
    assert ("VLLM_CPU_NUM_OF_RESERVED_CPU" in os.environ) == (cpu._num_cores() < 4)


def test_memory_for_the_target_is_a_flag_or_two_gib() -> None:
    assert settled()["VLLM_CPU_KVCACHE_SPACE"] == "2"
    del os.environ["VLLM_CPU_KVCACHE_SPACE"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in settled(kv_cache_memory_bytes=1 << 30)


def test_without_a_compiler_vllm_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = Namespace(
        kv_cache_memory_bytes=None,
        enforce_eager=False,
        tensor_parallel_size=1,
        data_parallel_size=1,
    )
    assert settle_cpu(flags) == [] and not flags.enforce_eager
    monkeypatch.setenv("CXX", "no-such-compiler")
    (note,) = settle_cpu(flags)
    assert "no-such-compiler" in note and flags.enforce_eager
    assert settle_cpu(flags) == []
