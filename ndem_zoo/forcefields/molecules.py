"""Tables of bonded terms by molecule, and which molecule each structure of a batch is.

A structure is recognized by its sequence of atomic numbers, on the device: in a simulation bonds must not depend on the
geometry. So two molecules of one force field must not have the same sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import DataError
from ndem_zoo.graph import Batch

if TYPE_CHECKING:
    from rdkit.Chem import Mol

#: An odd number with mixed bits (Knuth's multiplier of a linear congruential generator): products with it, modulo 2^64,
#: spread neighboring numbers over all bits.
_MIXER = 6364136223846793005


def sequence_keys(z: Int[Tensor, " N"], system: Int[Tensor, " N"], n_atoms: Int[Tensor, " S"]) -> Int[Tensor, " S"]:
    """A number for each structure that depends on its atomic numbers and their order."""
    first = torch.cumsum(n_atoms, 0) - n_atoms
    place = torch.arange(z.shape[0], device=z.device) - first.index_select(0, system)
    # A mixed bit pattern of (place, z); integer products wrap around.
    mixed = (place * 128 + z + 1) * _MIXER
    mixed = (mixed ^ (mixed >> 29)) * _MIXER
    mixed = mixed ^ (mixed >> 32)
    return torch.zeros(n_atoms.shape[0], dtype=torch.long, device=z.device).index_add(0, system, mixed)


def keys_of(dataset: MolecularDataset) -> Int[np.ndarray, " S"]:
    """The same for all structures of a dataset."""
    z = torch.from_numpy(dataset.z.astype(np.int64))
    n_atoms = torch.as_tensor(np.diff(dataset.ptr))
    system = torch.repeat_interleave(torch.arange(len(n_atoms)), n_atoms)
    return sequence_keys(z, system, n_atoms).numpy()


def distinct_molecules(dataset: MolecularDataset) -> tuple[list[Mol], Int[np.ndarray, " M"]]:
    """The molecules of a dataset, and the key of each.

    Raises
    ------
    DataError
        If two molecules have the same elements in the same order, or bonds cannot be found; names the structures.
    """
    from ndem_zoo.topology import perceive  # imports chemistry on request

    found = perceive(dataset)
    first = [int(np.flatnonzero(found.index == number)[0]) for number in range(len(found.mols))]
    keys = keys_of(dataset)[first]
    for number in range(len(keys)):
        same = np.flatnonzero(keys[:number] == keys[number])
        if len(same):
            raise DataError(
                f"structures {first[same[0]]} and {first[number]} have the same elements in the same order but other "
                "bonds; a force field with bonds could not tell them apart: number their atoms differently, or use the "
                "force field 'pairs', which has no bonds"
            )
    return found.mols, keys


def check_known(dataset: MolecularDataset, keys: Int[Tensor, " M"], owner: str) -> None:
    """Raise DataError for a structure that is none of the molecules `keys`."""
    bad = np.flatnonzero(~np.isin(keys_of(dataset), keys.cpu().numpy()))
    if len(bad):
        atoms = slice(dataset.ptr[bad[0]], dataset.ptr[bad[0] + 1])
        raise DataError(
            f"structure {bad[0]}: {owner} has no molecule with the atomic numbers {dataset.z[atoms].tolist()} in this "
            f"order; it was made for {len(keys)}, those of its training data"
        )


def molecule_of(
    batch: Batch, keys: Int[Tensor, " M"], names_unknown: bool
) -> tuple[Int[Tensor, " S"], Bool[Tensor, " S"]]:
    """Which of the molecules `keys` each structure is, and whether it is one of them.

    Raises
    ------
    DataError
        With `names_unknown`, if a structure is none of them; on a GPU, which would have to be waited for, the second result
        alone says so.
    """
    same = sequence_keys(batch.z, batch.system, batch.n_atoms).unsqueeze(1) == keys  # (S, M)
    if names_unknown and not same.is_cuda and not bool(same.any(dim=1).all()):
        number = int((~same.any(dim=1)).nonzero()[0])
        z = batch.z[batch.system == number].tolist()
        raise DataError(f"structure {number} of the batch: no molecule of the force field has the atomic numbers {z}")
    return same.to(torch.uint8).argmax(dim=1), same.any(dim=1)


def padded(rows: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """Tables (m_k, w) of several molecules as one (M, max m_k, w), filled up with zeros."""
    width = rows[0].shape[1]
    table = torch.zeros(len(rows), max(len(r) for r in rows), width, dtype=dtype)
    for number, values in enumerate(rows):
        table[number, : len(values)] = torch.as_tensor(np.asarray(values)).to(dtype)
    return table


def present(rows: Sequence[np.ndarray]) -> Bool[Tensor, "M T"]:
    """Where `padded` has rows of a molecule."""
    counts = torch.tensor([len(r) for r in rows])
    return torch.arange(int(counts.max()) if len(counts) else 0) < counts.unsqueeze(1)


def numbers_of(mols: Sequence[Mol]) -> Int[Tensor, "M n"]:
    """Atomic numbers of molecules, filled up with zeros."""
    return padded([np.array([[atom.GetAtomicNum()] for atom in mol.GetAtoms()]) for mol in mols], torch.long).squeeze(2)


def positions_of(batch: Batch, atoms: Int[Tensor, "S a b"], known: Bool[Tensor, " S"]) -> Float[Tensor, "S a b 3"]:
    """Positions of atoms given by their numbers within the structures; of an unknown one, which may be too short, anywhere."""
    rows = atoms.masked_fill(~known.view(-1, 1, 1), 0) + batch.starts.view(-1, 1, 1)
    return batch.pos.index_select(0, rows.flatten()).view(*atoms.shape, 3)
