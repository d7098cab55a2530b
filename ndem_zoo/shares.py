"""A step's batch, cut into shares: for several processes, or one after the other where memory is short.

All shares together are the batch. Noise is drawn for the whole batch and cut like the batch, and a mean over some rows
counts as much as these rows are of the whole batch's: so a step does not depend on the number of shares, but for rounding.
Which structures a step has is known to `sampling.Order`; who does which share, and how they are added up, to `training`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ndem_zoo.graph import Batch
from ndem_zoo.sampling import Collator, atom_indices, step_seed

#: Choice: atoms that a CPU computes at a time. Few enough for what a step keeps of them to stay near the processor, and many
#: enough to pay for the work around it.
ATOMS_AT_ONCE = 400


class Cut(NamedTuple):
    """What a share is a share of.

    Attributes
    ----------
    whole : Batch
        The step's whole batch, without positions, edges and labels: its structures, and which atoms are fixed.
    structures : (S,)
        The share's structures, as rows of the whole batch.
    atoms : (N,)
        Likewise its atoms.
    number : int
        Of the share, from 0.
    is_empty : bool
        Whether there are more shares than structures, and none is left for this one. It then holds the first structure,
        which counts nothing: every process has to take part in the sum of the gradients.
    """

    whole: Batch
    structures: Int[Tensor, " S"]
    atoms: Int[Tensor, " N"]
    number: int
    is_empty: bool

    def fraction(self, rows: Float[Tensor, " W"]) -> Float[Tensor, ""]:
        """The share's part of a sum over the whole batch's structures; 0 if there is nothing to sum."""
        if self.is_empty:
            return torch.zeros_like(rows[0])
        total = rows.sum()
        return rows.index_select(0, self.structures).sum() / torch.where(total > 0, total, torch.ones_like(total))


class Share(NamedTuple):
    """A part of a step's batch, or all of it.

    Attributes
    ----------
    batch : Batch
        The structures.
    cut : Cut or None
        What it is a share of; None if it is the whole batch.
    """

    batch: Batch
    cut: Cut | None = None


class ShareRng(torch.Generator):
    """Randomness of one share, such that all shares together see what the whole batch would.

    As a generator it is the share's own, and independent of that of other shares. `noise` draws from `common` instead: for
    the whole batch, with the numbers that an undivided batch gets, and then takes the share's rows.

    Parameters
    ----------
    cut
        What the share is a share of.
    seed, step
        What the randomness depends on; see `sampling.step_seed`.
    """

    def __new__(cls, cut: Cut, seed: int, step: int) -> ShareRng:
        return super().__new__(cls, device=cut.whole.pos.device)

    def __init__(self, cut: Cut, seed: int, step: int) -> None:
        self.cut = cut
        self.common = torch.Generator(device=cut.whole.pos.device).manual_seed(step_seed(seed, step))
        self.manual_seed(step_seed(seed, step, 1 + cut.number))


class Shares(tuple[Share, ...]):
    """The shares of a step that one process calculates, one after the other."""

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """See `Batch.record_stream`."""
        for share in self:
            share.batch.record_stream(stream)
            if share.cut is not None:
                share.cut.whole.record_stream(stream)
                share.cut.structures.record_stream(stream)
                share.cut.atoms.record_stream(stream)


class Cutter:
    """Makes the shares of a step that one process calculates.

    Parameters
    ----------
    collate
        Makes batches.
    number
        Into how many shares a step is cut.
    mine
        Which of them are made here.
    """

    def __init__(self, collate: Collator, number: int = 1, mine: Sequence[int] = (0,)) -> None:
        self.collate, self.number, self.mine = collate, number, mine
        self.device = collate.device

    def __call__(self, indices: Int[np.ndarray, " B"]) -> Shares:
        """Shares of the step with these structures; of the others neither positions nor labels are read."""
        if self.number == 1:
            return Shares([Share(self.collate(indices))])
        whole, counts = self.collate.skeleton(indices)
        shares = balanced(counts, self.number)
        ptr = np.concatenate([[0], np.cumsum(counts)])
        return Shares(self._share(number, indices, shares[number], whole, ptr) for number in self.mine)

    def _share(self, number: int, indices: np.ndarray, rows: np.ndarray, whole: Batch, ptr: np.ndarray) -> Share:
        """One share: `rows` are its places among `indices`."""
        is_empty = len(rows) == 0
        rows = np.zeros(1, dtype=np.int64) if is_empty else rows
        atoms, _ = atom_indices(ptr, rows)
        places = (self.collate.place(column) for column in (rows, atoms))
        return Share(self.collate(np.asarray(indices)[rows]), Cut(whole, *places, number, is_empty))


def shares_for(atoms: float, device: torch.device) -> int:
    """Into how many shares to cut a step of so many atoms, if nobody said: on a CPU it costs nothing and saves memory."""
    return max(1, math.ceil(atoms / ATOMS_AT_ONCE)) if device.type == "cpu" else 1


def balanced(costs: Int[np.ndarray, " S"], number: int) -> list[Int[np.ndarray, " s"]]:
    """Cut structures into shares of about equal cost, each in ascending order; some are empty if there are too few.

    Parameters
    ----------
    costs : (S,)
        Of each structure, such as its atoms.
    number
        Of shares.

    Notes
    -----
    The largest structure goes first, each to the share that has least so far (R. L. Graham, SIAM J. Appl. Math. 17, 416
    (1969)): the largest share is at most a third above the best possible one.
    """
    shares: list[list[int]] = [[] for _ in range(number)]
    heap = [(0, k) for k in range(number)]
    costs = np.asarray(costs)
    for row in np.argsort(-costs, kind="stable").tolist():
        total, k = heap[0]
        shares[k].append(row)
        heapq.heapreplace(heap, (total + int(costs[row]), k))
    return [np.sort(np.array(share, dtype=np.int64)) for share in shares]
