"""With how many threads a network computes a decoding step, on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from server.cpu import RESERVED_FROM

ALONE = 1 << 27
"""Multiply-adds of a step, one for each parameter and row, up to which one thread is no slower."""


@contextmanager
def threads_for(num_parameters: int, num_rows: int) -> Iterator[None]:
    """Compute a small step on one thread, where the worker shares all cores of a small machine.

    Its threads fall asleep soon there (`server/cpu.py`), and a small network has little to do
    between two occasions to wake them (`python -m deploy.bench cores`).

    Args:
        num_parameters: of the network.
        num_rows: one token of each is computed.
    """
    threads = torch.get_num_threads()
    if num_parameters * num_rows > ALONE or not 1 < threads < RESERVED_FROM:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
