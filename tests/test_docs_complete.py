"""Nothing is missing from the documentation: docstrings with shapes and units, pages, terms, a search box."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ndem_zoo

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))

#: Modules that cannot be imported without an optional package.
OPTIONAL = ("ndem_zoo.deepchem", "ndem_zoo.schnetpack", "ndem_zoo.cli", "ndem_zoo.commands", "ndem_zoo.metatomic")
#: Hand-written derivatives, for nobody to call: what their tensors are is said at the top of the module.
INTERNAL = ("ndem_zoo.fused", "ndem_zoo.models.equiformer_v2.passes", "ndem_zoo.models.equiformer_v2.products")

_ARRAY = re.compile(r"\b(ndarray|Tensor)\b")
_TYPED = re.compile(r"\b(Float|Int|Bool|Integer|Num|Shaped)\[")
_MANY = re.compile(r"^(Mapping|dict|Sequence|list|Iterable|Iterator|NamedTuple)\b")
#: (N, 3), (S,), (n_train,), (S, (L + 1)², C); or words where there is nothing more to say.
_SHAPE = re.compile(r"\((?:[A-Za-z]\w*|\d+|\.\.\.)(?: ?[-+*] ?\w+)*,[^()]*\)|scalar|any shape")
#: Units that a docstring must name, by the parameter.
_UNITS = {
    "cutoff": "Å",
    "skin": "Å",
    "sigma": "Å",
    "temperature": "K",
    "timestep": "fs",
    "pos": "Å",
    "positions": "Å",
}


# ---------------------------------------------------------------------------------------------------------- docstrings


def modules() -> Iterator[Any]:
    """Every public module that can be imported here."""
    for found in pkgutil.walk_packages(ndem_zoo.__path__, "ndem_zoo."):
        if any(part.startswith("_") for part in found.name.split(".")):
            continue
        try:
            yield importlib.import_module(found.name)
        except ImportError:
            if not found.name.startswith(OPTIONAL):
                raise


def documented(owner: type, name: str) -> str:
    """Docstrings of a method, here and in the base classes that declare it."""
    found = (inspect.getdoc(base.__dict__[name]) for base in owner.__mro__ if name in base.__dict__)
    return "\n".join(text for text in found if text)


def public_objects() -> Iterator[tuple[str, Any, str]]:
    """Name, object and docstring of every public function, class and method of the package."""
    for module in modules():
        for name, item in vars(module).items():
            where = f"{module.__name__}.{name}"
            if name.startswith("_") or getattr(item, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(item):
                yield where, item, inspect.getdoc(item) or ""
            elif inspect.isclass(item):
                yield where, item, "\n".join(base.__doc__ or "" for base in item.__mro__ if base is not object)
                for key, member in vars(item).items():
                    plain = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                    if not key.startswith("_") and inspect.isfunction(plain):
                        yield f"{where}.{key}", plain, documented(item, key)


@pytest.fixture(scope="module")
def api() -> list[tuple[str, Any, str]]:
    found = list(public_objects())
    assert len(found) > 600
    return found


def annotations(item: Any) -> dict[str, str]:
    """Annotations of parameters and of what is returned, as text."""
    try:
        signature = inspect.signature(item)
    except (TypeError, ValueError):
        return {}
    found = {name: str(parameter.annotation) for name, parameter in signature.parameters.items()}
    return found | {"return": str(signature.return_annotation)}


def test_everything_public_has_a_docstring(api):
    own = [name for name, item, _ in api if not inspect.isclass(item) or item.__doc__]
    missing = [name for name, item, text in api if not text.strip() or (inspect.isclass(item) and name not in own)]
    assert not missing, missing


def test_every_array_has_a_shape(api):
    """By jaxtyping in the signature, or in the docstring; containers of arrays say what is in them."""
    missing = [
        f"{name}: {parameter}"
        for name, item, text in api
        if not name.startswith(INTERNAL)
        for parameter, annotation in annotations(item).items()
        if _ARRAY.search(annotation) and not _TYPED.search(annotation) and not _MANY.match(annotation)
        if not _SHAPE.search(text)
    ]
    assert not missing, missing


def test_every_length_time_and_temperature_has_a_unit(api):
    missing = [
        f"{name}: {parameter} in {unit}"
        for name, item, text in api
        if not name.startswith((*INTERNAL, "ndem_zoo.commands"))  # whose options say it in their help
        for parameter, unit in _UNITS.items()
        if parameter in annotations(item) and not re.search(rf"(?<!\w){unit}(?!\w)", text)
    ]
    assert not missing, missing


def test_every_parameter_of_a_public_name_is_explained():
    """Of the names that `ndem_zoo` itself offers."""
    missing = []
    for name in ndem_zoo.__all__:
        item = getattr(ndem_zoo, name)
        if not callable(item):
            continue
        bases = item.__mro__ if inspect.isclass(item) else (item,)
        text = "\n".join(inspect.getdoc(base) or "" for base in bases)
        missing += [
            f"{name}: {key}" for key in inspect.signature(item).parameters if not re.search(rf"\b{key}\b", text)
        ]
    assert not missing, missing


def test_shapes_are_recognized():
    assert all(_SHAPE.search(text) for text in ("of (N, 3)", "`x` (S,) in eV", "(S + 1,)", "any shape", "a scalar"))
    assert not any(_SHAPE.search(text) for text in ("", "a (long) list", "f(x)", "see (3)", "of the atoms (and so on)"))


# --------------------------------------------------------------------------------------------------------------- pages


def cells_of(page: Path) -> list[str]:
    """The code cells of a py:percent script."""
    parts = re.split(r"(?m)^# %%", page.read_text(encoding="utf-8"))[1:]
    return [part.split("\n", 1)[1] for part in parts if not part.startswith(" [markdown]")]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials_check_what_they_taught(page):
    """Header for Jupyter, a place in the index, an `assert` in the last cell, and names that exist."""
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ---\n# jupyter:\n#   kernelspec: {name: python3, display_name: Python 3}\n# ---\n# %%")
    assert f"\ntutorials/{page.stem}\n" in (DOCS / "index.md").read_text(encoding="utf-8")
    last = ast.parse(cells_of(page)[-1])
    assert any(isinstance(node, ast.Assert) for node in ast.walk(last))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("ndem_zoo"):
            if node.module.startswith(OPTIONAL):
                pytest.importorskip(node.module.split(".")[1])
            for name in node.names:
                assert hasattr(importlib.import_module(node.module), name.name), f"{node.module}.{name.name}"


def test_twenty_questions_are_answered():
    text = (DOCS / "how-do-i.md").read_text(encoding="utf-8")
    answers = re.split(r"(?m)^### … .*\?$", text)[1:]
    assert len(answers) == 20
    assert all("](" in answer or "```python" in answer or "`" in answer for answer in answers)
    for target in re.findall(r"\]\(((?!http)[\w./-]+\.(?:md|py))", text):
        assert (DOCS / target).is_file(), target


def terms() -> list[str]:
    """Terms of the glossary: lines at the margin inside its directives."""
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```\{glossary\}\n(.*?)^```$", text)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith(" ")]


def test_glossary_has_the_words_of_the_code():
    """Objectives and parts of a model, and what the table of names in conventions.md explains beside fields of `Batch`."""
    from ndem_zoo.graph import Batch
    from ndem_zoo.registry import OBJECTIVES

    found = terms()
    assert len(found) == len(set(found)) > 50
    plain = {re.sub(r"\W|_", "", term).lower() for term in found}
    needed = {name.replace("_", "") for name in OBJECTIVES if name != "supervised"}
    assert needed | {"backbone", "head", "potential", "objective", "referenceenergies", "curvature"} <= plain
    table = (DOCS / "conventions.md").read_text(encoding="utf-8").split("## Names")[1].split("## Graphs")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ") and not row.startswith("| here")]
    fields = {field.name for field in dataclasses.fields(Batch)} | {"vectors"}
    names = {name for row in rows for name in re.findall(r"`(\w+)", row)} - fields
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    assert {"epsilon", "sigma", "mask", "ratio", "weight", "scale"} <= names
    for name in names:
        assert re.search(rf"\b{name}\b", text, flags=re.IGNORECASE), f"{name} is not in the glossary"


def test_site_has_a_search_box(tmp_path):
    """A page built with the site's theme and side bar: it has the box, and its words are in the index."""
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("docs_conf_search", DOCS / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    before, environment = list(sys.path), dict(os.environ)
    try:
        spec.loader.exec_module(conf)
    finally:
        sys.path[:] = before
        os.environ.clear()
        os.environ.update(environment)
    pytest.importorskip(conf.html_theme)
    kept = {
        key: value for key, value in vars(conf).items() if key in ("html_theme", "html_sidebars", "html_theme_options")
    }
    lines = [f"{key} = {value!r}" for key, value in kept.items()]
    (tmp_path / "conf.py").write_text("\n".join(["extensions = ['myst_parser']", *lines]), encoding="utf-8")
    (tmp_path / "index.md").write_text("# Page\n\nThe word quokka.\n", encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(tmp_path), str(tmp_path / "html")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    page = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    assert re.search(r'<form[^>]*action="search.html"', page)
    assert "quokka" in (tmp_path / "html" / "searchindex.js").read_text(encoding="utf-8")
