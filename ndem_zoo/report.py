"""One page about runs: `read_run` collects what `runs.train_run` left in a folder, `write_report` compares runs.

The page is Markdown, with figures beside it. It says what came out, also when the method with more parts is not better.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ndem_zoo import checkpoint as files
from ndem_zoo.errors import ConfigError, FileFormatError
from ndem_zoo.history import read_history
from ndem_zoo.physics import KCAL_PER_MOL
from ndem_zoo.plots import has_matplotlib, learning_curve_figure, save_figure

#: Choice: differences of less than this, relative, are called equal: seeds change more.
SAME = 0.01


@dataclass(frozen=True)
class RunSummary:
    """What a report says about one run.

    Attributes
    ----------
    name
        In tables and figures.
    record
        Content of ``metrics.json``; see `runs.train_run`.
    history
        Rows of the training's history.
    md
        `EnergyRecord.summary` of a dynamics with the model, if there was one.
    """

    name: str
    record: Mapping[str, Any]
    history: Sequence[Mapping[str, float]] = ()
    md: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Errors on the test data, or else on the validation data."""
        return self.record.get("test") or self.record.get("valid") or {}

    @property
    def judged_on(self) -> str:
        """Which data the errors are of."""
        part = "test" if self.record.get("test") else "validation"
        return f"{self.metrics.get('n_structures', 0)} {part} structures"


def read_run(folder: str | os.PathLike) -> RunSummary:
    """What `runs.train_run` left in a folder; also ``md.json``, which ``ndem-zoo md --json`` may have put there.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    FileFormatError
        If one of the files is damaged.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").is_file():
        raise FileNotFoundError(f"{folder} holds no finished run (no metrics.json)")
    record = files.load_json(folder / "metrics.json")
    if not (isinstance(record, dict) and {"training", "data", "objective", "environment"} <= set(record)):
        raise FileFormatError(f"{folder / 'metrics.json'} is not what a training writes")
    md = files.load_json(folder / "md.json") if (folder / "md.json").is_file() else {}
    return RunSummary(folder.resolve().name, record, read_history(folder / "history.csv"), md)


def write_report(
    path: str | os.PathLike,
    runs: Sequence[RunSummary],
    *,
    title: str = "Comparison of runs",
    figures: Sequence[str] = (),
) -> None:
    """Write a page that compares runs, and, where matplotlib is installed, their learning curves beside it.

    Parameters
    ----------
    path
        Markdown file.
    runs
        At least one.
    title
        Of the page.
    figures
        Names of further PNG files beside it, to be shown.

    Raises
    ------
    ConfigError
        If there are no runs, or two have the same name.
    """
    names = [run.name for run in runs]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"runs {names}: a report needs one or more, each with its own name")
    path = Path(path)
    shown = list(figures)
    curves = {run.name: run.history for run in runs if run.history}
    if curves and has_matplotlib():
        save_figure(learning_curve_figure(curves), path.with_name("learning_curve.png"))
        shown.append("learning_curve.png")
    files.write_text(path, report_text(runs, title, shown))


def report_text(runs: Sequence[RunSummary], title: str, figures: Sequence[str] = ()) -> str:
    """The page as Markdown."""
    sections = [f"# {title}", _data_section(runs), _verdict(runs), "## Errors", _error_table(runs)]
    sections += _element_section(runs) + ["## Training", _training_table(runs)] + _md_section(runs)
    if figures:
        sections += ["## Figures", *(f"![{Path(name).stem}]({name})" for name in figures)]
        sections.append("Learning curves are of the validation data; a circle marks the weights that were kept.")
    sections += ["## To do it again", *_reproduction(runs)]
    return "\n\n".join(section for section in sections if section) + "\n"


# -------------------------------------------------------------------------------------------------------------- sections


def _data_section(runs: Sequence[RunSummary]) -> str:
    """What was learned from; one line if it is the same for all."""
    lines = []
    for run in runs:
        data = run.record["data"]
        parts = ", ".join(
            f"{data[k]} {label}" for k, label in (("n_train", "training"), ("n_valid", "validation")) if k in data
        )
        lines.append(
            f"{data['name'] or data['source']}: {parts} structures (seed {data['seed']}); errors on {run.judged_on}."
        )
    if len(set(lines)) == 1:
        return lines[0]
    return "\n".join(f"- **{run.name}**: {line}" for run, line in zip(runs, lines, strict=True))


def _verdict(runs: Sequence[RunSummary]) -> str:
    """Which run has the smaller errors, in words: of exactly two runs."""
    return "" if len(runs) != 2 else " ".join(compare(runs[0], runs[1]))


def compare(first: RunSummary, second: RunSummary) -> list[str]:
    """A sentence for energies and one for forces: is `first` better than `second`, and by how much?"""
    sentences = []
    for key, what in (("energy_mae", "energy"), ("forces_mae", "force")):
        if key not in first.metrics or key not in second.metrics:
            continue
        ours, theirs = first.metrics[key], second.metrics[key]
        change = ours / theirs - 1.0
        if abs(change) < SAME:
            sentences.append(f"The {what} errors of {first.name} and {second.name} are equal within 1 %.")
        else:
            kind = "smaller" if change < 0 else "larger"
            sentences.append(
                f"The {what} error of {first.name} is {100 * abs(change):.0f} % {kind} than that of {second.name}."
            )
    return sentences


def _error_table(runs: Sequence[RunSummary]) -> str:
    """Mean absolute errors in the units of ASE, in their thousandths, and in those of the literature."""
    rows: list[tuple[str, Callable[[Mapping[str, float]], str]]] = [
        ("energy MAE (eV)", _cell("energy_mae", 1.0, 5)),
        ("energy MAE (meV/atom)", _cell("energy_mae_per_atom", 1e3, 3)),
        ("energy MAE (kcal/mol)", _cell("energy_mae_kcal", 1.0, 4)),
        ("force MAE (eV/Å)", _cell("forces_mae", 1.0, 5)),
        ("force MAE (meV/Å)", _cell("forces_mae", 1e3, 2)),
        ("force MAE (kcal/mol/Å)", _cell("forces_mae_kcal", 1.0, 4)),
        ("force RMSE (eV/Å)", _cell("forces_rmse", 1.0, 5)),
        ("mean cosine of forces", _cell("forces_cosine", 1.0, 5)),
    ]
    return _table(
        ["", *(run.name for run in runs)], [[label, *(cell(run.metrics) for run in runs)] for label, cell in rows]
    )


def _cell(name: str, factor: float, digits: int) -> Callable[[Mapping[str, float]], str]:
    return lambda metrics: f"{factor * metrics[name]:.{digits}f}" if name in metrics else "–"


def _element_section(runs: Sequence[RunSummary]) -> list[str]:
    """Force errors of each element."""
    prefix = "forces_mae_"
    names = [name for run in runs for name in run.metrics if name.startswith(prefix) and not name.endswith("_kcal")]
    elements = [name.removeprefix(prefix) for name in dict.fromkeys(names)]
    if not elements:
        return []
    rows = []
    for element in elements:
        values = [run.metrics.get(prefix + element, np.nan) for run in runs]
        rows.append([element, *(f"{1e3 * v:.2f} ({v / KCAL_PER_MOL:.3f})" if np.isfinite(v) else "–" for v in values)])
    head = ["force MAE by element, meV/Å (kcal/mol/Å)", *(run.name for run in runs)]
    return [_table(head, rows)]


def _training_table(runs: Sequence[RunSummary]) -> str:
    """How the models were made."""

    def row(label: str, cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [label, *(cell(run.record) for run in runs)]

    rows = [
        row("objective", lambda r: str(r["objective"])),
        row("weight of its own term", lambda r: "–" if r["objective"] == "supervised" else f"{r.get('weight'):g}"),
        row("preset", lambda r: str(r.get("preset") or "default")),
        row("parameters", lambda r: f"{r.get('n_parameters', 0):,}"),
        row(
            "steps",
            lambda r: f"{r['training']['steps']:,}" + (" (interrupted)" if r["training"]["interrupted"] else ""),
        ),
        row("time (s)", lambda r: f"{r['training']['seconds']:.0f}"),
    ]
    return _table(["", *(run.name for run in runs)], rows)


def _md_section(runs: Sequence[RunSummary]) -> list[str]:
    """How well energy is conserved."""
    with_md = [run for run in runs if run.md]
    if not with_md:
        return []
    columns = [
        ("duration (ps)", "duration_ps", "g"),
        ("drift of the total energy (meV/atom/ps)", "drift_meV_per_atom_per_ps", "+.4f"),
        ("its rms fluctuation (meV/atom)", "fluctuation_meV_per_atom", ".4f"),
        ("mean temperature (K)", "mean_temperature_K", ".0f"),
    ]
    rows = [[label, *(format(run.md[key], form) for run in with_md)] for label, key, form in columns]
    ensembles = ", ".join(dict.fromkeys(str(run.md["ensemble"]) for run in with_md))
    return [f"## Molecular dynamics ({ensembles})", _table(["", *(run.name for run in with_md)], rows)]


def _reproduction(runs: Sequence[RunSummary]) -> list[str]:
    """Commands and versions."""
    commands = list(dict.fromkeys(run.record["command"] for run in runs if run.record.get("command")))
    lines = ["```\n" + "\n".join(commands) + "\n```"] if commands else []
    places = dict.fromkeys(", ".join(f"{k} {v}" for k, v in run.record["environment"].items()) for run in runs)
    return [*lines, *places]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = [_row(head), "|" + "---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + [_row(row) for row in rows])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
