"""The device on which GPU tests run, and whether it is simulated: then networks are small."""

import os

DEVICE = "cuda"
PRETENDED = os.environ.get("HGNL_GPU") == "pretended"
PRECISIONS = ("fp16", "bf16")
