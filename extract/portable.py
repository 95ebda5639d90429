"""Functions that depend on the operating system: one implementation for Linux, one for any POSIX
system such as macOS.

HGNL_PORTABLE=1 selects the second on Linux too, for tests.
"""

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

ON_LINUX = sys.platform == "linux" and os.environ.get("HGNL_PORTABLE") != "1"
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def shared_memory(size: int) -> int:
    """A descriptor of `size` bytes that child processes can map: of memory or a temporary file."""
    if ON_LINUX:
        descriptor = os.memfd_create("decoded-frames")  # /dev/shm is 64 MB in many containers
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def end_with_parent() -> None:
    """End this process when its parent ends, even by kill -9: by the kernel, or by a thread that
    polls."""
    if ON_LINUX:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def keep_freed_memory() -> None:
    """Let malloc keep what is freed for later allocations. Has no effect without glibc.

    Otherwise it returns blocks of some MB to the kernel, which clears the pages of the next one.
    """
    if ON_LINUX:
        with contextlib.suppress(AttributeError, OSError):
            mallopt = ctypes.CDLL(None).mallopt
            # Older versions of glibc refuse more than 32 MB.
            mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def advise(libc: ctypes.CDLL, address: int, length: int, advice: int) -> None:
    """Tell the kernel how mapped memory will be read. Has no effect elsewhere."""
    if ON_LINUX:
        libc.madvise(address, length, advice)


def read_proc(name: str) -> str:
    """The text of /proc/NAME, "" if it does not exist."""
    if not ON_LINUX:
        return ""
    try:
        return Path("/proc", name).read_text(encoding="ascii", errors="replace")
    except OSError:  # a container without /proc
        return ""


def memory_available() -> int:
    """Bytes that the page cache could use: as reported by Linux, or half of all memory."""
    for line in read_proc("meminfo").splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
