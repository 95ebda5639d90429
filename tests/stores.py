"""What tests ask of a feature store on disk."""

import hashlib
from pathlib import Path


def store_digest(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a store: two stores are byte-identical where these are equal."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
