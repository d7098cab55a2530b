"""Which structures come when, and how they become a `Batch`: from columns of numbers, without an object per structure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int

from ndem_zoo.graph import Batch, make_batch

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[Int[np.ndarray, " B"]]:
    """The index arrays of one epoch: a permutation of n that depends on (seed, epoch) only, cut into batches.

    Being a function of its arguments, it needs no state to resume; the last batch may be smaller.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return np.split(order, np.arange(batch_size, n, batch_size))


def step_seed(seed: int, step: int) -> int:
    """A 64-bit seed for the randomness of one step, from (seed, step): the resumed run draws what the first one did."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def atom_indices(ptr: Int[np.ndarray, " S1"], indices: Int[np.ndarray, " B"]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the atoms of some structures, and how many atoms each has: (A_B,), (B,)."""
    starts = np.asarray(ptr[indices], dtype=np.int64)
    counts = np.asarray(ptr[indices + 1], dtype=np.int64) - starts
    offsets = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return np.arange(counts.sum()) + offsets, counts


def collate(
    dataset: MolecularDataset,
    indices: Int[np.ndarray, " B"],
    cutoff: float,
    dtype: torch.dtype = torch.float32,
    with_targets: bool = True,
) -> Batch:
    """The structures `indices` of a dataset as one `Batch` on the CPU.

    Parameters
    ----------
    dataset
        Columns to gather from.
    indices : (B,)
        Structures, in the order wanted.
    cutoff
        Radius in Å up to which edges must be complete.
    dtype
        Of the geometry; labels stay float64.
    with_targets
        False leaves the labels out.
    """
    indices = np.asarray(indices, dtype=np.int64)
    atoms, counts = atom_indices(dataset.ptr, indices)

    def rows(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        numbers = {name: column for name, column in columns.items() if column.dtype.kind in "biuf"}  # no names, no tags
        return {name: column[atoms if name in dataset.per_atom else indices] for name, column in numbers.items()}

    return make_batch(
        dataset.z[atoms],
        dataset.pos[atoms],
        counts,
        cutoff,
        cell=None if dataset.cell is None else dataset.cell[indices],
        pbc=None if dataset.pbc is None else dataset.pbc[indices],
        fixed=None if dataset.fixed is None else dataset.fixed[atoms],
        targets=rows(dataset.targets) if with_targets else None,
        extras=rows(dataset.extras),
        dtype=dtype,
    )
