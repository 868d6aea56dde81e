"""Small weights of networks on a CPU: multiplied by the kernel that is quickest to call.

vLLM gives weights of up to 1 MiB to SGL's kernel where a CPU has AMX, and all others to oneDNN's.
Small networks have hardly any larger ones, and the kernel pays where there are bfloat16
instructions without AMX, too: for few rows it is faster, for some sixteen the two are equal, and
for whole prompts it is a little slower. `python -m deploy.bench choices` says how much that is.

Reads vLLM 0.32's `dispatch_cpu_unquantized_gemm`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.model_executor.layers import utils

MAX_BYTES = 1 << 20
"""The time of larger ones is that of reading them, whichever kernel does. Part of the key of what
is compiled: a change of `_pays` that this does not show would find what expects the other kernel.
"""


@contextmanager
def quickly_multiplied() -> Iterator[None]:
    """Have vLLM choose that kernel for small weights that it gets ready for a CPU meanwhile."""
    choose = utils.check_cpu_sgl_kernel

    def check_cpu_sgl_kernel(n: int, k: int, dtype: torch.dtype) -> bool:
        return choose(n, k, dtype) or _pays(n, k, dtype)

    utils.check_cpu_sgl_kernel = check_cpu_sgl_kernel
    try:
        yield
    finally:
        utils.check_cpu_sgl_kernel = choose


def _pays(n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether it does for a weight `[n, k]` of this dtype. The kernel wants whole tiles."""
    return (
        dtype == torch.bfloat16
        and torch.cpu._is_avx512_bf16_supported()
        and hasattr(torch.ops._C, "weight_packed_linear")
        and n * k * dtype.itemsize <= MAX_BYTES
        and n % 16 == 0
        and k % 32 == 0
    )
