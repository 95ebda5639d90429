"""A walk over folders of videos, and what the names of the folders say: split and class.

No file is opened and none is asked for its size or kind: that comes with the folder's entry, so that a listing costs
little more than reading the folders.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection

from extract.cli import InputError, examples

VIDEO_EXTENSIONS = frozenset(
    {"264", "265", "3g2", "3gp", "amv", "asf", "avi", "divx", "dv", "f4v", "flv", "gif", "h264", "h265", "hevc", "ivf"}
    | {"m1v", "m2t", "m2ts", "m2v", "m4v", "mjpeg", "mjpg", "mkv", "mov", "mp4", "mpe", "mpeg", "mpg", "mpv", "mts"}
    | {"mxf", "nut", "obu", "ogg", "ogm", "ogv", "qt", "rm", "rmvb", "ts", "vob", "webm", "wmv", "y4m"}
)
SPLITS = dict.fromkeys(("train", "training"), "train")
SPLITS |= dict.fromkeys(("val", "validate", "validation"), "val")
SPLITS |= dict.fromkeys(("test", "testing"), "test")

_VOLUME = re.compile(r"vol_\d+")  # a folder that holds clips of any class, as in videos/vol_00/<clip>

Ignored = dict[str, tuple[str, ...]]  # reason -> POSIX paths


def extension(name: str) -> str:
    """In lower case and without the dot; "" for a name that has none."""
    stem, _, end = name.rpartition(".")
    return end.lower() if stem else ""


def folder(path: str) -> str:
    """The folder of a POSIX path, "" for the source itself."""
    return path.rpartition("/")[0]


def scan(root: str, *, only: Collection[str] | None = None) -> tuple[list[str], Ignored]:
    """POSIX paths below `root` of all videos, sorted, and what was ignored, by reason.

    `only` names the folders directly in `root` to walk. Linked folders are followed; a dangling link counts as the
    video that its name says it is, since whoever made it meant one.
    """
    videos: list[str] = []
    ignored: dict[str, list[str]] = defaultdict(list)
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while waiting:
        below, around = waiting.pop()
        try:
            with os.scandir(os.path.join(root, below)) as entries:
                found = list(entries)
        except OSError as error:
            ignored[f"folder that cannot be read ({error.strerror})"].append(below or ".")
            continue
        for entry in found:
            name = entry.name
            path = f"{below}/{name}" if below else name
            is_folder = _asked(entry.is_dir)
            if is_folder and not below and only is not None and name not in only:
                continue
            if reason := _why_not(entry, is_folder):
                ignored[reason].append(printable(path))
            elif not is_folder:
                videos.append(path)
            else:
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(around[-1], name)
                if real in around:
                    ignored["link that leads back to a folder around it"].append(path)
                else:
                    waiting.append((path, (*around, real)))
    videos.sort()
    return videos, {reason: tuple(sorted(names)) for reason, names in ignored.items()}


def _why_not(entry: os.DirEntry[str], is_folder: bool) -> str:
    """Why an entry is neither a video nor a folder to look into; "" if it is."""
    name = entry.name
    if name.startswith("."):
        return "macOS ._ file" if name.startswith("._") else "hidden"
    if not name.isascii() and printable(name) != name:
        return "name that is not UTF-8"
    end = extension(name)
    if is_folder:
        return "folder with the name of a video" if end in VIDEO_EXTENSIONS else ""
    if end not in VIDEO_EXTENSIONS:
        return "no video by its extension" if end else "name without an extension"
    if not _asked(entry.is_file) and os.path.exists(entry.path):
        return "neither a file nor a folder"  # such as a pipe, which would keep its reader waiting for ever
    return ""


def _asked(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link to itself, or through a folder that may not be entered: as good as dangling
        return False


def printable(path: str) -> str:
    """The path itself, or with escapes where it is not UTF-8, which neither a store nor a terminal could take."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def split_of(below: str) -> str:
    """The split that a folder lies in by its name or that of one around it, "" for none."""
    return next((SPLITS[part] for part in below.lower().split("/") if part in SPLITS), "")


def places(folders: Collection[str]) -> dict[str, tuple[str, str]]:
    """For each folder that holds videos: its split and its class.

    ```
    train/abseiling      -> train, abseiling        val              -> val, ""
    abseiling            -> "", abseiling           videos/vol_03    -> "", ""
    videos/val/abseiling -> val, abseiling          abseiling/group1 -> "", abseiling
    ```
    An outer folder around everything says nothing. `InputError` where splits and other folders stand side by side.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    while _one_around(list(parts.values())):
        parts = {folder: part[1:] for folder, part in parts.items()}
    tops = {part[0] for part in parts.values() if part}
    splits = {top for top in tops if top.lower() in SPLITS}
    if splits and splits != tops:
        raise InputError(
            f"folders named like splits ({examples(sorted(splits))}) stand beside others "
            f"({examples(sorted(tops - splits))}): are those classes? "
            "Move one kind away, or give a CSV path,label,split"
        )
    found = {}
    for folder, part in parts.items():
        split = SPLITS[part[0].lower()] if splits and part else ""
        inner = part[1:] if split else part
        named = bool(inner) and not _VOLUME.fullmatch(inner[-1])
        found[folder] = (split, inner[0] if named else "")
    return found


def _one_around(parts: list[list[str]]) -> bool:
    if any(len(part) < 2 for part in parts) or len({part[0] for part in parts}) > 1:
        return False
    return parts[0][0].lower() not in SPLITS
