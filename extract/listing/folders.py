"""A walk over folders of videos, and what the names of the folders say: split and class.

No file is opened and none is asked for its size or kind: that comes with the folder's entry, so
that a listing costs little more than reading the folders.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from extract import InputError
from extract.cli import first_few
from extract.numbered import gaps, numbered_pictures

VIDEO_EXTENSIONS = frozenset(
    {
        "264",
        "265",
        "3g2",
        "3gp",
        "amv",
        "asf",
        "avi",
        "divx",
        "dv",
        "f4v",
        "flv",
        "gif",
        "h264",
        "h265",
        "hevc",
        "ivf",
    }
    | {
        "m1v",
        "m2t",
        "m2ts",
        "m2v",
        "m4v",
        "mjpeg",
        "mjpg",
        "mkv",
        "mov",
        "mp4",
        "mpe",
        "mpeg",
        "mpg",
        "mpv",
        "mts",
    }
    | {
        "mxf",
        "nut",
        "obu",
        "ogg",
        "ogm",
        "ogv",
        "qt",
        "rm",
        "rmvb",
        "ts",
        "vob",
        "webm",
        "wmv",
        "y4m",
    }
)
SPLITS = dict.fromkeys(("train", "training"), "train")
SPLITS |= dict.fromkeys(("val", "validate", "validation"), "val")
SPLITS |= dict.fromkeys(("test", "testing"), "test")

_VOLUME = re.compile(
    r"vol_\d+"
)  # a folder that holds clips of any class, as in videos/vol_00/<clip>

Ignored = dict[str, tuple[str, ...]]  # reason -> POSIX paths
HIDDEN, NOT_A_VIDEO = "hidden", "not a video by its extension"
UNREADABLE = "cannot be read"


def extension(name: str) -> str:
    """In lower case and without the dot; "" for a name that has none."""
    stem, _, end = name.rpartition(".")
    return end.lower() if stem else ""


def folder(path: str) -> str:
    """The folder of a POSIX path, "" for the source itself."""
    return path.rpartition("/")[0]


class Scan(NamedTuple):
    """The videos below a folder, sorted POSIX paths; what was ignored, by reason; inodes of the
    videos' files.

    A link has the inode of the file that it leads to; a dangling one has none. `picture_folders` are
    those of the videos that are folders of numbered pictures, with what is missing in their
    numbering.
    """

    videos: list[str]
    ignored: Ignored
    inodes: dict[str, int]
    picture_folders: dict[str, str]


def scan(root: str, *, only: Collection[str] | None = None) -> Scan:
    """Find the videos below `root`.

    `only` names the folders directly in `root` to walk. Linked folders are followed; a dangling
    link counts as the video that its name says it is: it fails with a reason instead of being gone.
    """
    inodes: dict[str, int] = {}
    videos: list[str] = []
    ignored: dict[str, list[str]] = defaultdict(list)
    picture_folders: dict[str, str] = {}
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while waiting:
        below, parents = waiting.pop()
        try:
            with os.scandir(os.path.join(root, below)) as listed:
                entries = list(listed)
        except OSError as error:
            ignored[UNREADABLE].append(f"{below or '.'} ({error.strerror})")
            continue
        pictures = _pictures_of_a_video(entries)
        if pictures and below:
            videos.append(below)
            picture_folders[below] = gaps(pictures)
            inodes[below] = os.stat(os.path.join(root, below)).st_ino
            used = set(pictures.values())
            entries = [entry for entry in entries if entry.name not in used]
        for entry in entries:
            name = entry.name
            path = f"{below}/{name}" if below else name
            is_folder = _false_on_error(entry.is_dir)
            if is_folder and not below and only is not None and name not in only:
                continue
            reason, detail = _reason_to_ignore(entry, is_folder)
            if reason:
                ignored[reason].append(escape_non_utf8(path) + detail)
            elif not is_folder:
                videos.append(path)
                if inode := _inode(entry):
                    inodes[path] = inode
            else:
                real = (
                    os.path.realpath(entry.path)
                    if entry.is_symlink()
                    else os.path.join(parents[-1], name)
                )
                if real in parents:
                    ignored[UNREADABLE].append(f"{path} (link to a folder around it)")
                else:
                    waiting.append((path, (*parents, real)))
    videos.sort()
    by_reason = {reason: tuple(sorted(names)) for reason, names in ignored.items()}
    return Scan(videos, by_reason, inodes, picture_folders)


def _pictures_of_a_video(entries: Sequence[os.DirEntry[str]]) -> dict[int, str]:
    """The numbered pictures of a folder, if they are a video: if there is no video file beside
    them."""
    if any(extension(entry.name) in VIDEO_EXTENSIONS for entry in entries):
        return {}
    return numbered_pictures(entry.name for entry in entries if not _false_on_error(entry.is_dir))


def _reason_to_ignore(entry: os.DirEntry[str], is_folder: bool) -> tuple[str, str]:
    """Why an entry is neither a video nor a folder to look into, and a detail; "" if it is."""
    name = entry.name
    if name.startswith("."):  # among them the ._ files of macOS
        return HIDDEN, ""
    if not name.isascii() and escape_non_utf8(name) != name:
        return UNREADABLE, " (name is not UTF-8)"
    named_as_video = extension(name) in VIDEO_EXTENSIONS
    if is_folder:
        return (NOT_A_VIDEO, " (a folder)") if named_as_video else ("", "")
    if not named_as_video:
        return NOT_A_VIDEO, ""
    if not _false_on_error(entry.is_file) and os.path.exists(entry.path):
        return (
            UNREADABLE,
            " (neither a file nor a folder)",
        )  # a pipe would keep its reader waiting for ever
    return "", ""


def _inode(entry: os.DirEntry[str]) -> int:
    """Of the file itself. It comes with the folder's entry, or for a link from the stat that told
    its kind."""
    if not entry.is_symlink():
        return entry.inode()
    try:
        return entry.stat().st_ino
    except OSError:
        return 0


def _false_on_error(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except (
        OSError
    ):  # a link to itself, or through a folder that may not be entered: as good as dangling
        return False


def escape_non_utf8(path: str) -> str:
    """The path itself, or with escapes where it is not UTF-8, which neither a store nor a terminal
    could take."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def split_of(below: str) -> str:
    """The split that a folder lies in by its name or that of one around it, "" for none."""
    return next((SPLITS[part] for part in below.lower().split("/") if part in SPLITS), "")


def split_and_class(folders: Collection[str]) -> dict[str, tuple[str, str]]:
    """For each folder that holds videos: its split and its class.

    ```
    train/abseiling      -> train, abseiling        val              -> val, ""
    abseiling            -> "", abseiling           videos/vol_03    -> "", ""
    videos/val/abseiling -> val, abseiling          abseiling/group1 -> "", abseiling
    ```
    An outer folder around everything says nothing. `InputError` if splits and other folders are side by side.
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
