"""Layers of EquiformerV2: norms, radial functions, graph attention with SO(2) convolutions, feed-forward networks.

Written from the description of Y.-L. Liao, B. Wood, A. Das, T. Smidt, "EquiformerV2: Improved Equivariant Transformer for
Scaling to Higher-Degree Representations", ICLR 2024. What costs time and memory stands in `passes`; here are weights and
the order of the steps. Norms, softmax and sums over atoms stay in float32 under autocast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.graph import Batch, sum_by_index
from ndem_zoo.models.equiformer_v2 import passes
from ndem_zoo.models.equiformer_v2.so3 import constant, default_resolution, degrees_of_all, grid_matrices, layout


@dataclass(frozen=True)
class Sizes:
    """Sizes and variants that all layers share; the options of `EquiformerV2` under the same names."""

    lmax: int
    mmax: int
    sphere_channels: int
    attn_hidden_channels: int
    num_heads: int
    attn_alpha_channels: int
    attn_value_channels: int
    ffn_hidden_channels: int
    edge_channels: int
    num_distance_basis: int
    grid_resolution: int | None
    norm_type: str
    use_gate_act: bool
    use_grid_mlp: bool
    use_sep_s2_act: bool
    use_attn_renorm: bool
    max_z: int

    def resolution(self, mmax: int) -> tuple[int, int]:
        """Latitudes and longitudes of the grid for orders up to `mmax`."""
        return (self.grid_resolution,) * 2 if self.grid_resolution else default_resolution(self.lmax, mmax)

    @property
    def value_channels(self) -> int:
        """Channels of all heads' values together."""
        return self.num_heads * self.attn_value_channels


class EdgeFeatures(NamedTuple):
    """What is known of the edges and shared by all layers and heads.

    Attributes
    ----------
    batch : Batch
        The structures with the edges that count.
    basis : (E, B)
        Radial functions of the lengths.
    into : (E, K_M, K)
        Wigner rows that turn features into the edges' frames.
    back : (E, K_M, K)
        The same for the way back: enlarged where orders are left out.
    envelope : (E, 1) or None
        Factor of messages that falls to 0 at the cutoff.
    """

    batch: Batch
    basis: Tensor
    into: Tensor
    back: Tensor
    envelope: Tensor | None

    def detach(self) -> EdgeFeatures:
        """Without the graph of derivatives."""
        tensors = (None if value is None else value.detach() for value in self[1:])
        return EdgeFeatures(self.batch.replace(pos=self.batch.pos.detach()), *tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of `x`, of any shape, are calculated in: autocast's type where it is on."""
    kind = x.device.type
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if kind == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else x.dtype
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else x.dtype


def island(x: Tensor) -> Tensor:
    """`x`, of any shape, in at least float32: for norms, softmax and sums."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm of `x` (..., C) in at least float32."""
    with torch.autocast(x.device.type, enabled=False):
        return norm(island(x))


def smooth_leaky_relu(x: Tensor) -> Tensor:
    """Eq.: 0.6 x + 0.4 x (2 sigmoid(x) - 1), for any shape: slopes 1 and 0.2 far from 0, smooth between."""
    return x * (0.2 + 0.8 * torch.sigmoid(x))


# ------------------------------------------------------------------------------------------------------------ norms


class SphereLayerNorm(nn.Module):
    """``layer_norm_sh``: LayerNorm of the scalars; all degrees above 0 divided by one root mean square.

    Every degree counts alike in the mean, whatever its number of orders; weights per degree and channel.
    """

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        self.lmax = lmax
        self.norm_l0 = nn.LayerNorm(channels)
        self.affine_weight = nn.Parameter(torch.ones(lmax, channels))

    def forward(self, x: Float[Tensor, "N K C"]) -> Float[Tensor, "N K C"]:
        """Normalized features."""
        scalars = layer_norm(self.norm_l0, x[:, 0])
        rest = island(x[:, 1:])
        degree = degrees_of_all(self.lmax, x.device)[1:]
        balance = 1.0 / ((2 * degree + 1) * self.lmax).to(rest.dtype)
        mean = torch.einsum("nkc,k->n", rest.square(), balance) / rest.shape[-1]
        weight = self.affine_weight.index_select(0, degree - 1)
        rest = rest * (mean + 1e-5).rsqrt().reshape(-1, 1, 1) * weight
        return torch.cat([scalars.unsqueeze(1), rest], dim=1)


class SphereRMSNorm(nn.Module):
    """``rms_norm_sh``: scalars centered, then all degrees divided by one root mean square; a bias for scalars."""

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        self.lmax = lmax
        self.affine_weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.affine_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "N K C"]) -> Float[Tensor, "N K C"]:
        """Normalized features."""
        x = island(x)
        scalars = x[:, :1]
        x = torch.cat([scalars - scalars.mean(-1, keepdim=True), x[:, 1:]], dim=1)
        degree = degrees_of_all(self.lmax, x.device)
        balance = 1.0 / ((2 * degree + 1) * (self.lmax + 1)).to(x.dtype)
        mean = torch.einsum("nkc,k->n", x.square(), balance) / x.shape[-1]
        x = x * (mean + 1e-5).rsqrt().reshape(-1, 1, 1) * self.affine_weight.index_select(0, degree)
        return torch.cat([x[:, :1] + self.affine_bias, x[:, 1:]], dim=1)


NORMS = {"layer_norm_sh": SphereLayerNorm, "rms_norm_sh": SphereRMSNorm}


# ------------------------------------------------------------------------------------------------- linear and radial


class SO3Linear(nn.Module):
    """One matrix per degree, a bias for scalars."""

    def __init__(self, inputs: int, outputs: int, lmax: int) -> None:
        super().__init__()
        self.lmax, self.in_features = lmax, inputs
        self.weight = nn.Parameter(torch.empty(lmax + 1, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.uniform_(self.weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, x: Float[Tensor, "N K I"]) -> Float[Tensor, "N K O"]:
        """Mixes channels."""
        parts = [F.linear(x[:, :1], self.weight[0], self.bias)]
        for degree in range(1, self.lmax + 1):
            parts.append(F.linear(x[:, degree**2 : (degree + 1) ** 2], self.weight[degree]))
        return torch.cat(parts, dim=1)


class RadialFunction(nn.Module):
    """From lengths and elements of edges to hidden features, and by one more linear map to weights.

    Linear, LayerNorm and SiLU twice, on the radial basis and the embeddings of neighbor and center side by side.
    """

    def __init__(self, sizes: Sizes, outputs: int) -> None:
        super().__init__()
        width, self.n_basis = sizes.edge_channels, sizes.num_distance_basis
        self.source_embedding = nn.Embedding(sizes.max_z, width)
        self.target_embedding = nn.Embedding(sizes.max_z, width)
        self.linear_1 = nn.Linear(self.n_basis + 2 * width, width)
        self.norm_1 = nn.LayerNorm(width)
        self.linear_2 = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.linear_3 = nn.Linear(width, outputs)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.uniform_(embedding.weight, -0.001, 0.001)

    def hidden(self, edges: EdgeFeatures) -> Float[Tensor, "E W"]:
        """Features before the last linear map."""
        batch = edges.batch
        basis, source, target = self.linear_1.weight.split([self.n_basis, *[self.linear_2.in_features] * 2], dim=1)
        # The elements' parts of the first map are tables: (max_z, width) instead of (E, width) products.
        sources = F.linear(self.source_embedding.weight, source)
        targets = F.linear(self.target_embedding.weight, target, self.linear_1.bias)
        x = F.linear(edges.basis, basis)
        x = x + sources.index_select(0, batch.z.index_select(0, batch.src))
        x = x + targets.index_select(0, batch.z.index_select(0, batch.dst))
        x = F.silu(layer_norm(self.norm_1, x))
        return F.silu(layer_norm(self.norm_2, self.linear_2(x)))


class EdgeDegreeEmbedding(nn.Module):
    """First features of degree above 0: radial functions along the edges, summed over the neighbors."""

    def __init__(self, sizes: Sizes, avg_degree: float) -> None:
        super().__init__()
        self.sizes, self.avg_degree = sizes, avg_degree
        self.radial = RadialFunction(sizes, (sizes.lmax + 1) * sizes.sphere_channels)

    def forward(self, edges: EdgeFeatures) -> Float[Tensor, "N K C"]:
        """Sum over neighbors, divided by their typical number."""
        rows = self.sizes.lmax + 1  # those of order 0, which come first
        messages = self.radial.linear_3(self.radial.hidden(edges)).unflatten(1, (rows, -1))
        if edges.envelope is not None:
            messages = messages * edges.envelope.unsqueeze(-1)
        with torch.autocast(messages.device.type, enabled=False):
            turned = torch.bmm(edges.back[:, :rows].transpose(1, 2), messages.to(edges.back.dtype))
        return sum_by_index(turned, edges.batch.dst, len(edges.batch.z)) / self.avg_degree


# --------------------------------------------------------------------------------------------------------- attention


class SO2Linear(nn.Module):
    """Weights of an SO(2) convolution: one map for order 0, one without bias for each sign pair of orders above."""

    def __init__(self, inputs: int, outputs: int, lmax: int, mmax: int, extra: int = 0) -> None:
        super().__init__()
        self.shape = passes.SO2(layout(lmax, mmax), outputs)
        self.fc_m0 = nn.Linear((lmax + 1) * inputs, (lmax + 1) * outputs + extra)
        counts = [lmax - m + 1 for m in range(1, mmax + 1)]
        self.fc_m = nn.ModuleList(nn.Linear(n * inputs, 2 * n * outputs, bias=False) for n in counts)
        with torch.no_grad():
            for linear in self.fc_m:
                linear.weight.mul_(1 / math.sqrt(2.0))

    def weights(self) -> list[Tensor]:
        """Weight, bias and weights of the signed orders."""
        return [self.fc_m0.weight, self.fc_m0.bias, *(linear.weight for linear in self.fc_m)]

    def of_degree(self, degree: int) -> list[Tensor]:
        """The same, for the outputs of one degree alone; without extra outputs."""
        (_, n_all), width = self.shape.chosen.blocks[0], self.shape.width
        found = [p.unflatten(0, (n_all, width))[degree] for p in (self.fc_m0.weight, self.fc_m0.bias)]
        for m, linear in enumerate(self.fc_m[:degree], start=1):
            by_degree = linear.weight.unflatten(0, (2, self.shape.chosen.blocks[m][1], width))
            found.append(by_degree[:, degree - m].flatten(0, 1))
        return found


class GraphAttention(nn.Module):
    """Equivariant graph attention: messages are convolved in the edges' frames, weighted by attention, and summed.

    Parameters
    ----------
    sizes
        Of the network.
    outputs
        Channels of the result.
    degree
        If given, only this degree of the result is calculated: (N, 2l + 1, outputs). The weights for the others exist.
    """

    def __init__(self, sizes: Sizes, outputs: int, degree: int | None = None) -> None:
        super().__init__()
        self.sizes, self.degree = sizes, degree
        lmax, mmax, hidden = sizes.lmax, sizes.mmax, sizes.attn_hidden_channels
        gates = lmax * hidden if sizes.use_gate_act else hidden if sizes.use_sep_s2_act else 0
        alpha = sizes.num_heads * sizes.attn_alpha_channels
        chosen = layout(lmax, mmax)
        self.so2_conv_1 = SO2Linear(2 * sizes.sphere_channels, hidden, lmax, mmax, alpha + gates)
        self.radial = RadialFunction(sizes, chosen.n_radial * 2 * sizes.sphere_channels)
        self.alpha_norm = nn.LayerNorm(sizes.attn_alpha_channels) if sizes.use_attn_renorm else None
        self.alpha_dot = nn.Parameter(torch.empty(sizes.num_heads, sizes.attn_alpha_channels))
        nn.init.uniform_(self.alpha_dot, *(s / math.sqrt(sizes.attn_alpha_channels) for s in (-1, 1)))
        self.so2_conv_2 = SO2Linear(hidden, sizes.value_channels, lmax, mmax)
        self.proj = SO3Linear(sizes.value_channels, outputs, lmax)

    def forward(
        self, x: Float[Tensor, "N K C"], edges: EdgeFeatures, dropped: Float[Tensor, "E h"] | None = None
    ) -> Float[Tensor, "N K O"]:
        """What the neighbors send to every atom.

        Parameters
        ----------
        x : (N, K, C)
            Normalized features.
        edges
            Of the batch.
        dropped : (E, h), optional
            Factors of dropout for the attention.
        """
        batch, dtype = edges.batch, compute_dtype(x)
        first, alpha = self.so2_conv_1, self.sizes.num_heads * self.sizes.attn_alpha_channels
        inputs = [x, edges.into, self.radial.hidden(edges), self.radial.linear_3.weight, self.radial.linear_3.bias]
        inputs = [tensor.to(dtype) for tensor in (*inputs, *first.weights())]
        messages, extra = passes.EdgeConvolution.run(passes.Edges(first.shape, batch.src, batch.dst), *inputs)
        messages = self._activated(messages, extra[:, alpha:])
        attention = self._attention(extra[:, :alpha], edges)
        if dropped is not None:
            attention = attention * dropped
        if self.degree is not None:
            return self._one_degree(messages, attention, edges)
        second = [weight.to(dtype) for weight in self.so2_conv_2.weights()]
        (values,) = passes.SO2Convolution.run(self.so2_conv_2.shape, messages, *second)
        target = passes.Sum(batch.dst, len(x))
        (summed,) = passes.MessageSum.run(target, values, attention, edges.back.to(dtype))
        return self.proj(summed)

    def _activated(self, messages: Tensor, gates: Tensor) -> Tensor:
        """Nonlinearity of the messages."""
        chosen = self.so2_conv_1.shape.chosen
        if self.sizes.use_gate_act:
            return gated(messages, gates, constant(chosen.degrees, torch.long, messages.device), self.sizes.lmax)
        return on_sphere(self.sizes, self.sizes.mmax, True, messages, gates if self.sizes.use_sep_s2_act else None)

    def _attention(self, scalars: Float[Tensor, "E ha"], edges: EdgeFeatures) -> Float[Tensor, "E h"]:
        """Softmax over the neighbors of each center, in at least float32."""
        with torch.autocast(scalars.device.type, enabled=False):
            a = island(scalars).unflatten(1, (self.sizes.num_heads, -1))
            if self.alpha_norm is not None:
                a = self.alpha_norm(a)
            score = torch.einsum("eha,ha->eh", smooth_leaky_relu(a), self.alpha_dot)
            return neighbor_softmax(score, edges.batch.dst, len(edges.batch.z), edges.envelope)

    def _one_degree(self, messages: Tensor, attention: Tensor, edges: EdgeFeatures) -> Tensor:
        """Second convolution, sum and projection for one degree alone."""
        degree, chosen = self.degree, self.so2_conv_2.shape.chosen
        weights = [weight.to(messages.dtype) for weight in self.so2_conv_2.of_degree(degree)]
        parts = [F.linear(messages[:, : chosen.blocks[0][1]].flatten(1), *weights[:2]).unsqueeze(1)]
        for m, weight in enumerate(weights[2:], start=1):
            start, rows = chosen.blocks[m]
            out = F.linear(messages[:, start : start + 2 * rows].flatten(1), passes.signed_weight(weight))
            parts.append(out.unflatten(1, (2, -1)))
        kept = [row for row, l in enumerate(chosen.degrees) if l == degree]
        turn = edges.back.index_select(1, constant(tuple(kept), torch.long, messages.device))
        turn = turn[:, :, degree**2 : (degree + 1) ** 2].to(messages.dtype)
        target = passes.Sum(edges.batch.dst, len(edges.batch.z))
        (summed,) = passes.MessageSum.run(target, torch.cat(parts, dim=1), attention, turn)
        return F.linear(summed, self.proj.weight[degree], self.proj.bias if degree == 0 else None)


def neighbor_softmax(
    score: Float[Tensor, "E h"], dst: Tensor, n_atoms: int, envelope: Float[Tensor, "E 1"] | None
) -> Float[Tensor, "E h"]:
    """Softmax over the edges into each atom `dst` (E,).

    Eq.: with an envelope f, f_j f_j exp(s_j) / sum_k f_k exp(s_k): a neighbor that leaves counts no more in the sum, and an
    only neighbor, whose share is 1 until the end, fades as well.
    """
    with torch.no_grad():
        index = dst.unsqueeze(1).expand_as(score)
        highest = score.new_full((n_atoms, score.shape[1]), -math.inf).scatter_reduce(0, index, score, "amax")
    weight = torch.exp(score - highest.index_select(0, dst))
    if envelope is not None:
        weight = weight * envelope
    total = sum_by_index(weight, dst, n_atoms)
    share = weight / total.masked_fill(total == 0, 1.0).index_select(0, dst)
    return share if envelope is None else share * envelope


# ------------------------------------------------------------------------------------------------------- activations


def on_sphere(sizes: Sizes, mmax: int, by_order: bool, y: Tensor, gates: Tensor | None) -> Tensor:
    """SiLU on the grid; scalars are those of `gates` instead, where given."""
    to, back = grid_matrices(sizes.lmax, mmax, sizes.resolution(mmax), by_order, y.dtype, y.device)
    gates = None if gates is None else gates.to(y.dtype)
    return passes.SphereActivation.run(passes.Grid(to, back, gates is not None), y, gates)[0]


def gated(
    y: Float[Tensor, "E K C"], gates: Float[Tensor, "E LC"], degrees: Tensor, lmax: int
) -> Float[Tensor, "E K C"]:
    """SiLU of the scalars; degrees above times a sigmoid each. The first row is that of degree 0."""
    gates = torch.sigmoid(gates).unflatten(1, (lmax, -1)).index_select(1, degrees[1:] - 1)
    return torch.cat([F.silu(y[:, :1]), y[:, 1:] * gates], dim=1)


class FeedForward(nn.Module):
    """Feed-forward network of one atom's features: linear map, nonlinearity on the sphere or by gates, linear map.

    Parameters
    ----------
    sizes
        Of the network.
    outputs
        Channels of the result.
    scalars_only
        Whether only the scalars (N, outputs) are calculated. With separable activations they depend on scalars alone: the
        other weights exist, as published, and are not trained.
    """

    def __init__(self, sizes: Sizes, outputs: int, scalars_only: bool = False) -> None:
        super().__init__()
        self.sizes, self.scalars_only = sizes, scalars_only
        channels, hidden, lmax = sizes.sphere_channels, sizes.ffn_hidden_channels, sizes.lmax
        self.so3_linear_1 = SO3Linear(channels, hidden, lmax)
        self.so3_linear_2 = SO3Linear(hidden, outputs, lmax)
        if sizes.use_grid_mlp:
            self.grid_mlp = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        gates = (lmax if self.by_gates else 1) * hidden
        self.scalar_linear = nn.Linear(channels, gates) if self.by_gates or sizes.use_sep_s2_act else None
        if scalars_only and self.separable:
            self.so3_linear_1.requires_grad_(False)
            if sizes.use_grid_mlp:
                self.grid_mlp.requires_grad_(False)

    @property
    def by_gates(self) -> bool:
        """Whether the nonlinearity is that of gates."""
        return self.sizes.use_gate_act and not self.sizes.use_grid_mlp

    @property
    def separable(self) -> bool:
        """Whether scalars go their own way."""
        return self.sizes.use_sep_s2_act and not self.by_gates

    def forward(self, x: Float[Tensor, "N K C"]) -> Tensor:
        """(N, K, outputs), or (N, outputs) for scalars alone."""
        if self.scalars_only and self.separable:
            scalars = F.silu(self.scalar_linear(x[:, 0]))
            return F.linear(scalars, self.so3_linear_2.weight[0], self.so3_linear_2.bias)
        out = self.so3_linear_2(self._hidden(x))
        return out[:, 0] if self.scalars_only else out

    def _hidden(self, x: Tensor) -> Float[Tensor, "N K F"]:
        """What the second linear map reads."""
        y = self.so3_linear_1(x)
        scalars = None if self.scalar_linear is None else self.scalar_linear(x[:, 0])
        lmax = self.sizes.lmax
        if self.by_gates:
            return gated(y, scalars, degrees_of_all(lmax, x.device), lmax)
        if not self.sizes.use_grid_mlp:
            return on_sphere(self.sizes, lmax, False, y, scalars)
        return self._on_grid(y, scalars)

    def _on_grid(self, y: Tensor, scalars: Tensor | None) -> Tensor:
        """Three linear maps with SiLU between, point by point on the grid."""
        lmax = self.sizes.lmax
        grid = passes.Grid(*grid_matrices(lmax, lmax, self.sizes.resolution(lmax), False, y.dtype, y.device), False)
        # The first and the last map act on channels alone: on coefficients, which are fewer than points.
        y = self.grid_mlp[0](y)
        (y,) = passes.SphereNetwork.run(grid, y, self.grid_mlp[1].weight.to(y.dtype))
        if scalars is None:
            return self.grid_mlp[2](y)
        return torch.cat([F.silu(scalars).unsqueeze(1), self.grid_mlp[2](y[:, 1:])], dim=1)


class Block(nn.Module):
    """Attention and feed-forward network, each on normalized features and added to what was there."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        norm = NORMS[sizes.norm_type]
        self.norm_1 = norm(sizes.lmax, sizes.sphere_channels)
        self.ga = GraphAttention(sizes, sizes.sphere_channels)
        self.norm_2 = norm(sizes.lmax, sizes.sphere_channels)
        self.ffn = FeedForward(sizes, sizes.sphere_channels)

    def forward(
        self, x: Float[Tensor, "N K C"], edges: EdgeFeatures, dropped: Tensor | None = None, kept: Tensor | None = None
    ) -> Float[Tensor, "N K C"]:
        """New features; `dropped` (E, h) are factors of the attention, `kept` (2, N) of the two branches."""
        paths = (None, None) if kept is None else kept.unsqueeze(-1).unsqueeze(-1)
        x = x + _times(self.ga(self.norm_1(x), edges, dropped), paths[0])
        return x + _times(self.ffn(self.norm_2(x)), paths[1])


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def initialize(module: nn.Module, weight_init: str) -> None:
    """Zero biases; weights as published: ``"uniform"`` keeps what layers draw, ``"normal"`` draws with 1/sqrt(inputs)."""
    for child in module.modules():
        if isinstance(child, (nn.Linear, SO3Linear)):
            if child.bias is not None:
                nn.init.zeros_(child.bias)
            if weight_init == "normal":
                nn.init.normal_(child.weight, std=1 / math.sqrt(child.in_features))
    for child in module.modules():
        if isinstance(child, RadialFunction):
            for linear in (child.linear_1, child.linear_2, child.linear_3):
                bound = 1 / math.sqrt(linear.in_features)
                nn.init.uniform_(linear.weight, -bound, bound)
