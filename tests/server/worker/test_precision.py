"""Which dtype networks compute in, on CPUs with and without instructions for it."""

import pytest
import torch

from server.worker import precision
from server.worker.precision import network_dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_targets_dtype_where_it_can_be_multiplied(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_multiplies", lambda _: True)
    assert network_dtype(dtype, "cpu") == dtype
    assert network_dtype(dtype, "cuda") == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_on_a_cpu_that_would_convert_each_number(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_multiplies", lambda asked: asked == torch.float32)
    assert network_dtype(dtype, "cpu") == torch.float32
    assert network_dtype(dtype, "cuda") == dtype


def test_float32_can_always_be_multiplied() -> None:
    assert network_dtype(torch.float32, "cpu") == torch.float32
