"""SchNetPack's representations (PaiNN, SchNet, SO3net) as backbones, and the estimator built on PaiNN.

The networks are SchNetPack's own, imported when one is built; here are the translation of a `Batch`, and heads. The other
way round, NDeM inside SchNetPack's own training, is `ndem_zoo.schnetpack`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, sum_over_neighbors
from ndem_zoo.models.base import Backbone, Features, Head
from ndem_zoo.models.estimator import NDeMModel
from ndem_zoo.models.torchmd_net import EquivariantVectorHead, cosine_cutoff
from ndem_zoo.objectives.base import check_choice, check_whole
from ndem_zoo.optional import require
from ndem_zoo.physics import safe_norm

Representation = Literal["painn", "schnet", "so3net"]
RadialBasis = Literal["gaussian", "bessel"]

#: Rows of SchNetPack's table of elements.
_ELEMENTS = 100


class SchNetPackBackbone(Backbone):
    """A representation of SchNetPack.

    Parameters
    ----------
    representation
        ``"painn"``, ``"schnet"`` or ``"so3net"``.
    n_atom_basis
        Channels C (SchNetPack's configurations: 128).
    n_interactions
        Blocks (3).
    n_rbf, radial_basis
        Number and kind of radial functions (20, ``"gaussian"``).
    cutoff
        Radius in Å beyond which atoms do not see each other directly (5.0).
    shared_interactions
        Whether all blocks have the same weights.
    lmax
        Highest degree of SO3net's features (2); of no meaning for the others.

    Raises
    ------
    ConfigError
        For a representation or a size that does not exist.
    ImportError
        If SchNetPack is not installed.

    Notes
    -----
    SchNet has no vector features: its `vector_head` sums directions to the neighbors, weighted by their scalars. SO3net's
    constants are made in single precision, so that rotations hold to 1e-7 only, in double precision, too.

    References
    ----------
    Schütt et al., PaiNN: ICML 2021; SchNet: J. Chem. Phys. 148, 241722 (2018); SchNetPack 2.0: J. Chem. Phys. 158,
    144801 (2023).
    """

    max_z = _ELEMENTS
    tiny: ClassVar[dict[str, Any]] = {"n_atom_basis": 16, "n_interactions": 2, "n_rbf": 8}

    def __init__(
        self,
        *,
        representation: Representation = "painn",
        n_atom_basis: int = 128,
        n_interactions: int = 3,
        n_rbf: int = 20,
        radial_basis: RadialBasis = "gaussian",
        cutoff: float = 5.0,
        shared_interactions: bool = False,
        lmax: int = 2,
    ) -> None:
        super().__init__()
        check_choice("representation", representation, Representation)
        check_choice("radial_basis", radial_basis, RadialBasis)
        # Choice: of two channels, because vector heads halve them.
        least = {"n_atom_basis": 2, "n_interactions": 1, "n_rbf": 2, "lmax": 1}
        for name, value in zip(least, (n_atom_basis, n_interactions, n_rbf, lmax), strict=True):
            check_whole(name, value, least[name])
        if not cutoff > 0:
            raise ConfigError(f"cutoff={cutoff!r} Å; it must be positive")
        spk = require("schnetpack", extra="schnetpack")
        self.kind, self.n_atom_basis, self.cutoff = representation, n_atom_basis, float(cutoff)
        basis = {"gaussian": spk.nn.GaussianRBF, "bessel": spk.nn.BesselRBF}[radial_basis]
        options: dict[str, Any] = {
            "n_atom_basis": n_atom_basis,
            "n_interactions": n_interactions,
            "radial_basis": basis(n_rbf, self.cutoff),
            "cutoff_fn": spk.nn.CosineCutoff(self.cutoff),
            "shared_interactions": shared_interactions,
        }
        if representation == "so3net":
            options |= {"lmax": lmax, "return_vector_representation": True}
        name = {"painn": "PaiNN", "schnet": "SchNet", "so3net": "SO3net"}[representation]
        self.representation = getattr(spk.representation, name)(**options)

    def forward(self, batch: Batch, node_vectors: Float[Tensor, "N 3"] | None = None) -> Features:
        """Scalars (N, C) and vectors (N, 3, C) of all atoms; of SO3net also its multipoles (N, K, C).

        Raises
        ------
        ConfigError
            If `node_vectors` are given.
        """
        if node_vectors is not None:
            raise ConfigError("SchNetPack's representations take no node_vectors (force encoding)")
        found = self.representation(
            {
                "_atomic_numbers": batch.z,
                "_Rij": batch.vectors(),
                "_idx_i": batch.dst,
                "_idx_j": batch.src,
                "_idx_m": batch.system,
            }
        )
        scalars = found["scalar_representation"]
        vectors = found.get("vector_representation")
        if vectors is None:
            vectors = scalars.new_zeros(1).expand(len(scalars), 3, self.n_atom_basis)
        return Features(scalars, vectors.to(scalars.dtype), found.get("multipole_representation"))

    def scalar_head(self) -> Head:
        """SchNetPack's network for atomwise properties: C -> C/2 -> 1."""
        return AtomwiseHead(self.n_atom_basis)

    def vector_head(self, width: int | None = None) -> Head:
        """Two gated equivariant blocks, with `width` channels between them (default: half); the vector output."""
        if self.kind == "schnet":
            return NeighborVectorHead(self.n_atom_basis, width, self.cutoff)
        return EquivariantVectorHead(self.n_atom_basis, width)


class AtomwiseHead(Head):
    """One invariant number per atom, by SchNetPack's `build_mlp`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net: nn.Module = require("schnetpack.nn", extra="schnetpack").build_mlp(n_in=channels, n_out=1)

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, " N"]:
        """(N,), in units of the potential's scale."""
        return self.net(features.scalars)[:, 0]


class NeighborVectorHead(Head):
    """One vector per atom for networks without vector features, made of the directions to the neighbors.

    Eq.: v_i = sum_j s_j phi(d_ij) r_ij / d_ij, with s_j the neighbor's scalars and phi the cosine cutoff (`cutoff` in Å); then gated blocks.
    """

    sign_weights: ClassVar[tuple[str, ...]] = tuple(f"gated.{name}" for name in EquivariantVectorHead.sign_weights)

    def __init__(self, channels: int, width: int | None, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.gated = EquivariantVectorHead(channels, width)

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "N 3"]:
        """(N, 3), in units of the potential's scale."""
        edge = batch.vectors()  # (E, 3)
        distance = safe_norm(edge)  # (E,)
        weight = cosine_cutoff(distance, self.cutoff) / distance.masked_fill(distance == 0, 1.0)
        weighted = (edge * weight.unsqueeze(-1)).unsqueeze(-1)  # (E, 3, 1)
        messages = weighted * features.scalars.index_select(0, batch.src).unsqueeze(1)  # (E, 3, C)
        return self.gated(features._replace(vectors=sum_over_neighbors(messages, batch)), batch)


class NDeMPaiNN(NDeMModel):
    """Force field on SchNetPack's PaiNN, trained with NDeM unless told otherwise.

    Parameters and methods are those of `NDeMModel`; `backbone_options` are the options of `SchNetPackBackbone`, so
    ``{"representation": "schnet"}`` and ``"so3net"`` make it another network.
    """

    backbone_name: ClassVar[str] = "schnetpack"
