"""python -m pipelines.report: one page that shows what a folder of runs holds, for people who would rather look.

Stores, run folders, scores, ensembles and ablations are taken wherever they lie in the folder. The page shows what
there is, and names what is not there with the command that makes it. No clock gets into it: the same results give the
same bytes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from extract.cli import InputError, RunError, progress, run_command
from extract.files import replace_file
from pipelines.report.find import RUN_FILES, UNREADABLE, Found, find

# The sections: heading, and what is said where there is nothing for one.
SECTIONS = {
    "extracted": ("What was extracted", "no feature store (*.zarr): python -m extract makes one"),
    "training": ("Training", "no training run (metrics.csv): python -m aggregate.train makes one"),
    "results": ("Results", "no results: python -m aggregate.train and aggregate.evaluate --out make some"),
    "confusion": (
        "What is confused",
        "no scores of videos with labels (*.h5): python -m aggregate.evaluate --out makes some",
    ),
    "crossval": ("Cross-validation", "no cross-validation: python -m aggregate.crossval --out makes one"),
    "ablation": ("Ablation", "no ablation (ablation.csv): python -m aggregate.ablate makes one"),
    "attention": (
        "Attention along the timeline",
        "no attention: python -m aggregate.train --agg hgnl makes a model that has it (and keep its features)",
    ),
    "map": ("Map of features", "no map: python -m extract makes the features"),
    "ensemble": ("Ensemble", "no ensemble: python -m ensemble --scores ... --out makes one"),
    "provenance": ("Provenance", "no provenance: it comes with stores, runs and scores"),
    "missing": ("What is missing", ""),
    "problems": ("What could not be read", ""),
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
    print(f"{options.out}: {found}, {len(html) / 1e6:.1f} MB\nNext: open it in a browser")
    return 0


def render(found: Found, *, title: str, videos: tuple[Path, ...] = (), seed: int = 0) -> str:
    """The page: a section for each kind of thing there is, and what is missing at its end."""
    from pipelines.report import gallery, page, results

    makers = {
        "extracted": lambda: gallery.extracted(found, videos, seed),
        "training": lambda: results.training(found),
        "results": lambda: results.results(found),
        "confusion": lambda: results.confusion(found),
        "crossval": lambda: results.crossvals(found),
        "ablation": lambda: results.ablations(found),
        "attention": lambda: gallery.attention(found, videos, seed),
        "map": lambda: gallery.feature_maps(found, seed),
        "ensemble": lambda: results.ensembles(found),
        "provenance": lambda: results.provenance(found),
    }
    sections = dict.fromkeys(SECTIONS)
    for name, make in progress(makers.items(), unit="section"):
        try:
            sections[name] = make()
        except UNREADABLE as error:
            found.problems.append(f"{SECTIONS[name][0]}: {error!r}")
    missing = [SECTIONS[name][1] for name in makers if not sections[name]]
    for name, folder in found.runs.items():
        if absent := [file for file in RUN_FILES if not (folder / file).is_file()]:
            missing.append(f"run {name}: no {', '.join(absent)}; the same python -m aggregate.train resumes it")
    if found.stores and not videos:
        missing.append("no frames of the videos: --videos DIR says where they lie")
    sections |= {"missing": missing, "problems": found.problems}
    headings = {name: heading for name, (heading, _) in SECTIONS.items()}
    return page.render(title=title, found=str(found), videos=videos, headings=headings, sections=sections)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.report"))
