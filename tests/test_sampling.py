"""Batches from columns: the right rows for every kind of column, in the order asked for."""

from __future__ import annotations

import numpy as np
import pytest

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import DataError
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet, TorchMDNet
from ndem_zoo.sampling import collate, epoch_batches, step_seed


def mixed_sizes(z_last: int = 8) -> MolecularDataset:
    """Structures of 1, 2 and 3 atoms whose labels say where they come from."""
    counts = [1, 2, 3]
    atoms = np.arange(6, dtype=float)
    return MolecularDataset(
        np.array([1, 1, 8, 1, 6, z_last]),
        np.stack([1.5 * atoms, 0.3 * atoms**2, 0 * atoms], axis=1),
        np.concatenate([[0], np.cumsum(counts)]),
        targets={"energy": np.array([10.0, 20.0, 30.0]), "forces": np.repeat(atoms[:, None], 3, axis=1)},
        extras={"charges": atoms * 100, "smiles": np.array(["a", "b", "c"])},
    )


def test_rows_of_structures_and_atoms():
    batch = collate(mixed_sizes(), np.array([2, 0]), cutoff=5.0)
    assert batch.z.tolist() == [1, 6, 8, 1]
    assert batch.system.tolist() == [0, 0, 0, 1]
    assert batch.targets["energy"].tolist() == [30.0, 10.0]
    assert batch.targets["forces"][:, 0].tolist() == [3.0, 4.0, 5.0, 0.0]
    # a column of atoms with a name that nobody declared, and one that is no number
    assert batch.extras["charges"].tolist() == [300.0, 400.0, 500.0, 0.0]
    assert "smiles" not in batch.extras
    assert set(zip(batch.src.tolist(), batch.dst.tolist(), strict=True)) == {
        (0, 1),
        (1, 0),
        (0, 2),
        (2, 0),
        (1, 2),
        (2, 1),
    }


def test_an_epoch_visits_every_structure_once():
    epochs = [np.concatenate(epoch_batches(10, 4, seed=3, epoch=e)) for e in range(3)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert [len(b) for b in epoch_batches(10, 4, seed=3, epoch=0)] == [4, 4, 2]
    assert np.array_equal(epochs[2], np.concatenate(epoch_batches(10, 4, seed=3, epoch=2)))


def test_seeds_of_steps_differ():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4000
    assert max(seeds) < 2**63, "torch's generators take signed 64-bit seeds"


def test_an_element_beyond_the_embedding_is_refused_by_name():
    model = NDeMTorchMDNet(backbone_options=TorchMDNet.tiny, progress=False)
    with pytest.raises(DataError, match=r"structure 2: atomic number 100; this backbone knows those below 100"):
        model.fit(mixed_sizes(z_last=100), max_steps=1)
    assert not hasattr(model, "potential_")
