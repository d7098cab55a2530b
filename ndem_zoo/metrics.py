"""How good predictions are: errors in eV and in the units of the literature, always over all values at once.

Averages of per-batch averages weigh the last, smaller batch too much; nothing here does that. Atoms that are fixed do not
count where forces are compared: what acts on them moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from ase.data import chemical_symbols

from ndem_zoo.errors import DataError
from ndem_zoo.physics import KCAL_PER_MOL
from ndem_zoo.properties import PROPERTIES, property_of

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset

#: OC20's thresholds (fairchem 1.10, evaluator): energy in eV, any component of a force in eV/Å. Errors must be below.
OC20_ENERGY_THRESHOLD, OC20_FORCE_THRESHOLD = 0.02, 0.03


def dataset_metrics(predicted: Mapping[str, np.ndarray], dataset: MolecularDataset) -> dict[str, float]:
    """Errors on a dataset with labels: those of `error_metrics` and, where atoms are fixed (slabs), `oc20_metrics`.

    Parameters
    ----------
    predicted
        Columns in the dataset's order.
    dataset
        Structures with labels.
    """
    found = error_metrics(predicted, dataset.targets, dataset.z, dataset.ptr, dataset.fixed)
    is_free = dataset.fixed is not None and len(dataset) and not dataset.fixed.all()
    if is_free and "energy" in predicted and "energy" in dataset.targets:
        found |= oc20_metrics(predicted, dataset.targets, dataset.ptr, dataset.fixed)
    return found


def error_metrics(
    predicted: Mapping[str, np.ndarray],
    target: Mapping[str, np.ndarray],
    z: np.ndarray,
    ptr: np.ndarray,
    fixed: np.ndarray | None = None,
) -> dict[str, float]:
    """Errors of energies and forces.

    Parameters
    ----------
    predicted, target
        ``"energy"`` (S,) in eV and ``"forces"`` (A, 3) in eV/Å; what one of them lacks is left out.
    z : (A,)
        Atomic numbers.
    ptr : (S + 1,)
        Where each structure begins and ends.
    fixed : (A,) bool, optional
        Atoms whose forces do not count. Where all are fixed there are no errors of forces.

    Returns
    -------
    metrics : dict
        ``energy_mae``, ``energy_rmse`` (eV per structure), ``energy_mae_per_atom`` (eV), ``forces_mae``,
        ``forces_rmse`` (eV/Å, over components), ``forces_cosine`` (mean over atoms of the cosine between predicted and
        true force), ``forces_mae_<element>``, and the ``_kcal`` twins of the four errors (kcal/mol, kcal/mol/Å).
    """
    metrics: dict[str, float] = {}
    for name in sorted(set(predicted) & set(target) - {"energy", "forces"}):
        metrics |= property_metrics(name, predicted[name], target[name])
    if "energy" in predicted and "energy" in target:
        error = np.asarray(predicted["energy"]) - np.asarray(target["energy"])
        metrics |= {
            "energy_mae": float(np.abs(error).mean()),
            "energy_rmse": float(np.sqrt(np.square(error).mean())),
            "energy_mae_per_atom": float((np.abs(error) / np.diff(ptr)).mean()),
        }
    if "forces" in predicted and "forces" in target:
        forces, label, (elements,) = _free_forces(predicted, target, fixed, np.asarray(z))
        metrics |= _force_errors(forces, label, elements) if len(forces) else {}
    for name in ("energy_mae", "energy_rmse", "forces_mae", "forces_rmse"):
        if name in metrics:
            metrics[f"{name}_kcal"] = metrics[name] / KCAL_PER_MOL
    return metrics


def _force_errors(forces: np.ndarray, label: np.ndarray, z: np.ndarray) -> dict[str, float]:
    """Errors of the forces on one or more atoms."""
    error = np.abs(forces - label)
    return {
        "forces_mae": float(error.mean()),
        "forces_rmse": float(np.sqrt(np.square(error).mean())),
        "forces_cosine": _mean_cosine(forces, label),
        **{f"forces_mae_{chemical_symbols[n]}": float(error[z == n].mean()) for n in np.unique(z)},
    }


def oc20_metrics(
    predicted: Mapping[str, np.ndarray],
    target: Mapping[str, np.ndarray],
    ptr: np.ndarray,
    fixed: np.ndarray | None = None,
) -> dict[str, float]:
    """The metrics of OC20's tasks, with its definitions.

    Parameters
    ----------
    predicted, target
        See `error_metrics`. Without forces (IS2RE) there are those of the energy.
    ptr : (S + 1,)
        Where each structure begins and ends.
    fixed : (N,), optional
        Atoms whose forces do not count.

    Returns
    -------
    metrics : dict
        ``energy_mae`` (eV), ``ewt`` (share of structures whose energy is off by less than 0.02 eV); with forces also
        ``forces_mae``, ``forces_x_mae``, ``forces_y_mae``, ``forces_z_mae`` (eV/Å, over components of free atoms),
        ``forces_cosine`` (mean over free atoms), ``forces_magnitude_mae`` (eV/Å, of the lengths), and ``efwt`` (share of
        structures whose energy is off by less than 0.02 eV and no component of a free atom's force by 0.03 eV/Å or more).

    Raises
    ------
    DataError
        If there are no structures, or no free atoms.

    Notes
    -----
    OC20's results are the plain mean over its four splits: `mean_over_splits`.
    """
    energy_error = np.abs(np.asarray(predicted["energy"]) - np.asarray(target["energy"]))
    if not len(energy_error):
        raise DataError("there are no structures to compare; needed is one or more")
    is_near = energy_error < OC20_ENERGY_THRESHOLD
    metrics = {"energy_mae": float(energy_error.mean()), "ewt": float(is_near.mean())}
    if "forces" not in predicted or "forces" not in target:
        return metrics
    owner = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    forces, label, (owner,) = _free_forces(predicted, target, fixed, owner)
    if not len(forces):
        raise DataError("all atoms are fixed; there are no forces to compare")
    error = np.abs(forces - label)
    largest = np.zeros(len(energy_error))  # a structure without free atoms has no error of forces
    np.maximum.at(largest, owner, error.max(axis=1))
    lengths = np.linalg.norm(forces, axis=1) - np.linalg.norm(label, axis=1)
    return metrics | {
        "forces_mae": float(error.mean()),
        **{f"forces_{axis}_mae": float(error[:, k].mean()) for k, axis in enumerate("xyz")},
        "forces_cosine": _mean_cosine(forces, label),
        "forces_magnitude_mae": float(np.abs(lengths).mean()),
        "efwt": float((is_near & (largest < OC20_FORCE_THRESHOLD)).mean()),
    }


def mean_over_splits(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Plain mean of each metric over splits, such as OC20's ``val_id``, ``val_ood_ads``, ``val_ood_cat``, ``val_ood_both``.

    Parameters
    ----------
    metrics
        Metrics of each split, by its name; all must have the same.

    Raises
    ------
    DataError
        If there are no splits, or one lacks a metric; names it.
    """
    if not metrics:
        raise DataError("there are no splits; needed is one or more")
    names = list(next(iter(metrics.values())))
    for split, values in metrics.items():
        if set(values) != set(names):
            raise DataError(f"split {split!r} has the metrics {sorted(values)}, others have {sorted(names)}")
    return {name: float(np.mean([values[name] for values in metrics.values()])) for name in names}


def property_metrics(name: str, predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Errors of one number per structure that is no energy of a force field.

    Parameters
    ----------
    name
        Of the target.
    predicted, target : (S,)
        In its unit; see `ndem_zoo.properties`.

    Returns
    -------
    metrics : dict
        ``<name>_mae``, ``<name>_rmse``, and where papers use another unit, ``<name>_mae_meV`` and ``<name>_rmse_meV``.
    """
    error = np.asarray(predicted) - np.asarray(target)
    metrics = {f"{name}_mae": float(np.abs(error).mean()), f"{name}_rmse": float(np.sqrt(np.square(error).mean()))}
    known = property_of(name)
    if known.report:
        metrics |= {f"{key}_{known.report}": value * known.factor for key, value in list(metrics.items())}
    return metrics


def unit_of(name: str) -> str:
    """Unit of a metric: such as ``"eV/Å"``, or ``""`` for a number without unit."""
    if name.endswith("_cosine") or name in ("ewt", "efwt"):
        return ""
    target = name.split("_mae")[0].split("_rmse")[0]
    if target in PROPERTIES and target != "energy":
        report = PROPERTIES[target].report
        return report if report and name.endswith(report) else PROPERTIES[target].unit
    energy = "kcal/mol" if name.endswith("_kcal") else "eV"
    if name.startswith("forces_"):
        return energy + "/Å"
    return energy + ("/atom" if "_per_atom" in name else "")


def _free_forces(
    predicted: Mapping[str, np.ndarray],
    target: Mapping[str, np.ndarray],
    fixed: np.ndarray | None,
    *columns: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Predicted and true forces of the atoms that are free, and their rows of other columns."""
    forces, label = np.asarray(predicted["forces"]), np.asarray(target["forces"])
    if fixed is None:
        return forces, label, columns
    free = ~np.asarray(fixed, dtype=bool)
    return forces[free], label[free], tuple(column[free] for column in columns)


def _mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine between rows; a zero row counts as cosine 0."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.where(norms > 0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0), 0.0).mean())
