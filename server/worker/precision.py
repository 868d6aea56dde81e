"""Which number format value networks compute in."""

import torch
from vllm.logger import init_logger

logger = init_logger(__name__)


def network_dtype(target: torch.dtype, device_type: str) -> torch.dtype:
    """Return what networks beside a target of this dtype compute in.

    The target's own, but on a CPU without instructions for it. There, PyTorch converts each number
    of a half-precision product on the way and gains nothing from a larger batch, while float32
    products run at the machine's full speed: a network in float32 takes a fraction of the time, and
    twice the memory. A checkpoint in bfloat16 is exact in float32.
    """
    if device_type != "cpu" or _multiplies(target):
        return target
    logger.info_once(
        "value networks compute in float32: this CPU has no instructions for %s", target
    )
    return torch.float32


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN, which PyTorch's products go to, has kernels for the dtype on this CPU."""
    supports = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supports or bool(supports[dtype]())
