"""The report's HTML: one self-contained page without scripts, made for a screen, a phone and paper.

Parameters named `content` or `body` are HTML, made by these functions; everything else is text and is escaped here.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light; --ink: #1d2329; --soft: #5d6670; --line: #dfe2e3; --accent: #12698f; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 64rem; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1, h2, h3 { margin: 0; font-weight: 650; line-height: 1.25; }
h1 { font-size: 1.9rem; letter-spacing: -.015em; }
h2 { margin-top: 3.2rem; padding: 1rem 0 .3rem; border-top: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin-top: 1.8rem; font-size: 1rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--accent); text-decoration: none; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: 1rem; font-size: .9rem; }
figure { margin: 1.1rem 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .4rem; max-width: 46rem; font-size: .85rem; line-height: 1.45; color: var(--soft); }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 0 2rem; }
.scroll { overflow-x: auto; }
.wide img { min-width: 54rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.strip div { font-size: .75rem; line-height: 1.3; color: var(--soft); }
.strip img { display: block; width: 100%; aspect-ratio: 4 / 3; object-fit: cover; border-radius: 3px; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .87rem; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; white-space: nowrap; vertical-align: bottom; color: var(--soft); }
th, td { padding: .28rem 1.1rem .28rem 0; vertical-align: top; }
tbody td { border-top: 1px solid var(--line); }
.n { text-align: right; white-space: nowrap; }
td:not(.n) { min-width: 6rem; }
@media print {
  nav { display: none; }
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  h2 { margin-top: 1.6rem; }
  h2, h3 { break-after: avoid; }
  figure, .strip div, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  .wide img { min-width: 0; }
  .row { grid-template-columns: 1fr 1fr; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def text(value: object) -> str:
    """`value` as HTML text, fit for attributes too; control characters and halves of surrogates become U+FFFD."""
    letters = (c if c.isprintable() or c in " \n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return escape("".join(letters), quote=True)


def page(title: str, content: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole page; a section is (id, heading, body)."""
    links = "".join(f'<a href="#{name}">{text(heading)}</a>\n' for name, heading, _ in sections)
    bodies = "".join(
        f'<section id="{name}"><h2>{text(heading)}</h2>\n{body}</section>\n' for name, heading, body in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{text(title)}</title>
<style>{STYLE}</style></head>
<body><header><h1>{text(title)}</h1>
{content}<nav>{links}</nav></header>
<main>{bodies}</main></body></html>
"""


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>\n"


def heading(words: str) -> str:
    return f"<h3>{text(words)}</h3>\n"


def items(lines: Iterable[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{text(line)}</li>\n" for line in lines) + "</ul>\n"


def figure(picture: bytes, shows: str, caption: str = "", *, wide: bool = False) -> str:
    """A picture over its caption; `shows` is for those who cannot see it, `wide` lets a phone push it sideways."""
    content = image(picture, shows)
    if wide:
        content = f'<div class="scroll wide" tabindex="0" role="group" aria-label="{text(shows)}">{content}</div>'
    return f"<figure>{content}" + (f"<figcaption>{text(caption)}</figcaption>" if caption else "") + "</figure>\n"


def image(picture: bytes, shows: str) -> str:
    """An SVG or a JPEG as a part of the page."""
    kind = "jpeg" if picture.startswith(b"\xff\xd8") else "svg+xml"
    return f'<img alt="{text(shows)}" src="data:image/{kind};base64,{base64.b64encode(picture).decode()}">'


def side_by_side(contents: Iterable[str]) -> str:
    """Figures beside each other where there is room."""
    return f'<div class="row">{"".join(contents)}</div>\n'


def strip(pictures: Iterable[tuple[bytes, str, str]]) -> str:
    """Small pictures: JPEG, what it shows, the words below."""
    boxes = (f"<div>{image(data, shows)}{text(words)}</div>\n" for data, shows, words in pictures)
    return f'<div class="strip">{"".join(boxes)}</div>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    """A table of text; columns `numbers` are set to the right."""

    def cells(kind: str, values: Sequence[object]) -> str:
        right = (' class="n"' if at in numbers else "" for at in range(len(values)))
        return "".join(f"<{kind}{n}>{text(value)}</{kind}>" for n, value in zip(right, values, strict=True))

    body = "".join(f"<tr>{cells('td', values)}</tr>\n" for values in rows)
    whole = f"<table><thead><tr>{cells('th', head)}</tr></thead>\n<tbody>{body}</tbody></table>"
    label = text(", ".join(filter(None, head)))
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{whole}</div>\n'
