"""python -m pipelines.report: one HTML page of everything in a folder of runs.

Stores, run folders, scores, ensembles and ablations are found at any depth. For anything that is
missing, the page names the command that makes it. The page holds no date, so the same results give
the same bytes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from extract import InputError
from extract.cli import run_as_script
from extract.durable import replace_file
from pipelines.report.find import find


@dataclass(frozen=True)
class Options:
    """Make one self-contained HTML page of a folder: features, training, results, ablations,
    ensembles."""

    rundir: Annotated[Path, tyro.conf.Positional]
    """The folder, e.g. runs/demo, with all folders below it."""
    out: Path = Path("report.html")
    """The page; it opens from disk, without a network or other files."""
    videos: tuple[Path, ...] = ()
    """Folders of the videos; ids are paths below them. Without them the page has no thumbnails."""


def main(options: Options) -> int:
    from pipelines.report.page import render

    for folder in (options.rundir, *options.videos):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
    contents = find(options.rundir, options.videos)
    html = render(contents, options.rundir.resolve().name)
    replace_file(options.out, html)
    for problem in contents.problems:
        print(f"not shown: {problem}", file=sys.stderr)
    print(f"{options.out}: {contents}, {len(html) / 1e6:.1f} MB\nNext: open it in a browser")
    return 0


if __name__ == "__main__":
    run_as_script()
