"""Tiny clip-wise models of transformers, in folders as they are published: 4 frames of 32 x 32, 32
features."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
SIZES = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "resample": 2}
KINDS: dict[str, tuple[Any, dict, dict]] = {
    "videomae": (
        transformers.VideoMAEForVideoClassification,
        {**TINY, "intermediate_size": 64, "num_frames": 4},
        {"image_processor_type": "VideoMAEImageProcessor", **SIZES},
    ),
    "timesformer": (
        transformers.TimesformerForVideoClassification,
        {**TINY, "intermediate_size": 64, "num_frames": 4},
        {"image_processor_type": "VideoMAEImageProcessor", **SIZES},
    ),
    "vivit": (
        transformers.VivitForVideoClassification,
        {**TINY, "intermediate_size": 64, "num_frames": 4, "tubelet_size": [2, 16, 16]},
        {
            "image_processor_type": "VivitImageProcessor",
            **SIZES,
            "offset": True,
            "rescale_factor": 1 / 127.5,
        },
    ),
    "vjepa2": (
        transformers.VJEPA2Model,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "crop_size": 32,
            "frames_per_clip": 4,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
        },
        {"video_processor_type": "VJEPA2VideoProcessor", "crop_size": 32},
    ),
}


def make_folder(folder: Path, kind: str) -> Any:
    """Write a model of transformers as it is published, with its classifier and random weights,
    biases included."""
    model_class, options, processor = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return getattr(model, model.base_model_prefix, model)
