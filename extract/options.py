"""The options of `python -m extract`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

# Settings that a store records are None unless given. Their values then come from the store that is
# continued, or from here for a new one.
DEFAULTS: dict[str, Any] = {
    "backbone": "legacy_seresnext101_32x4d",
    "weights": "pretrained",
    "per_clip": "mean",
    "frames": 25,
    "crops": 1,
    "augment_passes": 0,
    "precision": "auto",
    "engine": "auto",
    "form": "auto",
    "decoder": "pyav",
    "block_size": 64,
    "seed": 0,
}


@dataclass(frozen=True)
class Options:
    """Run a frozen backbone over sampled frames of every video and store the features.

    Run it again to continue, to add new videos, or (--retry-failed) to try failed ones again. A
    store keeps the settings that it was created with: they need not be given again, and different
    ones are refused. Labels, splits and groups that were corrected in the listing are corrected in
    the store without decoding.
    """

    videos: Path
    """A folder (split/class/clip, class/clip, flat), a file, or a CSV (Kinetics', or
    path,label[,start,end] ...)."""
    out: str
    """The feature store: a folder, or a URL that fsspec knows (s3://bucket/feats.zarr)."""
    root: Path | None = None
    """With a CSV: the folder of its videos (default: the CSV's own)."""
    labels: str = "auto"
    """auto (integers in their order; the Kinetics-700 list if the videos look like Kinetics; else
    the sorted names), kinetics700, or a file with a class per line."""
    backbone: str | None = None
    """A timm model, torchvision/NAME (video models), or hf/FOLDER_OR_ID (V-JEPA 2, VideoMAE,
    TimeSformer, ViViT) (new store: legacy_seresnext101_32x4d)."""
    weights: str | None = None
    """pretrained (new store), random, or a file (.pth, .safetensors, or a checkpoint of `hgnl
    finetune`)."""
    image_size: int | None = None
    """Pixels per side, for a timm model that accepts a size other than that of its training."""
    clip_frames: int | None = None
    """Frames per clip of a clip-wise backbone (default: its own)."""
    clip_fps: float | None = None
    """Frames per second in a clip (default: the backbone's own)."""
    per_clip: Literal["mean", "time"] | None = None
    """Rows of features per clip: one (new store), or one per temporal position of a clip-wise
    backbone."""
    processor: Literal["torchvision"] | None = None
    """Resize frames of an hf/ model with Pillow, as stores of earlier versions did."""
    frames: int | None = None
    """Frames per video: the middles of N equal segments (new store: 25)."""
    window: float | None = None
    """Cut each video into windows of N seconds, a row each (a remainder shorter than half a window
    is merged into the last)."""
    stride: float | None = None
    """Seconds from one window to the next (default: as long as a window)."""
    fps: float | None = None
    """Frames per second in windows: of --window seconds, or else as long as --frames take."""
    frame_rate: float | None = None
    """Pictures per second of folders of numbered pictures (img_00001.jpg ...)."""
    crops: Literal[1, 3, 10] | None = None
    """Views of each frame. 1: center (new store); 3: center and both ends; 10: corners and center,
    each also flipped."""
    augment_passes: int | None = None
    """Additional views for training: a random frame of each segment, a random crop, a random flip
    (new store: 0)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] | None = None
    """auto (new store): fp16 on a GPU; on a CPU bf16 if it has it, else fp32. int8: calibrated on
    some of the videos."""
    engine: Literal["auto", "openvino", "torch"] | None = None
    """Runtime of the backbone. auto (new store): OpenVINO on a CPU (PyTorch if it cannot run the
    model), PyTorch on a GPU."""
    form: Literal["auto", "eager", "graphs", "compiled"] | None = None
    """Execution on a GPU. auto: the faster of eager and graphs, which give the same bytes;
    compiled: takes minutes to start."""
    decoder: Literal["pyav", "decord", "torchcodec-cuda"] | None = None
    """Decoder of the videos (new store: pyav). torchcodec-cuda: NVDEC; videos that it cannot decode
    are decoded by pyav, and named."""
    workers: int | None = None
    """Backbones that run in parallel (default: one per visible GPU, else one). More than one start
    Ray."""
    address: str | None = None
    """A Ray cluster (auto, or host:port) to spread the work over."""
    threads: int | None = None
    """CPU cores per worker, at most the machine's (default: all that this process may use)."""
    decode_workers: int | None = None
    """Decoding processes per worker, at most 16 per core (default: its share of the cores)."""
    video_timeout: float = 60.0
    """Seconds after which a video is given up, plus one for each 2 MB of its file."""
    block_size: int | None = None
    """Videos that are processed, stored and resumed together (new store: 64)."""
    retry_failed: bool = False
    """Try videos again that failed in an earlier run."""
    retry_changed: bool = False
    """Extract videos again if their files have been replaced."""
    drop_unlisted: bool = False
    """Take videos that the list no longer has out of training and scores, until they are listed
    again."""
    limit: int | None = None
    """Only the first N videos."""
    max_failed: float = 0.05
    """Fraction of failed videos up to which the run counts as good (exit status 0, else 3)."""
    seed: int | None = None
    """Seed for random weights and augmentation (new store: 0)."""

    def with_defaults(self) -> Any:
        """These options with defaults for missing settings (typed Any: no setting is None now)."""
        missing = {name for name in DEFAULTS if getattr(self, name) is None}
        return replace(self, **{name: DEFAULTS[name] for name in missing})
