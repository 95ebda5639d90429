"""python -m pipelines.report: one page that shows what a folder of runs holds, for people who would rather look.

Stores, run folders, scores, ensembles and ablations are taken wherever they lie in the folder. The page shows what
there is, and names what is not there with the command that makes it. No clock gets into it: the same results give the
same bytes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from extract.cli import InputError, RunError, run_command
from extract.files import replace_file
from pipelines.report.find import RUN_FILES, Found, find

if TYPE_CHECKING:
    pass

# What makes the things of a section that is empty.
MAKERS = {
    "extracted": "no feature store (*.zarr): python -m extract makes one",
    "training": "no training run (metrics.csv): python -m aggregate.train makes one",
    "results": "no results: python -m aggregate.train and aggregate.evaluate --out make some",
    "confusion": "no scores of videos with labels (*.h5): python -m aggregate.evaluate --out makes some",
    "ablation": "no ablation (ablation.csv): python -m aggregate.ablate makes one",
    "attention": "no attention: python -m aggregate.train --agg hgnl makes a model that has it (and keep its features)",
    "map": "no map: python -m extract makes the features",
    "ensemble": "no ensemble: python -m ensemble --scores ... --out makes one",
    "provenance": "no provenance: it comes with stores, runs and scores",
}


@dataclass(frozen=True)
class Options:
    """Make one self-contained HTML page of what a folder holds: features, training, results, ablations, ensembles."""

    rundir: Annotated[Path, tyro.conf.Positional]
    """The folder, e.g. runs/demo; everything below it is looked at."""
    out: Path = Path("report.html")
    """The page; it opens from disk and needs neither a network nor another file."""
    videos: tuple[Path, ...] = ()
    """Folders that the ids of the videos are relative to; without them the page has no thumbnails."""
    seed: int = 0
    """Of whatever is drawn: sample frames, the videos of the map, the candidates for attention."""


def main(options: Options) -> int:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RunError(
            "the report draws with matplotlib, which is not installed: pip install 'hgnl-video[demo]'"
        ) from None
    for folder in (options.rundir, *options.videos):
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder")
    found = find(options.rundir)
    html = render(found, title=options.rundir.resolve().name, videos=options.videos, seed=options.seed)
    replace_file(options.out, html)
    for problem in found.problems:
        print(f"not shown: {problem}", file=sys.stderr)
    print(f"{options.out}: {found}, {len(html) / 1e6:.1f} MB")
    return 0


# -- the page ------------------------------------------------------------------------------------------------------


def render(found: Found, *, title: str, videos: tuple[Path, ...] = (), seed: int = 0) -> str:
    """The page: a section for each kind of thing there is, and what is missing at its end."""
    from pipelines.report import gallery, page, results

    makers = {
        "What was extracted": lambda: gallery.extracted(found, videos, seed),
        "Training": lambda: results.training(found),
        "Results": lambda: results.results(found),
        "What is confused": lambda: results.confusion(found),
        "Ablation": lambda: results.ablation(found),
        "Attention along the timeline": lambda: gallery.attention(found, videos, seed),
        "Map of features": lambda: gallery.feature_maps(found, seed),
        "Ensemble": lambda: results.ensemble(found),
        "Provenance": lambda: results.provenance(found),
    }
    made = []
    for name, (heading, make) in zip(MAKERS, makers.items(), strict=True):
        try:
            made.append((name, heading, make()))
        except (InputError, RunError, OSError, ValueError, KeyError) as error:  # the other sections are still shown
            found.problems.append(f"{heading}: {error!r}")
    missing = [MAKERS[name] for name, _, body in made if not body] + _missing_files(found)
    if found.stores and not videos:
        missing.append("no frames of the videos: --videos DIR says where they lie")
    sections = [section for section in made if section[2]]
    if missing:
        sections.append(("missing", "What is missing", page.items(missing)))
    if found.problems:
        sections.append(("problems", "What could not be read", page.items(found.problems)))
    return page.page(f"Report: {title}", page.paragraph(f"{found}."), sections)


def _missing_files(found: Found) -> list[str]:
    """What the run folders lack."""
    lines = []
    for name, folder in found.runs.items():
        absent = [file for file in RUN_FILES if not (folder / file).is_file()]
        if absent:
            lines.append(f"run {name}: no {', '.join(absent)}; the same python -m aggregate.train resumes it")
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.report"))
