"""What an extraction costs, on machines that may not be at hand: H100 hours, CPU-core hours, bytes, blocks."""

from dataclasses import dataclass

H100_FRAMES_A_SECOND = 5_000.0  # SE-ResNeXt101 32x4d in fp16 at 224 pixels, assumed, not measured: 80 TFLOP/s


@dataclass(frozen=True)
class Cost:
    """`videos` of V `views` x T `frames` x D `dim`; decoding one takes a core `decode_seconds` (measure it)."""

    videos: int
    views: int
    frames: int
    dim: int
    decode_seconds: float
    block_size: int = 64
    device_frames: float = H100_FRAMES_A_SECOND  # that a device takes a second

    @property
    def device_hours(self) -> float:
        return self.videos * self.views * self.frames / self.device_frames / 3600

    @property
    def core_hours(self) -> float:
        return self.videos * self.decode_seconds / 3600

    @property
    def bytes(self) -> int:
        return self.videos * self.views * self.frames * self.dim * 2

    @property
    def blocks(self) -> int:
        return -(-self.videos // self.block_size)

    def block_seconds(self, cores: float) -> float:
        """Of a worker with one device and so many decoding cores, near or lent: the slower of the two."""
        decode = self.block_size * self.decode_seconds / cores
        return max(decode, self.block_size * self.views * self.frames / self.device_frames)

    def __str__(self) -> str:
        feed = self.core_hours / max(self.device_hours, 1e-9)
        return (
            f"{self.device_hours:.3g} H100 hours ({self.device_frames:,.0f} frames/s assumed), {self.core_hours:.3g} "
            f"CPU-core hours of decoding ({feed:.0f} cores feed one H100), {self.bytes / 1e9:,.3g} GB in "
            f"{self.blocks:,} blocks"
        )
