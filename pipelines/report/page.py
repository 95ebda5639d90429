"""The report's HTML: `page.html.j2` filled in, every value escaped."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from aggregate import figures
from aggregate.ablation.compare import percent
from aggregate.metrics import Interval
from extract.cli import progress
from pipelines.report import audits, gallery, results
from pipelines.report.compared import summary
from pipelines.report.find import RUN_FILES, UNREADABLE, Found

# What the sections of page.html.j2 are given: nothing where there is nothing to show.
SECTIONS = {
    "random": results.random_backbones,
    "results": results.results,
    "confusion": results.confusion,
    "attention": gallery.attention,
    "crossval": results.crossvals,
    "ablation": results.ablations,
    "ensemble": results.ensembles,
    "training": results.training,
    "audit": audits.audits,
    "map": gallery.feature_maps,
    "extracted": gallery.extracted,
    "provenance": results.provenance,
}


def render(found: Found, title: str) -> str:
    """The page: a section for each kind of thing there is, and what is missing at its end."""
    sections: dict[str, Any] = {}
    contents = {**SECTIONS, "summary": lambda found: summary(found, sections.get("attention", []))}
    for name, content in progress(contents.items(), unit="section"):
        try:
            if shown := content(found):
                sections[name] = shown
        except UNREADABLE as error:
            found.problems.append(f"{name}: {error!r}")
    missing = []
    for name, folder in found.runs.items():
        if absent := [file for file in RUN_FILES if not (folder / file).is_file()]:
            missing.append(
                f"run {name}: no {', '.join(absent)}; the command that began it, run again, goes on"
            )
    if found.stores and not found.videos:
        missing.append("no frames of the videos: --videos DIR says where they lie")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(
        loader=loader, autoescape=True, finalize=_printable, trim_blocks=True
    )
    pages.filters.update(
        data_uri=_data_uri, interval=_interval, percent=percent, thousands="{:,}".format
    )
    return pages.get_template("page.html.j2").render(
        title=title, found=found, sections=sections, missing=missing
    )


def _interval(interval: Mapping[str, float] | None, sign: str = "") -> str:
    """In percent; nothing of None."""
    return format(Interval(**interval), sign) if interval else ""


def _printable(value: Any) -> Any:
    """Control characters and halves of surrogates become U+FFFD; the page's own markup stays as it
    is."""
    if hasattr(value, "__html__"):
        return value
    return "".join(
        c if c.isprintable() or c in " \n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )


def _data_uri(picture: figures.Figure | bytes) -> Markup:
    """A figure (as SVG) or a JPEG as a part of the page."""
    kind, content = (
        ("jpeg", picture) if isinstance(picture, bytes) else ("svg+xml", figures.svg(picture))
    )
    return Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
