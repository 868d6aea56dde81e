"""What holds for all tests."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes run tests at once. Threads of both on the same cores wait for each other.
    torch.set_num_threads(1)
