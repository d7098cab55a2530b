"""Energies and forces of whole datasets, batch by batch: what validation, `predict` and `evaluate` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ndem_zoo.models.potential import Potential
from ndem_zoo.sampling import collate

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset


def predict_columns(
    potential: Potential, dataset: MolecularDataset, batch_size: int, need_forces: bool = True
) -> dict[str, np.ndarray]:
    """Predictions for every structure, in the dataset's order.

    Parameters
    ----------
    potential
        On the device and in the dtype to compute with; put into evaluation mode, and back afterwards.
    dataset
        Structures.
    batch_size
        Structures per batch.
    need_forces
        False skips the forces.

    Returns
    -------
    columns : dict
        ``"energy"`` (S,) in eV and, if the potential has them, ``"forces"`` (A, 3) in eV/Å; both float64.
    """
    parameter = next(potential.parameters())
    was_training = potential.training
    potential.eval()
    energies, forces = [np.zeros(0)], [np.zeros((0, 3))]
    try:
        with torch.no_grad():
            for start in range(0, len(dataset), batch_size):
                indices = np.arange(start, min(start + batch_size, len(dataset)))
                batch = collate(dataset, indices, potential.backbone.cutoff, parameter.dtype, with_targets=False)
                prediction = potential(batch.to(parameter.device), need_forces=need_forces)
                energies.append(prediction.energy.double().cpu().numpy())
                if prediction.forces is not None:
                    forces.append(prediction.forces.double().cpu().numpy())
    finally:
        potential.train(was_training)
    columns = {"energy": np.concatenate(energies)}
    if potential.force_mode != "none" and need_forces:
        columns["forces"] = np.concatenate(forces)
    return columns
