"""What the contestants compute on: molecules of the embedded sample, clusters of 32 to 512 atoms, boxes of water.

Every input set has geometry of its own, so that nothing can be carried over from one step to the next but what a real
training could carry over too. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndem_zoo.datasets import MolecularDataset, read_sample
from ndem_zoo.graph import Batch, make_batch

#: Å; the MD17 setting.
CUTOFF = 5.0
#: Atoms per Å³, about that of liquid water and of organic solids.
DENSITY = 0.1
#: Å; thermal noise on the sample's frames, so that sets drawn from 300 frames differ in every atom.
JITTER = 0.03

#: Å and degrees, of the gas-phase molecule.
_OH, _HOH = 0.9572, 104.52


@dataclass(frozen=True, eq=False)
class Inputs:
    """One input set: as our `Batch`, and as the columns that it was made of.

    Attributes
    ----------
    batch
        float32, with targets ``energy`` (S,) float64 and ``forces`` (N, 3) in the network's unit.
    z, pos, counts, cell, pbc
        Columns; positions float64 in Å, `cell` None for free molecules.
    box : (3, 3) float32 or None
        The cell as torchmd-net wants it.
    """

    batch: Batch
    z: np.ndarray
    pos: np.ndarray
    counts: np.ndarray
    cell: np.ndarray | None = None
    pbc: np.ndarray | None = None
    box: Tensor | None = None

    def fresh_batch(self, cutoff: float = CUTOFF) -> Batch:
        """Made from the columns again, neighbor list included."""
        return make_batch(self.z, self.pos, self.counts, cutoff, cell=self.cell, pbc=self.pbc)

    def dataset(self) -> MolecularDataset:
        """The columns with the labels, as a dataset."""
        ptr = np.concatenate([[0], np.cumsum(self.counts)])
        targets = {name: value.numpy().astype(np.float64) for name, value in self.batch.targets.items()}
        return MolecularDataset(self.z, self.pos, ptr, targets=targets, cell=self.cell, pbc=self.pbc)

    def first(self, n: int) -> Inputs:
        """The first n structures."""
        if n >= len(self.counts):
            return self
        atoms = int(self.counts[:n].sum())
        targets = {"energy": self.batch.targets["energy"][:n], "forces": self.batch.targets["forces"][:atoms]}
        return _inputs(self.z[:atoms], self.pos[:atoms], self.counts[:n], {k: v.numpy() for k, v in targets.items()})


def _inputs(
    z: np.ndarray, pos: np.ndarray, counts: np.ndarray, targets: dict[str, np.ndarray], cell: np.ndarray | None = None
) -> Inputs:
    cells = None if cell is None else cell[None]
    pbc = None if cell is None else np.ones((1, 3), dtype=bool)
    batch = make_batch(z, pos, counts, CUTOFF, cell=cells, pbc=pbc, targets=targets)
    box = None if cell is None else torch.tensor(cell, dtype=torch.float32)
    return Inputs(batch, z, pos, counts, cells, pbc, box)


@lru_cache(maxsize=4)
def sample(molecule: str) -> Any:
    """The embedded frames."""
    return read_sample(molecule)


def molecule_sets(molecule: str, batch_size: int, n_sets: int = 4, seed: int = 0) -> list[Inputs]:
    """Sets of `batch_size` frames with thermal noise, labels centered and divided by the forces' root mean square."""
    data = sample(molecule)
    rng = np.random.default_rng([seed, batch_size])
    n_atoms = int(data.counts[0])
    pos = data.pos.reshape(-1, n_atoms, 3)
    forces = data.targets["forces"].reshape(-1, n_atoms, 3)
    scale = float(np.sqrt(np.square(forces).mean()))
    energy = (data.targets["energy"] - data.targets["energy"].mean()) / scale
    sets = []
    for _ in range(n_sets):
        rows = rng.choice(len(pos), size=batch_size, replace=batch_size > len(pos))
        moved = pos[rows] + rng.normal(scale=JITTER, size=(batch_size, n_atoms, 3))
        targets = {"energy": energy[rows], "forces": forces[rows].reshape(-1, 3) / scale}
        counts = np.full(batch_size, n_atoms)
        sets.append(_inputs(np.tile(data.z[:n_atoms], batch_size), moved.reshape(-1, 3), counts, targets))
    return sets


def cluster_sets(n_atoms: int, n_sets: int = 4, seed: int = 0) -> list[Inputs]:
    """One free cluster a set: the sites of a cubic lattice nearest to a center, moved, with H, C, N and O on them.

    At `DENSITY`, with no two atoms nearer than 1 Å.
    """
    rng = np.random.default_rng([seed, n_atoms])
    spacing = DENSITY ** (-1 / 3)
    half = int(np.ceil((3 * n_atoms / (4 * np.pi)) ** (1 / 3))) + 2
    axis = np.arange(-half, half + 1, dtype=np.float64)
    sites = spacing * np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    sets = []
    for _ in range(n_sets):
        center = rng.uniform(0, spacing, size=3)
        nearest = np.argsort(np.square(sites - center).sum(axis=1), kind="stable")[:n_atoms]
        moved = sites[nearest] + rng.uniform(-1, 1, size=(n_atoms, 3)) * (spacing - 1.0) / (2 * np.sqrt(3))
        z = rng.choice([1, 6, 7, 8], size=n_atoms, p=[0.5, 0.3, 0.1, 0.1])
        sets.append(_inputs(z, moved, np.array([n_atoms]), _unlabeled(n_atoms)))
    return sets


def water_sets(cells: tuple[int, int, int], n_sets: int = 4, seed: int = 0) -> list[Inputs]:
    """One periodic box of water a set: molecules on a cubic lattice at the density of the liquid, turned at random.

    Has ``3 * product(cells)`` atoms; with at least 4 cells a side a box is wider than twice the cutoff.
    """
    rng = np.random.default_rng([seed, *cells])
    spacing = (3 / DENSITY) ** (1 / 3)
    half = np.deg2rad(_HOH / 2)
    water = np.array(
        [[0, 0, 0], [_OH * np.sin(half), _OH * np.cos(half), 0], [-_OH * np.sin(half), _OH * np.cos(half), 0]]
    )
    sites = spacing * np.stack(np.meshgrid(*map(np.arange, cells), indexing="ij"), axis=-1).reshape(-1, 3)
    z = np.tile([8, 1, 1], len(sites))
    cell = spacing * np.diag(np.array(cells, dtype=np.float64))
    sets = []
    for _ in range(n_sets):
        turned = np.einsum("sij,aj->sai", _rotations(rng, len(sites)), water)
        pos = (sites[:, None] + rng.uniform(-0.1, 0.1, size=(len(sites), 1, 3)) + turned).reshape(-1, 3)
        sets.append(_inputs(z, pos, np.array([len(z)]), _unlabeled(len(z)), cell))
    return sets


def _rotations(rng: np.random.Generator, n: int) -> np.ndarray:
    """Rotations drawn uniformly: (n, 3, 3)."""
    from scipy.spatial.transform import Rotation

    return Rotation.random(n, random_state=rng).as_matrix()


def _unlabeled(n_atoms: int) -> dict[str, np.ndarray]:
    """Zeros: what a step costs does not depend on its labels."""
    return {"energy": np.zeros(1), "forces": np.zeros((n_atoms, 3))}


def edges_within(inputs: Inputs, cutoff: float = CUTOFF) -> int:
    """Directed pairs nearer than the cutoff, without self-pairs."""
    return int((inputs.batch.vectors().norm(dim=-1) < cutoff).sum())


def most_neighbors(inputs: Inputs, cutoff: float = CUTOFF) -> int:
    """Largest number of neighbors of an atom."""
    near = inputs.batch.vectors().norm(dim=-1) < cutoff
    return int(torch.bincount(inputs.batch.dst[near], minlength=1).max())
