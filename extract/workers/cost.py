"""What an extraction costs on machines that are not at hand."""

from dataclasses import dataclass

H100_FRAMES_A_SECOND = 5_000.0  # SE-ResNeXt101 32x4d, fp16, 224 pixels: 80 TFLOP/s; assumed, not measured


@dataclass(frozen=True)
class Cost:
    """H100 hours of the backbone, core hours of decoding, bytes of features."""

    h100_hours: float
    core_hours: float
    size: int

    def __str__(self) -> str:
        return (
            f"{self.h100_hours:.3g} H100 hours (assumed: {H100_FRAMES_A_SECOND:,.0f} frames/s), {self.core_hours:.3g} "
            f"CPU-core hours of decoding (so {self.core_hours / self.h100_hours:.0f} cores feed one H100), "
            f"{self.size / 1e9:.3g} GB"
        )


def cost(videos: int, *, views: int, frames: int, dim: int, decode_seconds: float) -> Cost:
    """Of `videos`, each of V views x T frames, D channels, decoded in `decode_seconds` of a core (measure some)."""
    pictures = videos * views * frames
    return Cost(pictures / H100_FRAMES_A_SECOND / 3600, videos * decode_seconds / 3600, pictures * dim * 2)
