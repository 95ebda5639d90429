"""Scan folders for videos, and read splits and classes from the names of the folders.

No file is opened, and stat is called for links only: the kind of a file comes with the folder's
entry, so that a listing costs little more than reading the folders.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from extract import InputError
from extract.cli import first_few
from extract.numbered import gaps, numbered_pictures

VIDEO_EXTENSIONS = frozenset(
    """
    264 265 3g2 3gp amv asf avi divx dv f4v flv gif h264 h265 hevc ivf m1v m2t m2ts m2v m4v mjpeg
    mjpg mkv mov mp4 mpe mpeg mpg mpv mts mxf nut obu ogg ogm ogv qt rm rmvb ts vob webm wmv y4m
    """.split()  # noqa: SIM905
)
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# A folder that holds clips of any class, as in videos/vol_00/<clip>.
_VOLUME = re.compile(r"vol_\d+")

Ignored = dict[str, tuple[str, ...]]  # reason -> POSIX paths
NOT_A_VIDEO, UNREADABLE = "not a video by its extension", "cannot be read"


def extension(name: str) -> str:
    """The extension in lower case without the dot, "" for none."""
    stem, _, end = name.rpartition(".")
    return end.lower() if stem else ""


def folder(path: str) -> str:
    """The folder of a POSIX path, "" for the root."""
    return path.rpartition("/")[0]


class Scan(NamedTuple):
    """The videos below a folder, as POSIX paths."""

    videos: list[str]  # sorted
    ignored: Ignored
    inodes: dict[str, int]  # of the file, also for a link; a dangling link has none
    picture_folders: dict[str, str]  # videos that are folders of numbered pictures -> their gaps


def scan(root: str, *, only: Collection[str] | None = None) -> Scan:
    """Find the videos below `root`.

    Linked folders are followed. A dangling link counts as a video if it is named like one: it then
    fails with a reason instead of being ignored.

    Args:
        only: names of the folders directly in `root` to walk; None for all.
    """
    inodes: dict[str, int] = {}
    videos: list[str] = []
    ignored: dict[str, list[str]] = defaultdict(list)
    picture_folders: dict[str, str] = {}
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while waiting:
        below, parents = waiting.pop()
        try:
            with os.scandir(os.path.join(root, below)) as iterator:
                entries = list(iterator)
        except OSError as error:
            ignored[UNREADABLE].append(f"{below or '.'} ({error.strerror})")
            continue
        pictures = _pictures_of_a_video(entries)
        if pictures and below:
            videos.append(below)
            picture_folders[below] = gaps(pictures)
            inodes[below] = os.stat(os.path.join(root, below)).st_ino
            names = set(pictures.values())
            entries = [entry for entry in entries if entry.name not in names]
        for entry in entries:
            name = entry.name
            path = f"{below}/{name}" if below else name
            is_folder = _false_on_error(entry.is_dir)
            if is_folder and not below and only is not None and name not in only:
                continue
            reason, detail = _reason_to_ignore(entry, is_folder)
            if reason:
                ignored[reason].append(escape_non_utf8(path) + detail)
                continue
            is_link = entry.is_symlink()
            if is_folder:
                real = os.path.realpath(entry.path) if is_link else os.path.join(parents[-1], name)
                if real in parents:
                    ignored[UNREADABLE].append(f"{path} (link to a folder around it)")
                else:
                    waiting.append((path, (*parents, real)))
                continue
            videos.append(path)
            if not is_link:
                inodes[path] = entry.inode()
            elif status := _false_on_error(entry.stat):
                inodes[path] = status.st_ino
    by_reason = {reason: tuple(sorted(paths)) for reason, paths in ignored.items()}
    return Scan(sorted(videos), by_reason, inodes, picture_folders)


def _pictures_of_a_video(entries: Sequence[os.DirEntry[str]]) -> dict[int, str]:
    """The numbered pictures of a folder by number, if they are a video: {} next to video files."""
    if any(extension(entry.name) in VIDEO_EXTENSIONS for entry in entries):
        return {}
    return numbered_pictures(entry.name for entry in entries if not _false_on_error(entry.is_dir))


def _reason_to_ignore(entry: os.DirEntry[str], is_folder: bool) -> tuple[str, str]:
    """The reason and a detail if an entry is neither a video nor a folder to scan, else ""."""
    name = entry.name
    if name.startswith("."):  # among them the ._ files of macOS
        return "hidden", ""
    if not name.isascii() and escape_non_utf8(name) != name:
        return UNREADABLE, " (name is not UTF-8)"
    named_as_video = extension(name) in VIDEO_EXTENSIONS
    if is_folder:
        return (NOT_A_VIDEO, " (a folder)") if named_as_video else ("", "")
    if not named_as_video:
        return NOT_A_VIDEO, ""
    if not _false_on_error(entry.is_file) and os.path.exists(entry.path):
        return UNREADABLE, " (neither a file nor a folder)"  # reading a pipe would never end
    return "", ""


def _false_on_error(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError:  # like a dangling link: a link to itself, or through a folder without access
        return False


def escape_non_utf8(path: str) -> str:
    """The path with escapes for bytes that are not UTF-8: stores and terminals cannot hold them."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def split_of(below: str) -> str:
    """The split that a folder, or one around it, is named like; "" for none."""
    return next((SPLITS[part] for part in below.lower().split("/") if part in SPLITS), "")


def split_and_class(folders: Collection[str]) -> dict[str, tuple[str, str]]:
    """For each folder that holds videos: its split and its class.

    ```
    train/abseiling      -> train, abseiling        val              -> val, ""
    abseiling            -> "", abseiling           videos/vol_03    -> "", ""
    videos/val/abseiling -> val, abseiling          abseiling/group1 -> "", abseiling
    ```
    An outer folder around everything is skipped. `InputError` if splits and other folders are next
    to each other.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    while _has_single_root(list(parts.values())):
        parts = {folder: part[1:] for folder, part in parts.items()}
    tops = {part[0] for part in parts.values() if part}
    splits = {top for top in tops if top.lower() in SPLITS}
    if splits and splits != tops:
        raise InputError(
            f"folders named like splits ({first_few(sorted(splits))}) are next to others "
            f"({first_few(sorted(tops - splits))}): are those classes? "
            "Move one kind away, or give a CSV path,label,split"
        )
    result = {}
    for folder, part in parts.items():
        split = SPLITS[part[0].lower()] if splits and part else ""
        inner = part[1:] if split else part
        named = bool(inner) and not _VOLUME.fullmatch(inner[-1])
        result[folder] = (split, inner[0] if named else "")
    return result


def _has_single_root(parts: list[list[str]]) -> bool:
    if any(len(part) < 2 for part in parts) or len({part[0] for part in parts}) > 1:
        return False
    return parts[0][0].lower() not in SPLITS
