"""Shard files of a feature store, mapped into memory as one strided array.

A shard of `features` holds the uncompressed chunks of its videos one after the other, then an index
(Zarr v3's `sharding_indexed`):

    | video 0: V*T*D float16 | crc32c | video 1 ... | crc32c | ...
    | index: (offset, nbytes) uint64 * block_size | crc32c |

So the videos of a shard are a fixed stride apart. Address space is reserved once for all shards,
and shard b is mapped at `base + b * slot_bytes`. Reading any frames of any videos is then one numpy
indexing expression on a five-dimensional strided array, as fast as on a memory-mapped .npy file.
"""

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from extract.portable import advise

CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)  # Zarr's mark for a chunk that is not in the shard
_MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap module does not name it
_MAP_FAILED = ctypes.c_void_p(-1).value


class ShardError(Exception):
    """A shard file that is missing, cut short, or not laid out as this package writes it."""


@dataclass(frozen=True)
class ShardLayout:
    """Where the features of each video are in a shard of `block_size` videos.

    video_shape: V, T, D.
    """

    block_size: int
    video_shape: tuple[int, int, int]

    @property
    def video_bytes(self) -> int:
        return math.prod(self.video_shape) * 2

    @property
    def stride(self) -> int:
        """Bytes from one video to the next."""
        return self.video_bytes + CRC_BYTES

    def size(self, videos: int) -> int:
        """Bytes of a shard that holds `videos` of its `block_size` videos."""
        return videos * self.stride + self.block_size * 16 + CRC_BYTES

    def read_index(self, path: Path) -> int:
        """The number of videos in a shard.

        Raises ShardError unless its size, the checksum of its index and all offsets are as
        expected.
        """
        index_bytes = self.block_size * 16
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(size - index_bytes - CRC_BYTES, 0))
                tail = file.read()
        except FileNotFoundError:
            raise ShardError(f"{path} is missing") from None
        if google_crc32c.value(tail[:index_bytes]) != int.from_bytes(tail[index_bytes:], "little"):
            raise ShardError(
                f"{path} is cut short or overwritten: the checksum of its index does not match"
            )
        index = np.frombuffer(tail[:index_bytes], dtype="<u8").reshape(-1, 2)
        videos = int((index[:, 0] != _ABSENT).sum())
        in_order = index[:videos].tolist() == [
            [video * self.stride, self.stride] for video in range(videos)
        ]
        if not in_order or size != self.size(videos):
            raise ShardError(
                f"{path} has another layout than this package writes ({videos} videos, {size:,} "
                "bytes)"
            )
        return videos

    def intact_videos(self, path: Path) -> list[bool]:
        """Whether the bytes of each video in a shard match their checksum; reads the whole file.

        Raises ShardError as `read_index` does.
        """
        videos, intact = self.read_index(path), []
        with path.open("rb") as file:
            for _ in range(videos):
                features, recorded = file.read(self.video_bytes), file.read(CRC_BYTES)
                intact.append(google_crc32c.value(features) == int.from_bytes(recorded, "little"))
        return intact


def shard_name(block: int) -> str:
    """The name of a block's shard file, as Zarr names chunks."""
    return f"c.{block}.0.0.0"


class ShardMap:
    """All shards of a store as one float16 array [blocks, block_size, V, T, D].

    Shards are mapped on first use; a shard that was never mapped reads as zeros. A mapping holds no
    file descriptor, as each of Python's own `mmap` objects does, so a store may have thousands of
    shards.

    Args:
        paths: returns the files of some blocks.
        videos: the least number of videos that each shard must hold, int [blocks].
        readahead: whether the kernel may read megabytes around a page, which is faster for a store
            that fits into memory. Without it each page is read alone; `prefetch` starts many reads.
    """

    def __init__(
        self,
        layout: ShardLayout,
        paths: Callable[[list[int]], list[Path]],
        videos: np.ndarray,
        *,
        readahead: bool,
    ):
        self._layout, self._paths, self._videos = layout, paths, videos
        self._readahead = readahead
        blocks, page = len(videos), mmap.PAGESIZE
        self._slot_bytes = math.ceil(layout.size(layout.block_size) / page) * page
        self._mapped = np.zeros(blocks, dtype=bool)
        self._libc = _libc()
        size = max(self._slot_bytes * blocks, page)
        # Address space only: no memory is used until a shard is mapped into its slot.
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._base = self._map(None, size, anonymous, -1)
        weakref.finalize(self, self._libc.munmap, self._base, size)
        _, frames, dim = layout.video_shape
        self.array = np.ndarray(
            (blocks, layout.block_size, *layout.video_shape),
            "<f2",
            buffer=memoryview((ctypes.c_uint8 * size).from_address(self._base)),
            strides=(self._slot_bytes, layout.stride, frames * dim * 2, dim * 2, 2),
        )
        self.array.flags.writeable = False

    def ensure_mapped(self, blocks: np.ndarray) -> None:
        """Map the shards of `blocks` (int array) that are not mapped yet. Raises ShardError."""
        if self._mapped[blocks].all():
            return
        unmapped = np.unique(blocks[~self._mapped[blocks]]).tolist()
        for block, path in zip(unmapped, self._paths(unmapped), strict=True):
            # Checked first, because reading a mapping beyond the end of its file kills the process.
            videos = self._layout.read_index(path)
            if videos < self._videos[block]:
                raise ShardError(
                    f"{path} holds {videos} videos, {self._videos[block]} are finished"
                )
            size = self._layout.size(videos)
            slot = self._base + block * self._slot_bytes
            descriptor = os.open(path, os.O_RDONLY)
            try:
                self._map(slot, size, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
            finally:
                os.close(descriptor)
            if not self._readahead:
                advise(self._libc, slot, size, mmap.MADV_RANDOM)
            self._mapped[block] = True

    def prefetch(self, *index: np.ndarray) -> None:
        """Ask the kernel to start reading single frames, all at once.

        index: of block, video in it, view and frame, as arrays that broadcast.
        """
        frame_strides = self.array.strides[:4]
        offsets = sum(
            part.astype(np.int64) * stride
            for part, stride in zip(np.broadcast_arrays(*index), frame_strides, strict=True)
        )
        first = (self._base + np.ravel(offsets)) // mmap.PAGESIZE * mmap.PAGESIZE
        length = self.array.strides[3] + mmap.PAGESIZE  # a frame may begin in the middle of a page
        for address in first.tolist():
            advise(self._libc, address, length, mmap.MADV_WILLNEED)

    def _map(self, address: int | None, size: int, flags: int, descriptor: int) -> int:
        mapped = self._libc.mmap(address, size, mmap.PROT_READ, flags, descriptor, 0)
        if mapped == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(
                code, f"cannot map {size:,} bytes of a feature store: {os.strerror(code)}"
            )
        return mapped


def _libc() -> ctypes.CDLL:
    """The C library, with the types of mmap, munmap and madvise."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        *[ctypes.c_int] * 3,
        ctypes.c_longlong,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
