"""Quickstart and tutorials: their form, what they promise in lines, and their conversion into notebooks.

That they run, and that what they teach holds, is seen when the documentation is built, which executes them.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [DOCS / "quickstart.py", *sorted((DOCS / "tutorials").glob("*.py"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.fixture(scope="module")
def notebooks():
    """The script that makes notebooks, as a module."""
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "scripts" / "make_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells_of(page: Path, kind: str) -> list[str]:
    """Sources of a page's cells of a kind."""
    return [cell.source for cell in jupytext.read(page, fmt="py:percent").cells if cell.cell_type == kind]


def lines_of(code: str) -> int:
    """Lines that are not blank."""
    return sum(1 for line in code.splitlines() if line.strip())


def declared_extras() -> set[str]:
    """Names of the extras in setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            return {key.value for key in node.value.keys}
    raise AssertionError("setup.py has no extras_require")


# ------------------------------------------------------------------------------------------------------------ form


@each_page
def test_a_page_begins_with_a_title_and_ends_with_what_it_taught(page):
    assert page.read_text(encoding="utf-8").startswith("# ---\n# jupyter:\n")
    assert cells_of(page, "markdown")[0].startswith("# ")
    last = ast.parse(cells_of(page, "code")[-1])
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(last)) >= 2, "the last cell asserts what was taught"


@each_page
def test_a_page_is_in_the_index(page):
    name = page.relative_to(DOCS).with_suffix("").as_posix()
    assert re.search(rf"^{name}$", (DOCS / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_quickstart_begins_with_ten_lines():
    first = cells_of(DOCS / "quickstart.py", "code")[0]
    assert lines_of(first) <= 10
    calls = {
        node.func.attr
        for node in ast.walk(ast.parse(first))
        if isinstance(node, ast.Call) and hasattr(node.func, "attr")
    }
    assert {"fit", "predict", "evaluate"} <= calls


def test_own_backbone_and_objective_take_60_lines():
    code = (DOCS / "tutorials" / "own_backbone.py").read_text(encoding="utf-8")
    written = {"AtomHead", "LittleNet", "CleanForces"}
    classes = [n for n in ast.parse(code).body if isinstance(n, ast.ClassDef) and n.name in written]
    assert {node.name for node in classes} == written
    assert sum(lines_of(ast.get_source_segment(code, node)) for node in classes) <= 60


# ------------------------------------------------------------------------------------------------------- notebooks


@each_page
def test_a_page_becomes_a_valid_notebook(page, notebooks):
    nbformat = pytest.importorskip("nbformat")
    text = notebooks.notebook_of(page)
    assert text == notebooks.notebook_of(page), "nothing in it is drawn at random"
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code[1:]] == cells_of(page, "code")
    assert not any(cell.outputs for cell in code), "no outputs that could be old"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            targets = re.findall(r"\]\(([^)]*)\)", cell.source)
            assert all(target.startswith("http") for target in targets), "a notebook stands alone"


@each_page
def test_the_first_cell_says_how_to_install(page, notebooks):
    first = json.loads(notebooks.notebook_of(page))["cells"][0]
    command = "".join(first["source"]).splitlines()[-1]
    found = re.fullmatch(r'%pip install -q "ndem_zoo(?:\[([\w,]+)\])?"', command)
    assert found, command
    extras = set((found[1] or "").split(",")) - {""}
    assert extras <= declared_extras()
    code = "\n".join(cells_of(page, "code"))
    is_about_deepchem = re.search(r"^\s*(?:from|import) .*\bdeepchem\b", code, flags=re.MULTILINE)
    assert is_about_deepchem or "deepchem" not in extras, "Colab has no DeepChem"


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("quickstart", {"plots", "dgl"}),
        ("off_equilibrium", {"plots", "chem"}),
        ("qm9", {"dgl", "chem"}),
        ("oc20", {"oc20"}),
    ],
)
def test_extras_are_those_that_a_page_uses(name, extras, notebooks):
    (page,) = (page for page in PAGES if page.stem == name)
    assert set(notebooks.extras_of(page.read_text(encoding="utf-8"))) == extras


def test_words_of_code_that_name_extras(notebooks):
    assert notebooks.extras_of("from ndem_zoo import deepchem") == ["deepchem"]
    assert notebooks.extras_of("import ndem_zoo.deepchem as dc") == ["deepchem"]
    assert notebooks.extras_of("from ndem_zoo import NDeMPaiNN\nfrom rdkit import Chem") == ["chem", "schnetpack"]
    assert notebooks.extras_of("import numpy") == []
    assert set(notebooks.USES) <= declared_extras()


def test_other_sources_and_old_python(notebooks):
    cell = notebooks.install_cell("import deepchem", "git+https://example.org/ndem_zoo")
    assert '%pip install -q "ndem_zoo[deepchem] @ git+https://example.org/ndem_zoo"' in cell
    assert "no DeepChem for Python 3.12" in cell


def test_links_become_paths(notebooks):
    text = "[NDeM](../theory/ndem.md#the-key-identity), [here](#there), [far](https://example.org/x)"
    assert notebooks.without_links(text, DOCS / "tutorials") == (
        "NDeM (`docs/theory/ndem.md`), here, [far](https://example.org/x)"
    )


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_the_script_writes_files(tmp_path, notebooks):
    notebooks.main([str(DOCS / "quickstart.py"), "--out", str(tmp_path / "new")])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["quickstart.ipynb"]
    assert json.loads((tmp_path / "new" / "quickstart.ipynb").read_text(encoding="utf-8"))["nbformat"] == 4
