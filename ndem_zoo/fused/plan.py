"""The fused execution plan of TorchMD-NET's Equivariant Transformer: the same numbers as `TorchMDNet`, in less time.

The module's own `forward` is the definition; here the same pass is run with hand-written derivatives, as one node of
autograd. Training on forces needs the gradient, by the weights, of

    J = f(x, vec) + <v, dE/dpos>        (f: what the heads make of the features; v: from the loss of the forces)

and <v, dE/dpos> is the derivative of E along v. So four passes give everything, and nothing is differentiated twice:

    forward    features of the atoms
    backward   dE/dpos; the adjoint of every value on the way is kept
    tangent    derivative of every value along v
    reverse    adjoints of all values in J. Those of the tangents need no computing: they are the adjoints of
               `backward`.

Filters are made once for each pair, together with their derivative by the distance, so that no adjoint of an edge has
channels. `autograd.py` makes these passes known to autograd, `head.py` has those of the heads.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ndem_zoo.fused import autograd, native
from ndem_zoo.fused.pairs import Layer, Pairs
from ndem_zoo.fused.torch_kernels import TorchKernels

if TYPE_CHECKING:
    from ndem_zoo.graph import Batch
    from ndem_zoo.models.torchmd_net import TorchMDNet

_LAYER_PARAMETERS = (
    "layernorm.weight", "layernorm.bias", "q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias",
    "v_proj.weight", "v_proj.bias", "o_proj.weight", "o_proj.bias", "vec_proj.weight", "dk_proj.weight",
    "dk_proj.bias", "dv_proj.weight", "dv_proj.bias",
)  # fmt: skip
_OTHER_PARAMETERS = (
    "embedding.weight", "neighbor_embedding.embedding.weight", "neighbor_embedding.distance_proj.weight",
    "neighbor_embedding.distance_proj.bias", "neighbor_embedding.combine.weight", "neighbor_embedding.combine.bias",
    "out_norm.weight", "out_norm.bias",
)  # fmt: skip


def features(backbone: TorchMDNet, batch: Batch, vec: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Scalars (N, C) and vectors (N, 3, C); None where the plan does not apply, for the caller to do it the plain way.

    Parameters
    ----------
    backbone
        The network.
    batch
        Structures.
    vec : (N, 3, C), optional
        Vectors before the first layer; None for zeros.
    """
    if not backbone.attention_layers or backbone.distance_expansion.means.requires_grad or batch.z.shape[0] == 0:
        return None
    if torch._C._are_functorch_transforms_active():  # vmap and torch.func see no hand-written derivatives
        return None
    parameters = _parameters(backbone)
    pos = batch.pos
    library = native.library() if pos.device.type == "cpu" else None
    kernels = TorchKernels(pos) if library is None else native.NativeKernels(library, pos.dtype)
    needs_forces = torch.is_grad_enabled() and pos.requires_grad
    flat = pos.detach().contiguous()
    pairs = kernels.pairs(batch.src, batch.dst, batch.shift, flat, batch.system, backbone.cutoff)
    if pairs is None:
        return None
    basis = backbone.distance_expansion
    vector_cutoff = backbone.attention_layers[0].vector_cutoff
    kernels.radial(pairs, backbone.cutoff, vector_cutoff, basis.means, basis.betas, needs_forces)
    weights = [parameter.detach() for parameter in parameters]
    layers = backbone.attention_layers
    if library is None:
        passes = BackbonePasses(kernels, pairs, batch.z, pos, weights, backbone)
    else:
        sizes = len(layers), layers[0].num_heads, backbone.out_norm.eps
        passes = native.NativeBackbone(kernels, pairs, batch.z, pos, weights, *sizes)
    scalars, vectors = autograd.run(passes, (pos, vec), parameters)
    scalars.passes = passes  # tells heads that their plan can follow
    return scalars, vectors


def _parameters(backbone: TorchMDNet) -> list[Tensor]:
    """All weights, in the order of `_parameter_names`."""

    def found(module: nn.Module, path: str) -> Tensor:
        *owners, name = path.split(".")
        for owner in owners:
            module = module._modules[owner]
        return module._parameters[name]

    layers = [found(layer, name) for layer in backbone.attention_layers for name in _LAYER_PARAMETERS]
    return layers + [found(backbone, name) for name in _OTHER_PARAMETERS]


def _parameter_names(n_layers: int) -> list[str]:
    layers = [f"attention_layers.{i}.{name}" for i in range(n_layers) for name in _LAYER_PARAMETERS]
    return [*layers, *_OTHER_PARAMETERS]


@dataclass(slots=True)
class _Adjoints:
    """What `backward` keeps: adjoints of the values of each layer (lists by layer) and before the first."""

    normed_out: Tensor | None = None  # of the features, before the last normalization
    x: list[Tensor] = field(default_factory=list)  # after the layer
    vec: list[Tensor] = field(default_factory=list)
    o: list[Tensor] = field(default_factory=list)
    w: list[Tensor | None] = field(default_factory=list)
    x_sum: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    x_first: Tensor | None = None
    neighbors: Tensor | None = None


@dataclass(slots=True)
class _Tangents:
    """What `tangent` keeps: derivatives along the displacement, of the same values."""

    change: Tensor
    neighbors: Tensor
    x: list[Tensor] = field(default_factory=list)  # before the layer
    vec: list[Tensor | None] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    w: list[Tensor | None] = field(default_factory=list)
    score: list[Tensor] = field(default_factory=list)
    score_self: list[Tensor] = field(default_factory=list)
    x_sum: list[Tensor] = field(default_factory=list)
    o: list[Tensor] = field(default_factory=list)
    x_last: Tensor | None = None


class BackbonePasses(autograd.Passes):
    """One evaluation of the network, from (positions, first vectors or None) to (scalars, vectors)."""

    def __init__(
        self, kernels: TorchKernels, pairs: Pairs, z: Tensor, pos: Tensor,
        weights: list[Tensor], backbone: TorchMDNet,
    ) -> None:  # fmt: skip
        super().__init__(pos)
        self.names = _parameter_names(len(backbone.attention_layers))
        self.kernels, self.pairs, self.z = kernels, pairs, z
        self.weights = dict(zip(self.names, weights, strict=True))
        self.eps = backbone.out_norm.eps
        heads = [layer.num_heads for layer in backbone.attention_layers]
        self.layers = [self._layer(i, heads[i]) for i in range(len(heads))]

    def _layer(self, i: int, heads: int) -> Layer:
        weight = {name: self.weights[f"attention_layers.{i}.{name}"] for name in _LAYER_PARAMETERS}
        channels = weight["q_proj.bias"].shape[0]

        def joined(kind: str, *names: str) -> Tensor:
            return torch.cat([weight[f"{name}_proj.{kind}"] for name in names])

        return Layer(
            channels=channels,
            heads=heads,
            qkv_weight=joined("weight", "q", "k", "v"),
            qkv_bias=joined("bias", "q", "k", "v"),
            filter_weight_t=joined("weight", "dk", "dv").t().contiguous(),
            filter_bias=joined("bias", "dk", "dv"),
            o_weight=weight["o_proj.weight"],
            vec_weight=weight["vec_proj.weight"],
        )

    check_second_order = autograd.refuse_second_order

    def _of_layer(self, i: int, name: str) -> Tensor:
        return self.weights[f"attention_layers.{i}.{name}"]

    def forward(self, _: Tensor, vec: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scalars (N, C) and vectors (N, 3, C) of the atoms."""
        k, pairs, weights = self.kernels, self.pairs, self.weights
        embed = "neighbor_embedding."
        self.emb = weights[embed + "embedding.weight"].index_select(0, self.z)
        self.embed_bias = weights[embed + "distance_proj.bias"]
        proj_t = weights[embed + "distance_proj.weight"].t().contiguous()
        self.embed_pre = k.product(pairs.rbf[: pairs.p], proj_t)
        self.embed_pre_r = None if pairs.rbf_r is None else k.product(pairs.rbf_r, proj_t)
        neighbors = k.embed_forward(pairs, self.embed_bias, self.embed_pre, self.emb)
        self.first = torch.cat([weights["embedding.weight"].index_select(0, self.z), neighbors], dim=1)
        self.combine = weights[embed + "combine.weight"]
        self.combine_t = self.combine.t().contiguous()
        x = k.product(self.first, self.combine_t, weights[embed + "combine.bias"])
        vec = None if vec is None else vec.contiguous()
        for i, layer in enumerate(self.layers):
            x, vec = self._layer_forward(i, layer, x, vec)
        self.unit, self.inverse, scalars = k.norm_forward(
            x, weights["out_norm.weight"], weights["out_norm.bias"], self.eps
        )
        return scalars.clone(), vec.clone()  # what leaves must not lie in memory that is used again

    def _layer_forward(self, i: int, layer: Layer, x: Tensor, vec: Tensor | None) -> tuple[Tensor, Tensor]:
        k, pairs = self.kernels, self.pairs
        layer.unit, layer.inverse, layer.normed = k.norm_forward(
            x, self._of_layer(i, "layernorm.weight"), self._of_layer(i, "layernorm.bias"), self.eps
        )
        layer.transpose()
        layer.y = k.product(layer.normed, layer.qkv_weight_t, layer.qkv_bias)
        layer.pre = k.product(pairs.rbf, layer.filter_weight_t)
        layer.pre_r = None if pairs.rbf_r is None else k.product(pairs.rbf_r, layer.filter_weight_t)
        layer.vec = vec
        layer.w = None if vec is None else _by_atom(k.product(_rows(vec), layer.vec_weight_t))
        layer.x_sum, v_sum = k.pair_forward(pairs, layer)
        layer.o = k.product(layer.x_sum, layer.o_weight_t, self._of_layer(i, "o_proj.bias"))
        return k.update_forward(x, vec, layer.o, layer.w, v_sum)

    def backward(self, g_x: Tensor, g_vec: Tensor, *, keep: bool) -> tuple[tuple[Tensor, None], _Adjoints]:
        """Adjoints of the positions, from those of the features."""
        k, pairs, found = self.kernels, self.pairs, _Adjoints()
        if keep:
            found.normed_out = g_x
        g_change = k.zeros(pairs.p, 4)
        into = k.zeros(*g_x.shape)
        k.norm_backward(self.unit, self.inverse, self.weights["out_norm.weight"], g_x, into, False)
        g_x = into
        for i in reversed(range(len(self.layers))):
            g_x, g_vec = self._layer_backward(i, self.layers[i], g_x, g_vec, g_change, found if keep else None)
        half = self.first.shape[1] // 2
        g_neighbors = k.product(g_x, self.combine[:, half:])
        k.embed_backward(
            pairs, self.embed_bias, self.embed_pre, self.embed_pre_r, self.emb, g_neighbors, g_change, False
        )
        if keep:
            found.x_first, found.neighbors = g_x, g_neighbors
        return (k.geometry_backward(pairs, g_change).clone(), None), found

    def _layer_backward(
        self, i: int, layer: Layer, g_x: Tensor, g_vec: Tensor, g_change: Tensor, found: _Adjoints | None
    ) -> tuple[Tensor, Tensor | None]:
        k = self.kernels
        before, into = k.empty(*g_x.shape).copy_(g_x), None if layer.vec is None else k.empty(*g_vec.shape)
        with contextlib.nullcontext() if found else k.scratch():
            g_o, g_w = k.update_backward(layer.o, layer.w, g_x, g_vec)
            g_sum = k.product(g_o, layer.o_weight)
            if into is not None:
                k.product(_rows(g_w), layer.vec_weight, out=_rows(into.copy_(g_vec)), add=True)
            g_y, _ = k.pair_backward(self.pairs, layer, g_sum, g_vec, into, g_change, False)
            g_normed = k.product(g_y, layer.qkv_weight)
            gamma = self._of_layer(i, "layernorm.weight")
            k.norm_backward(layer.unit, layer.inverse, gamma, g_normed, before, False)
        if found is not None:
            kept = {"x": g_x, "vec": g_vec, "o": g_o, "w": g_w, "x_sum": g_sum, "y": g_y, "normed": g_normed}
            for name, value in kept.items():
                getattr(found, name).insert(0, value)
        return before, into

    def tangent(self, pos_t: Tensor, _: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], _Tangents]:
        """Derivatives of the features along a displacement (N, 3) of the atoms."""
        k, pairs = self.kernels, self.pairs
        change = k.geometry_tangent(pairs, pos_t)
        neighbors = k.embed_tangent(pairs, change, self.embed_bias, self.embed_pre, self.embed_pre_r, self.emb)
        found = _Tangents(change, neighbors)
        half = self.first.shape[1] // 2
        x_t, vec_t = k.product(neighbors, self.combine_t[half:]), None
        for i, layer in enumerate(self.layers):
            x_t, vec_t = self._layer_tangent(i, layer, x_t, vec_t, found)
        found.x_last = x_t
        out_t = k.norm_tangent(self.unit, self.inverse, self.weights["out_norm.weight"], x_t)
        return (out_t.clone(), vec_t.clone()), found

    def _layer_tangent(
        self, i: int, layer: Layer, x_t: Tensor, vec_t: Tensor | None, found: _Tangents
    ) -> tuple[Tensor, Tensor]:
        k = self.kernels
        if layer.vec is not None and vec_t is None:  # encoded vectors do not depend on positions
            vec_t = k.zeros(*layer.vec.shape)
        normed_t = k.norm_tangent(layer.unit, layer.inverse, self._of_layer(i, "layernorm.weight"), x_t)
        y_t = k.product(normed_t, layer.qkv_weight_t)
        w_t = None if vec_t is None else _by_atom(k.product(_rows(vec_t), layer.vec_weight_t))
        sum_t, v_t, score_t, score_self_t = k.pair_tangent(self.pairs, layer, found.change, y_t, vec_t)
        o_t = k.product(sum_t, layer.o_weight_t)
        kept = {"x": x_t, "vec": vec_t, "normed": normed_t, "y": y_t, "w": w_t, "x_sum": sum_t, "o": o_t}
        for name, value in {**kept, "score": score_t, "score_self": score_self_t}.items():
            getattr(found, name).append(value)
        return k.update_tangent(x_t, vec_t, layer.o, layer.w, o_t, w_t, v_t)

    def gradient(
        self, m_x: Tensor, m_vec: Tensor, *, second: tuple[_Adjoints, _Tangents] | None, wanted: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, Tensor | None], list[Tensor | None]]:
        """Adjoints of positions (first order only) and first vectors, and gradients by all weights."""
        k, pairs, weights, out = self.kernels, self.pairs, self.weights, {}
        g_change = k.zeros(pairs.p, 4) if wanted[0] and second is None else None
        into = k.zeros(*m_x.shape)
        norm = self.unit, self.inverse, weights["out_norm.weight"]
        if second is None:
            gradients = k.norm_backward(*norm, m_x, into, True)
        else:
            gradients = k.norm_reverse(*norm, second[1].x_last, second[0].normed_out, m_x, into)
        out["out_norm.weight"], out["out_norm.bias"] = gradients
        m_x = into
        for i in reversed(range(len(self.layers))):
            m_x, m_vec = self._layer_gradient(i, self.layers[i], m_x, m_vec, g_change, second, out)
        self._first_gradient(m_x, g_change, second, out)
        g_pos = None if g_change is None else k.geometry_backward(pairs, g_change).clone()
        return (g_pos, None if m_vec is None else m_vec.clone()), [out[name] for name in self.names]

    def _layer_gradient(
        self, i: int, layer: Layer, m_x: Tensor, m_vec: Tensor, g_change: Tensor | None,
        second: tuple[_Adjoints, _Tangents] | None, out: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Adjoints before the layer; files the gradients by its weights in `out`."""
        k, pairs, gamma = self.kernels, self.pairs, self._of_layer(i, "layernorm.weight")
        before, into = k.empty(*m_x.shape).copy_(m_x), None if layer.vec is None else k.empty(*m_vec.shape)
        g = None if second is None else {name: getattr(second[0], name)[i] for name in _LAYER_ADJOINTS}
        t = None if second is None else {name: getattr(second[1], name)[i] for name in _LAYER_TANGENTS}
        with k.scratch():
            if second is None:
                m_o, m_w = k.update_backward(layer.o, layer.w, m_x, m_vec)
            else:
                m_o, m_w = k.update_reverse(layer.o, layer.w, t["o"], t["w"], g["x"], g["vec"], m_x, m_vec)
            m_sum = k.product(m_o, layer.o_weight)
            if into is not None:
                k.product(_rows(m_w), layer.vec_weight, out=_rows(into.copy_(m_vec)), add=True)
            if second is None:
                m_y, m_pre = k.pair_backward(pairs, layer, m_sum, m_vec, into, g_change, True)
                m_pre_r = None
            else:
                m_y, m_pre, m_pre_r = k.pair_reverse(
                    pairs, layer, second[1].change, t["y"], t["vec"], t["score"], t["score_self"], g["x_sum"],
                    g["vec"], m_sum, m_vec, into,
                )  # fmt: skip
            m_normed = k.product(m_y, layer.qkv_weight)
            norm = layer.unit, layer.inverse, gamma
            if second is None:
                scale, shift = k.norm_backward(*norm, m_normed, before, True)
            else:
                scale, shift = k.norm_reverse(*norm, t["x"], g["normed"], m_normed, before)
            qkv = k.weight_gradient(m_y, layer.normed, second and (g["y"], t["normed"]))
            filters = k.weight_gradient(m_pre, pairs.rbf, second and (m_pre_r, pairs.rbf_r))
            qkv_bias, filter_bias = k.column_sum(m_y), k.column_sum(m_pre)
            values = {
                "layernorm.weight": scale, "layernorm.bias": shift,
                "o_proj.weight": k.weight_gradient(m_o, layer.x_sum, second and (g["o"], t["x_sum"])),
                "o_proj.bias": k.column_sum(m_o), "vec_proj.weight": None,
            }  # fmt: skip
            if into is not None:
                more = second and (_rows(g["w"]), _rows(t["vec"]))
                values["vec_proj.weight"] = k.weight_gradient(_rows(m_w), _rows(layer.vec), more)
        c = layer.channels
        for name, start, stop in (("q", 0, c), ("k", c, 2 * c), ("v", 2 * c, 5 * c)):
            values[f"{name}_proj.weight"], values[f"{name}_proj.bias"] = qkv[start:stop], qkv_bias[start:stop]
        for name, start, stop in (("dk", 0, c), ("dv", c, 4 * c)):
            values[f"{name}_proj.weight"], values[f"{name}_proj.bias"] = filters[start:stop], filter_bias[start:stop]
        out.update({f"attention_layers.{i}.{name}": value for name, value in values.items()})
        return before, into

    def _first_gradient(
        self, m_x: Tensor, g_change: Tensor | None, second: tuple[_Adjoints, _Tangents] | None, out: dict[str, Tensor]
    ) -> None:
        """Gradients by the weights before the first layer."""
        k, pairs, half, embed = self.kernels, self.pairs, self.first.shape[1] // 2, "neighbor_embedding."
        gradient = k.weight_gradient(m_x, self.first, None)
        if second is not None:  # the atom's own embedding has no tangent
            gradient[:, half:] += k.product(second[0].x_first.t(), second[1].neighbors)
        out[embed + "combine.weight"], out[embed + "combine.bias"] = gradient, k.column_sum(m_x)
        m_own, m_neighbors = k.product(m_x, self.combine[:, :half]), k.product(m_x, self.combine[:, half:])
        values = self.embed_bias, self.embed_pre, self.embed_pre_r, self.emb
        if second is None:
            m_pre, m_emb = k.embed_backward(pairs, *values, m_neighbors, g_change, True)
            more = None
        else:
            m_pre, m_pre_r, m_emb = k.embed_reverse(
                pairs, second[1].change, *values, second[0].neighbors, m_neighbors
            )
            more = m_pre_r, pairs.rbf_r
        for name, value in (("embedding.weight", m_own), (embed + "embedding.weight", m_emb)):
            out[name] = torch.zeros_like(self.weights[name]).index_add_(0, self.z, value)
        out[embed + "distance_proj.weight"] = k.weight_gradient(m_pre, pairs.rbf[: pairs.p], more)
        out[embed + "distance_proj.bias"] = k.column_sum(m_pre)


_LAYER_ADJOINTS = ("x", "vec", "o", "w", "x_sum", "y", "normed")
_LAYER_TANGENTS = ("x", "vec", "normed", "y", "w", "score", "score_self", "x_sum", "o")


def _rows(vectors: Tensor) -> Tensor:
    """(N, 3, C) as (3N, C)."""
    return vectors.view(-1, vectors.shape[-1])


def _by_atom(rows: Tensor) -> Tensor:
    """(3N, C) as (N, 3, C)."""
    return rows.view(-1, 3, rows.shape[-1])
