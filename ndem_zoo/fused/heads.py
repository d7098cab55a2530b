"""The passes of TorchMD-NET's heads: gated equivariant blocks, one after the other.

With a = W1 v, b = W2 v, n = |a|, h = A [s; n], u = B silu(h) = [out | gate], a block maps scalars s and vectors v to
silu(out) (the last block: out) and b gate. `GatedEquivariantBlock` is the definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ndem_zoo.fused import autograd

if TYPE_CHECKING:
    from ndem_zoo.fused.native import Kernels
    from ndem_zoo.models.base import Features
    from ndem_zoo.models.torchmd_net import GatedEquivariantBlock

_NAMES = (
    "vec1_proj.weight", "vec2_proj.weight", "update_net.0.weight", "update_net.0.bias", "update_net.2.weight",
    "update_net.2.bias",
)  # fmt: skip


def run(blocks: list[GatedEquivariantBlock], features: Features) -> tuple[Tensor, Tensor] | None:
    """Scalars (N, O) and vectors (N, 3, O) of the last block; None if the features were not made by the fused plan."""
    backbone = getattr(features.scalars, "passes", None)
    if backbone is None or torch._C._are_functorch_transforms_active():
        return None
    named = [dict(block.named_parameters()) for block in blocks]
    parameters = [weights[name] for weights in named for name in _NAMES]
    passes = HeadPasses(backbone.kernels.like(), backbone.pos, blocks, [p.detach() for p in parameters])
    return autograd.run(passes, (features.scalars, features.vectors), parameters)


@dataclass(slots=True)
class _Block:
    """Weights and values of one block; see the module's first lines for their names."""

    activate: bool
    channels: int  # I
    out_channels: int  # O
    vec_weight: Tensor  # (I + O, I), of W1 and W2
    hidden_weight: Tensor  # A (I, 2I)
    hidden_bias: Tensor
    out_weight: Tensor  # B (2O, I)
    out_bias: Tensor
    vec_weight_t: Tensor
    hidden_weight_t: Tensor
    out_weight_t: Tensor
    v: Tensor | None = None  # (N, 3, I)
    ab: Tensor | None = None  # (3N, I + O)
    sn: Tensor | None = None  # (N, 2I)
    h: Tensor | None = None  # (N, I)
    t: Tensor | None = None  # silu(h)
    u: Tensor | None = None  # (N, 2O)


class HeadPasses(autograd.Passes):
    """One evaluation of a head, from (scalars, vectors) to those of its last block."""

    def __init__(
        self, kernels: Kernels, pos: Tensor, blocks: list[GatedEquivariantBlock],
        weights: list[Tensor],
    ) -> None:  # fmt: skip
        super().__init__(pos)
        self.kernels, n = kernels, len(_NAMES)
        self.blocks = []
        for i, block in enumerate(blocks):
            first, second, hidden, hidden_bias, out, out_bias = weights[i * n : (i + 1) * n]
            vec = torch.cat([first, second])
            transposed = (weight.t().contiguous() for weight in (vec, hidden, out))
            sizes = block.activate, first.shape[1], second.shape[0]
            self.blocks.append(_Block(*sizes, vec, hidden, hidden_bias, out, out_bias, *transposed))

    def forward(self, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Scalars and vectors of the last block."""
        k = self.kernels
        s, v = s.detach().contiguous(), v.detach().contiguous()
        for b in self.blocks:
            b.v = v
            b.ab = k.product(v.view(-1, b.channels), b.vec_weight_t)
            b.sn = k.length_forward(s, b.ab)
            b.h = k.product(b.sn, b.hidden_weight_t, b.hidden_bias)
            b.t = k.silu_forward(b.h)
            b.u = k.product(b.t, b.out_weight_t, b.out_bias)
            s, v = k.gate_forward(b.u, b.ab, b.activate)
        return s.clone(), v.clone()

    def backward(self, g_s: Tensor, g_v: Tensor, *, keep: bool) -> tuple[tuple[Tensor, Tensor], list[Any]]:
        """Adjoints of scalars and vectors."""
        k, found = self.kernels, []
        for b in reversed(self.blocks):
            g_u, g_ab = k.gate_backward(b.u, b.ab, g_s, g_v, b.activate)
            g_h = k.silu_backward(b.h, k.product(g_u, b.out_weight))
            g_sn = k.product(g_h, b.hidden_weight)
            kept = {"s": g_s, "v": g_v, "u": g_u, "h": g_h, "sn": g_sn, "ab": g_ab}
            g_s = k.length_backward(b.sn, b.ab, g_sn, g_ab)
            g_v = k.product(g_ab, b.vec_weight).view(-1, 3, b.channels)
            found.insert(0, kept)
        return (g_s.clone(), g_v.clone()), found if keep else None

    def tangent(self, s_t: Tensor, v_t: Tensor) -> tuple[tuple[Tensor, Tensor], list[Any]]:
        """Derivatives of scalars and vectors along a change of the features."""
        k, found = self.kernels, []
        for b in self.blocks:
            kept = {"v": v_t}
            kept["ab"] = k.product(v_t.reshape(-1, b.channels), b.vec_weight_t)
            kept["sn"] = k.length_tangent(b.sn, b.ab, s_t, kept["ab"])
            kept["h"] = k.product(kept["sn"], b.hidden_weight_t)
            kept["t"] = k.silu_backward(b.h, kept["h"])  # the same factor
            kept["u"] = k.product(kept["t"], b.out_weight_t)
            s_t, v_t = k.gate_tangent(b.u, b.ab, kept["u"], kept["ab"], b.activate)
            found.append(kept)
        return (s_t.clone(), v_t.clone()), found

    def gradient(
        self, m_s: Tensor, m_v: Tensor, *, second: tuple[list[Any], list[Any]] | None, wanted: tuple[bool, ...]
    ) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
        """Adjoints of scalars and vectors, and gradients by all weights."""
        k, gradients = self.kernels, []
        for i, b in reversed(list(enumerate(self.blocks))):
            g, t = (None, None) if second is None else (second[0][i], second[1][i])
            if g is None:
                m_u, m_ab = k.gate_backward(b.u, b.ab, m_s, m_v, b.activate)
                m_h = k.silu_backward(b.h, k.product(m_u, b.out_weight))
                m_sn = k.product(m_h, b.hidden_weight)
                m_s = k.length_backward(b.sn, b.ab, m_sn, m_ab)
            else:
                m_u, m_ab = k.gate_reverse(b.u, b.ab, t["u"], t["ab"], g["s"], g["v"], m_s, m_v, b.activate)
                g_t = k.product(g["u"], b.out_weight)
                m_h = k.silu_reverse(b.h, t["h"], g_t, k.product(m_u, b.out_weight))
                m_sn = k.product(m_h, b.hidden_weight)
                m_s = k.length_reverse(b.sn, b.ab, t["sn"], t["ab"], g["sn"], m_sn, m_ab)
            vec = k.weight_gradient(m_ab, b.v.view(-1, b.channels), g and (g["ab"], t["v"].view(-1, b.channels)))
            gradients = [
                vec[: b.channels],
                vec[b.channels :],
                k.weight_gradient(m_h, b.sn, g and (g["h"], t["sn"])),
                k.column_sum(m_h),
                k.weight_gradient(m_u, b.t, g and (g["u"], t["t"])),
                k.column_sum(m_u),
                *gradients,
            ]
            m_v = k.product(m_ab, b.vec_weight).view(-1, 3, b.channels)
        return (m_s.clone(), m_v.clone()), gradients
