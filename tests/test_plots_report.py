"""Plots show the numbers that they were given; reports say what the runs say."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

from ndem_zoo.errors import ConfigError, DataError, FileFormatError
from ndem_zoo.physics import KCAL_PER_MOL
from ndem_zoo.plots import MAX_POINTS, learning_curve_figure, parity_figure, save_figure
from ndem_zoo.report import RunSummary, compare, read_run, report_text, write_report

pytest.importorskip("matplotlib")


@pytest.fixture
def target():
    rng = np.random.default_rng(0)
    return {"energy": rng.normal(-4000.0, 0.2, size=30), "forces": rng.normal(size=(270, 3))}


PTR = np.arange(31) * 9


def history(n: int = 6, step: int = 10) -> list[dict[str, float]]:
    """Rows whose third-last validation is the best."""
    rows = []
    for i in range(n):
        loss = 1.0 / (1 + i) if i < n - 2 else 1.0
        row = {"epoch": 0.5 * i, "step": step * (i + 1), "seconds": 2.0 * (i + 1), "train_loss": loss}
        rows.append(row | {"valid_loss": loss, "valid_energy_mae": 0.1 * loss, "valid_forces_mae": 0.3 * loss})
    return rows


def points(axis) -> np.ndarray:
    return np.asarray(axis.collections[0].get_offsets())


# ------------------------------------------------------------------------------------------------------------------ plots


def test_parity_shows_every_value_and_the_errors_of_all(target):
    predicted = {"energy": target["energy"] + 0.05, "forces": target["forces"] * 1.1}
    figure = parity_figure({"one": predicted, "two": target}, target, PTR)
    axes = figure.axes[:4]
    mean = target["energy"].mean()
    np.testing.assert_allclose(
        points(axes[0]), np.stack([target["energy"] - mean, predicted["energy"] - mean], 1), atol=1e-9
    )
    np.testing.assert_allclose(
        points(axes[1]), np.stack([target["forces"].ravel(), predicted["forces"].ravel()], axis=1)
    )
    assert axes[0].get_title() == f"one\nenergy MAE 0.0500 eV = {0.05 / KCAL_PER_MOL:.3g} kcal/mol"
    mae = 0.1 * np.abs(target["forces"]).mean()
    assert axes[1].get_title() == f"one\nforce MAE {mae:.3g} eV/Å = {mae / KCAL_PER_MOL:.3g} kcal/mol/Å"
    assert "MAE 0.00 eV" in axes[2].get_title()
    for axis in axes:
        assert axis.get_xlim() == axis.get_ylim()
        low, high = axis.get_xlim()
        assert low < points(axis).min()
        assert points(axis).max() < high


def test_parity_of_structures_of_different_size_is_per_atom():
    ptr = np.array([0, 2, 12])
    target = {"energy": np.array([-20.0, -100.0])}
    figure = parity_figure({"m": {"energy": np.array([-21.0, -100.0])}}, target, ptr)
    np.testing.assert_allclose(points(figure.axes[0]), [[-10.0, -10.5], [-10.0, -10.0]])
    assert "eV/atom" in figure.axes[0].get_xlabel()
    assert "energy MAE 0.500 eV " in figure.axes[0].get_title()


def test_parity_of_many_points_is_a_density_of_all_of_them():
    rng = np.random.default_rng(0)
    target = {"forces": rng.normal(size=(MAX_POINTS, 3))}
    figure = parity_figure({"m": {"forces": target["forces"] + 0.01}}, target, np.array([0, MAX_POINTS]))
    assert figure.axes[0].collections[0].get_array().sum() == 3 * MAX_POINTS


def test_parity_without_anything_to_compare(target):
    with pytest.raises(DataError, match="no labels"):
        parity_figure({"m": {"energy": target["energy"]}}, {}, PTR)


@pytest.mark.parametrize("against", ["seconds", "step", "epoch"])
def test_learning_curve_shows_the_history_and_marks_the_best(against):
    rows = history()
    figure = learning_curve_figure({"a": rows, "b": history(4)}, against=against)
    for axis, name in zip(figure.axes, ("valid_forces_mae", "valid_energy_mae"), strict=True):
        line, best = axis.lines[:2]
        np.testing.assert_allclose(line.get_xdata(), [row[against] for row in rows])
        np.testing.assert_allclose(line.get_ydata(), [row[name] for row in rows])
        assert best.get_xdata() == [rows[3][against]]
        assert axis.get_yscale() == "log"
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]


def test_second_scale_of_a_learning_curve_is_kcal_per_mol():
    figure = learning_curve_figure({"a": history()})
    axis = figure.axes[0]
    figure.savefig(io.BytesIO(), format="png")  # scales are set while drawing
    right = axis.child_axes[0]
    np.testing.assert_allclose(np.array(right.get_ylim()) * KCAL_PER_MOL, axis.get_ylim())
    assert right.get_ylabel() == "kcal/mol/Å"


def test_learning_curve_without_validation_data_is_of_the_training_loss():
    rows = [{"epoch": 1.0, "step": 1, "seconds": 1.0, "train_loss": 2.0}]
    figure = learning_curve_figure({"a": rows})
    assert figure.axes[0].get_ylabel() == "training loss"
    with pytest.raises(DataError, match="'b' is empty"):
        learning_curve_figure({"a": rows, "b": []})


def test_figures_are_saved_whole_and_pyplot_stays_out_of_it(target, tmp_path):
    import sys

    figure = parity_figure({"m": target}, target, PTR)
    save_figure(figure, tmp_path / "new" / "p.png")
    content = (tmp_path / "new" / "p.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content[-8:-4] == b"IEND"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.png"]
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


# ----------------------------------------------------------------------------------------------------------------- report


def summary(name: str, energy: float, forces: float, **record) -> RunSummary:
    metrics = {"n_structures": 1000, "energy_mae": energy, "energy_mae_per_atom": energy / 9}
    metrics |= {"forces_mae": forces, "forces_mae_H": forces / 2, "forces_rmse": 1.3 * forces, "forces_cosine": 0.9876}
    metrics |= {f"{key}_kcal": metrics[key] / KCAL_PER_MOL for key in ("energy_mae", "forces_mae", "forces_rmse")}
    base = {
        "command": f"train {name}",
        "preset": "md17_fast",
        "objective": name,
        "weight": 0.5,
        "n_parameters": 207490,
        "data": {"source": "sample:ethanol", "name": "sample ethanol", "seed": 1, "n_train": 450, "n_valid": 50},
        "training": {"steps": 4321, "epochs": 3.0, "seconds": 170.2, "interrupted": False},
        "environment": {"ndem_zoo": "0.1.0", "torch": "2.4.1"},
        "test": metrics,
    }
    return RunSummary(name, base | record, history())


def cells(text: str, label: str) -> list[str]:
    """The numbers of a row of a table."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_report_has_the_errors_in_all_units():
    text = report_text([summary("ndem", 0.0100, 0.0500), summary("supervised", 0.0125, 0.0500)], "Title")
    assert cells(text, "energy MAE (eV)") == ["0.01000", "0.01250"]
    assert cells(text, "energy MAE (meV/atom)") == ["1.111", "1.389"]
    assert cells(text, "energy MAE (kcal/mol)") == ["0.2306", "0.2883"]
    assert cells(text, "force MAE (meV/Å)") == ["50.00", "50.00"]
    assert cells(text, "force MAE (kcal/mol/Å)") == ["1.1530", "1.1530"]
    assert cells(text, "H") == ["25.00 (0.577)"] * 2
    assert cells(text, "steps") == ["4,321"] * 2
    assert cells(text, "weight of its own term") == ["0.5", "–"]
    assert "450 training, 50 validation structures (seed 1); errors on 1000 test structures" in text
    assert "train ndem\ntrain supervised" in text
    assert "torch 2.4.1" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {4}


@pytest.mark.parametrize(
    ("energy", "forces", "says"),
    [
        (0.02, 0.03, ["energy error of ndem is 100 % larger", "force error of ndem is 40 % smaller"]),
        (
            0.01005,
            0.05,
            ["energy errors of ndem and supervised are equal", "force errors of ndem and supervised are equal"],
        ),
    ],
)
def test_comparison_is_honest_in_both_directions(energy, forces, says):
    first, second = summary("ndem", energy, forces), summary("supervised", 0.01, 0.05)
    assert all(part in sentence for part, sentence in zip(says, compare(first, second), strict=True))
    assert says[0] in report_text([first, second], "Title")


def test_report_file_embeds_figures_that_exist(tmp_path):
    path = tmp_path / "page" / "report.md"
    md = {
        "ensemble": "nve",
        "duration_ps": 1.0,
        "drift_meV_per_atom_per_ps": -0.0123,
        "fluctuation_meV_per_atom": 0.004,
    }
    first = summary("ndem", 0.01, 0.05)
    first = RunSummary(first.name, first.record, first.history, md | {"mean_temperature_K": 301.4})
    write_report(path, [first, summary("supervised", 0.01, 0.05)])
    text = path.read_text(encoding="utf-8")
    assert cells(text, "drift of the total energy (meV/atom/ps)") == ["-0.0123"]
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert figures == ["learning_curve.png", "element_errors.png"]
    assert all((path.parent / name).is_file() for name in figures)
    with pytest.raises(ConfigError, match="its own name"):
        write_report(path, [first, first])


def test_reading_runs_that_are_not_there_or_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        read_run(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(FileFormatError, match="not what a training writes"):
        read_run(tmp_path)
