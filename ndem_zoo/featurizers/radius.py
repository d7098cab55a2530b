"""`RadiusGraph`: atoms closer than a cutoff are connected, periodic images included.

Takes `ase.Atoms` or arrays, gives DGLGraphs with the fields of `ndem_zoo.graph.to_dgl`. The search itself is vesin's
(`ndem_zoo.graph.neighbor_list`); training on our own datasets does not come through here, but makes its batches
straight from the columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.featurizers.base import Featurizer, Structure
from ndem_zoo.graph import Nearest, image_numbers, nearest_edges, neighbor_list, to_dgl

if TYPE_CHECKING:
    from dgl import DGLGraph

#: Atoms closer than this, in Å, are an error in the data: no nuclei come so near.
MIN_DISTANCE = 0.1


class RadiusGraph(Featurizer):
    """Connects every atom with all atoms within a radius.

    Parameters
    ----------
    cutoff
        Radius in Å. Choice: 5.0, the cutoff of TorchMD-NET's ET on molecules.
    max_neighbors
        At most so many edges into one atom: the nearest ones, equally near ones by their index. None: all.

        Pitfall: with a limit, forces jump where neighbors change places, and the graph is not symmetric.
    skin
        Å that are added to the cutoff, so that the edges stay complete while atoms move by up to half of it.
    strict
        False: besides the nearest `max_neighbors`, also those about as far as the next one; see `graph.Nearest`.

    Raises
    ------
    ConfigError
        If an option is out of range.

    Examples
    --------
    >>> from ase.build import molecule
    >>> graph = RadiusGraph(cutoff=1.2)(molecule("H2O"))
    >>> graph.num_nodes(), graph.num_edges()
    (3, 4)
    """

    def __init__(
        self, cutoff: float = 5.0, max_neighbors: int | None = None, skin: float = 0.0, strict: bool = True
    ) -> None:
        if not 0 < cutoff < np.inf:
            raise ConfigError(f"cutoff={cutoff!r} Å; it must be a positive number")
        if not 0 <= skin < np.inf:
            raise ConfigError(f"skin={skin!r} Å; it must be a number >= 0")
        if max_neighbors is not None and (max_neighbors < 1 or int(max_neighbors) != max_neighbors):
            raise ConfigError(f"max_neighbors={max_neighbors!r}; it must be an integer >= 1, or None for all")
        self.cutoff, self.max_neighbors, self.skin, self.strict = cutoff, max_neighbors, skin, strict

    @property
    def radius(self) -> float:
        """Radius of the edges in Å: cutoff and skin."""
        return float(self.cutoff + self.skin)

    def graph(self, structure: Structure) -> DGLGraph:
        """Graph of one structure; raises DataError if two of its atoms are closer than 0.1 Å."""
        pos = structure.pos
        src, dst, shift = neighbor_list(pos, max(self.radius, MIN_DISTANCE), structure.cell, structure.pbc)
        distance = np.linalg.norm(pos[src] + shift - pos[dst], axis=1)
        check_distances(src, dst, distance)
        keep = distance < self.radius
        if self.max_neighbors is not None:
            limit = Nearest(self.max_neighbors, self.strict)
            edges = [torch.from_numpy(values) for values in (distance, src, dst)]
            image = (
                None
                if structure.cell is None
                else image_numbers(torch.from_numpy(shift), torch.from_numpy(structure.cell))
            )
            keep &= nearest_edges(*edges, len(pos), limit, image).numpy()
        return to_dgl(
            structure.z,
            pos,
            src[keep],
            dst[keep],
            shift[keep],
            forces=structure.forces,
            energy=structure.energy,
            cell=structure.cell,
            pbc=structure.pbc,
            fixed=structure.fixed,
        )


def check_distances(src: np.ndarray, dst: np.ndarray, distance: np.ndarray) -> None:
    """Raise DataError if an edge, of `src`, `dst` (E,) and `distance` (E,) in Å, is shorter than atoms can be apart."""
    if len(distance) and distance.min() < MIN_DISTANCE:
        edge = int(distance.argmin())
        raise DataError(
            f"atoms {dst[edge]} and {src[edge]} are {distance[edge]:.3g} Å apart; allowed is {MIN_DISTANCE} Å or more "
            "(duplicate atoms, another unit of length, or a wrong cell?)"
        )
