"""A page as a list of blocks, and two ways to write it: as Markdown with figures beside it, or as one HTML file.

The HTML holds everything that it shows (figures are in it as data), runs no script and loads nothing: its own content
security policy forbids both. It follows the reader's choice of light or dark colors. What a page says is decided by the
callers.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ndem_zoo._version import __version__


@dataclass(frozen=True)
class Heading:
    """Title of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of (what, text)."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is."""

    text: str


@dataclass(frozen=True)
class Table:
    """Numbers, with a name for each row in the first column.

    Attributes
    ----------
    head
        One text for each column.
    rows
        Each as long as `head`.
    caption
        What the table shows; in HTML only.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes
    ----------
    name
        Of the PNG file beside a Markdown page, without ending.
    alt
        For those who do not see it: what is drawn, and what it shows in numbers.
    caption
        Below it.
    light, dark
        Content of PNG files for light and dark pages; without `dark` the light one stands for both.
    """

    name: str
    alt: str
    caption: str
    light: bytes
    dark: bytes | None = None


Block = Heading | Paragraph | Items | Code | Table | Figure


# -------------------------------------------------------------------------------------------------------------- markdown


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown; figures are links to ``<name>.png`` beside it."""
    return "\n\n".join([f"# {title}", *(_markdown(block) for block in blocks)]) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Items):
        return "\n".join(f"- **{what}**: {text}" for what, text in block.items)
    if isinstance(block, Code):
        return f"```\n{block.text}\n```"
    if isinstance(block, Figure):
        return f"![{block.name}]({block.name}.png)\n\n{block.caption}"
    lines = [_markdown_row(block.head), "|---|" + "---:|" * (len(block.head) - 1)]
    return "\n".join(lines + [_markdown_row(row) for row in block.rows])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_figures(blocks: Sequence[Block], folder: Path) -> None:
    """The PNG files that a Markdown page shows."""
    from ndem_zoo.checkpoint import write_bytes

    for block in blocks:
        if isinstance(block, Figure):
            write_bytes(folder / f"{block.name}.png", block.light)


# ------------------------------------------------------------------------------------------------------------------ html

#: Nothing may be loaded or run, whatever a page says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

#: Colors are those of `plots.DARK_GROUND` and `plots.DARK_TEXT` in the dark, where figures have no edge then.
_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1d1f23; --dim: #565b63; --line: #d9dce1; --head: #f2f3f5; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #1b1d21; --text: #e4e6ea; --dim: #a6abb4; --line: #3d4149; --head: #26292f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--dim); padding-bottom: .3rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; font-weight: 500; }
thead th { background: var(--head); font-weight: 600; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption, footer { color: var(--dim); font-size: .92rem; }
pre { background: var(--head); padding: .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file that needs nothing else."""
    body = "\n".join(_html(block) for block in blocks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
{body}
<footer><p>Written by ndem_zoo {html.escape(__version__)}.</p></footer>
</main>
</body>
</html>
"""


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html.escape(block.text)}</h2>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Items):
        lines = [f"<li><strong>{html.escape(what)}</strong>: {html.escape(text)}</li>" for what, text in block.items]
        return "<ul>\n" + "\n".join(lines) + "\n</ul>"
    if isinstance(block, Code):
        return f"<pre><code>{html.escape(block.text)}</code></pre>"
    return _html_figure(block) if isinstance(block, Figure) else _html_table(block)


def _html_table(table: Table) -> str:
    """A table that scrolls by itself where it is too wide, also by keyboard."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.head)
    rows = []
    for name, *cells in table.rows:
        numbers = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{numbers}</tr>')
    caption = html.escape(table.caption)
    return (
        f'<div class="wide" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _html_figure(figure: Figure) -> str:
    """The picture itself, and another one for dark pages."""
    image = f'<img src="{_data(figure.light)}" alt="{html.escape(figure.alt)}">'
    if figure.dark is not None:
        dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(figure.dark)}">'
        image = f"<picture>{dark}{image}</picture>"
    return f"<figure>{image}<figcaption>{html.escape(figure.caption)}</figcaption></figure>"


def _data(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
