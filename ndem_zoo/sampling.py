"""Which structures come when, and how they become a `Batch`: from columns of numbers, without an object per structure.

`Order` says which structures a step sees, `size_batches` how a prediction is cut up, `Collator` gathers their rows, and
`load` does so one batch ahead of the device where that pays. What is done with a batch is known to the callers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ndem_zoo import graph
from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import ALL_PAIRS_UP_TO, Batch, Nearest, make_batch

if TYPE_CHECKING:
    from ndem_zoo.datasets.base import MolecularDataset
    from ndem_zoo.shares import Cutter

#: Choice: structures whose numbers of atoms differ by less than a factor 2^(1/4) = 1.19 are in one bucket.
BUCKETS_PER_DOUBLING = 4

#: Choice: a batch of predictions has at most about so many atoms and edges; 64 molecules of 21 atoms have 26,880 edges.
MAX_ATOMS, MAX_EDGES = 4096, 32_768

#: Choice: atoms per Å³ where no cell tells: liquid water has 0.10, diamond 0.18.
TYPICAL_DENSITY = 0.12

#: Sizes of batches whose index tensors a `Collator` keeps: the full one, the last of an epoch, and room to spare.
_KEPT_SHAPES = 4


# ---------------------------------------------------------------------------------------------------------------- order


class Order:
    """Which structures each step of a training sees: every structure once per epoch, in an order drawn from the seed.

    The batches of an epoch depend on (seed, epoch) and the sizes of the structures only, so a resumed run needs no
    state but its step.

    Parameters
    ----------
    counts : (S,)
        Atoms of each structure.
    batch_size
        Largest number of structures in a batch; None for no limit, if there is `max_atoms`.
    seed
        Of the shuffling.
    max_atoms
        Largest number of atoms in a batch; None for no limit.
    bucket
        Whether batches are made of structures of similar size: shuffled within buckets of size, and the batches are
        shuffled again.

    Raises
    ------
    ConfigError
        If a structure alone exceeds `max_atoms`; names it.
    """

    def __init__(
        self,
        counts: Int[np.ndarray, " S"],
        batch_size: int | None,
        seed: int,
        *,
        max_atoms: int | None = None,
        bucket: bool = False,
    ) -> None:
        self.counts, self.batch_size, self.seed = np.asarray(counts, dtype=np.int64), batch_size, seed
        self.max_atoms, self.bucket = max_atoms, bucket
        if max_atoms is not None and (self.counts > max_atoms).any():
            index = int(np.flatnonzero(self.counts > max_atoms)[0])
            raise ConfigError(f"structure {index} has {self.counts[index]} atoms, more than max_atoms={max_atoms}")
        self.batches = functools.lru_cache(maxsize=2)(self._batches)  # an epoch, and the one that is begun ahead of it

    def _batches(self, epoch: int) -> list[Int[np.ndarray, " B"]]:
        """Structures of each batch of an epoch; the last batch may be smaller."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.counts))
        if self.bucket:
            sizes = np.floor(BUCKETS_PER_DOUBLING * np.log2(np.maximum(self.counts, 1)))
            order = order[np.argsort(sizes[order], kind="stable")]
        batches = _cut(order, self.batch_size, [(self.counts, self.max_atoms)])
        return [batches[i] for i in rng.permutation(len(batches))] if self.bucket else batches

    def length(self, epoch: int) -> int:
        """Number of batches of an epoch; only with `max_atoms` do epochs differ."""
        return len(self.batches(epoch)) if self.max_atoms is not None else math.ceil(len(self.counts) / self.batch_size)

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch to which a step belongs, and its place in it; both from 0."""
        if self.max_atoms is None:
            return divmod(step, self.length(0))
        epoch = 0
        while step >= (length := self.length(epoch)):
            step, epoch = step - length, epoch + 1
        return epoch, step

    def after(self, step: int) -> Iterator[Int[np.ndarray, " B"]]:
        """The batches of this step and of all that follow, without end."""
        epoch, position = self.locate(step)
        while True:
            yield from self.batches(epoch)[position:]
            epoch, position = epoch + 1, 0


def _cut(
    order: Int[np.ndarray, " S"], batch_size: int | None, limits: Sequence[tuple[np.ndarray, int | None]]
) -> list[Int[np.ndarray, " B"]]:
    """Cut `order` into pieces as long as possible, with no more than `batch_size` members each.

    `limits` are pairs (weight of each structure, largest sum of weights in a piece); what is heavier alone is alone.
    """
    sums = [(np.cumsum(weights[order]), limit) for weights, limit in limits if limit is not None]
    if not sums:
        return np.split(order, np.arange(batch_size, len(order), batch_size))
    pieces, start = [], 0
    while start < len(order):
        stop = len(order) if batch_size is None else min(len(order), start + batch_size)
        for total, limit in sums:
            before = total[start - 1] if start else 0
            stop = min(stop, int(np.searchsorted(total, before + limit, side="right")))
        pieces.append(order[start : max(stop, start + 1)])
        start += len(pieces[-1])
    return pieces


def size_batches(
    dataset: MolecularDataset, batch_size: int, cutoff: float, members: int = 1, nearest: Nearest | None = None
) -> list[Int[np.ndarray, " B"]]:
    """All structures, largest first, in batches that a prediction has the memory for.

    Parameters
    ----------
    dataset
        Structures.
    batch_size
        Largest number of structures in a batch; `MAX_ATOMS` and `MAX_EDGES` limit it further.
    cutoff
        Radius of the edges in Å.
    members
        Number of models that predict at once, which share all limits.
    nearest
        Limit on the edges into one atom.
    """
    counts = dataset.counts
    order = np.argsort(-counts, kind="stable")  # structures of one size stay in the dataset's order
    limits = [(counts, MAX_ATOMS // members), (expected_edges(dataset, cutoff, nearest), MAX_EDGES // members)]
    return _cut(order, max(1, batch_size // members), limits)


def expected_edges(dataset: MolecularDataset, cutoff: float, nearest: Nearest | None = None) -> np.ndarray:
    """About how many edges each structure has (S,) within `cutoff` (Å), from its size and density."""
    counts = dataset.counts.astype(np.float64)
    density = np.full(len(counts), TYPICAL_DENSITY)
    periodic = np.zeros(len(counts), dtype=bool)
    if dataset.is_periodic:
        periodic = dataset.pbc.any(axis=1)
        volume = np.abs(np.linalg.det(dataset.cell))
        filled = dataset.pbc.all(axis=1) & (volume > 0)
        density[filled] = counts[filled] / volume[filled]
    neighbors = density * (4 / 3) * math.pi * cutoff**3
    others = counts - 1  # without images, nobody has more neighbors
    neighbors = np.where(periodic, neighbors, np.minimum(neighbors, others))
    if nearest is not None:
        neighbors = np.minimum(neighbors, nearest.number)
    return counts * np.where(~periodic & (counts <= ALL_PAIRS_UP_TO), others, neighbors)


def step_seed(seed: int, step: int, *more: int) -> int:
    """A 64-bit seed for the randomness of one step, from (seed, step): the resumed run draws what the first one did.

    `more` numbers make independent seeds for parts of the step.
    """
    return int(np.random.SeedSequence([seed, step, *more]).generate_state(1, np.uint64)[0] >> 1)


# --------------------------------------------------------------------------------------------------------------- batches


def atom_indices(ptr: Int[np.ndarray, " S1"], indices: Int[np.ndarray, " B"]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the atoms of some structures, and how many atoms each has: (A_B,), (B,)."""
    starts = np.asarray(ptr[indices], dtype=np.int64)
    counts = np.asarray(ptr[indices + 1], dtype=np.int64) - starts
    offsets = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return np.arange(counts.sum()) + offsets, counts


class Collator:
    """Makes batches of a dataset's structures.

    Where all structures have the same elements in the same order, are free and get all their pairs as edges (MD17),
    everything but positions and labels is the same in every batch of a size: it is made once, on the device, and shared
    by all of them as the same tensors. A batch is then a gather of the rest.

    Parameters
    ----------
    dataset
        Columns to gather from.
    cutoff
        Radius in Å up to which edges must be complete.
    dtype
        Of the geometry; labels stay float64.
    device
        Where batches go.
    nearest
        Limit on the edges into one atom; see `graph.make_batch`.
    with_targets
        False leaves the labels out.
    """

    def __init__(
        self,
        dataset: MolecularDataset,
        cutoff: float,
        dtype: torch.dtype = torch.float32,
        *,
        nearest: Nearest | None = None,
        device: torch.device | str = "cpu",
        with_targets: bool = True,
    ) -> None:
        self.cutoff, self.dtype, self.device = cutoff, dtype, torch.device(device)
        dataset, self._chosen = dataset.origin()  # where the rows are, and which of its structures are meant
        self.dataset = dataset
        self.nearest = nearest
        self._size = _common_size(dataset)  # 0: batches have nothing in common
        self._pos = self._column(dataset.pos, True)
        columns = {"targets": dataset.targets if with_targets else {}, "extras": dataset.extras}
        self._labels = {
            kind: {name: self._column(value, name in dataset.per_atom) for name, value in _numbers(values).items()}
            for kind, values in columns.items()
        }
        self._known: dict[int, Batch] = {}

    def __call__(self, indices: Int[np.ndarray, " B"]) -> Batch:
        """The structures `indices` as one batch, in this order; it is not waited for the copy to a GPU."""
        indices = np.asarray(indices, dtype=np.int64)
        if self._chosen is not None:
            indices = self._chosen[indices]
        known = self._known.get(len(indices))
        if known is not None:
            structures = torch.from_numpy(indices)
            pos = self._rows(self._pos, True, structures, structures)
            counts = np.full(len(indices), self._size)
            pos = torch.from_numpy(graph.near_origin(pos.numpy(), counts, self.dtype)).to(self.dtype)
            return known.replace(pos=self._move(pos), **self._gather(structures, structures))
        atoms, counts = atom_indices(self.dataset.ptr, indices)
        batch = self._assemble(indices, atoms, counts)
        if self._size:
            if len(self._known) == _KEPT_SHAPES:
                self._known.pop(next(iter(self._known)))
            self._known[len(indices)] = batch
        return batch.replace(**self._gather(torch.from_numpy(indices), torch.from_numpy(atoms)))

    def skeleton(self, indices: Int[np.ndarray, " B"]) -> tuple[Batch, Int[np.ndarray, " B"]]:
        """Which atoms these structures have and which are fixed, with all positions 0 and no edges; and their numbers."""
        indices = np.asarray(indices, dtype=np.int64)
        if self._chosen is not None:
            indices = self._chosen[indices]
        atoms, counts = atom_indices(self.dataset.ptr, indices)
        fixed = None if self.dataset.fixed is None else self.dataset.fixed[atoms]
        z, pos = self.dataset.z[atoms], np.zeros((len(atoms), 3))
        # Without edges: as if each atom were a structure of its own, and then not.
        bare = make_batch(z, pos, np.ones(len(atoms), dtype=np.int64), self.cutoff, fixed=fixed, dtype=self.dtype)
        system = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
        whole = bare.replace(system=system, n_systems=len(counts), cell=bare.cell[: len(counts)])
        return self._placed(whole), counts

    def place(self, rows: Int[np.ndarray, " M"]) -> Int[Tensor, " M"]:
        """Numbers of rows on the device; without waiting."""
        return self._move(torch.from_numpy(rows))

    def _placed(self, batch: Batch) -> Batch:
        """A batch on the device."""
        return (batch.pin_memory() if self.device.type == "cuda" else batch).to(self.device)

    def _column(self, column: np.ndarray, is_per_atom: bool) -> Tensor:
        """A column as a tensor that shares its memory, with a row for each structure where their sizes are equal."""
        if min(column.strides, default=0) < 0:  # torch has no strides that go backwards
            column = np.array(column, order="C")  # not ascontiguousarray: it returns a single row as it is
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writ")  # nobody writes into it
            tensor = torch.from_numpy(np.asarray(column))
        return tensor.view(-1, self._size, *tensor.shape[1:]) if self._size and is_per_atom else tensor

    def _assemble(self, indices: np.ndarray, atoms: np.ndarray, counts: np.ndarray) -> Batch:
        """A batch from nothing, without labels."""
        dataset = self.dataset
        batch = make_batch(
            dataset.z[atoms],
            dataset.pos[atoms],
            counts,
            self.cutoff,
            nearest=self.nearest,
            search=self.device.type in graph.LISTS_ON,
            cell=None if dataset.cell is None else dataset.cell[indices],
            pbc=None if dataset.pbc is None else dataset.pbc[indices],
            fixed=None if dataset.fixed is None else dataset.fixed[atoms],
            dtype=self.dtype,
        )
        batch = self._placed(batch)
        return graph.rebuild_edges(batch, self.cutoff) if batch.cutoff == 0 else batch

    def _gather(self, structures: Tensor, atoms: Tensor) -> dict[str, dict[str, Tensor]]:
        """Labels and extras on the device."""
        per_atom = self.dataset.per_atom
        return {
            kind: {
                name: self._move(self._rows(column, name in per_atom, structures, atoms))
                for name, column in columns.items()
            }
            for kind, columns in self._labels.items()
        }

    def _rows(self, column: Tensor, is_per_atom: bool, structures: Tensor, atoms: Tensor) -> Tensor:
        """Rows of a column for these structures, or their atoms."""
        if is_per_atom and self._size:
            return column.index_select(0, structures).flatten(0, 1)
        return column.index_select(0, atoms if is_per_atom else structures)

    def _move(self, tensor: Tensor) -> Tensor:
        """To the device; without waiting, from page-locked memory."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def collate(
    dataset: MolecularDataset,
    indices: Int[np.ndarray, " B"],
    cutoff: float,
    dtype: torch.dtype = torch.float32,
    with_targets: bool = True,
) -> Batch:
    """The structures `indices` as one `Batch` on the CPU, with edges up to `cutoff` (Å); for more than one see `Collator`."""
    return Collator(dataset, cutoff, dtype, with_targets=with_targets)(indices)


def _numbers(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns that can be tensors: no names, no tags."""
    return {name: column for name, column in columns.items() if column.dtype.kind in "biuf"}


def _common_size(dataset: MolecularDataset) -> int:
    """Atoms of each structure, if all have the same elements in the same order, are free, and have few atoms; else 0."""
    size = int(dataset.ptr[1]) if len(dataset) else 0
    columns = [dataset.pos, *dataset.targets.values(), *dataset.extras.values()]
    if not 0 < size <= ALL_PAIRS_UP_TO or dataset.is_periodic or dataset.fixed is not None:
        return 0
    if not all(column.flags.c_contiguous for column in columns):  # to see its structures as blocks, it would be copied
        return 0
    is_same = (dataset.counts == size).all() and (dataset.z.reshape(-1, size) == dataset.z[:size]).all()
    return size if is_same else 0


# -------------------------------------------------------------------------------------------------------------- loading


def load(collate: Collator | Cutter, order: Iterable[np.ndarray], ahead: bool | None = None) -> Iterator[Any]:
    """The batches of `order`, one after the other.

    Parameters
    ----------
    collate
        Makes them; or cuts them into shares, too.
    order
        Structures of each batch.
    ahead
        Whether a thread of its own makes the next batch (on a GPU: and copies it, on a stream of its own) while this one
        is being used; default: on a GPU only, since a CPU that computes has no time to spare. Batches and their order
        are the same. The thread ends with the iterator: close it. What goes wrong in the thread is raised here when the
        batch is due.
    """
    is_cuda = collate.device.type == "cuda"
    if not (is_cuda if ahead is None else ahead):
        yield from map(collate, order)
        return
    stream = torch.cuda.Stream(collate.device) if is_cuda else None

    def make(indices: np.ndarray) -> tuple[Any, Any]:
        """In the thread: a batch, and the event after which it is there."""
        with torch.cuda.stream(stream) if is_cuda else contextlib.nullcontext():
            return collate(indices), stream.record_event() if is_cuda else None

    pool = ThreadPoolExecutor(1, thread_name_prefix="ndem_zoo-batches")
    try:
        following = None
        for indices in order:
            current, following = following, pool.submit(make, indices)
            if current is not None:
                yield _arrived(*current.result())
        if following is not None:
            yield _arrived(*following.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _arrived(batch: Any, event: Any) -> Any:
    """A batch (or the shares of one) that the current stream may use; the CPU does not wait."""
    if event is not None:
        stream = torch.cuda.current_stream(event.device)
        stream.wait_event(event)
        batch.record_stream(stream)
    return batch
