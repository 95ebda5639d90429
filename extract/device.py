"""The device that work runs on."""

import torch

from extract.cli import InputError


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. InputError for a device that is not there: never another one in silence."""
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
