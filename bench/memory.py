"""The memory that a call needs beyond its inputs, and memory that is kept so that no call waits for pages."""
import contextlib
import ctypes
import gc
import os
import re
import resource
import statistics
from collections.abc import Callable

import torch


def peak_extra_bytes(call: Callable[[], object], device: str) -> int | None:
    """Growth of the peak memory during `call` over what was held before it; None where the system cannot tell.

    On a CPU this is the growth of the resident set, so run it in a process of its own that has made one small call before, and
    under FREED_ENVIRONMENT, which hands freed memory back at once.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak
    if not os.path.exists("/proc/self/status"):
        return None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the peak back to what is resident now
    before = _status_bytes("VmRSS")
    kept = call()
    peak = _status_bytes("VmHWM") - before
    del kept
    return max(peak, 0)


FREED_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# The C library keeps all memory that it once had, in huge pages. Once `keep_memory` has given it enough, no output needs new pages.
KEPT_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def keep_memory(size: int) -> None:
    """Under KEPT_ENVIRONMENT: `size` bytes, touched, from which later tensors are cut. What stands behind them keeps them apart."""
    whole = torch.ones(size, dtype=torch.uint8)
    keep_memory.border = torch.ones(64)
    del whole


def page_faults(call: Callable[[], object], calls: int = 5) -> int:
    """Of one call, the median: pages that the system had to find for it."""
    counts = []
    for _ in range(calls):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return int(statistics.median(counts))


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{key}:\s+(\d+) kB", file.read(), re.MULTILINE).group(1)) * 1024
