"""Engines of these tests run in the test's own process: one starts in seconds then.

What vLLM's processes add is tested where a server runs, and in `test_waiting` and
`test_tensor_parallel`.
"""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def engines_in_this_process(environment_of_its_own: None) -> Iterator[None]:
    """Also undo what a worker of vLLM's does to its process, which is the test's here."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with (
        mock.patch.object(torch, "set_num_threads", torch.set_num_threads),
        mock.patch.object(torch.accelerator, "synchronize", torch.accelerator.synchronize),
        mock.patch.object(torch.accelerator, "empty_cache", torch.accelerator.empty_cache),
    ):
        yield
