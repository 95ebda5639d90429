"""Choose the device to run on, without importing torch if only the CPU is possible."""

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from extract import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> "torch.device":
    """The torch device for `--device name`; `auto` is a GPU if there is one.

    Raises InputError for a device that does not exist; another one is never used instead.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is not known; give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs on this machine; "
            "use cpu or auto"
        )
    return device


def runs_on_cpu(name: str) -> bool:
    """Whether `choose_device(name)` is the CPU. Imports torch only if a GPU is possible.

    Raises InputError as `choose_device`.
    """
    if name == "cpu" or (name == "auto" and not _has_gpu_driver()):
        return True
    return choose_device(name).type == "cpu"


def count_gpus() -> int:
    """GPUs that PyTorch sees."""
    if not _has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def _has_gpu_driver() -> bool:
    """Whether a GPU driver is installed, without the seconds that importing torch takes."""
    if "torch" in sys.modules or Path("/dev/kfd").exists():  # /dev/kfd: AMD's driver
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
