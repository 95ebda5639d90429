"""python -m pipelines.report: one page that shows what a folder of runs holds, for people who would
rather look.

Stores, run folders, scores, ensembles and ablations are taken wherever they lie in the folder. The
page shows what there is, and names what is not there with the command that makes it. No clock gets
into it: the same results give the same bytes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from extract import InputError
from extract.cli import run_command
from extract.durable import replace_file
from pipelines.report.find import find


@dataclass(frozen=True)
class Options:
    """Make one self-contained HTML page of what a folder holds: features, training, results,
    ablations, ensembles."""

    rundir: Annotated[Path, tyro.conf.Positional]
    """The folder, e.g. runs/demo; everything below it is looked at."""
    out: Path = Path("report.html")
    """The page; it opens from disk and needs neither a network nor another file."""
    videos: tuple[Path, ...] = ()
    """Folders that the ids of the videos are relative to; without them the page has no
    thumbnails."""


def main(options: Options) -> int:
    from pipelines.report.page import render

    for folder in (options.rundir, *options.videos):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
    found = find(options.rundir, options.videos)
    html = render(found, options.rundir.resolve().name)
    replace_file(options.out, html)
    for problem in found.problems:
        print(f"not shown: {problem}", file=sys.stderr)
    print(f"{options.out}: {found}, {len(html) / 1e6:.1f} MB\nNext: open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.report"))
