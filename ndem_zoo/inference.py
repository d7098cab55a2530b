"""Predictions for whole datasets, batch by batch: what validation, `predict` and `evaluate` share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from ndem_zoo.models.potential import Potential
from ndem_zoo.sampling import Collator, atom_indices, load, size_batches

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset
    from ndem_zoo.distributed import Peers


def predict_columns(
    potential: Potential,
    dataset: MolecularDataset,
    batch_size: int,
    need_forces: bool = True,
    peers: Peers | None = None,
) -> dict[str, np.ndarray]:
    """Predictions for every structure, in the dataset's order.

    Parameters
    ----------
    potential
        On the device and in the dtype to compute with; put into evaluation mode, and back afterwards.
    dataset
        Structures.
    batch_size
        Largest number of structures in a batch. Structures of similar size go together, the largest first, with limits
        on atoms and edges (`sampling.size_batches`): one large structure among many small ones goes alone.
    need_forces
        False skips the forces.
    peers
        Processes with the same weights and structures, each of which predicts a part of the batches and gets all; all of
        them make the same call.

    Returns
    -------
    columns : dict
        The target, such as ``"energy"``: (S,) in eV or its own unit; and, if the potential has them, ``"forces"``
        (A, 3) in eV/Å; both float64.
    """
    parameter = next(potential.parameters())
    cutoff = potential.backbone.cutoff
    columns = {potential.target: np.zeros(len(dataset))}
    if potential.force_mode != "none" and need_forces:
        columns["forces"] = np.zeros((len(dataset.z), 3))
    order = size_batches(dataset, batch_size, cutoff, nearest=potential.backbone.nearest)
    if peers is not None:
        order = [order[number] for number in peers.part(len(order))]
    place = {"nearest": potential.backbone.nearest, "device": parameter.device}
    collate = Collator(dataset, cutoff, parameter.dtype, with_targets=False, **place)
    was_training = potential.training
    potential.eval()
    try:
        with torch.no_grad(), contextlib.closing(load(collate, order)) as batches:
            for indices, batch in zip(order, batches, strict=True):
                prediction = potential(batch, need_forces=need_forces)
                columns[potential.target][indices] = prediction.value.double().cpu().numpy()
                if prediction.forces is not None:
                    atoms, _ = atom_indices(dataset.ptr, indices)
                    columns["forces"][atoms] = prediction.forces.double().cpu().numpy()
    finally:
        potential.train(was_training)
    if peers is not None:
        for column in columns.values():
            peers.add_up(column)  # what others predict is 0 here
    return columns
