"""A video and frame indices in, frames out: reading, cropping, and subprocesses that can be killed."""

from extract.decode.opening import VideoError
from extract.decode.reader import Decoded, decode, decoder_version
from extract.decode.writer import write_video

__all__ = ["Decoded", "VideoError", "decode", "decoder_version", "write_video"]
