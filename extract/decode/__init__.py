"""Decode frames of videos: readers, resizing and cropping, and killable child processes."""

from extract.decode.container import VideoError
from extract.decode.packets import Span
from extract.decode.reader import Decoded, decode, decode_spans, decoder_version
from extract.decode.writer import write_video

__all__ = [
    "Decoded",
    "Span",
    "VideoError",
    "decode",
    "decode_spans",
    "decoder_version",
    "write_video",
]
