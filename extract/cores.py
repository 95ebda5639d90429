"""The CPU: how many cores this process may use, and whether they compute in bf16."""

import os

from extract.portable import read_proc


def available_cores(limit: int | None = None) -> int:
    """The number of cores to use: `limit` (--threads) if given, but at most all of the machine.
    Without a limit, all that are available.

    Available is the minimum of the CPU affinity, a container's quota (cgroup `cpu.max`, rounded
    up), and OMP_NUM_THREADS if it is set.
    """
    if limit is not None:
        return min(limit, os.cpu_count() or limit)
    from joblib import cpu_count  # affinity, and quotas of cgroup versions 1 and 2

    cores = cpu_count()
    # One number per level of nesting, separated by commas.
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdigit() and int(threads) > 0:
        return min(cores, int(threads))
    return cores


def has_native_bf16() -> bool:
    """Whether the CPU has bf16 instructions, which makes bf16 faster than fp32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(read_proc("cpuinfo").split())
