"""The report's HTML: `page.html.j2` filled in, every value escaped."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def render(**values: Any) -> str:
    """The whole page; bytes are pictures (SVG or JPEG), everything else is text."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, finalize=_printable, trim_blocks=True)
    pages.filters.update(data_uri=_data_uri, percent=percent, spread=spread, thousands="{:,}".format)
    return pages.get_template("page.html.j2").render(values)


def percent(interval: Mapping[str, float] | None, sign: str = "") -> str:
    """`61.8 [61.3, 62.4]`, in percent, of `value`, `low` and `high`; nothing of None."""
    if interval is None:
        return ""
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def spread(row: Mapping[str, float], name: str, sign: str = "") -> str:
    """`percent` of a column of a row, and of those of its interval."""
    return percent({"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}, sign)


def _printable(value: Any) -> Any:
    """Control characters and halves of surrogates become U+FFFD; the page's own markup stays as it is."""
    if hasattr(value, "__html__"):
        return value
    return "".join(c if c.isprintable() or c in " \n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _data_uri(picture: bytes) -> Any:
    """An SVG or a JPEG as a part of the page."""
    from markupsafe import Markup

    kind = "jpeg" if picture.startswith(b"\xff\xd8") else "svg+xml"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(picture).decode()}")
