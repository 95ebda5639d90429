"""How many CPU cores this process may use: the one place that every pool of threads or processes asks."""

import os


def available_cores(limit: int | None = None) -> int:
    """The cores to use: `limit` (--threads) if given, else what the machine allows.

    The machine allows the least of the CPU affinity, a container's quota (cgroup `cpu.max`, rounded up), and
    OMP_NUM_THREADS if it is set.
    """
    if limit is not None:
        return limit
    from joblib import cpu_count  # affinity, and quotas of cgroup versions 1 and 2

    cores = cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # one number per level of nesting
    if threads.isdigit() and int(threads) > 0:
        cores = min(cores, int(threads))
    return cores
