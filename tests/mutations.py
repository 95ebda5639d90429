"""Damage to files that depends only on a seed, and a comparison of decode children with plain
decoding on damaged videos."""

import contextlib
import hashlib
from typing import Any

import av
import numpy as np

from extract.decode import VideoError, decode
from extract.decode.container import LENIENT_METADATA
from extract.sampling import segment_centers

KINDS = ("bits", "bytes", "cut", "swap", "repeat", "zeros", "header", "tail", "remove", "bits")


def mutate(content: bytes, seed: int) -> bytes:
    """Apply one of ten kinds of damage: bit flips, other bytes, a cut, swapped or repeated or
    zeroed blocks, a header ..."""
    rng = np.random.default_rng(seed)
    data = np.frombuffer(content, np.uint8).copy()
    kind, size = KINDS[seed % len(KINDS)], len(data)
    if size < 8:
        return content[: rng.integers(0, size + 1)]
    block = int(rng.integers(1, max(2, min(size // 4, 4096))))
    one, other = (int(place) for place in rng.integers(0, size - block, 2))
    if kind == "bits":
        for place in rng.integers(0, size, rng.integers(1, 12)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == "bytes":
        places = rng.integers(0, size, rng.integers(1, 64))
        data[places] = rng.integers(0, 256, len(places))
    elif kind == "cut":
        data = data[: rng.integers(0, size)]
    elif kind == "swap":
        data[one : one + block], data[other : other + block] = (
            data[other : other + block],
            data[one : one + block].copy(),
        )
    elif kind == "repeat":
        data = np.insert(data, one, data[other : other + block])
    elif kind == "zeros":
        data[one : one + block] = 0
    elif kind == "header":
        places = rng.integers(0, min(size, 512), rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
    elif kind == "tail":
        places = rng.integers(max(0, size - 1024), size, rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
    else:
        data = np.delete(data, slice(one, one + block))
    return data.tobytes()


def compare(job: tuple[str, int], out: np.ndarray) -> dict[str, Any]:
    """In a child: the result of `decode` on a file, and how it differs from plainly decoding
    everything."""
    path, frames = job
    try:
        found = decode(path, lambda count: segment_centers(count, frames))
    except VideoError as error:
        return {"failed": error.reason}
    if found.problem:
        return {"partial": found.problem}
    wanted = {digest(frame) for frame in found.frames}
    plain, corrupt, error = plainly(path)
    damaged: list[int] = []
    if len(plain) == found.num_frames:
        damaged = [n for n in found.indices.tolist() if corrupt[n]]
        differ = [
            n
            for n, frame in zip(found.indices.tolist(), found.frames, strict=True)
            if digest(frame) != plain[n]
        ]
    else:
        differ = sorted(wanted - set(plain))
    damaged = (
        [n for n in found.indices.tolist() if n < len(corrupt) and corrupt[n]]
        if len(plain) == found.num_frames
        else []
    )
    return {
        "ok": found.num_frames,
        "plain": len(plain),
        "differ": differ,
        "corrupt": damaged,
        "error": error,
    }


def digest(frame: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frame)).hexdigest() + str(frame.shape)


def plainly(path: str) -> tuple[list[str], list[bool], str]:
    """Digests of all frames, rotated for display; which of them are corrupt; and the error that
    ended decoding, if any."""
    found, corrupt, error = [], [], ""
    with contextlib.suppress(av.FFmpegError), av.open(path, **LENIENT_METADATA) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for packet in packets_of(container, stream):
            try:
                frames = packet.decode()
            except av.FFmpegError as problem:  # later packets may still be whole
                error = error or str(problem)
                continue
            for frame in frames:
                turns = round(frame.rotation / 90) % 4
                found.append(digest(np.rot90(frame.to_ndarray(format="rgb24"), turns)))
                corrupt.append(frame.is_corrupt)
    return found, corrupt, error


def packets_of(container, stream):
    with contextlib.suppress(IndexError):  # raised by PyAV if a stream appears in the middle
        yield from container.demux(stream)
