"""What operating systems do differently, each with a way that every POSIX system has beside Linux's
own.

Linux on x86-64 and aarch64 has all of it; macOS takes the other ways. HGNL_PORTABLE=1 takes them on
Linux too, which is how they are tested.
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


def shared_memory(size: int) -> int:
    """A file descriptor of `size` bytes that a child process can map: memory, or elsewhere a file
    without a name."""
    if ON_LINUX:
        descriptor = os.memfd_create(
            "decoded-frames"
        )  # not /dev/shm, which is 64 MB in many containers
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def end_with_parent() -> None:
    """End this process when its parent ends, also on kill -9: by the kernel, or elsewhere by a
    thread that looks."""
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


def advise(libc: ctypes.CDLL, address: int, length: int, advice: int) -> None:
    """Tell the kernel how mapped memory will be read. Only advice: without it reading still
    works."""
    if ON_LINUX:
        libc.madvise(address, length, advice)


def read_proc(name: str) -> str:
    """The text of /proc/NAME, empty without one."""
    if not ON_LINUX:
        return ""
    try:
        return Path("/proc", name).read_text(encoding="ascii", errors="replace")
    except OSError:  # a container without /proc
        return ""


def memory_available() -> int:
    """Bytes that the page cache could take: what Linux says, or half of the memory there is."""
    for line in read_proc("meminfo").splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
