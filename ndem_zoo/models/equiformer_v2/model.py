"""EquiformerV2 as a backbone, its heads, and the estimator built on it.

An equivariant transformer of spherical tensors up to degree L: attention in frames that are aligned with the edges, and
nonlinearities on grids on the sphere. Layers stand in `attention`, published sizes in `presets`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, Nearest, within
from ndem_zoo.models.base import Backbone, Features, Head
from ndem_zoo.models.equiformer_v2.attention import (
    NORMS,
    Block,
    EdgeDegreeEmbedding,
    EdgeFeatures,
    FeedForward,
    GraphAttention,
    Sizes,
    SO3Linear,
    initialize,
    island,
)
from ndem_zoo.models.equiformer_v2.presets import PRESETS
from ndem_zoo.models.equiformer_v2.so3 import constant, edge_rotations, layout, vector_harmonics, wigner_rows
from ndem_zoo.models.estimator import NDeMModel
from ndem_zoo.physics import safe_norm


class EquiformerV2(Backbone):
    """EquiformerV2, for energies and direct or gradient forces.

    Defaults are those of the 31M model on OC20; `from_preset` gives all published sizes. With its energy head and force
    head, the 31M, 83M and 153M models have 31,058,690, 83,164,802 and 153,602,690 parameters.

    Parameters
    ----------
    num_layers
        Blocks of attention and feed-forward network.
    lmax, mmax
        Largest degree L of the features, and largest order M that is convolved along edges.
    sphere_channels
        Channels C of every degree.
    attn_hidden_channels, num_heads, attn_alpha_channels, attn_value_channels
        Attention: channels of messages, heads, channels of a head's score and of its values.
    ffn_hidden_channels
        Channels inside the feed-forward networks.
    grid_resolution
        Latitudes and longitudes of the grids on the sphere, even; None: 2(L + 1) by about as many, as by default in the
        reference. The finer the grid, the more exactly the features rotate with the structure.
    edge_channels, num_distance_basis
        Channels of radial functions; Gaussians that they see (600 in the published models, whatever their files say).
    cutoff
        Radius in Å beyond which atoms do not see each other.
    max_neighbors, strict_neighbors
        Only so many nearest neighbors of an atom count, equally near ones by their index or all (see `Nearest`); None:
        all within the cutoff.
    norm_type
        ``"layer_norm_sh"`` or ``"rms_norm_sh"``.
    use_grid_mlp
        Whether feed-forward networks act point by point on a grid; otherwise they have one activation.
    use_gate_act
        Gates instead of activations on the sphere (in feed-forward networks only without `use_grid_mlp`).
    use_sep_s2_act
        Whether scalars go their own way through activations on the sphere.
    use_attn_renorm
        Whether scores are normalized before the activation.
    alpha_drop, drop_path_rate
        In training: share of attention weights that is dropped; of branches, structure by structure.
    weight_init
        ``"uniform"`` or ``"normal"``.
    max_z
        Rows of the embedding tables: atomic numbers below it are known.
    average_atoms, average_neighbors
        What the energy and the first sum over neighbors are divided by (OC20's; in other data a matter of scale).
    roll
        Roll of the edges' frames: ``"fixed"``, or ``"random"`` in training, as in the reference. The network sees it only
        as far as its grids are coarse.
    smooth_cutoff
        Choice: an envelope that lets messages fade towards the cutoff. False, as published: energies jump when an
        atom crosses the cutoff.
    encode_vectors
        Whether the backbone accepts `node_vectors` (DeNS's force encoding); adds (L + 2) C parameters.
    checkpoint_activations
        Trade time for memory: blocks are calculated again in the backward pass.

    Attributes
    ----------
    rng : torch.Generator or None
        Where dropout and random rolls come from in training mode; None: torch's global generator.

    Raises
    ------
    ConfigError
        If a size is not positive, M exceeds L, or a name is unknown.

    Notes
    -----
    Turns with the structure as exactly as its grids allow (`symmetry`). Mirror images do not have equal energies: the
    convolution mixes the orders +m and -m, which a mirror tells apart.

    References
    ----------
    Liao, Wood, Das, Smidt, ICLR 2024; options and numbers after fairchem-core 1.10.
    """

    #: Measured: 4e-10, the largest of 12 rotations (degree 2 on 18 x 18 points).
    symmetry: ClassVar[float] = 1e-8
    mirror: ClassVar[bool] = False
    can_be_stacked: ClassVar[bool] = False  # its passes are functions of autograd
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        name: {option: sourced.value for option, sourced in values.items()} for name, values in PRESETS.items()
    }
    free_options: ClassVar[frozenset[str]] = frozenset(
        {"encode_vectors", "alpha_drop", "drop_path_rate", "weight_init", "checkpoint_activations"}
    )
    tiny: ClassVar[dict] = {
        "num_layers": 2,
        "lmax": 2,
        "mmax": 2,
        "sphere_channels": 16,
        "attn_hidden_channels": 8,
        "num_heads": 2,
        "attn_alpha_channels": 8,
        "attn_value_channels": 4,
        "ffn_hidden_channels": 16,
        "edge_channels": 16,
        "num_distance_basis": 16,
        "cutoff": 5.0,
        "max_neighbors": 200,
        "average_atoms": 4.0,
        "average_neighbors": 8.0,
        "max_z": 100,
        "alpha_drop": 0.0,
        "drop_path_rate": 0.0,
        "smooth_cutoff": True,
        "encode_vectors": True,
    }

    def __init__(
        self,
        *,
        num_layers: int = 8,
        lmax: int = 4,
        mmax: int = 2,
        sphere_channels: int = 128,
        attn_hidden_channels: int = 64,
        num_heads: int = 8,
        attn_alpha_channels: int = 64,
        attn_value_channels: int = 16,
        ffn_hidden_channels: int = 128,
        grid_resolution: int | None = 18,
        edge_channels: int = 128,
        num_distance_basis: int = 600,
        cutoff: float = 12.0,
        max_neighbors: int | None = 20,
        strict_neighbors: bool = True,
        norm_type: str = "layer_norm_sh",
        use_grid_mlp: bool = True,
        use_gate_act: bool = False,
        use_sep_s2_act: bool = True,
        use_attn_renorm: bool = True,
        alpha_drop: float = 0.1,
        drop_path_rate: float = 0.1,
        weight_init: str = "uniform",
        max_z: int = 90,
        average_atoms: float = 77.81317,
        average_neighbors: float = 23.395238876342773,
        roll: str = "fixed",
        smooth_cutoff: bool = False,
        encode_vectors: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        given = locals()
        self.sizes = Sizes(**{field.name: given[field.name] for field in dataclasses.fields(Sizes)})
        _check(given)
        self.cutoff, self.max_z = float(cutoff), max_z
        self.nearest = None if max_neighbors is None else Nearest(max_neighbors, strict_neighbors)
        self.is_smooth = smooth_cutoff
        self.average_atoms, self.roll, self.checkpoint_activations = float(average_atoms), roll, checkpoint_activations
        self.alpha_drop, self.drop_path_rate, self.weight_init = alpha_drop, drop_path_rate, weight_init
        self.embedding = nn.Embedding(max_z, sphere_channels)
        self.vector_embedding = SO3Linear(1, sphere_channels, lmax) if encode_vectors else None
        self.edge_degree = EdgeDegreeEmbedding(self.sizes, float(average_neighbors))
        self.blocks = nn.ModuleList(Block(self.sizes) for _ in range(num_layers))
        self.norm = NORMS[norm_type](lmax, sphere_channels)
        initialize(self, weight_init)

    def forward(self, batch: Batch, node_vectors: Float[Tensor, "N 3"] | None = None) -> Features:
        """Features of all atoms; `tensors` are all degrees, in e3nn's order.

        Raises
        ------
        ConfigError
            If `node_vectors` are given to a backbone without ``encode_vectors=True``.
        """
        edges = self.edge_features(within(batch, self.cutoff, self.nearest))
        x = self._initial(batch, node_vectors) + self.edge_degree(edges)
        for block in self.blocks:
            dropped, kept = self._drawn(edges.batch, x)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, edges, dropped, kept, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, edges, dropped, kept)
        x = self.norm(x)
        return Features(x[:, 0], x[:, 1:4], x, edges)

    def edge_features(self, batch: Batch) -> EdgeFeatures:
        """What all layers and heads know of the edges; in the dtype of the positions, also under autocast."""
        lmax, mmax = self.sizes.lmax, self.sizes.mmax
        with torch.autocast(batch.pos.device.type, enabled=False):
            vectors = batch.vectors()
            distance = safe_norm(vectors)
            rotation = edge_rotations(vectors, self._rolls(distance))
            into = wigner_rows(rotation, lmax, mmax)
            scales = constant(layout(lmax, mmax).scales, into.dtype, into.device)
            back = into if lmax == mmax else into * scales.unsqueeze(-1)
            envelope = fade(distance / self.cutoff).unsqueeze(-1) if self.is_smooth else None
            basis = gaussians(distance, self.cutoff, self.sizes.num_distance_basis)
        return EdgeFeatures(batch, basis, into, back, envelope)

    def _rolls(self, distance: Tensor) -> Float[Tensor, " E"] | None:
        """Random angles in training, if wanted."""
        if self.roll == "fixed" or not self.training:
            return None
        return self._random(distance.shape, distance) * (2 * math.pi)

    def _random(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.rand(shape, generator=self.rng, dtype=like.dtype, device=like.device)

    def _drawn(self, batch: Batch, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Factors of dropout for a block: of the attention (E, h), and of its branches (2, N), equal within structures."""
        if not self.training:
            return None, None
        dropped = kept = None
        if self.alpha_drop > 0:
            shape = (len(batch.src), self.sizes.num_heads)
            dropped = (self._random(shape, like) >= self.alpha_drop).to(like.dtype) / (1 - self.alpha_drop)
        if self.drop_path_rate > 0:
            whole = self._random((2, batch.n_systems), like) >= self.drop_path_rate
            kept = whole.to(like.dtype).index_select(1, batch.system) / (1 - self.drop_path_rate)
        return dropped, kept

    def _initial(self, batch: Batch, node_vectors: Tensor | None) -> Float[Tensor, "N K C"]:
        """Embeddings of the elements as scalars, and encoded vectors."""
        lmax = self.sizes.lmax
        x = self.embedding(batch.z).unsqueeze(1)
        x = torch.cat([x, x.new_zeros((len(x), (lmax + 1) ** 2 - 1, x.shape[2]))], dim=1)
        if self.vector_embedding is None:
            if node_vectors is not None:
                raise ConfigError("this EquiformerV2 takes no node_vectors; build it with encode_vectors=True")
            return x
        vectors = torch.zeros_like(batch.pos) if node_vectors is None else node_vectors.to(batch.pos.dtype)
        return x + self.vector_embedding(vector_harmonics(vectors, lmax).unsqueeze(-1))

    def scalar_head(self) -> Head:
        """A feed-forward network to one channel, whose scalars are divided by `average_atoms`."""
        return EnergyHead(self.sizes, self.average_atoms, self.weight_init)

    def vector_head(self, width: int | None = None) -> Head:
        """An attention layer to one channel of degree 1.

        Parameters
        ----------
        width
            Channels of its messages; default: those of the backbone's attention.
        """
        sizes = self.sizes if width is None else dataclasses.replace(self.sizes, attn_hidden_channels=width)
        if not sizes.attn_hidden_channels > 0:
            raise ConfigError(f"width={width!r}; it must be positive")
        return ForceHead(sizes, self.weight_init)


class EnergyHead(Head):
    """One invariant number per atom: a feed-forward network's scalars over `average_atoms`."""

    def __init__(self, sizes: Sizes, average_atoms: float, weight_init: str) -> None:
        super().__init__()
        self.average_atoms = average_atoms
        self.ffn = FeedForward(sizes, 1, scalars_only=True)
        initialize(self, weight_init)

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, " N"]:
        """(N,), in units of the potential's scale."""
        return island(self.ffn(features.tensors))[:, 0] / self.average_atoms


class ForceHead(Head):
    """One vector per atom: an attention layer's output of degree 1."""

    sign_weights: ClassVar[tuple[str, ...]] = ("ga.proj.weight",)

    def __init__(self, sizes: Sizes, weight_init: str) -> None:
        super().__init__()
        self.ga = GraphAttention(sizes, 1, degree=1)
        initialize(self, weight_init)

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "N 3"]:
        """(N, 3), in units of the potential's scale."""
        return island(self.ga(features.tensors, features.edges))[:, :, 0]


class NDeMEquiformerV2(NDeMModel):
    """Force field on EquiformerV2, trained with NDeM unless told otherwise.

    Parameters and methods are those of `NDeMModel`; `backbone_options` are the options of `EquiformerV2`. The default preset
    is ``"oc20_31M"``; on a CPU, or for few frames, take ``"oc20_tiny"``, ``"md17_fast"`` or ``"qm9_fast"``.
    """

    backbone_name: ClassVar[str] = "equiformer_v2"
    default_preset: ClassVar[str] = "oc20_31M"


def gaussians(distance: Float[Tensor, " E"], cutoff: float, number: int) -> Float[Tensor, "E B"]:
    """Eq.: exp(-1/2 ((d - mu_k) / (2 delta))²) with `number` centers mu_k from 0 to the cutoff, delta apart; in Å."""
    delta = cutoff / (number - 1)
    centers = constant(tuple(delta * k for k in range(number)), distance.dtype, distance.device)
    return torch.exp(-0.5 * ((distance.unsqueeze(-1) - centers) / (2 * delta)).square())


def fade(u: Tensor) -> Tensor:
    """Eq.: 1 - 21 u⁵ + 35 u⁶ - 15 u⁷ below 1, 0 above, for any shape: leaves 1 and meets 0 with two derivatives of zero."""
    return (1 - u**5 * (21 - 35 * u + 15 * u.square())) * (u < 1).to(u.dtype)


def _check(given: dict[str, Any]) -> None:
    """Refuse options that make no network."""
    sizes = [field.name for field in dataclasses.fields(Sizes) if field.type == "int" and field.name != "mmax"]
    for name in (*sizes, "cutoff", "average_atoms", "average_neighbors", "max_neighbors", "grid_resolution"):
        if given[name] is not None and not given[name] > 0:
            raise ConfigError(f"{name}={given[name]!r}; it must be positive")
    lmax, mmax, resolution = given["lmax"], given["mmax"], given["grid_resolution"]
    if not 0 <= mmax <= lmax:
        raise ConfigError(f"mmax={mmax}; with lmax={lmax} it must be from 0 to {lmax}")
    if resolution is not None and (resolution % 2 or resolution < 2 * (lmax + 1)):
        raise ConfigError(
            f"grid_resolution={resolution}; with lmax={lmax} it must be even and at least {2 * (lmax + 1)}"
        )
    if given["num_distance_basis"] < 2:
        raise ConfigError(f"num_distance_basis={given['num_distance_basis']}; it must be at least 2")
    for name in ("alpha_drop", "drop_path_rate"):
        if not 0 <= given[name] < 1:
            raise ConfigError(f"{name}={given[name]!r}; it must be at least 0 and below 1")
    allowed = {"norm_type": tuple(NORMS), "weight_init": ("uniform", "normal"), "roll": ("fixed", "random")}
    for name, values in allowed.items():
        if given[name] not in values:
            raise ConfigError(f"{name}={given[name]!r}; allowed are {', '.join(values)}")
