"""TorchMD-NET's Equivariant Transformer (ET) as a backbone, and the estimator built on it.

Written from the equations of P. Thölke and G. De Fabritiis, "TorchMD-NET: Equivariant Transformers for Neural Network
based Molecular Potentials", ICLR 2022. Parameters carry the names that checkpoints of the ET family use. This is the
reference: plain tensors, one line per equation; a faster execution plan has to agree with it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo import fused
from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, sum_by_index
from ndem_zoo.models.base import Backbone, Features, Head
from ndem_zoo.models.estimator import NDeMModel
from ndem_zoo.physics import MAX_Z, safe_norm

if TYPE_CHECKING:
    from ndem_zoo.foreign import Imported


def cosine_cutoff(distance: Tensor, cutoff: float) -> Tensor:
    """1/2 (cos(pi d / cutoff) + 1) inside the cutoff, 0 outside: falls from 1 to 0 with zero slope at both ends.

    Distances, of any shape, and cutoff are in Å.
    """
    inside = 0.5 * (torch.cos(distance * (math.pi / cutoff)) + 1.0)
    return inside * (distance < cutoff).to(distance.dtype)


class ExpNormalBasis(nn.Module):
    """Radial functions phi(d) exp(-beta_k (exp(-alpha d) - mu_k)²) with alpha = 5 / cutoff.

    Their centers mu_k are equidistant in exp(-d), between exp(-cutoff) and 1; beta_k = (2/K (1 - exp(-cutoff)))^-2.
    Distances d and the cutoff are in Å.
    """

    def __init__(self, cutoff: float, num_rbf: int, trainable: bool) -> None:
        super().__init__()
        self.cutoff = cutoff
        start = math.exp(-cutoff)
        means = torch.linspace(start, 1.0, num_rbf)
        betas = torch.full((num_rbf,), (2.0 / num_rbf * (1.0 - start)) ** -2)
        for name, value in (("means", means), ("betas", betas)):
            if trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, distance: Float[Tensor, " E"]) -> Float[Tensor, "E K"]:
        """Values of the K radial functions at distances in Å."""
        decay = torch.exp(distance * (-5.0 / self.cutoff)).unsqueeze(-1)  # (E, 1)
        return cosine_cutoff(distance, self.cutoff).unsqueeze(-1) * torch.exp(
            -self.betas * (decay - self.means).square()
        )


class NeighborEmbedding(nn.Module):
    """Mixes the elements of the neighbors within `cutoff` (Å), weighted by distance, into an atom's embedding."""

    def __init__(self, channels: int, num_rbf: int, cutoff: float, max_z: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.embedding = nn.Embedding(max_z, channels)
        self.distance_proj = nn.Linear(num_rbf, channels)
        self.combine = nn.Linear(2 * channels, channels)
        _reset_linear(self.distance_proj, self.combine)

    def forward(
        self, x: Tensor, z: Tensor, src: Tensor, dst: Tensor, distance: Tensor, rbf: Tensor
    ) -> Float[Tensor, "N C"]:
        """x_i <- W [x_i ; sum_j Emb(z_j) (W_d e(d_ij) + b_d) phi(d_ij)] + b, over neighbors j != i.

        `x` is (N, C), `z` (N,), `src` and `dst` (E,), `distance` (E,) in Å, `rbf` (E, R).
        """
        weight = self.distance_proj(rbf) * cosine_cutoff(distance, self.cutoff).unsqueeze(-1)  # (E, C)
        neighbors = sum_by_index(self.embedding(z).index_select(0, src) * weight, dst, x.shape[0])
        return self.combine(torch.cat([x, neighbors], dim=-1))


class EquivariantAttention(nn.Module):
    """One layer of the ET: attention without softmax, which exchanges scalars and vectors between neighbors.

    Parameters
    ----------
    cutoff
        Å.
    vector_cutoff
        True multiplies the values by the cutoff function, so that energies are continuous when an atom crosses the
        cutoff; False multiplies the attention only, as the first published version did: for its checkpoints.
    """

    def __init__(self, channels: int, num_heads: int, num_rbf: int, cutoff: float, vector_cutoff: bool) -> None:
        super().__init__()
        self.channels, self.num_heads = channels, num_heads
        self.cutoff, self.vector_cutoff = cutoff, vector_cutoff
        self.layernorm = nn.LayerNorm(channels)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, 3 * channels)
        self.o_proj = nn.Linear(channels, 3 * channels)
        self.vec_proj = nn.Linear(channels, 3 * channels, bias=False)
        self.dk_proj = nn.Linear(num_rbf, channels)
        self.dv_proj = nn.Linear(num_rbf, 3 * channels)
        _reset_linear(self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.vec_proj, self.dk_proj, self.dv_proj)

    def forward(
        self, x: Tensor, vec: Tensor | None, src: Tensor, dst: Tensor, unit: Tensor, distance: Tensor, rbf: Tensor
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N 3 C"]]:
        """Changes of scalars (N, C) and vectors (N, 3, C); edges include self-loops with unit vector 0.

        `vec` None stands for zeros, as before the first layer: what they would be multiplied with is not computed.
        """
        n, heads = x.shape[0], self.num_heads
        width = self.channels // heads  # D: channels of a head
        normed = self.layernorm(x)
        q = self.q_proj(normed).view(n, heads, width)
        k = self.k_proj(normed).view(n, heads, width)
        v = self.v_proj(normed).view(n, heads, 3 * width)
        dk = F.silu(self.dk_proj(rbf)).view(-1, heads, width)  # (E, H, D)
        dv = F.silu(self.dv_proj(rbf)).view(-1, heads, 3 * width)  # (E, H, 3D)
        phi = cosine_cutoff(distance, self.cutoff).unsqueeze(-1)  # (E, 1)
        # Without the vector cutoff, vector messages count in full inside the cutoff; edges beyond it (the skin) never do.
        vector_phi = phi if self.vector_cutoff else (distance < self.cutoff).to(phi.dtype).unsqueeze(-1)

        attention = F.silu((q.index_select(0, dst) * k.index_select(0, src) * dk).sum(-1)) * phi  # (E, H)
        # Pitfall: the three parts are split inside each head, not off the flat (E, 3C) tensor.
        scalar, along_vec, along_edge = (v.index_select(0, src) * dv).split(width, dim=-1)  # 3 x (E, H, D)
        x_sum = sum_by_index((scalar * attention.unsqueeze(-1)).reshape(-1, self.channels), dst, n)
        message = (unit * vector_phi).unsqueeze(-1) * along_edge.reshape(-1, 1, self.channels)  # (E, 3, C)
        if vec is not None:
            along_vec = along_vec.reshape(-1, self.channels) * vector_phi
            message = message + vec.index_select(0, src) * along_vec.unsqueeze(1)
        vec_sum = sum_by_index(message, dst, n)

        o1, o2, o3 = self.o_proj(x_sum).split(self.channels, dim=-1)
        if vec is None:
            return o3, vec_sum
        vec1, vec2, vec3 = self.vec_proj(vec).split(self.channels, dim=-1)
        return (vec1 * vec2).sum(dim=1) * o2 + o3, vec3 * o1.unsqueeze(1) + vec_sum


class TorchMDNet(Backbone):
    """Equivariant Transformer of TorchMD-NET.

    With the energy head it has 1,339,906 parameters in the MD17 setting (the defaults) and 6,864,898 in that of QM9
    (``hidden_channels=256, num_layers=8, num_rbf=64``).

    Parameters
    ----------
    hidden_channels
        Channels C of scalars and vectors (MD17: 128).
    num_layers
        Attention layers (MD17: 6).
    num_heads
        Attention heads; a divisor of `hidden_channels` (8).
    num_rbf
        Radial functions K (MD17: 32).
    cutoff
        Radius in Å beyond which atoms do not see each other directly (5.0).
    vector_cutoff
        True, for training from scratch: energies are continuous at the cutoff. False: as in checkpoints before v1.0.
    trainable_rbf
        Whether centers and widths of the radial functions are trained.
    encode_vectors
        Whether the backbone accepts `node_vectors` (force encoding); adds `hidden_channels` parameters.
    max_z
        Rows of the embedding tables: atomic numbers below it are known (100).

    Raises
    ------
    ConfigError
        If `hidden_channels` is not a multiple of `num_heads` and of 2, or a size is not positive.

    References
    ----------
    Thölke and De Fabritiis, ICLR 2022, Table 5 (hyper-parameters); torchmd-net issue 254 (`vector_cutoff`).
    """

    plans: ClassVar[tuple[str, ...]] = ("eager", "fused")
    #: Where the eager plan leaves out edges beyond the cutoff, which give exact zeros: looking for them makes a GPU wait.
    skips_far_edges_on: ClassVar[tuple[str, ...]] = ("cpu",)
    tiny: ClassVar[dict] = {"hidden_channels": 16, "num_layers": 2, "num_heads": 2, "num_rbf": 8}
    free_options: ClassVar[frozenset[str]] = frozenset({"encode_vectors", "trainable_rbf"})

    def __init__(
        self,
        *,
        hidden_channels: int = 128,
        num_layers: int = 6,
        num_heads: int = 8,
        num_rbf: int = 32,
        cutoff: float = 5.0,
        vector_cutoff: bool = True,
        trainable_rbf: bool = False,
        encode_vectors: bool = False,
        max_z: int = MAX_Z,
    ) -> None:
        super().__init__()
        sizes = {"hidden_channels": hidden_channels, "num_heads": num_heads, "num_rbf": num_rbf, "cutoff": cutoff}
        for name, value in sizes.items():
            if not value > 0:
                raise ConfigError(f"{name}={value!r}; it must be positive")
        if hidden_channels % num_heads or hidden_channels % 2:
            raise ConfigError(f"hidden_channels={hidden_channels} must be even and a multiple of num_heads={num_heads}")
        self.hidden_channels, self.cutoff, self.max_z = hidden_channels, float(cutoff), max_z
        self.embedding = nn.Embedding(max_z, hidden_channels)
        self.distance_expansion = ExpNormalBasis(self.cutoff, num_rbf, trainable_rbf)
        self.neighbor_embedding = NeighborEmbedding(hidden_channels, num_rbf, self.cutoff, max_z)
        self.attention_layers = nn.ModuleList(
            EquivariantAttention(hidden_channels, num_heads, num_rbf, self.cutoff, vector_cutoff)
            for _ in range(num_layers)
        )
        self.out_norm = nn.LayerNorm(hidden_channels)
        self.vector_embedding = nn.Parameter(torch.randn(hidden_channels)) if encode_vectors else None
        if not encode_vectors:  # the vectors are 0 before the first layer: this weight is there, and has no effect
            for layer in self.attention_layers[:1]:
                layer.vec_proj.weight.requires_grad_(False)

    def forward(self, batch: Batch, node_vectors: Float[Tensor, "N 3"] | None = None) -> Features:
        """Scalars (N, C) and vectors (N, 3, C) of all atoms.

        Raises
        ------
        ConfigError
            If `node_vectors` are given to a backbone without ``encode_vectors=True``.
        """
        vec = self._initial_vectors(batch, node_vectors)
        if self.plan == "fused" and (found := fused.features(self, batch, vec)) is not None:
            return Features(*found)
        n = batch.z.shape[0]
        edge, src, dst = batch.vectors(), batch.src, batch.dst
        distance = safe_norm(edge)
        if distance.device.type in self.skips_far_edges_on:
            near = (~(distance >= self.cutoff)).nonzero().flatten()  # NaN stays
            edge, distance, src, dst = (t.index_select(0, near) for t in (edge, distance, src, dst))
        rbf = self.distance_expansion(distance)
        x = self.neighbor_embedding(self.embedding(batch.z), batch.z, src, dst, distance, rbf)

        # Attention includes the atom itself, at distance 0 and without direction.
        loop = torch.arange(n, device=x.device)
        src, dst = torch.cat([src, loop]), torch.cat([dst, loop])
        unit = torch.cat([edge / distance.masked_fill(distance == 0, 1.0).unsqueeze(-1), edge.new_zeros(n, 3)])
        zeros = distance.new_zeros(n)
        distance, rbf = torch.cat([distance, zeros]), torch.cat([rbf, self.distance_expansion(zeros)])
        for layer in self.attention_layers:
            dx, dvec = layer(x, vec, src, dst, unit, distance, rbf)
            x, vec = x + dx, dvec if vec is None else vec + dvec
        if vec is None:  # no layers
            vec = x.new_zeros(n, 3, self.hidden_channels)
        return Features(self.out_norm(x), vec)

    def _initial_vectors(self, batch: Batch, node_vectors: Tensor | None) -> Float[Tensor, "N 3 C"] | None:
        """The encoded vectors of the atoms; None for zeros."""
        if node_vectors is None:
            return None
        if self.vector_embedding is None:
            raise ConfigError("this TorchMDNet takes no node_vectors; build it with encode_vectors=True")
        return node_vectors.to(batch.pos.dtype).unsqueeze(-1) * self.vector_embedding

    def scalar_head(self) -> Head:
        """Two gated equivariant blocks; the scalar output (86,530 parameters at 128 channels)."""
        return EquivariantScalarHead(self.hidden_channels)

    def vector_head(self, width: int | None = None) -> Head:
        """Two gated equivariant blocks, with `width` channels between them (default: half); the vector output."""
        return EquivariantVectorHead(self.hidden_channels, width)

    def charge_head(self) -> nn.Module:
        """Two gated equivariant blocks; both outputs, as TorchMD-NET's head for dipole moments has them."""
        return EquivariantChargeHead(self.hidden_channels)


class GatedEquivariantBlock(nn.Module):
    """Maps scalars and vectors from `channels` to `out_channels`; scalars see norms, and gate the vectors."""

    def __init__(self, channels: int, out_channels: int, activate: bool) -> None:
        super().__init__()
        self.out_channels, self.activate = out_channels, activate
        self.vec1_proj = nn.Linear(channels, channels, bias=False)
        self.vec2_proj = nn.Linear(channels, out_channels, bias=False)
        self.update_net = nn.Sequential(
            nn.Linear(2 * channels, channels), nn.SiLU(), nn.Linear(channels, 2 * out_channels)
        )
        _reset_linear(self.vec1_proj, self.vec2_proj, self.update_net[0], self.update_net[2])

    def forward(self, scalars: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C), (N, 3, C) -> (N, O), (N, 3, O)."""
        norm = safe_norm(self.vec1_proj(vectors), dim=1)  # (N, C)
        out, gate = self.update_net(torch.cat([scalars, norm], dim=-1)).split(self.out_channels, dim=-1)
        return F.silu(out) if self.activate else out, self.vec2_proj(vectors) * gate.unsqueeze(1)


class _GatedHead(Head):
    """Two gated blocks, C -> C/2 (or `width`) -> 1."""

    def __init__(self, channels: int, width: int | None = None) -> None:
        super().__init__()
        width = channels // 2 if width is None else width
        self.output_network = nn.ModuleList(
            [GatedEquivariantBlock(channels, width, True), GatedEquivariantBlock(width, 1, False)]
        )

    def outputs(self, features: Features, vectors: bool) -> tuple[Tensor, ...]:
        """Scalar (N, 1) and, if wanted, vector (N, 3, 1) output."""
        if hasattr(features.scalars, "passes"):  # made by the fused plan
            found = fused.head(self.output_network, features, vectors)
            if found is not None:
                return found
        outputs = features.scalars, features.vectors
        for block in self.output_network:
            outputs = block(*outputs)
        return outputs


class EquivariantScalarHead(_GatedHead):
    """One invariant number per atom."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        # Exists in published checkpoints and counts in their size, but no scalar output depends on it.
        self.output_network[-1].vec2_proj.requires_grad_(False)

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, " N"]:
        """(N,), in units of the potential's scale."""
        return self.outputs(features, vectors=False)[0][:, 0]


class EquivariantVectorHead(_GatedHead):
    """One vector per atom, which rotates with the structure."""

    sign_weights: ClassVar[tuple[str, ...]] = ("output_network.1.vec2_proj.weight",)

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "N 3"]:
        """(N, 3), in units of the potential's scale."""
        return self.outputs(features, vectors=True)[1][:, :, 0]


class EquivariantChargeHead(_GatedHead):
    """One number and one vector per atom."""

    def forward(self, features: Features, batch: Batch) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
        """(N,) and (N, 3), in units of the potential's scale."""
        scalars, vectors = self.outputs(features, vectors=True)
        return scalars[:, 0], vectors[:, :, 0]


class NDeMTorchMDNet(NDeMModel):
    """Force field on TorchMD-NET's Equivariant Transformer, trained with NDeM unless told otherwise.

    Parameters and methods are those of `NDeMModel`; `backbone_options` are the options of `TorchMDNet`.
    """

    backbone_name: ClassVar[str] = "torchmd_net"

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike | Imported,
        *,
        energy_unit: str | None = None,
        elements: Iterable[str] | None = None,
        partial: bool = False,
        **keywords: Any,
    ) -> NDeMTorchMDNet:
        """A model from a checkpoint of TorchMD-NET, Zaidi et al., Frad or SliDe; executes nothing that is in the file.

        Parameters
        ----------
        path
            The file, or what `ndem_zoo.foreign.import_checkpoint` made of it.
        energy_unit
            Unit of the energies that the network was trained on (MD17: ``"kcal/mol"``; QM9 in PyG: ``"eV"``), which no file
            names: the model then predicts as the trained one did. None: backbone and denoising head, without energies, to
            `fit` another model from.
        elements
            Symbols of the elements that it was trained on, which no file names either; needed with `energy_unit`.
        partial
            See `ndem_zoo.foreign.import_checkpoint`.
        **keywords
            Of the constructor; `backbone_options` are the file's unless given.

        Returns
        -------
        model
            Its `init_report_` says what became of each weight.

        Raises
        ------
        FileNotFoundError, FileFormatError
            If the file cannot be read.
        ConfigError
            If our network cannot represent the one in the file, or would give other energies; for an unknown unit.
        """
        from ndem_zoo.foreign import Imported, import_checkpoint, in_units, with_energies

        imported = path if isinstance(path, Imported) else import_checkpoint(path, partial=partial)
        model = cls(**{"backbone_options": imported.options, **keywords})
        if energy_unit is None:
            return model._take(imported.start(), {}, (), partial)
        if not elements:
            raise ConfigError("elements=None with energy_unit: name the elements that it was trained on, such as 'CHO'")
        symbols = re.findall("[A-Z][a-z]?", elements) if isinstance(elements, str) else list(elements)
        return model._take(with_energies(imported), in_units(imported, energy_unit), symbols, partial)


def _reset_linear(*layers: nn.Linear) -> None:
    """Xavier-uniform weights and zero biases, as published."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
