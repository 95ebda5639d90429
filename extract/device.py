"""The device that work runs on."""

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from extract import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> "torch.device":
    """The torch device for `--device name`; `auto` is a GPU if there is one.

    Raises InputError for a device that is not there: never falls back to another one.
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
            f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs to PyTorch; use cpu or auto"
        )
    return device


def runs_on_cpu(name: str) -> bool:
    """Whether `choose_device(name)` is the CPU. Imports torch only if a GPU is possible. InputError
    as there."""
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
    """Without a driver no GPU can be used, which is known without the seconds that importing torch
    takes."""
    if "torch" in sys.modules or Path("/dev/kfd").exists():  # /dev/kfd: AMD's driver
        return True
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False
