"""How good predictions are: errors in eV and in the units of the literature, always over all values at once.

Averages of per-batch averages weigh the last, smaller batch too much; nothing here does that.
"""

from __future__ import annotations

import numpy as np
from ase.data import chemical_symbols

from ndem_zoo.physics import KCAL_PER_MOL
from ndem_zoo.properties import PROPERTIES, property_of


def error_metrics(
    predicted: dict[str, np.ndarray], target: dict[str, np.ndarray], z: np.ndarray, ptr: np.ndarray
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
        forces, label = np.asarray(predicted["forces"]), np.asarray(target["forces"])
        error = np.abs(forces - label)
        metrics |= {
            "forces_mae": float(error.mean()),
            "forces_rmse": float(np.sqrt(np.square(error).mean())),
            "forces_cosine": _mean_cosine(forces, label),
        }
        metrics |= {f"forces_mae_{chemical_symbols[n]}": float(error[z == n].mean()) for n in np.unique(z)}
    for name in ("energy_mae", "energy_rmse", "forces_mae", "forces_rmse"):
        if name in metrics:
            metrics[f"{name}_kcal"] = metrics[name] / KCAL_PER_MOL
    return metrics


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
    """Unit of a metric of `error_metrics`: such as ``"eV/Å"``, or ``""`` for a number without unit."""
    if name.endswith("_cosine"):
        return ""
    target = name.split("_mae")[0].split("_rmse")[0]
    if target in PROPERTIES and target != "energy":
        report = PROPERTIES[target].report
        return report if report and name.endswith(report) else PROPERTIES[target].unit
    energy = "kcal/mol" if name.endswith("_kcal") else "eV"
    if name.startswith("forces_"):
        return energy + "/Å"
    return energy + ("/atom" if "_per_atom" in name else "")


def _mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine between rows; a zero row counts as cosine 0."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.where(norms > 0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0), 0.0).mean())
