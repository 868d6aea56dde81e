"""Engines of these tests run in the test's own process: one starts in seconds then.

What vLLM's processes add is tested where a server runs, and in `test_waiting` and
`test_tensor_parallel`.
"""

import os

import pytest


@pytest.fixture(autouse=True, scope="module")
def engines_in_this_process(environment_of_its_own: None) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
