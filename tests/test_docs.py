"""The documentation tells the truth: its code runs, its commands exist, its tables of defaults are the code's."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if not {"generated", "_build"} & set(p.parts))]

_FENCE = re.compile(r"^```(\S*)")
_NO_RUN = re.compile(r"^<!-- no-run: (.+) -->$")


class Block(NamedTuple):
    """A fenced block of a page: its language, first line (from 1), text, and why it is not run."""

    language: str
    line: int
    text: str
    no_run: str | None


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks with a language; directives in braces are Sphinx's business."""
    blocks, language, start, previous = [], None, 0, ""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        fence = _FENCE.match(line)
        if language is None and fence:
            language, start = fence[1], number + 1
            reason = _NO_RUN.match(previous)
        elif language is not None and line.rstrip() == "```":
            text = "\n".join(lines[start - 1 : number - 1])
            blocks.append(Block(language, start, text, reason[1] if reason else None))
            language = None
            previous = ""
            continue
        if line.strip():
            previous = line.strip()
    assert language is None, f"{page}: the block that begins at line {start - 1} is not closed"
    return blocks


def script_of(page: Path) -> str:
    """The Python blocks of a page as one script, every line where it is in the page, so that tracebacks are right."""
    lines = [""] * len(page.read_text(encoding="utf-8").splitlines())
    for block in blocks_of(page):
        if block.language == "python" and block.no_run is None:
            text = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(text)] = text
    return "\n".join(lines)


def with_language(language: str, run: bool) -> list[Any]:
    """Parameters (page, block) for the blocks of a language that are, or are not, to be run."""
    return [
        pytest.param(page, block, id=f"{page.relative_to(ROOT)}:{block.line}")
        for page in PAGES
        for block in blocks_of(page)
        if block.language == language and (block.no_run is None) == run
    ]


#: Pages about an optional package: skipped where it is not installed.
NEEDS = {"schnetpack.md": "schnetpack"}


def skip_without_its_package(page: Path) -> None:
    """Skip the page where the package that it is about is missing."""
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])


RUNNABLE = [page for page in PAGES if any(b.language == "python" and b.no_run is None for b in blocks_of(page))]


def test_there_is_something_to_run():
    assert ROOT / "README.md" in RUNNABLE
    assert len(RUNNABLE) >= 9


@pytest.mark.dgl
@pytest.mark.filterwarnings("error::ndem_zoo.errors.DataWarning")
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch, dgl):
    skip_without_its_package(page)
    monkeypatch.chdir(tmp_path)
    if "import deepchem" in script_of(page):
        pytest.importorskip("deepchem")
    exec(compile(script_of(page), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("page", "block"), with_language("python", run=False))
def test_python_blocks_that_are_not_run_fit_the_code(page, block):
    """They compile, what they import exists, and calls of what they import use keywords that exist."""
    if "ndem_zoo.deepchem" in block.text:
        pytest.importorskip("deepchem")
    skip_without_its_package(page)
    tree = ast.parse(block.text)
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                imported[name.asname or name.name] = getattr(importlib.import_module(node.module), name.name)
    assert imported, "a block that is not run must at least import what it shows"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            keywords = {k.arg: None for k in node.keywords if k.arg}
            inspect.signature(imported[node.func.id]).bind_partial(*node.args, **keywords)


@pytest.mark.slow
@pytest.mark.dgl
def test_quickstart_runs_as_a_script(tmp_path, dgl):
    pytest.importorskip("matplotlib")
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, str(DOCS / "quickstart.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "kcal/mol/Å" in done.stdout
    assert "Traceback" not in done.stderr


def commands_of(block: Block) -> list[list[str]]:
    """Words of the commands in a console block."""
    return [shlex.split(line[2:]) for line in block.text.splitlines() if line.startswith("$ ")]


CONSOLE = with_language("console", run=True) + with_language("console", run=False)


@pytest.mark.parametrize(("page", "block"), CONSOLE)
def test_commands_exist(page, block):
    """Options of ``ndem-zoo`` are parsed, not run; targets of ``make`` are in the Makefile; scripts exist."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for words in commands_of(block):
        if words[0] == "make":
            assert set(words[1:]) <= targets
        elif words[0] == "ndem-zoo":
            pytest.importorskip("typer")
            import typer

            from ndem_zoo.commands import app

            command = typer.main.get_command(app).commands[words[1]]
            command.make_context(words[1], words[2:])
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[:2] == ["pip", "install"]


def test_targets_of_make_in_prose_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in PAGES:
        for words in re.findall(r"`make ([a-z0-9 -]+)`", page.read_text(encoding="utf-8")):
            assert set(words.split()) <= targets, page


@pytest.mark.slow
def test_command_line_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer")
    from ndem_zoo.cli import run

    monkeypatch.chdir(tmp_path)
    commands = [
        words
        for block in blocks_of(DOCS / "how-to" / "command-line.md")
        if block.language == "console" and block.no_run is None
        for words in commands_of(block)
    ]
    assert [words[1] for words in commands] == ["train", "evaluate", "predict", "md", "info", "report", "bench"]
    for words in commands:
        assert run(words[1:]) == 0, (words, capsys.readouterr().err)
    for file in ("metrics.json", "split.json", "history.csv", "predictions.npz", "model/config.json"):
        assert (tmp_path / "runs" / "first" / file).is_file()


def test_exit_codes_are_those_of_the_code():
    from ndem_zoo import cli

    text = (DOCS / "how-to" / "command-line.md").read_text(encoding="utf-8")
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    assert documented == {cli.OK, cli.UNEXPECTED, cli.USAGE, cli.DATA, cli.INTERRUPTED}


# ------------------------------------------------------------------------------------------------- tables and the code


def open_choices() -> list[tuple[str, str, str]]:
    """Rows (where, option, default) of the table of what the paper leaves open."""
    text = (DOCS / "theory" / "ndem.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\| (\w+) \| `(\w+)` \| `([^`]*)` \|", text, flags=re.MULTILINE)
    assert len(rows) >= 20
    return rows


def test_documented_defaults_are_those_of_the_code():
    from ndem_zoo.models.torchmd_net import TorchMDNet
    from ndem_zoo.objectives.ndem import NDeMOptions
    from ndem_zoo.presets import preset_values

    preset = preset_values(None)
    for where, option, default in open_choices():
        if where == "objective":
            value = getattr(NDeMOptions(), option)
            value = preset["objectives"]["ndem"].get(option, value)
        elif where == "backbone":
            value = inspect.signature(TorchMDNet).parameters[option].default
        else:
            value = preset[option]
        assert repr(value) == default, f"{option}: the page says {default}, the code {value!r}"


def test_every_option_of_ndem_is_in_the_table():
    from ndem_zoo.objectives.ndem import NDeMOptions

    documented = {option for where, option, _ in open_choices() if where == "objective"}
    assert documented == {field.name for field in dataclasses.fields(NDeMOptions)}


def test_names_of_the_glossary_exist():
    """Fields of a graph, and of a Batch, as conventions.md names them."""
    from ndem_zoo.graph import Batch

    text = (DOCS / "conventions.md").read_text(encoding="utf-8")
    fields = {field.name for field in dataclasses.fields(Batch)}
    assert {"z", "pos", "cell", "system", "src", "dst"} <= fields
    for name in re.findall(r'`ndata\["(\w+)"\]`', text):
        assert name in {"Z", "R", "F", "fixed", "energy", "cell", "pbc"}


@pytest.mark.dgl
def test_graph_fields_are_the_documented_ones(dgl):
    from ase.build import bulk
    from ase.constraints import FixAtoms

    from ndem_zoo import MolecularDataset, RadiusGraph, load_sample

    text = (DOCS / "conventions.md").read_text(encoding="utf-8")
    documented = set(re.findall(r'`ndata\["(\w+)"\]`', text))
    _, (train, _, _), _ = load_sample("ethanol")
    atoms = bulk("Cu")
    atoms.set_constraint(FixAtoms([0]))
    crystal = RadiusGraph(3.0)(atoms)
    assert set(train.graph(0).ndata) | set(crystal.ndata) == documented
    assert set(crystal.edata) == set(re.findall(r'`edata\["(\w+)"\]`', text))
    assert isinstance(train, MolecularDataset)


def test_every_objective_and_preset_is_documented():
    from ndem_zoo.registry import OBJECTIVES

    text = (DOCS / "theory" / "objectives.md").read_text(encoding="utf-8")
    for name in OBJECTIVES:
        assert f'`"{name}"`' in text


def test_paths_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:docs|constraints)/[\w./-]+)`", text) + re.findall(r"constraints/[\w.-]+\.txt", text):
        if "_build" not in path:
            assert (ROOT / path).exists(), path


def test_pages_made_from_the_code(monkeypatch, tmp_path):
    """The benchmark's tables are included where they are, and a sentence stands in where they are not."""
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    spec.loader.exec_module(conf)
    presets = conf.preset_tables()
    assert "| `force_weight` | `100.0` | NDeM, CVPR 2026, main text: 1:100 |" in presets
    assert "1,339,906" in conf.parameter_counts()
    assert "6,864,898" in conf.parameter_counts()
    assert "NDeMOptions" in conf.objective_options()
    monkeypatch.setattr(conf, "RESULTS", tmp_path)
    assert "No table" in conf.benchmark_tables()
    (tmp_path / "md17_ethanol_objectives.md").write_text("# Table\n")
    assert "{include}" in conf.benchmark_tables()
