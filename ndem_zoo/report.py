"""One page about runs: `read_run` collects what `runs.train_run` left in a folder, `write_report` compares runs.

The page is one HTML file that holds all it shows, or Markdown with figures beside it (`page.py`). It says what came out,
also when the method with more parts is not better.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ndem_zoo import checkpoint as files
from ndem_zoo import page, plots
from ndem_zoo.errors import ConfigError, FileFormatError
from ndem_zoo.history import read_history
from ndem_zoo.page import Block, Code, Figure, Heading, Items, Paragraph, Table
from ndem_zoo.physics import KCAL_PER_MOL
from ndem_zoo.predictions import Predictions
from ndem_zoo.properties import PROPERTIES

#: Choice: differences of less than this, relative, are called equal: seeds change more.
SAME = 0.01

_SUFFIXES = (".html", ".htm", ".md")


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
    predictions
        Beside their labels, for figures; None where none were kept.
    """

    name: str
    record: Mapping[str, Any]
    history: Sequence[Mapping[str, float]] = ()
    md: Mapping[str, Any] = field(default_factory=dict)
    predictions: Predictions | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Errors on the test data, or else on the validation data."""
        return self.record.get("test") or self.record.get("valid") or {}

    @property
    def judged_on(self) -> str:
        """Which data the errors are of."""
        part = "test" if self.record.get("test") else "validation"
        return f"{self.metrics.get('n_structures', 0)} {part} structures"

    @property
    def element_errors(self) -> dict[str, float]:
        """Mean absolute error of force components in eV/Å by chemical symbol."""
        prefix = "forces_mae_"
        names = [name for name in self.metrics if name.startswith(prefix) and not name.endswith("_kcal")]
        return {name.removeprefix(prefix): self.metrics[name] for name in names}


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
    record = files.load_record(folder / "metrics.json")
    if not (isinstance(record, dict) and {"training", "data", "objective", "environment"} <= set(record)):
        raise FileFormatError(f"{folder / 'metrics.json'} is not what a training writes")
    md = files.load_json(folder / "md.json") if (folder / "md.json").is_file() else {}
    history = read_history(folder / "history.csv")
    return RunSummary(folder.resolve().name, record, history, md, Predictions.load(folder))


def write_report(path: str | os.PathLike, runs: Sequence[RunSummary], *, title: str = "Comparison of runs") -> None:
    """Write a page that compares runs.

    Figures (learning curves, predicted against reference values, errors by element and by size of the force) are drawn
    where matplotlib is installed.

    Parameters
    ----------
    path
        A name in ``.html``: one file that holds all it shows, needs no network and runs no script. In ``.md``: Markdown,
        with figures as PNG files beside it.
    runs
        At least one.
    title
        Of the page.

    Raises
    ------
    ConfigError
        If there are no runs, two have the same name, or the file's name ends in something else.
    """
    names = [run.name for run in runs]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"runs {names}: a report needs one or more, each with its own name")
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"report {path}: its name must end in one of {', '.join(_SUFFIXES)}")
    is_html = path.suffix != ".md"
    blocks = report_blocks(runs, report_figures(runs, with_dark=is_html))
    if is_html:
        files.write_text(path, page.to_html(title, blocks))
        return
    page.write_figures(blocks, path.parent)
    files.write_text(path, page.to_markdown(title, blocks))


def report_text(runs: Sequence[RunSummary], title: str) -> str:
    """The page as Markdown, without figures."""
    return page.to_markdown(title, report_blocks(runs))


def report_blocks(runs: Sequence[RunSummary], figures: Sequence[Figure] = ()) -> list[Block]:
    """What the page holds, from top to bottom."""
    blocks = [*_data_section(runs), *_verdict(runs), Heading("Errors"), _error_table(runs), *_element_section(runs)]
    blocks += [Heading("Training"), _training_table(runs), *_md_section(runs)]
    if figures:
        blocks += [Heading("Figures"), *figures]
    return [*blocks, Heading("To do it again"), *_reproduction(runs)]


# --------------------------------------------------------------------------------------------------------------- figures


def report_figures(runs: Sequence[RunSummary], with_dark: bool = False) -> list[Figure]:
    """Pictures of what the runs have data for; none without matplotlib.

    Parameters
    ----------
    runs
        To be compared.
    with_dark
        Whether each is drawn for dark pages as well.
    """
    if not plots.has_matplotlib():
        return []
    figures = [_learning_curves(runs, with_dark)] if any(run.history for run in runs) else []
    for number, run in enumerate(runs):
        if run.predictions is not None and run.predictions.target:
            figures.append(_parity(run, number, with_dark))
    if any(run.element_errors for run in runs):
        figures.append(_element_bars(runs, with_dark))
    samples = {run.name: run.predictions.force_errors() for run in runs if run.predictions is not None}
    samples = {name: found for name, found in samples.items() if found is not None and len(found[0])}
    if samples:
        figures.append(_errors_by_force(samples, with_dark))
    return figures


def _drawn(name: str, alt: str, caption: str, draw: Callable[[], Any], with_dark: bool) -> Figure:
    """A figure; the dark one is another drawing with other colors."""
    light = plots.figure_bytes(draw())
    return Figure(name, alt, caption, light, plots.figure_bytes(plots.darken(draw())) if with_dark else None)


def _learning_curves(runs: Sequence[RunSummary], with_dark: bool) -> Figure:
    curves = {run.name: run.history for run in runs if run.history}
    ends = []
    for name, rows in curves.items():
        key = next((k for k in ("valid_forces_mae", "valid_loss", "train_loss") if any(k in row for row in rows)), None)
        values = [row[key] for row in rows if key in row] if key else []
        if values:
            ends.append(f"{name}: {_LABELS[key]} from {values[0]:.4g} to {values[-1]:.4g}, lowest {min(values):.4g}")
    alt = f"Learning curves against training time. {'; '.join(ends)}."
    caption = "Learning curves, of the validation data where there are some; a circle marks the weights that were kept."
    return _drawn("learning_curve", alt, caption, lambda: plots.learning_curve_figure(curves), with_dark)


_LABELS = {"valid_forces_mae": "force MAE (eV/Å)", "valid_loss": "validation loss", "train_loss": "training loss"}


def _parity(run: RunSummary, color: int, with_dark: bool) -> Figure:
    known = run.predictions
    errors = []
    for name, target in known.target.items():
        mae = float(np.abs(known.predicted[name] - target).mean())
        unit = "eV/Å" if name == "forces" else PROPERTIES[name].unit if name in PROPERTIES else ""
        errors.append(f"{name} MAE {mae:.4g} {unit}".rstrip())
    alt = f"Predicted against reference values of {run.name}: {', '.join(errors)}."
    caption = f"{run.name}: predicted against reference values of {known.note()}."

    def draw() -> Any:
        return plots.parity_figure({run.name: known.predicted}, known.target, known.ptr, first_color=color)

    return _drawn(f"parity_{_file_name(run.name)}", alt, caption, draw, with_dark)


def _element_bars(runs: Sequence[RunSummary], with_dark: bool) -> Figure:
    errors = {run.name: run.element_errors for run in runs if run.element_errors}
    said = [
        f"{name}: " + ", ".join(f"{symbol} {1e3 * value:.3g}" for symbol, value in found.items())
        for name, found in errors.items()
    ]
    alt = f"Force errors by element in meV/Å. {'; '.join(said)}."
    caption = "Mean absolute error of force components by element, of the data of the table of errors."
    return _drawn("element_errors", alt, caption, lambda: plots.element_error_figure(errors), with_dark)


def _errors_by_force(samples: Mapping[str, tuple[np.ndarray, np.ndarray]], with_dark: bool) -> Figure:
    said = []
    for name, (size, error) in samples.items():
        half = size <= np.median(size)
        low, high = (1e3 * error[part].mean() if part.any() else np.nan for part in (half, ~half))
        said.append(f"{name}: {low:.3g} meV/Å for the smaller half of the forces, {high:.3g} meV/Å for the larger half")
    alt = f"Length of the force error against the length of the reference force. {'; '.join(said)}."
    caption = "Error against the size of the force: means of equally many atoms each; the shade holds the middle half of them."
    return _drawn("error_by_force", alt, caption, lambda: plots.force_error_figure(samples), with_dark)


def _file_name(name: str) -> str:
    """Letters, digits and a few signs, as file names have them everywhere."""
    return re.sub(r"[^\w.-]+", "_", name)


# -------------------------------------------------------------------------------------------------------------- sections


def _data_section(runs: Sequence[RunSummary]) -> list[Block]:
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
        return [Paragraph(f"{_listed([run.name for run in runs])}. {lines[0]}")]
    return [Items([(run.name, line) for run, line in zip(runs, lines, strict=True)])]


def _listed(names: Sequence[str]) -> str:
    return ("Run: " if len(names) == 1 else "Runs: ") + ", ".join(names)


def _verdict(runs: Sequence[RunSummary]) -> list[Block]:
    """Which run has the smaller errors, in words: of exactly two runs."""
    sentences = compare(runs[0], runs[1]) if len(runs) == 2 else []
    return [Paragraph(" ".join(sentences))] if sentences else []


def compare(first: RunSummary, second: RunSummary) -> list[str]:
    """A sentence for each target and one for forces: is `first` better than `second`, and by how much?"""
    sentences = []
    named = {f"{name}_mae": name for name in PROPERTIES} | {"forces_mae": "force"}
    for key, what in named.items():
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


def _error_table(runs: Sequence[RunSummary]) -> Table:
    """Mean absolute errors in the units of ASE, in their thousandths, and in those of the literature."""
    rows: list[tuple[str, str, float, int]] = [
        ("energy MAE (eV)", "energy_mae", 1.0, 5),
        ("energy MAE (meV/atom)", "energy_mae_per_atom", 1e3, 3),
        ("energy MAE (kcal/mol)", "energy_mae_kcal", 1.0, 4),
        ("force MAE (eV/Å)", "forces_mae", 1.0, 5),
        ("force MAE (meV/Å)", "forces_mae", 1e3, 2),
        ("force MAE (kcal/mol/Å)", "forces_mae_kcal", 1.0, 4),
        ("force RMSE (eV/Å)", "forces_rmse", 1.0, 5),
        ("mean cosine of forces", "forces_cosine", 1.0, 5),
    ]
    for name, known in PROPERTIES.items():
        if name != "energy":
            rows.append((f"{name} MAE ({known.unit})", f"{name}_mae", 1.0, 5))
            rows += [(f"{name} MAE ({known.report})", f"{name}_mae", known.factor, 3)] if known.report else []
    shown = [row for row in rows if any(row[1] in run.metrics for run in runs)]
    cells = [
        [label, *(_number(run.metrics, key, factor, digits) for run in runs)] for label, key, factor, digits in shown
    ]
    return Table(["", *(run.name for run in runs)], cells, "Errors on data that were not trained on")


def _number(metrics: Mapping[str, float], key: str, factor: float, digits: int) -> str:
    return f"{factor * metrics[key]:.{digits}f}" if key in metrics else "–"


def _element_section(runs: Sequence[RunSummary]) -> list[Block]:
    """Force errors of each element."""
    elements = list(dict.fromkeys(symbol for run in runs for symbol in run.element_errors))
    if not elements:
        return []
    rows = []
    for element in elements:
        values = [run.element_errors.get(element, np.nan) for run in runs]
        rows.append([element, *(f"{1e3 * v:.2f} ({v / KCAL_PER_MOL:.3f})" if np.isfinite(v) else "–" for v in values)])
    head = ["force MAE by element, meV/Å (kcal/mol/Å)", *(run.name for run in runs)]
    return [Table(head, rows, "Errors of force components by element")]


def _training_table(runs: Sequence[RunSummary]) -> Table:
    """How the models were made."""

    def row(label: str, cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [label, *(cell(run.record) for run in runs)]

    rows = [
        row("model", lambda r: str(r.get("model", "–"))),
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
    return Table(["", *(run.name for run in runs)], rows, "How the models were made")


def _md_section(runs: Sequence[RunSummary]) -> list[Block]:
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
    table = Table(["", *(run.name for run in with_md)], rows, "How well energy is conserved")
    return [Heading(f"Molecular dynamics ({ensembles})"), table]


def _reproduction(runs: Sequence[RunSummary]) -> list[Block]:
    """Commands and versions."""
    commands = list(dict.fromkeys(run.record["command"] for run in runs if run.record.get("command")))
    places = dict.fromkeys(", ".join(f"{k} {v}" for k, v in run.record["environment"].items()) for run in runs)
    return [*([Code("\n".join(commands))] if commands else []), *(Paragraph(place) for place in places)]
