"""Structures as plain tensors (`Batch`), and the way to and from DGL graphs.

`Batch` is what backbones, heads and objectives see: atoms of all structures in one row, edges between them, on one
device. This is the only module that knows the field names of a `DGLGraph` and how to import DGL. What the numbers mean
(energies, units, reference energies) is not known here; neighbor lists of single structures come from `featurizers`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ndem_zoo.errors import DataError

if TYPE_CHECKING:
    from dgl import DGLGraph

#: Choice: up to this many atoms a free molecule gets all its pairs as edges, so that no neighbor list is ever rebuilt.
ALL_PAIRS_UP_TO = 32

#: Targets and extras with one row per atom; everything else has one row per structure.
PER_ATOM = frozenset({"forces"})

#: Choice: distances that differ by less, in Å, are equal when nearest neighbors are chosen, so that the choice among
#: symmetric atoms follows the index of the neighbor, then its image, and not the last bit.
TIE = 1e-4

#: Weights of the cell vectors that number images: shift . (w1 a1 + w2 a2 + w3 a3) stays when a structure is rotated.
_IMAGE_WEIGHTS = (0.5257311121191336, 0.6180339887498949, 0.5844443852190474)

#: A limit that is not strict also keeps neighbors whose *squared* distance exceeds that of the first one left out by less
#: than this, in Å² (fairchem's value).
DEGENERATE = 0.01

#: Choice: structures farther than this from the origin, in Å, are moved there before positions are rounded to float32,
#: which resolves 4e-6 Å at this distance.
FAR = 64.0

#: Where neighbors are searched for with cell lists (vesin); elsewhere all images of all pairs are compared, on the device.
LISTS_ON = ("cpu",)

#: Choice: so many pairs and images are looked at together when edges are made on a GPU: 0.4 GB for all their
#: vectors.
PAIRS_AT_ONCE = 1 << 24


class Nearest(NamedTuple):
    """A limit on the neighbors of a center: only the nearest ones count.

    Attributes
    ----------
    number
        How many.
    strict
        True: exactly so many, equally near ones by their index and image. False: also those that are about as far as the first
        one left out, so that symmetric atoms are treated alike.
    """

    number: int
    strict: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Structures side by side: the only input of backbones, heads and objectives.

    Attributes
    ----------
    z : (N,) int64
        Atomic numbers.
    pos : (N, 3)
        Positions in Å.
    src, dst : (E,) int64
        Edges from neighbor j = `src` to center i = `dst`; no self-loops.
    shift : (E, 3)
        Cartesian image shift of the neighbor in Å; zeros without periodic boundaries.
    system : (N,) int64
        Structure of each atom, ascending.
    n_systems : int
        Number of structures S.
    cutoff : float
        Radius in Å that the edges were built with, skin included; ``inf`` when all pairs are edges.
    nearest : Nearest or None
        Limit on the edges into one atom that they were built with; None when they are complete up to `cutoff`.
    cell : (S, 3, 3)
        Cell vectors as rows in Å; zeros for a structure that is not periodic.
    fixed : (N,) bool
        Atoms that must not move.
    targets, extras : mapping of tensors
        Labels, and whatever an objective needs besides; one row per atom or per structure. Labels stay float64.
    """

    z: Int[Tensor, " N"]
    pos: Float[Tensor, "N 3"]
    src: Int[Tensor, " E"]
    dst: Int[Tensor, " E"]
    shift: Float[Tensor, "E 3"]
    system: Int[Tensor, " N"]
    n_systems: int
    cutoff: float
    cell: Float[Tensor, "S 3 3"]
    fixed: Bool[Tensor, " N"]
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    nearest: Nearest | None = None

    def vectors(self) -> Float[Tensor, "E 3"]:
        """Vectors r_ij = pos[src] + shift - pos[dst] in Å, from the center i to the neighbor j."""
        return self.pos.index_select(0, self.src) + self.shift - self.pos.index_select(0, self.dst)

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields replaced; the tensors that stay are shared."""
        return replace(self, **changes)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """A copy on `device` with the geometry in `dtype`; labels keep their dtype (rule: float64 until centered)."""

        def move(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return tensor.to(device=device, dtype=dtype, non_blocking=True)

        return self.replace(
            **{name: move(getattr(self, name), dtype) for name in ("pos", "shift", "cell")},
            **{name: move(getattr(self, name)) for name in ("z", "src", "dst", "system", "fixed")},
            targets={name: move(value) for name, value in self.targets.items()},
            extras={name: move(value) for name, value in self.extras.items()},
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, labels included."""
        fields = (self.z, self.pos, self.src, self.dst, self.shift, self.system, self.cell, self.fixed)
        return [*fields, *self.targets.values(), *self.extras.values()]

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of a batch that was made on another CUDA stream until `stream` is done with it, too."""
        for tensor in self.tensors():
            tensor.record_stream(stream)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which a GPU copies without waiting."""
        tensors = ("z", "pos", "src", "dst", "shift", "system", "cell", "fixed")
        return self.replace(
            **{name: getattr(self, name).pin_memory() for name in tensors},
            targets={name: value.pin_memory() for name, value in self.targets.items()},
            extras={name: value.pin_memory() for name, value in self.extras.items()},
        )

    @property
    def n_atoms(self) -> Int[Tensor, " S"]:
        """Number of atoms of each structure, on the batch's device."""
        return torch.zeros(self.n_systems, dtype=torch.long, device=self.z.device).index_add_(
            0, self.system, torch.ones_like(self.system)
        )

    @property
    def starts(self) -> Int[Tensor, " S"]:
        """Row of the first atom of each structure."""
        n_atoms = self.n_atoms
        return torch.cumsum(n_atoms, 0) - n_atoms

    @property
    def places(self) -> Int[Tensor, " N"]:
        """Number of each atom within its structure."""
        return torch.arange(len(self.z), device=self.z.device) - self.starts.index_select(0, self.system)


# --------------------------------------------------------------------------------------------------------------- sums


def sum_over_neighbors(values: Tensor, batch: Batch) -> Tensor:
    """Sum edge values (E, ...) over the neighbors of each center: (N, ...)."""
    return sum_by_index(values, batch.dst, batch.z.shape[0])


def sum_over_atoms(values: Tensor, batch: Batch) -> Tensor:
    """Sum atom values (N, ...) over each structure: (S, ...)."""
    return sum_by_index(values, batch.system, batch.n_systems)


def mean_over_atoms(values: Tensor, batch: Batch) -> Tensor:
    """Average atom values (N, ...) over each structure: (S, ...)."""
    counts = batch.n_atoms.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
    return sum_over_atoms(values, batch) / counts


def sum_by_index(values: Tensor, index: Int[Tensor, " E"], size: int) -> Tensor:
    """Add the rows of `values` that share an index: (size, ...); of half precision in float32."""
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()  # many small numbers of 8 bits do not add up
    return values.new_zeros((size, *values.shape[1:])).index_add(0, index, values)


# -------------------------------------------------------------------------------------------------------------- edges


def all_pairs(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """All ordered pairs within structures of `counts` atoms: (src, dst), each (E,) int64, sorted by center."""
    counts = np.asarray(counts, dtype=np.int64)
    sizes = set(counts.tolist())
    if len(counts) > 1 == len(sizes) and 0 < (size := sizes.pop()) <= ALL_PAIRS_UP_TO:  # frames of one molecule, say
        src, dst = (np.arange(0, len(counts) * size, size)[:, None] + _pairs_of_one(size)).reshape(2, -1)
        return src, dst
    starts = np.cumsum(counts) - counts
    degree = np.repeat(counts - 1, counts)  # (N,), edges of each center
    dst = np.repeat(np.arange(len(degree)), degree)
    # The edges of a center count up from the first atom of its structure, and leave out the center itself.
    src = np.arange(len(dst)) + np.repeat(np.repeat(starts, counts) - (np.cumsum(degree) - degree), degree)
    return src + (src >= dst), dst


@lru_cache(maxsize=ALL_PAIRS_UP_TO)
def _pairs_of_one(n: int) -> np.ndarray:
    """Those of a single structure: (2, 1, E), not to be written into."""
    return np.stack(all_pairs([n]))[:, None]


def neighbor_list(
    pos: np.ndarray, cutoff: float, cell: np.ndarray | None = None, pbc: Sequence[bool] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of one structure that are closer than `cutoff`, periodic images included.

    Parameters
    ----------
    pos : (n, 3)
        Positions in Å.
    cutoff
        Radius in Å.
    cell : (3, 3), optional
        Cell vectors as rows in Å.
    pbc : three booleans, optional
        Which cell vectors are periodic.

    Returns
    -------
    src, dst : (E,) int64
        Neighbor and center, sorted by center.
    shift : (E, 3) float64
        Cartesian image shift of the neighbor in Å.

    Raises
    ------
    DataError
        If a position is not finite. All else is checked where structures come in (`datasets.checks`).
    """
    from ase.geometry import complete_cell
    from vesin import NeighborList

    pbc = np.zeros(3, dtype=bool) if pbc is None else np.asarray(pbc, dtype=bool)
    if not np.isfinite(pos).all():
        atom = int(np.flatnonzero(~np.isfinite(pos).all(axis=1))[0])
        raise DataError(f"position of atom {atom} is {pos[atom]}; neighbors are searched for among finite numbers")
    # Directions that are not periodic may have no cell vector; the search wants a box of full rank all the same.
    box = np.zeros((3, 3)) if cell is None or not pbc.any() else complete_cell(np.where(pbc[:, None], cell, 0.0))
    calculator = NeighborList(cutoff=float(cutoff), full_list=True, sorted=True)
    # Pitfall: vesin wants points and box of one dtype, and returns unsigned indices.
    center, neighbor, image = calculator.compute(
        points=np.ascontiguousarray(pos, dtype=np.float64), box=box, periodic=pbc, quantities="ijS"
    )
    shift = image.astype(np.float64) @ box if pbc.any() else np.zeros((len(center), 3))
    return neighbor.astype(np.int64), center.astype(np.int64), shift


def into_cell(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Images of atoms at `pos` (n, 3), in Å, that are inside of the `cell` (3, 3) in its periodic directions `pbc` (3,)."""
    from ase.geometry import complete_cell

    pbc = np.asarray(pbc, dtype=bool)
    box = complete_cell(np.where(pbc[:, None], cell, 0.0))
    return pos - (np.floor(pos @ np.linalg.inv(box)) * pbc) @ box


def near_origin(
    pos: np.ndarray,
    counts: np.ndarray,
    dtype: torch.dtype,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | None = None,
) -> np.ndarray:
    """Positions that can be rounded to `dtype`: structures that are far from the origin are moved there.

    Neither energies nor forces depend on where a structure is, but float32 numbers are the coarser the larger they are. Most
    structures are near the origin and stay as they are; of the others, atoms of crystals go into the cell, too.

    Parameters
    ----------
    pos : (N, 3)
        Positions in Å, float64.
    counts : (S,)
        Atoms of each structure.
    dtype
        What they are rounded to; nothing is moved for float64.
    cell, pbc : (S, 3, 3) and (S, 3), optional
        Cells as rows in Å, and which of the rows are periodic.

    Returns
    -------
    pos : (N, 3)
        In Å; `pos` itself if all are near.
    """
    if dtype == torch.float64 or not len(pos) or not max(pos.max(), -pos.min()) > FAR:
        return pos
    moved = np.array(pos, dtype=np.float64)
    stops = np.cumsum(counts)
    for i, (start, stop) in enumerate(zip(stops - counts, stops, strict=True)):
        own = moved[start:stop]
        if not len(own) or np.abs(own).max() <= FAR:
            continue
        if cell is not None and pbc is not None and np.any(pbc[i]):
            own = into_cell(own, cell[i], pbc[i])
        moved[start:stop] = own - own.mean(axis=0) if np.abs(own).max() > FAR else own
    return moved


def image_numbers(shift: Float[Tensor, "E 3"], cell: Float[Tensor, "... 3 3"]) -> Float[Tensor, " E"]:
    """A number that is equal for equal images of a cell (3, 3), or of each edge's own (E, 3, 3), however it is rotated."""
    cell = cell.double()
    direction = torch.einsum("...kj,k->...j", cell, cell.new_tensor(_IMAGE_WEIGHTS))
    return (shift.double() * direction).sum(-1)


def nearest_edges(
    distance: Float[Tensor, " E"],
    src: Int[Tensor, " E"],
    dst: Int[Tensor, " E"],
    n_atoms: int,
    nearest: Nearest,
    image: Float[Tensor, " E"] | None = None,
) -> Bool[Tensor, " E"]:
    """Mask (E,) of the edges from the nearest neighbors of each center, with fairchem's two meanings of a limit.

    Parameters
    ----------
    distance : (E,)
        Lengths of the edges in Å.
    src, dst : (E,) int64
        Neighbors and centers.
    n_atoms
        Number of atoms N.
    nearest
        The limit. Strict: see `TIE`; not strict: see `DEGENERATE`.
    image : (E,), optional
        Which image of the neighbor it is (`image_numbers`); decides between those that are equally near.
    """
    limit, strict = nearest
    order = _by_center_and_distance(distance, src, dst, n_atoms, strict, image)
    center = dst.index_select(0, order)
    degree = torch.zeros(n_atoms, dtype=torch.long, device=dst.device).index_add_(0, dst, torch.ones_like(dst))
    first = torch.cumsum(degree, 0) - degree  # where the edges of a center begin
    place = torch.arange(len(dst), device=dst.device) - first.index_select(0, center)
    kept = place < limit
    if not strict:
        square = distance.double().square().index_select(0, order)
        bound = square.new_full((n_atoms,), math.inf)
        bound.index_copy_(0, center[place == limit], square[place == limit] + DEGENERATE)
        kept = square <= bound.index_select(0, center)
    return torch.zeros_like(kept).index_copy_(0, order, kept)


def _by_center_and_distance(
    distance: Tensor, src: Tensor, dst: Tensor, n_atoms: int, strict: bool, image: Tensor | None
) -> Tensor:
    """Order (E,) of the edges by center, then length (in steps of `TIE` if strict), then neighbor, then image."""
    rank = torch.round(distance.double() / TIE) if strict else distance.double()
    keys = [] if image is None else [torch.round(image / TIE)]
    if strict and n_atoms <= 1 << 19:  # three keys in one number: one search for the order instead of three
        steps = rank.clamp(max=(1 << 20) - 1).long()  # up to 100 Å
        keys.append((dst << 39) | (steps << 19) | src)
    else:
        keys += [src, rank, dst]
    order = _stable_order(keys[0])
    for key in keys[1:]:
        order = order.index_select(0, _stable_order(key.index_select(0, order)))
    return order


def _stable_order(key: Tensor) -> Tensor:
    """`torch.argsort`, which on a CPU is several times slower than numpy's."""
    if key.device.type == "cpu":
        return torch.from_numpy(np.argsort(key.numpy(), kind="stable"))
    return torch.argsort(key, stable=True)


def within(batch: Batch, cutoff: float, nearest: Nearest | None = None) -> Batch:
    """`batch` without the edges that are not shorter than `cutoff` Å, and of those that are, only the nearest.

    For backbones whose result would depend on the others; reads the number of edges, so a GPU is waited for.
    """
    with torch.no_grad():
        distance = batch.vectors().norm(dim=-1)
        kept = (distance < cutoff).nonzero().flatten()
        if nearest is not None and nearest != batch.nearest:
            length, src, dst, shift = (t.index_select(0, kept) for t in (distance, batch.src, batch.dst, batch.shift))
            image = image_numbers(shift, batch.cell.index_select(0, batch.system.index_select(0, dst)))
            kept = kept[nearest_edges(length, src, dst, len(batch.z), nearest, image)]
    edges = {name: getattr(batch, name).index_select(0, kept) for name in ("src", "dst", "shift")}
    return batch.replace(**edges, cutoff=min(batch.cutoff, cutoff), nearest=nearest or batch.nearest)


def _needs_search(counts: np.ndarray, pbc: np.ndarray | None) -> bool:
    """Whether edges depend on positions; few free atoms get all pairs."""
    periodic = pbc is not None and bool(np.any(pbc))
    return periodic or not len(counts) or max(counts.tolist()) > ALL_PAIRS_UP_TO


def _periodic_rows(cell: np.ndarray, pbc: np.ndarray) -> Tensor:
    """A cell as batches have it: rows of zeros where it is not periodic."""
    return torch.from_numpy(np.where(np.asarray(pbc, dtype=bool)[:, None], np.asarray(cell, dtype=np.float64), 0.0))


def edges_of(
    pos: np.ndarray,
    counts: np.ndarray,
    cutoff: float,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | None = None,
    nearest: Nearest | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """Edges for structures side by side: all pairs where that is cheap, neighbor lists otherwise.

    Parameters
    ----------
    pos : (N, 3)
        Positions in Å.
    counts : (S,)
        Atoms of each structure.
    cutoff
        Radius in Å of the neighbor lists.
    cell : (S, 3, 3), optional
        Cell vectors as rows in Å.
    pbc : (S, 3), optional
        Which cell vectors are periodic.
    nearest
        Limit on the edges into one atom; all pairs, which need no search, are not limited.

    Returns
    -------
    src, dst : (E,) int64
        Neighbor and center.
    shift : (E, 3) float64 or None
        Image shifts in Å; None when all are zero.
    radius : float
        What the edges are complete up to, in Å: ``inf`` for all pairs.
    """
    periodic = pbc is not None and bool(np.any(pbc))
    if not _needs_search(counts, pbc):
        return *all_pairs(counts), None, math.inf
    stops = np.cumsum(counts)
    found = []
    for i, (start, stop) in enumerate(zip(stops - counts, stops, strict=True)):
        box, flags = (None, None) if pbc is None or cell is None else (cell[i], pbc[i])
        src, dst, shift = neighbor_list(pos[start:stop], cutoff, box, flags)
        if nearest is not None:  # structure by structure: what is thrown away is never there for all of them
            local = np.ascontiguousarray(pos[start:stop], dtype=np.float64)
            distance = np.sqrt(np.square(local[src] + shift - local[dst]).sum(axis=1))
            edges = [torch.from_numpy(values) for values in (distance, src, dst)]
            image = None if box is None else image_numbers(torch.from_numpy(shift), _periodic_rows(box, flags))
            kept = nearest_edges(*edges, int(stop - start), nearest, image).numpy()
            src, dst, shift = src[kept], dst[kept], shift[kept]
        found.append((src + start, dst + start, shift))
    if not found:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), None, float(cutoff)
    src, dst, shift = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return src, dst, shift if periodic else None, float(cutoff)


def edges_on_device(
    pos: Float[Tensor, "N 3"], counts: Int[Tensor, " S"], cutoff: float, cell: Float[Tensor, "S 3 3"]
) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs closer than `cutoff`, periodic images included, on the device of `pos` and without neighbor lists.

    Compares every atom with every image of every other one in its structure: for a GPU, where that beats a transfer.

    Parameters
    ----------
    pos : (N, 3)
        Positions in Å, anywhere in space.
    counts : (S,) int64
        Atoms of each structure.
    cutoff
        Radius in Å.
    cell : (S, 3, 3)
        Cells as rows in Å; rows of zeros are not periodic.

    Returns
    -------
    src, dst : (E,) int64
        Neighbor and center, sorted by center.
    shift : (E, 3)
        Image shifts in Å.
    """
    pos, cell = pos.detach().double(), cell.detach().double()
    periodic = (cell != 0).any(-1)  # (S, 3)
    box = _completed(cell, periodic)
    system = torch.repeat_interleave(torch.arange(len(counts), device=pos.device), counts)
    # Into the cell: image numbers are then bounded by the heights of the cell.
    whole = torch.einsum("ni,nij->nj", pos, torch.linalg.inv(box)[system]).floor() * periodic[system]
    origin = torch.einsum("ni,nij->nj", whole, box[system])
    height = 1.0 / torch.linalg.inv(box).norm(dim=1)  # (S, 3), between opposite faces
    reach = torch.ceil(cutoff / height).long() * periodic
    starts = torch.cumsum(counts, 0) - counts
    found = []
    for first, last in _chunks(counts, reach):
        chunk = slice(first, last)
        images = _images(reach[chunk].amax(0))  # (M, 3)
        number = counts[chunk] ** 2
        of = torch.repeat_interleave(torch.arange(first, last, device=pos.device), number)  # structure of each pair
        place = torch.arange(len(of), device=pos.device) - torch.repeat_interleave(
            torch.cumsum(number, 0) - number, number
        )
        center, neighbor = starts[of] + place // counts[of], starts[of] + place % counts[of]
        direct = (pos - origin)[neighbor] - (pos - origin)[center]
        moved = torch.einsum("mi,sij->smj", images.to(box.dtype), box[chunk])[of - first]  # (P, M, 3)
        square = (direct.unsqueeze(1) + moved).square().sum(-1)
        allowed = (images.abs() <= reach[of].unsqueeze(1)).all(-1)
        itself = (center == neighbor).unsqueeze(1) & (images == 0).all(-1)
        pair, image = ((square < cutoff**2) & allowed & ~itself).nonzero(as_tuple=True)
        shift = moved[pair, image] - origin[neighbor[pair]] + origin[center[pair]]
        found.append((neighbor[pair], center[pair], shift))
    if not found:
        return counts.new_zeros(0), counts.new_zeros(0), pos.new_zeros((0, 3))
    src, dst, shift = (torch.cat(parts) for parts in zip(*found, strict=True))
    return src, dst, shift


def _completed(cell: Float[Tensor, "S 3 3"], periodic: Bool[Tensor, "S 3"]) -> Float[Tensor, "S 3 3"]:
    """Cells of full rank: rows of zeros are replaced by unit vectors perpendicular to the others."""
    from ase.geometry import complete_cell

    if bool(periodic.all()):
        return cell
    return torch.from_numpy(np.stack([complete_cell(box) for box in cell.cpu().numpy()])).to(cell)


def _chunks(counts: Tensor, reach: Tensor) -> list[tuple[int, int]]:
    """Ranges of structures whose pairs and images are few enough to be looked at together."""
    limits, first, pairs, farthest = [], 0, 0, [0, 0, 0]
    for index, (n, own) in enumerate(zip(counts.tolist(), reach.tolist(), strict=True)):
        # All pairs of a chunk see its farthest images.
        largest = [max(both) for both in zip(farthest, own, strict=True)]
        work = (pairs + n * n) * math.prod(2 * r + 1 for r in largest)
        if pairs and work > PAIRS_AT_ONCE:
            limits.append((first, index))
            first, pairs, largest = index, 0, own
        pairs, farthest = pairs + n * n, largest
    return [*limits, (first, len(counts))] if len(counts) else []


def _images(reach: Int[Tensor, " 3"]) -> Int[Tensor, "M 3"]:
    """All triples of image numbers up to `reach` in each direction."""
    return torch.cartesian_prod(*(torch.arange(-int(n), int(n) + 1, device=reach.device) for n in reach))


def rebuild_edges(batch: Batch, cutoff: float, pos: Float[Tensor, "N 3"] | None = None) -> Batch:
    """`batch` with fresh edges up to `cutoff` Å, for atoms at `pos` (default: where they are); limited as before.

    Neighbor lists on a CPU, all images of all pairs on a GPU.
    """
    pos = batch.pos if pos is None else pos
    if pos.device.type not in LISTS_ON:
        src, dst, shift = edges_on_device(pos, batch.n_atoms, cutoff, batch.cell)
        edges = {"src": src, "dst": dst, "shift": shift.to(pos.dtype)}
        fresh = batch.replace(pos=pos, **edges, cutoff=float(cutoff), nearest=None)
        return fresh if batch.nearest is None else within(fresh, cutoff, batch.nearest)
    counts = batch.n_atoms.numpy()
    cell = batch.cell.detach().double().numpy()
    # Pitfall: a Batch knows cells, not flags; a row of zeros means that this direction is not periodic.
    pbc = (cell != 0).any(axis=-1)
    src, dst, shift, radius = edges_of(pos.detach().double().numpy(), counts, cutoff, cell, pbc, batch.nearest)
    return batch.replace(
        pos=pos,
        src=torch.from_numpy(src),
        dst=torch.from_numpy(dst),
        shift=pos.new_zeros((len(src), 3)) if shift is None else torch.from_numpy(shift).to(pos),
        cutoff=radius,
        nearest=None if math.isinf(radius) else batch.nearest,
    )


def displace(batch: Batch, epsilon: Float[Tensor, "N 3"], cutoff: float, reuse_edges: bool = False) -> Batch:
    """Move the atoms by `epsilon` Å, with edges that are complete up to `cutoff` afterwards.

    The edges are kept when they cannot have become incomplete: always when they are all pairs (no device
    synchronization), or when the radius they were built with exceeds `cutoff` by twice the largest displacement. Edges
    to the nearest neighbors alone are searched again.

    Parameters
    ----------
    batch
        Structures.
    epsilon : (N, 3)
        Displacements in Å.
    cutoff
        Radius in Å.
    reuse_edges
        True keeps the edges whatever the displacements: for small noise, where they hardly change. Vectors are new.
    """
    moved = batch.replace(pos=batch.pos + epsilon)
    if reuse_edges or (math.isinf(batch.cutoff) and batch.nearest is None):
        return moved
    # Pitfall: reading the largest displacement waits for a GPU; unavoidable where edges depend on positions.
    if batch.nearest is None and batch.cutoff >= cutoff + 2 * float(epsilon.detach().norm(dim=-1).max()):
        return moved
    return rebuild_edges(moved, cutoff)


def make_batch(
    z: np.ndarray,
    pos: np.ndarray,
    counts: np.ndarray,
    cutoff: float,
    *,
    nearest: Nearest | None = None,
    search: bool = True,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | None = None,
    fixed: np.ndarray | None = None,
    targets: Mapping[str, np.ndarray] | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Assemble a `Batch` on the CPU from columns of numbers.

    Parameters
    ----------
    z : (N,)
        Atomic numbers of all structures, one after the other.
    pos : (N, 3)
        Positions in Å.
    counts : (S,)
        Atoms of each structure.
    cutoff
        Radius in Å up to which edges must be complete.
    nearest
        Limit on the edges into one atom, where neighbors have to be searched for.
    search
        False leaves edges that have to be searched for to `rebuild_edges`: there are none, and the batch's cutoff is 0.
    cell, pbc : (S, 3, 3) and (S, 3), optional
        Cells as rows in Å, and which of the rows are periodic.
    fixed : (N,) bool, optional
        Atoms that must not move.
    targets, extras
        Columns with one row per atom or per structure; kept in their own dtype.
    dtype
        Of the geometry; see `near_origin`.
    """
    counts = np.asarray(counts, dtype=np.int64)
    pos = near_origin(np.asarray(pos), counts, dtype, cell, pbc)
    if search or not _needs_search(counts, pbc):
        src, dst, shift, radius = edges_of(pos, counts, cutoff, cell, pbc, nearest)
    else:
        src, dst, shift, radius = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), None, 0.0
    rows = np.zeros((len(counts), 3, 3)) if cell is None or pbc is None else np.where(pbc[:, :, None], cell, 0.0)
    return Batch(
        z=torch.from_numpy(np.array(z, dtype=np.int64)),
        pos=torch.from_numpy(np.array(pos)).to(dtype),  # a copy: columns of datasets are read-only
        src=torch.from_numpy(src),
        dst=torch.from_numpy(dst),
        shift=torch.zeros((len(src), 3), dtype=dtype) if shift is None else torch.as_tensor(shift, dtype=dtype),
        system=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        n_systems=len(counts),
        cutoff=radius,
        cell=torch.as_tensor(rows, dtype=dtype),
        fixed=torch.zeros(len(z), dtype=torch.bool) if fixed is None else torch.from_numpy(np.array(fixed, dtype=bool)),
        targets={name: torch.from_numpy(np.array(value)) for name, value in (targets or {}).items()},
        extras={name: torch.from_numpy(np.array(value)) for name, value in (extras or {}).items()},
        nearest=None if math.isinf(radius) else nearest,
    )


# ---------------------------------------------------------------------------------------------------------------- DGL


class _NoGraphBolt(types.ModuleType):
    """Stands in for `dgl.graphbolt`, the sampler for giant graphs, where its library does not fit the installed torch."""

    __path__: ClassVar[
        list[str]
    ] = []  # looks like a package, so that imports of its submodules fail with a clear error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"dgl.graphbolt.{name} is not available: this DGL has no GraphBolt for the installed torch")


def _graphbolt_fits(folder: str) -> bool:
    """Whether the GraphBolt in `folder` can be imported beside the installed torch."""
    library = f"libgraphbolt_pytorch_{torch.__version__.split('+')[0]}.so"
    if not os.path.exists(os.path.join(folder, library)):
        return False
    try:
        return importlib.util.find_spec("torchdata.datapipes") is not None
    except ImportError:  # torchdata itself is absent
        return False


def import_dgl() -> types.ModuleType:
    """Import DGL, without the parts of it that clash with newer versions of torch.

    Of DGL 2, only GraphBolt is bound to one version of torch, and ``import dgl`` imports it; a stand-in under its name
    lets the rest of DGL be used. DGL 1.1.3 has no GraphBolt and is left alone.

    Raises
    ------
    ImportError
        If DGL is not installed; names the extra.
    """
    if "dgl" in sys.modules:
        return sys.modules["dgl"]
    spec = importlib.util.find_spec("dgl")
    if spec is None or spec.origin is None:
        raise ImportError("DGL is not installed: pip install 'ndem_zoo[dgl]'")
    os.environ.setdefault("DGLBACKEND", "pytorch")  # otherwise DGL writes ~/.dgl/config.json
    folder = os.path.join(os.path.dirname(spec.origin), "graphbolt")
    stand_in = os.path.isdir(folder) and not _graphbolt_fits(folder)
    if stand_in:
        sys.modules["dgl.graphbolt"] = _NoGraphBolt("dgl.graphbolt")
    try:
        return importlib.import_module("dgl")
    except BaseException:
        if stand_in:
            sys.modules.pop("dgl.graphbolt", None)
        raise


def is_dgl_graph(value: Any) -> bool:
    """Whether `value` is a DGLGraph, without importing DGL for it."""
    dgl = sys.modules.get("dgl")
    return dgl is not None and isinstance(value, dgl.DGLGraph)


def to_dgl(
    z: np.ndarray,
    pos: np.ndarray,
    src: np.ndarray,
    dst: np.ndarray,
    shift: np.ndarray,
    *,
    forces: np.ndarray | None = None,
    energy: float | None = None,
    cell: np.ndarray | None = None,
    pbc: Sequence[bool] | None = None,
    fixed: np.ndarray | None = None,
) -> DGLGraph:
    """One structure as a DGLGraph on the CPU.

    Node data are ``Z`` (n,), ``R`` (n, 3) in Å and, where known, ``F`` (n, 3) in eV/Å and ``fixed`` (n,); edge data ``shift`` (E, 3) in Å.
    DGL has no data per graph, and only node and edge data survive batching, pickling and DeepChem's disk datasets:
    ``energy`` (n,) is the *total* energy of the structure in eV, repeated on each of its atoms, and likewise ``cell``
    (n, 3, 3) in Å and ``pbc`` (n, 3) of a periodic structure. All floats are float64.
    """
    dgl = import_dgl()
    n = len(z)
    graph = dgl.graph((torch.as_tensor(src), torch.as_tensor(dst)), num_nodes=n)
    graph.ndata["Z"] = torch.from_numpy(np.array(z, dtype=np.int64))
    graph.ndata["R"] = torch.as_tensor(np.array(pos, dtype=np.float64))
    graph.edata["shift"] = torch.as_tensor(np.asarray(shift, dtype=np.float64))
    if forces is not None:
        graph.ndata["F"] = torch.as_tensor(np.array(forces, dtype=np.float64))
    if energy is not None:
        graph.ndata["energy"] = torch.full((n,), float(energy), dtype=torch.float64)
    if fixed is not None:
        graph.ndata["fixed"] = torch.from_numpy(np.array(fixed, dtype=bool))
    if cell is not None and pbc is not None and np.any(pbc):
        graph.ndata["cell"] = torch.as_tensor(np.array(cell, dtype=np.float64)).expand(n, 3, 3).contiguous()
        graph.ndata["pbc"] = torch.as_tensor(np.array(pbc, dtype=bool)).expand(n, 3).contiguous()
    return graph


def from_dgl(graphs: DGLGraph | Sequence[DGLGraph], cutoff: float, dtype: torch.dtype = torch.float32) -> Batch:
    """One or several DGLGraphs as a `Batch`, with the edges that the graphs have.

    Parameters
    ----------
    graphs
        A graph, a batched graph, or a sequence of graphs with the fields of `to_dgl`.
    cutoff
        Radius in Å up to which their edges are complete; a DGLGraph does not know it.
    dtype
        Of the geometry.

    Raises
    ------
    DataError
        If a graph lacks ``Z`` or ``R``, their shapes or dtypes are others, or it has self-loops, which backbones add
        themselves.
    """
    dgl = import_dgl()
    graph = graphs if isinstance(graphs, dgl.DGLGraph) else dgl.batch(list(graphs))
    for name in ("Z", "R"):
        if name not in graph.ndata:
            raise DataError(f"the graph has no ndata['{name}']; it has {sorted(graph.ndata)}")
    check_node_data(graph)
    src, dst = graph.edges()
    shift = graph.edata.get("shift", torch.zeros(len(src), 3, device=src.device)).to(dtype)
    is_loop = src == dst
    if "cell" in graph.ndata:  # an edge to an image of the atom itself is none
        is_loop = is_loop & (shift == 0).all(-1)
    # Pitfall: dgl.add_self_loop gives its edges a shift of ones, so the shift alone does not tell.
    if bool(is_loop.any()):
        raise DataError("the graph has self-loops; remove them with dgl.remove_self_loop, the models add their own")
    counts = graph.batch_num_nodes()
    first = torch.cumsum(counts, 0) - counts
    cell = torch.zeros(len(counts), 3, 3, dtype=dtype)
    if "cell" in graph.ndata:
        cell = (graph.ndata["cell"] * graph.ndata["pbc"][:, :, None]).index_select(0, first).to(dtype)
    pos = graph.ndata["R"]
    if pos.device.type == "cpu" and pos.dtype != dtype:
        pos = torch.from_numpy(near_origin(pos.numpy(), counts.numpy(), dtype))
    targets = {"forces": graph.ndata["F"]} if "F" in graph.ndata else {}
    if "energy" in graph.ndata:
        targets["energy"] = graph.ndata["energy"].index_select(0, first)
    return Batch(
        z=graph.ndata["Z"].long(),
        pos=graph.ndata["R"].to(dtype),
        src=src.long(),
        dst=dst.long(),
        shift=shift,
        system=torch.repeat_interleave(torch.arange(len(counts), device=src.device), counts),
        n_systems=len(counts),
        cutoff=float(cutoff),
        cell=cell,
        fixed=graph.ndata.get("fixed", torch.zeros(graph.num_nodes(), dtype=torch.bool, device=src.device)),
        targets=targets,
    )


def check_node_data(graph: DGLGraph) -> None:
    """Raise DataError for node data whose shapes are not those of `to_dgl`, or whose dtypes are of another kind."""
    reals, integers = (
        (torch.float16, torch.float32, torch.float64),
        (torch.int64, torch.int32, torch.int16, torch.uint8),
    )
    known = {
        "Z": ((), (*integers, torch.int8)),
        "R": ((3,), (*reals, *integers)),
        "F": ((3,), reals),
        "energy": ((), reals),
        "fixed": ((), (torch.bool,)),
        "cell": ((3, 3), reals),
        "pbc": ((3,), (torch.bool,)),
    }
    n = graph.num_nodes()
    for name, (shape, dtypes) in known.items():
        values = graph.ndata.get(name)
        if values is not None and (values.shape[1:] != shape or values.dtype not in dtypes):
            raise DataError(
                f"ndata['{name}'] has shape {tuple(values.shape)} and dtype {values.dtype}; needed are {(n, *shape)} and "
                f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
            )
    empty = (graph.batch_num_nodes() == 0).nonzero().flatten().tolist()
    if empty:
        where = "it" if graph.batch_size == 1 else f"structure {empty[0]} of the batch"
        raise DataError(f"{where} has no atoms; allowed is one or more")
    if ("cell" in graph.ndata) != ("pbc" in graph.ndata):
        raise DataError("the graph has only one of ndata['cell'] and ndata['pbc']; a periodic structure needs both")
    if "cell" in graph.ndata:
        is_flat = (graph.ndata["pbc"] & (graph.ndata["cell"] == 0).all(-1)).any(-1).nonzero().flatten()
        if len(is_flat):
            pbc = graph.ndata["pbc"][is_flat[0]].tolist()
            raise DataError(
                f"atom {int(is_flat[0])} has pbc={pbc} and a cell vector of zeros along a periodic direction"
            )
