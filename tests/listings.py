"""Files to list, and helpers that read a listing."""

from pathlib import Path

from extract.listing.videos import Listing


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def labeled(listing: Listing) -> dict[str, str]:
    """Class name by id, "" for none."""
    return {
        video.id: listing.classes[video.label] if video.label >= 0 else ""
        for video in listing.videos
    }
