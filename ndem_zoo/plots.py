"""Pictures of predictions and trainings, as matplotlib figures: parity, learning curves, errors by element and by force.

Functions take numbers and return a `Figure`; pyplot and its global state are not used, so they run without a display
and in any thread. What the numbers are is decided in `runs.py` and `demo.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ndem_zoo.checkpoint import write_bytes
from ndem_zoo.errors import DataError
from ndem_zoo.optional import require
from ndem_zoo.physics import KCAL_PER_MOL
from ndem_zoo.properties import PROPERTIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

#: Colors of figures on a dark page; contrast of text 13:1.
DARK_GROUND, DARK_TEXT, DARK_GRID = "#1b1d21", "#e4e6ea", "#33363c"

#: Choice: more points than this are shown as a density, in which none hides another.
MAX_POINTS = 5_000


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def parity_figure(
    predictions: Mapping[str, Mapping[str, np.ndarray]],
    target: Mapping[str, np.ndarray],
    ptr: np.ndarray,
    *,
    first_color: int = 0,
) -> Figure:
    """Predicted against true energies, forces and other targets, one row of panels for each model.

    Parameters
    ----------
    predictions
        For each model's name its ``"energy"`` (S,) in eV and ``"forces"`` (A, 3) in eV/Å, as far as there are, and
        targets of `ndem_zoo.properties` (S,).
    target
        The labels, under the same names.
    ptr : (S + 1,)
        Where each structure begins and ends.
    first_color
        Number of the first model's color in `COLORS`, so that a model has the same one in every figure.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Energies are shown relative to their mean; per atom, when structures differ in size. Titles give the mean
        absolute error in eV or eV/Å and in kcal/mol or kcal/mol/Å; small panels show how the errors are distributed.

    Raises
    ------
    DataError
        If there is nothing to compare.
    """
    names = [*PROPERTIES, "forces"]
    shared = [name for name in names if name in target and any(name in p for p in predictions.values())]
    if not shared:
        raise DataError("there are no labels to compare with; a parity plot needs energies, forces or a property")
    figure = _figure(4.6 * len(shared), 4.3 * len(predictions))
    axes = figure.subplots(len(predictions), len(shared), squeeze=False)
    for row, (label, columns) in enumerate(predictions.items()):
        for column, name in enumerate(shared):
            draw = {"energy": _draw_energy_parity, "forces": _draw_force_parity}.get(name)
            draw = draw or functools.partial(_draw_property_parity, name)
            draw(axes[row, column], columns[name], target[name], ptr, label, COLORS[(first_color + row) % len(COLORS)])
    return figure


def learning_curve_figure(
    histories: Mapping[str, Sequence[Mapping[str, float]]], *, against: str = "seconds", title: str = ""
) -> Figure:
    """Errors on the validation data while training, of one or several runs, on a logarithmic scale.

    Parameters
    ----------
    histories
        For each run's name the rows of its history (`NDeMModel.history_`).
    against
        What the horizontal axis shows: ``"seconds"``, ``"step"`` or ``"epoch"``.
    title
        Of the figure.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Without validation data the training loss is shown. A circle marks the best validation, whose weights are kept.

    Raises
    ------
    DataError
        If a history is empty.
    """
    for label, rows in histories.items():
        if not rows:
            raise DataError(f"the history of {label!r} is empty; there is nothing to draw")
    shown = [name for name in _CURVES if any(name in row for rows in histories.values() for row in rows)]
    shown = [name for name in shown if name != "train_loss"] or ["train_loss"]
    figure = _figure(5.2 * len(shown), 4.0)
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for number, (label, rows) in enumerate(histories.items()):
            _draw_curve(axis, rows, name, against, label, COLORS[number % len(COLORS)])
        _decorate_curve(axis, name, against)
    if title:
        figure.suptitle(title)
    return figure


def element_error_figure(errors: Mapping[str, Mapping[str, float]]) -> Figure:
    """Force errors of each element as bars, of one or several models beside each other.

    Parameters
    ----------
    errors
        For each model's name the mean absolute error of force components in eV/Å by chemical symbol.

    Raises
    ------
    DataError
        If there are no errors.
    """
    elements = list(dict.fromkeys(symbol for found in errors.values() for symbol in found))
    if not elements:
        raise DataError("there are no force errors by element to draw")
    figure = _figure(2.4 + 0.5 * len(elements) * (1 + len(errors)), 4.0)
    axis = figure.subplots()
    width = 0.8 / len(errors)
    for number, (label, found) in enumerate(errors.items()):
        at = np.arange(len(elements)) + (number + 0.5) * width - 0.4
        heights = [1e3 * found.get(symbol, np.nan) for symbol in elements]
        axis.bar(at, heights, 0.92 * width, color=COLORS[number % len(COLORS)], label=label)
    axis.set_xticks(range(len(elements)), elements)
    axis.set(ylabel="force MAE (meV/Å)")
    axis.grid(True, axis="y", color="0.92", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.legend(frameon=False)
    _add_scale(axis, "kcal/mol/Å", 1e3 * KCAL_PER_MOL)
    return figure


def force_error_figure(samples: Mapping[str, tuple[np.ndarray, np.ndarray]], n_bins: int = 12) -> Figure:
    """Error of forces against the size of the true force: the mean in bins, with the middle half of the errors.

    Parameters
    ----------
    samples
        For each model's name the lengths (A,) of the true forces and of the error vectors, in eV/Å.
    n_bins
        Each has as many atoms as the others.

    Raises
    ------
    DataError
        If there are no atoms.
    """
    if not samples or not all(len(size) for size, _ in samples.values()):
        raise DataError("there are no forces to draw errors of")
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    for number, (label, (size, error)) in enumerate(samples.items()):
        color = COLORS[number % len(COLORS)]
        parts = np.array_split(np.argsort(size, kind="stable"), min(n_bins, len(size)))
        x = [size[part].mean() for part in parts]
        low, high = np.transpose([np.quantile(1e3 * error[part], (0.25, 0.75)) for part in parts])
        axis.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axis.plot(x, [1e3 * error[part].mean() for part in parts], "o-", color=color, markersize=4, label=label)
    axis.set(xlabel="length of the reference force (eV/Å)", ylabel="length of the error (meV/Å)")
    axis.set_ylim(bottom=0.0)
    axis.grid(True, color="0.92", linewidth=0.7)
    axis.legend(frameon=False)
    _add_scale(axis, "kcal/mol/Å", 1e3 * KCAL_PER_MOL)
    return figure


def figure_bytes(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as the content of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return stream.getvalue()


def darken(figure: Figure) -> Figure:
    """Change a figure's colors to those of a dark page; returns the same figure.

    Bright text on a dark ground; the colors of the data stay.
    """
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    figure.set_facecolor(DARK_GROUND)
    for axis in figure.findobj(Axes):
        axis.set_facecolor(DARK_GROUND)
        axis.tick_params(which="both", colors=DARK_TEXT, grid_color=DARK_GRID)
        for spine in axis.spines.values():
            spine.set_edgecolor(DARK_TEXT)
        for shades in axis.collections:
            if shades.get_array() is not None:  # densities: what is rare comes close to the ground
                shades.set_cmap(shades.get_cmap().reversed())
        for line in axis.get_lines():
            if line.get_color() == "0.35":  # diagonals and zero lines
                line.set_color("0.75")
    for text in figure.findobj(Text):
        text.set_color(DARK_TEXT)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 150) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_bytes(path, figure_bytes(figure, dpi))


# -------------------------------------------------------------------------------------------------------------- details

#: What a learning curve shows: column of the history -> label, and unit in which the literature gives it.
_CURVES = {
    "valid_forces_mae": ("force MAE, validation (eV/Å)", "kcal/mol/Å"),
    "valid_energy_mae": ("energy MAE, validation (eV)", "kcal/mol"),
    **{
        f"valid_{name}_mae": (f"{name} MAE, validation ({known.unit})", None)
        for name, known in PROPERTIES.items()
        if name != "energy"
    },
    "train_loss": ("training loss", None),
}

_ABSCISSAE = {"seconds": "training time (s)", "step": "training steps", "epoch": "epochs"}


def _figure(width: float, height: float) -> Figure:
    """An empty figure, known to no pyplot."""
    figure_class = require("matplotlib.figure", extra="plots").Figure
    return figure_class(figsize=(width, height), layout="constrained")


def _draw_energy_parity(
    axis: Axes, predicted: np.ndarray, target: np.ndarray, ptr: np.ndarray, label: str, color: str
) -> None:
    """Energies relative to the mean of the labels, or per atom where structures differ in size."""
    counts = np.diff(ptr)
    mae = float(np.abs(predicted - target).mean())
    title = f"{label}\nenergy MAE {_number(mae)} eV = {_number(mae / KCAL_PER_MOL)} kcal/mol"
    if (counts == counts[0]).all():
        mean, unit = target.mean(), "eV"
        x, y, what = target - mean, predicted - mean, "energy − mean"
    else:
        x, y, unit, what = target / counts, predicted / counts, "eV/atom", "energy per atom"
    _draw_parity(axis, x, y, what, unit, title, color)


def _draw_force_parity(
    axis: Axes, predicted: np.ndarray, target: np.ndarray, ptr: np.ndarray, label: str, color: str
) -> None:
    """Components of forces."""
    mae = float(np.abs(predicted - target).mean())
    title = f"{label}\nforce MAE {_number(mae)} eV/Å = {_number(mae / KCAL_PER_MOL)} kcal/mol/Å"
    _draw_parity(axis, target.reshape(-1), predicted.reshape(-1), "force component", "eV/Å", title, color)


def _draw_property_parity(
    name: str, axis: Axes, predicted: np.ndarray, target: np.ndarray, ptr: np.ndarray, label: str, color: str
) -> None:
    """One number for each structure, as it is."""
    known, mae = PROPERTIES[name], float(np.abs(predicted - target).mean())
    title = f"{label}\n{name} MAE {_number(mae)} {known.unit}"
    if known.report:
        title += f" = {_number(mae * known.factor)} {known.report}"
    _draw_parity(axis, target, predicted, name, known.unit, title, color)


def _draw_parity(axis: Axes, x: np.ndarray, y: np.ndarray, what: str, unit: str, title: str, color: str) -> None:
    """Points around the diagonal, and the distribution of their errors in a corner."""
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.04 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    axis.plot(limits, limits, color="0.35", linewidth=0.9, zorder=1)
    if len(x) <= MAX_POINTS:
        axis.scatter(x, y, s=9, color=color, alpha=float(np.clip(500 / len(x), 0.3, 0.8)), linewidths=0, zorder=2)
    else:
        axis.hexbin(x, y, gridsize=90, extent=(*limits, *limits), bins="log", mincnt=1, cmap=_shades(color), zorder=2)
    axis.set(xlim=limits, ylim=limits, aspect="equal")
    axis.set(xlabel=f"reference {what} ({unit})", ylabel=f"predicted {what} ({unit})")
    axis.set_title(title, fontsize=10)
    axis.grid(True, color="0.92", linewidth=0.7)
    axis.set_axisbelow(True)
    _draw_errors(axis.inset_axes([0.63, 0.09, 0.34, 0.24]), y - x, unit, color)


def _draw_errors(axis: Axes, error: np.ndarray, unit: str, color: str) -> None:
    """Histogram of errors, without the last half percent on either side."""
    factor, unit = (1e3, "m" + unit) if np.abs(error).mean() < 1.0 else (1.0, unit)
    width = factor * float(np.quantile(np.abs(error), 0.99)) or 1.0
    axis.hist(factor * error, bins=41, range=(-width, width), color=color)
    axis.axvline(0.0, color="0.35", linewidth=0.8)
    axis.set_xlim(-1.05 * width, 1.05 * width)
    axis.set_xticks([-_round_down(0.8 * width), 0.0, _round_down(0.8 * width)])
    axis.set_yticks([])
    axis.tick_params(labelsize=7, pad=1)
    axis.set_title(f"error ({unit})", fontsize=7, pad=2)
    axis.set_zorder(5)


def _round_down(value: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not above `value`."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(power * max(digit for digit in (1.0, 2.0, 5.0) if digit * power <= value * (1 + 1e-9)))


def _shades(color: str) -> Any:
    """A color map from a pale to a deep shade of one color."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    rgb = np.array(to_rgb(color))
    return LinearSegmentedColormap.from_list("shades", [0.78 + 0.22 * rgb, rgb, 0.35 * rgb])


def _draw_curve(
    axis: Axes, rows: Sequence[Mapping[str, float]], name: str, against: str, label: str, color: str
) -> None:
    """One run's line, and a circle where its validation loss is lowest."""
    points = [(row[against], row[name], row.get("valid_loss", np.nan)) for row in rows if name in row]
    if not points:
        return
    x, y, loss = np.array(points).T
    axis.plot(x, y, color=color, linewidth=1.6, marker="." if len(x) < 30 else None, markersize=4, label=label)
    if np.isfinite(loss).any():
        best = int(np.nanargmin(loss))
        axis.plot(x[best], y[best], "o", color=color, markersize=7, markerfacecolor="none", markeredgewidth=1.4)


def _decorate_curve(axis: Axes, name: str, against: str) -> None:
    """Scales, labels, and the unit of the literature on the right."""
    from matplotlib.ticker import LogLocator, NullFormatter

    text, other_unit = _CURVES[name]
    axis.set_yscale("log")
    axis.set(xlabel=_ABSCISSAE.get(against, against), ylabel=text)
    axis.grid(True, which="both", color="0.92", linewidth=0.7)
    axis.legend(frameon=False)
    plain = _plain_formatter()
    scales: list[Any] = [axis.yaxis]
    if other_unit is not None:
        scales.append(_add_scale(axis, other_unit, KCAL_PER_MOL).yaxis)
    for scale in scales:
        scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        scale.set_major_formatter(plain)
        scale.set_minor_formatter(NullFormatter())


def _add_scale(axis: Axes, unit: str, one: float) -> Any:
    """The vertical axis once more on the right, in a unit of which `one` is what the left axis calls 1."""
    right = axis.secondary_yaxis("right", functions=(lambda value: value / one, lambda value: value * one))
    right.set_ylabel(unit)
    return right


def _plain_formatter() -> Any:
    """0.02 instead of 2 x 10^-2."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}")


def _number(value: float) -> str:
    """Three digits, without an exponent where that can be read."""
    return f"{value:#.3g}".rstrip(".")
