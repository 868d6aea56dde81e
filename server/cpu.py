"""What vLLM's processes are told on a CPU, by way of their environment."""

import os

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def use_huge_pages() -> None:
    """Let PyTorch keep large tensors in huge pages, in the processes that this one starts.

    Each step reads all weights once. In pages of 4 KiB every one of them costs the processor a
    search for its address, on a virtual machine two. Linux gives huge pages where it is asked
    (`transparent_hugepage/enabled` is `madvise` or `always`) and has some; PyTorch asks when its
    variable says so, for what is larger than 2 MiB. A user who has set it keeps what it says.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
