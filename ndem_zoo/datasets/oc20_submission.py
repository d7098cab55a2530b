"""OC20's submission file: predictions for the four test splits as one npz of plain arrays.

Layout: ``make_submission_file.py`` of fairchem 1.10, and ``docs/leaderboard/oc20.md`` of fairchem 2 (2026). Predictions
come from a model's `predict`; structures and their ids from `load_oc20`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ndem_zoo.checkpoint import whole_file
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError

SPLITS = ("id", "ood_ads", "ood_cat", "ood_both")


def write_submission(
    path: str | os.PathLike,
    splits: Mapping[str, tuple[MolecularDataset, Mapping[str, Any]]],
    *,
    atoms: str = "all",
) -> None:
    """Write predictions for OC20's test splits in the layout of its leaderboard.

    Parameters
    ----------
    path
        The npz file; replaced as a whole, or not at all.
    splits
        For each of ``"id"``, ``"ood_ads"``, ``"ood_cat"`` and ``"ood_both"``: the structures, whose ids are
        ``<sid>_<fid>`` (S2EF) or ``<sid>`` (IS2RE), and what a model's `predict` returned for them.
    atoms
        ``"all"`` (default): forces of all atoms, zeros for fixed ones, as in the example of the current leaderboard;
        ``"free"``: forces of free atoms only, as the former server wanted them.

    Raises
    ------
    ConfigError
        If a split is missing or unknown, or `atoms` is neither.
    DataError
        If predictions do not fit the structures, are not finite or too large for float16, or ids are not unique.

    Notes
    -----
    ``<split>_ids`` are sorted (`numpy.unique`), and everything else is in their order; ``<split>_energy`` (S,) and
    ``<split>_forces`` (A, 3) are float16; ``numpy.split(forces, <split>_chunk_idx)`` gives the forces of each structure.
    """
    if atoms not in ("all", "free"):
        raise ConfigError(f"atoms={atoms!r}; allowed are 'all' and 'free'")
    if set(splits) != set(SPLITS):
        raise ConfigError(f"splits are {sorted(splits)}; needed are {', '.join(SPLITS)}")
    arrays: dict[str, np.ndarray] = {}
    for name in SPLITS:
        try:
            arrays |= {f"{name}_{key}": value for key, value in _arrays(*splits[name], atoms).items()}
        except DataError as error:
            raise DataError(f"split {name!r}: {error}") from error
    with whole_file(Path(path)) as file:
        np.savez_compressed(file, **arrays)


def _arrays(dataset: MolecularDataset, predicted: Mapping[str, Any], atoms: str) -> dict[str, np.ndarray]:
    """The arrays of one split."""
    ids, order = np.unique(dataset.ids, return_index=True)
    if len(ids) != len(dataset):
        raise DataError(f"{len(dataset)} structures have {len(ids)} different ids; all must be different")
    energy = np.asarray(predicted["energy"], dtype=np.float64)
    if energy.shape != (len(dataset),):
        raise DataError(f"energies have shape {energy.shape}; needed is ({len(dataset)},)")
    arrays = {"ids": np.asarray(ids), "energy": _half(energy, "energy")[order]}
    if "forces" not in predicted:
        return arrays
    forces, keep = _flat(predicted["forces"], dataset), np.ones(len(dataset.z), dtype=bool)
    if dataset.fixed is not None:
        free = ~np.asarray(dataset.fixed)
        forces, keep = forces * free[:, None], free if atoms == "free" else keep
    half = _half(forces, "forces")
    chunks = [half[a:b][keep[a:b]] for a, b in ((dataset.ptr[i], dataset.ptr[i + 1]) for i in order)]
    counts = [len(chunk) for chunk in chunks]
    return arrays | {"forces": np.concatenate(chunks), "chunk_idx": np.cumsum(counts)[:-1].astype(np.int64)}


def _flat(forces: Any, dataset: MolecularDataset) -> np.ndarray:
    """Forces as (A, 3), from any form that `predict` returns."""
    is_one = isinstance(forces, np.ndarray)
    flat = forces.reshape(-1, 3) if is_one else np.concatenate([np.asarray(part).reshape(-1, 3) for part in forces])
    if flat.shape != (len(dataset.z), 3) or (not is_one and [len(part) for part in forces] != dataset.counts.tolist()):
        raise DataError(f"forces are of {len(flat)} atoms; the structures have {len(dataset.z)}")
    return flat.astype(np.float64, copy=False)


def _half(values: np.ndarray, name: str) -> np.ndarray:
    """Values as float16, if they fit."""
    bad = np.flatnonzero(~(np.abs(values) <= np.finfo(np.float16).max).reshape(len(values), -1).all(axis=1))
    if len(bad):
        raise DataError(f"{name} of row {bad[0]} is {values[bad[0]]}; float16 holds finite numbers up to 65504")
    return values.astype(np.float16)
