"""Shard files of a feature store, seen as memory: one strided array over thousands of files.

A shard of `features` holds its videos' chunks one after the other, uncompressed, and an index
behind them (Zarr v3's `sharding_indexed`):

    | video 0: V*T*D float16 | crc32c | video 1 ... | crc32c | ... | index: (offset, nbytes) uint64 * B | crc32c |

So video r of block b lies at a fixed stride, and shard b can be mapped at `base + b * slot_bytes`: one
reserved stretch of address space in which every shard has its place. Reading any frames of any
videos is then one numpy indexing expression on a five-dimensional strided array, as fast as a plain
memory-mapped array of the same bytes.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
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


def shard_bytes(videos: int, block_size: int, video_bytes: int) -> int:
    """Size in bytes of a shard that holds `videos` of at most `block_size` videos."""
    return videos * (video_bytes + CRC_BYTES) + block_size * 16 + CRC_BYTES


def read_index(path: Path, *, block_size: int, video_bytes: int) -> int:
    """Number of videos in a shard, size and index checked (checksum; video i lies at i strides), or
    `ShardError`."""
    index_bytes = block_size * 16
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
    index = np.frombuffer(tail[:index_bytes], dtype="<u8").reshape(block_size, 2)
    videos = int((index[:, 0] != _ABSENT).sum())
    stride = np.uint64(video_bytes + CRC_BYTES)
    in_order = (index[:videos, 0] == np.arange(videos, dtype=np.uint64) * stride).all()
    if (
        not in_order
        or (index[:videos, 1] != stride).any()
        or size != shard_bytes(videos, block_size, video_bytes)
    ):
        raise ShardError(
            f"{path} is laid out otherwise than this package writes it ({videos} videos, {size:,} bytes)"
        )
    return videos


def damaged_videos(path: Path, *, block_size: int, video_bytes: int) -> list[int]:
    """Read a whole shard; places (0-based, within the block) of the videos whose bytes do not match
    their checksum.

    Places behind the shard's last video count as damaged: nothing was written there.
    """
    videos = read_index(path, block_size=block_size, video_bytes=video_bytes)
    stride = video_bytes + CRC_BYTES
    damaged = []
    with path.open("rb") as file:
        for place in range(videos):
            chunk = file.read(stride)
            if google_crc32c.value(chunk[:video_bytes]) != int.from_bytes(
                chunk[video_bytes:], "little"
            ):
                damaged.append(place)
    return damaged + list(range(videos, block_size))


def shard_name(block: int) -> str:
    """The file of a block's features, as Zarr names a chunk."""
    return f"c.{block}.0.0.0"


class ShardMap:
    """All shards of a store as one array `[blocks, block_size, V, T, D]` of little-endian float16,
    mapped on first use.

    Mappings hold no file descriptor (Python's own `mmap` keeps one each), so thousands of shards
    cost nothing. `paths` gives the files of some blocks, `videos` (int [blocks]) says how many
    each holds at least. Slots of shards that were never mapped read as zeros. `sparse` is for files
    that memory does not hold: a page that is not there is read alone, where the kernel would read
    megabytes around it, and `prefetch` has many read at once.
    """

    def __init__(
        self,
        paths: Callable[[list[int]], list[Path]],
        videos: np.ndarray,
        *,
        block_size: int,
        video_shape: tuple[int, int, int],
        sparse: bool = False,
    ):
        self.sparse = sparse
        self._paths, self._videos, self._block_size = paths, videos, block_size
        blocks = len(videos)
        self._video_bytes = int(np.prod(video_shape)) * 2
        page = mmap.PAGESIZE
        self._slot_bytes = -(-shard_bytes(block_size, block_size, self._video_bytes) // page) * page
        self._mapped = np.zeros(blocks, dtype=bool)
        self._libc = _libc()
        size = max(self._slot_bytes * blocks, page)
        # Address space only: nothing is read or reserved until a shard is mapped into its place.
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._base = self._map(None, size, anonymous, -1)
        weakref.finalize(self, self._libc.munmap, self._base, size)
        views, frames, dim = video_shape
        raw = np.frombuffer(
            memoryview((ctypes.c_uint8 * size).from_address(self._base)), dtype="<f2"
        )
        strides = (self._slot_bytes, self._video_bytes + CRC_BYTES, frames * dim * 2, dim * 2, 2)
        shape = (blocks, block_size, views, frames, dim)
        self.array = np.lib.stride_tricks.as_strided(
            raw, shape=shape, strides=strides, writeable=False
        )

    def ensure_mapped(self, blocks: np.ndarray) -> None:
        """Map the shards of `blocks` (int array) that are not mapped yet; `ShardError` names one
        that cannot be."""
        if not self._mapped[blocks].all():
            self._map_shards(np.unique(blocks[~self._mapped[blocks]]).tolist())

    def prefetch(
        self, blocks: np.ndarray, places: np.ndarray, views: np.ndarray, frames: np.ndarray
    ) -> None:
        """Have the kernel begin to read single frames (index arrays that broadcast), all at
        once."""
        index = np.broadcast_arrays(blocks, places, views, frames)
        offsets = sum(
            part.astype(np.int64) * stride
            for part, stride in zip(index, self.array.strides, strict=False)
        )
        first = (self._base + np.ravel(offsets)) // mmap.PAGESIZE * mmap.PAGESIZE
        length = self.array.strides[3] + mmap.PAGESIZE  # a frame may begin in the middle of a page
        for address in first.tolist():
            advise(self._libc, address, length, mmap.MADV_WILLNEED)

    def _map_shards(self, blocks: list[int]) -> None:
        for block, path in zip(blocks, self._paths(blocks), strict=True):
            # Checked before it is mapped: touching a mapping beyond the end of its file would kill
            # the process.
            videos = read_index(path, block_size=self._block_size, video_bytes=self._video_bytes)
            if videos < self._videos[block]:
                raise ShardError(
                    f"{path} holds {videos} videos, {self._videos[block]} are finished"
                )
            size = shard_bytes(videos, self._block_size, self._video_bytes)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                address = self._map(
                    self._base + block * self._slot_bytes,
                    size,
                    mmap.MAP_SHARED | _MAP_FIXED,
                    descriptor,
                )
                if self.sparse:
                    advise(self._libc, address, size, mmap.MADV_RANDOM)
            finally:
                os.close(descriptor)
            self._mapped[block] = True

    def _map(self, address: int | None, size: int, flags: int, descriptor: int) -> int:
        mapped = self._libc.mmap(address, size, mmap.PROT_READ, flags, descriptor, 0)
        if mapped == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(
                code, f"cannot map {size:,} bytes of a feature store: {os.strerror(code)}"
            )
        return mapped


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_longlong,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
