"""What holds for all tests."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes run tests at once. Threads of both on the same cores wait for each other, and
    # vLLM would bind the workers of both to the same core.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")


@pytest.fixture(autouse=True, scope="module")
def environment_of_its_own() -> Iterator[None]:
    """What a module sets for the processes that it starts is not set for another module's."""
    with mock.patch.dict(os.environ):
        yield
