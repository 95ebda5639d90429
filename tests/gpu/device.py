"""The device that GPU tests run on: cuda, or with HGNL_GPU_DEVICE=cpu the CPU, on small networks, to try the tests."""

import os

DEVICE = os.environ.get("HGNL_GPU_DEVICE", "cuda")
REHEARSAL = DEVICE == "cpu"
PRECISIONS = ("bf16",) if REHEARSAL else ("fp16", "bf16")  # half precision that the device has
