"""Render the report's HTML from `page.html.j2`, with every value escaped."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from aggregate import figures
from aggregate.ablation.compare import percent
from aggregate.metrics import Interval
from extract import Record
from extract.cli import progress
from pipelines.report import audits, gallery, results
from pipelines.report.compared import summary
from pipelines.report.find import RUN_FILES, UNREADABLE, Contents

# The content of each section of page.html.j2; empty if there is nothing to show.
SECTIONS = {
    "random": results.backbones_with_random_weights,
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


def render(contents: Contents, title: str) -> str:
    """The page: a section for each kind of content, and at the end a list of what is missing."""
    sections: Record = {}

    def first_section(contents: Contents) -> Record:
        return summary(contents, sections.get("attention", []))

    renderers = {**SECTIONS, "summary": first_section}  # the summary needs the others
    for name, section_of in progress(renderers.items(), unit="section"):
        try:
            if section := section_of(contents):
                sections[name] = section
        except UNREADABLE as error:
            contents.problems.append(f"{name}: {error!r}")
    missing = []
    for name, folder in contents.runs.items():
        if absent := [file for file in RUN_FILES if not (folder / file).is_file()]:
            missing.append(
                f"run {name}: no {', '.join(absent)}; run its command again, which resumes it"
            )
    if contents.stores and not contents.videos:
        missing.append("no frames of the videos: --videos DIR says where they are")
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
    )
    pages.filters.update(
        data_uri=_data_uri, interval=_interval, percent=percent, thousands="{:,}".format
    )
    return pages.get_template("page.html.j2").render(
        title=title, contents=contents, sections=sections, missing=missing
    )


def _interval(interval: Mapping[str, float] | None, sign: str = "") -> str:
    """An interval in percent; empty for None."""
    return format(Interval(**interval), sign) if interval else ""


def _printable(value: Any) -> Any:
    """Replace control characters and lone surrogates with U+FFFD. The page's own markup stays
    unchanged."""
    if hasattr(value, "__html__"):
        return value
    return "".join(
        c if c.isprintable() or c in " \n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )


def _data_uri(picture: figures.Figure | bytes) -> Markup:
    """A figure (as SVG) or a JPEG, embedded in the page."""
    kind, content = (
        ("jpeg", picture) if isinstance(picture, bytes) else ("svg+xml", figures.svg(picture))
    )
    return Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
