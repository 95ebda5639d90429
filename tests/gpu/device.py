"""The device that GPU tests run on, and whether it is a pretended one: then networks are small."""

import os

DEVICE = "cuda"
PRETENDED = os.environ.get("HGNL_GPU") == "pretended"
PRECISIONS = ("fp16", "bf16")
