"""Turn the quickstart and the tutorials into Jupyter notebooks, for Colab and the like.

    pip install 'ndem_zoo[docs]'
    python scripts/make_notebooks.py                       # all pages, into notebooks/
    python scripts/make_notebooks.py docs/quickstart.py --out here --source git+https://host/you/ndem_zoo

The first cell of each notebook installs the package with the extras that the page uses; DeepChem is among them only where
the page is about DeepChem. Links to other pages become their paths in the repository. Notebooks hold no outputs: the pages
are executed when the documentation is built.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from pathlib import Path

from ndem_zoo.checkpoint import write_text
from ndem_zoo.optional import require

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

#: Extra of setup.py -> modules, imported names and attributes whose use says that a page needs it.
USES: dict[str, frozenset[str]] = {
    "plots": frozenset({"matplotlib", "ndem_zoo.plots"}),
    "dgl": frozenset({"dgl", "graph", "graphs", "RadiusGraph", "ConformerGraph"}),
    "chem": frozenset({"rdkit", "ConformerGraph"}),
    "deepchem": frozenset({"deepchem", "ndem_zoo.deepchem"}),
    "schnetpack": frozenset({"schnetpack", "ndem_zoo.schnetpack", "NDeMPaiNN", "SchNetPackBackbone"}),
    "oc20": frozenset({"load_oc20"}),
    "cli": frozenset({"typer", "ndem_zoo.cli", "ndem_zoo.commands"}),
    "xtb": frozenset({"tblite"}),
}

_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:)([^)#\s]*)(?:#[^)\s]*)?\)")


def pages() -> list[Path]:
    """The quickstart, and the tutorials by name."""
    return [DOCS / "quickstart.py", *sorted((DOCS / "tutorials").glob("*.py"))]


def words_of(code: str) -> set[str]:
    """Modules with their parents, imported names and attributes in Python code."""
    words: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            words.update(alias.name for alias in node.names)
        else:
            modules = []
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
        for module in modules:
            parts = module.split(".")
            words.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return words


def extras_of(code: str) -> list[str]:
    """Extras of the package that a page's code needs, in the order of `USES`."""
    words = words_of(code)
    return [extra for extra, uses in USES.items() if uses & words]


def install_cell(code: str, source: str) -> str:
    """Text of the first cell: how to install what the page needs, and what it cannot install."""
    extras = extras_of(code)
    wanted = f"ndem_zoo[{','.join(extras)}]" if extras else "ndem_zoo"
    lines = ["# Install the package with what this page uses. On your own machine you may have done so already."]
    if "deepchem" in extras:
        lines.append("# There is no DeepChem for Python 3.12 and later: this page needs an older kernel.")
    if "NDEM_ZOO_SHARED_DATA" in code:
        lines.append("# Genuine data are looked for in the folder that the variable NDEM_ZOO_SHARED_DATA names.")
    return "\n".join([*lines, f'%pip install -q "{wanted if source == "ndem_zoo" else f"{wanted} @ {source}"}"'])


def without_links(text: str, folder: Path) -> str:
    """Markdown in which links to other pages are their paths in the repository; `folder` is that of the page."""

    def path_of(link: re.Match) -> str:
        if not link[2]:  # to a heading of the same page
            return link[1]
        target = Path(os.path.normpath(folder / link[2]))
        return f"{link[1]} (`{target.relative_to(ROOT).as_posix()}`)"

    return _LINK.sub(path_of, text)


def notebook_of(page: Path, source: str = "ndem_zoo") -> str:
    """A page as the text of a notebook.

    Parameters
    ----------
    page
        A py:percent script.
    source
        What pip installs: the name of the package, or a URL for it.
    """
    jupytext = require("jupytext", extra="docs")
    code = page.read_text(encoding="utf-8")
    notebook = jupytext.reads(code, fmt="py:percent")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = without_links(cell.source, page.parent)
    first = require("nbformat", extra="docs").v4.new_code_cell(install_cell(code, source))
    first.id = "install"  # drawn at random otherwise, and the file would differ each time
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.cells.insert(0, first)
    return jupytext.writes(notebook, fmt="ipynb")


def main(arguments: list[str] | None = None) -> None:
    """Write the notebooks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "page", nargs="*", type=Path, help="py:percent scripts; default: the quickstart and all tutorials"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "notebooks", help="folder (default: notebooks)")
    parser.add_argument("--source", default="ndem_zoo", help="what pip installs: the package's name or a URL")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for page in options.page or pages():
        path = options.out / f"{page.stem}.ipynb"
        write_text(path, notebook_of(page.resolve(), options.source))
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
