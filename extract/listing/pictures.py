"""Folders of numbered pictures in a listing: lines for its report, and checks of the frame rate."""

from collections.abc import Mapping, Sequence

from extract import InputError
from extract.cli import counted


def describe_picture_folders(folders: Mapping[str, str]) -> list[str]:
    """Lines for the listing's report. folders: the gaps in the numbering of each, or ""."""
    missing = [f"{name}: {gap}" for name, gap in folders.items() if gap]
    lines = [f"folders of numbered pictures, a video each: {len(folders):,}"] if folders else []
    if missing:
        lines.append(f"GAPS in the numbers of pictures: {counted(missing)}")
    return lines


def refuse_picture_folders(source: str, folders: Sequence[str]) -> None:
    """InputError if there are such folders, for commands that cannot read them."""
    if folders:
        raise InputError(
            f"{source} lists folders of numbered pictures, such as {folders[0]}; only `extract` "
            "reads them, with --frame-rate: train and test on the features that it stores"
        )


def require_frame_rate(source: str, folders: Sequence[str], rate: float | None) -> None:
    """InputError if there are such folders and no rate (Hz)."""
    if rate is None and folders:
        raise InputError(
            f"{source} lists folders of numbered pictures ({len(folders):,}, like {folders[0]}); "
            "give --frame-rate, how many are shown per second, or move them away"
        )


def refuse_needless_rate(source: str, folders: Sequence[str], rate: float | None) -> None:
    """InputError if a rate (Hz) is given without such folders."""
    if rate is not None and not folders:
        raise InputError(
            f"--frame-rate {rate:g} is for folders of numbered pictures; {source} lists none, "
            "leave it out"
        )
