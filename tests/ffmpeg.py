"""FFmpeg for torchcodec: whether the system has its libraries, and those in PyAV's wheel."""

import re
from pathlib import Path

import av
import pytest


def links_to_ffmpeg(folder: Path) -> Path:
    """A folder of links to PyAV's FFmpeg, with the names that other programs look for."""
    for library in Path(av.__file__).parent.with_name("av.libs").iterdir():
        (folder / library.name).symlink_to(library)
        plain = re.sub(r"-[0-9a-f]{8}\.so(\.\d+).*", r".so\1", library.name)
        if plain != library.name:
            (folder / plain).symlink_to(library)
    return folder


def needs_torchcodec() -> pytest.MarkDecorator:
    """Skip a test where torchcodec is not installed, or the system has no libraries of FFmpeg."""
    # prove.py and benchmarks import this module to make links, before there is anything to load.
    from extract import InputError
    from extract.decode import decoder_version

    try:
        decoder_version("torchcodec-cpu")
    except InputError as error:
        return pytest.mark.skip(reason=str(error))
    return pytest.mark.skipif(False, reason="")
