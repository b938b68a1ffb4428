"""The page: one HTML file with its style and pictures inside, which asks for nothing from any network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #fff; --card: #f6f8fa; --rule: #d0d7de;
  --bar: #0072b2; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b3; --paper: #0d1117; --card: #161b22;
  --rule: #30363d; --bar: #56b4e9; --c0: #56b4e9; --c1: #ff9248; --c2: #3ecfa4; --c3: #e3a1c4; --c4: #f0b93a;
  --c5: #9ad1f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 16px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
section { break-inside: avoid-page; } p { margin: .4rem 0; } .soft, .empty, caption { color: var(--soft); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: 12px; min-width: 0; }
.card h3 { font-size: 1rem; margin: 0 0 .4rem; }
svg { width: 100%; max-width: 640px; height: auto; display: block; }
svg.key { display: inline-block; width: 28px; height: 8px; margin-right: 6px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.tick { fill: var(--soft); } .end, .name { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--rule); } .mark { stroke: var(--soft); stroke-dasharray: 3 3; } .bar { fill: var(--bar); }
.line { fill: none; stroke-width: 2; } .dot { fill: var(--card); stroke-width: 2; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.legend span { display: inline-block; margin-right: 16px; font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--rule); }
th[scope=row] { text-align: left; }
caption { text-align: left; padding: 4px 0; } .matrix td { background: color-mix(in srgb, var(--bar)
  calc(var(--share) * 55%), transparent); }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 8px; }
.views figure { margin: 0; } .views figcaption { font-size: .85rem; color: var(--soft); }
.first { margin: .8rem 0; font-weight: 600; } nav a { margin-right: 14px; white-space: nowrap; }
a { color: var(--bar); }
ol.findings { padding-left: 1.4rem; } ol.findings li { margin: .8rem 0; } .gain { font-weight: 600; }
.area { display: inline-block; border: 1px solid var(--rule); border-radius: 4px; padding: 0 6px; font-size: .8rem; }
img { max-width: 100%; height: auto; border-radius: 4px; } pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 500px) { th, td { padding: 3px 5px; } }
@media print { .card, figure, .views { break-inside: avoid; } h2, h3 { break-after: avoid; }
  body { max-width: none; } .card { border-color: #999; } pre { white-space: pre-wrap; } }
"""


class Section(NamedTuple):
    """A part of the page: a heading and HTML, whose texts are already escaped."""

    title: str
    body: str


def render(title: str, subtitle: str, sections: Iterable[Section], *, first: str = "") -> str:
    """The whole file.

    Args:
        title, subtitle: of the page.
        sections: in order.
        first: what the last section says, in one sentence, shown at the top with a link; empty: nothing.
    """
    sections = list(sections)
    links = "".join(f'<a href="#{_anchor(part.title)}">{escape(part.title)}</a> ' for part in sections)
    parts = "".join(
        f'<section id="{_anchor(part.title)}"><h2>{escape(part.title)}</h2>{part.body}</section>\n' for part in sections
    )
    if first:
        first = f'<p class="first"><a href="#{_anchor(sections[-1].title)}">{escape(first)}</a></p>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>\n'
        f"{first}<nav>{links}</nav>\n{parts}</body></html>\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def cards(entries: Iterable[tuple[str, str]]) -> str:
    """Boxes side by side where there is room: (heading, HTML)."""
    boxes = "".join(f'<div class="card"><h3>{escape(title)}</h3>{body}</div>' for title, body in entries)
    return f'<div class="columns">{boxes}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> str:
    """A table of texts; the first of each row is its heading."""
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(text)}</td>" for text in row[1:])}</tr>'
        for row in rows
    )
    note = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{note}<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def picture(image: Image.Image, text: str, *, longest: int = 640, quality: int = 80) -> str:
    """An image inside the page, as JPEG of at most `longest` pixels; `text` says what it shows."""
    small = image.convert("RGB")
    small.thumbnail((longest, longest))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=quality)
    coded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{escape(text)}" src="data:image/jpeg;base64,{coded}">'


def views(entries: Iterable[tuple[str, Image.Image]], text: str) -> str:
    """Pictures of one image side by side where there is room: (title, picture); `text` says what they show."""
    figures = "".join(
        f"<figure>{picture(image, f'{title} of {text}')}<figcaption>{escape(title)}</figcaption></figure>"
        for title, image in entries
    )
    return f'<div class="views">{figures}</div>'


def paragraph(text: str, kind: str = "") -> str:
    """Text between blank lines."""
    return f"<p{f' class={kind!r}' if kind else ''}>{escape(text)}</p>"
