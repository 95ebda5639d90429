"""FFmpeg for torchcodec on systems without one: the FFmpeg in PyAV's wheel."""

import re
from pathlib import Path

import av


def links_to_ffmpeg(folder: Path) -> Path:
    """A folder of links to PyAV's FFmpeg, with the names that other programs look for."""
    for library in Path(av.__file__).parent.with_name("av.libs").iterdir():
        (folder / library.name).symlink_to(library)
        plain = re.sub(r"-[0-9a-f]{8}\.so(\.\d+).*", r".so\1", library.name)
        if plain != library.name:
            (folder / plain).symlink_to(library)
    return folder
