"""What an extraction costs on machines that are not at hand."""

H100_FRAMES_A_SECOND = (
    5_000.0  # SE-ResNeXt101 32x4d, fp16, 224 pixels: 80 TFLOP/s; assumed, not measured
)


def cost(videos: int, *, views: int, frames: int, dim: int, decode_seconds: float) -> str:
    """Of `videos`, each of V views x T frames, D channels, decoded in `decode_seconds` of a core
    (measure some).

    In words: H100 hours of the backbone, core hours of decoding, size of the features.
    """
    pictures = videos * views * frames
    h100_hours, core_hours = pictures / H100_FRAMES_A_SECOND / 3600, videos * decode_seconds / 3600
    return (
        f"{h100_hours:.3g} H100 hours (assumed: {H100_FRAMES_A_SECOND:,.0f} frames/s), {core_hours:.3g} CPU-core hours "
        f"of decoding (so {core_hours / h100_hours:.0f} cores feed one H100), {pictures * dim * 2 / 1e9:.3g} GB"
    )
