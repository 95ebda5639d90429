"""The CPU: how many cores this process may use, for every pool of threads or processes, and what
they compute in."""

import os

from extract.portable import read_proc


def available_cores(limit: int | None = None) -> int:
    """The cores to use: `limit` (--threads) if given, else what the machine allows.

    The machine allows the least of the CPU affinity, a container's quota (cgroup `cpu.max`, rounded
    up), and OMP_NUM_THREADS if it is set.
    """
    if limit is not None:
        return limit
    from joblib import cpu_count  # affinity, and quotas of cgroup versions 1 and 2

    cores = cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[
        0
    ]  # one number per level of nesting
    if threads.isdigit() and int(threads) > 0:
        cores = min(cores, int(threads))
    return cores


def has_native_bf16() -> bool:
    """Whether the CPU itself computes in bf16, which is then faster than fp32. Never a matter of
    the load."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(read_proc("cpuinfo").split())
