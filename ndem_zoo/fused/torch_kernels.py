"""The kernels of the fused plan in PyTorch's own operations: for GPUs, for CPUs without a compiler, and as a check.

Same methods and numbers as `native.NativeKernels`. On a GPU nothing here waits for the device, and shapes depend on the
number of atoms and edges alone: pairs beyond the cutoff stay, with cutoff functions of 0.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from ndem_zoo.fused.gemm import product
from ndem_zoo.fused.pairs import Layer, Pairs


def _silu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu and its first two derivatives."""
    s = torch.sigmoid(x)
    value = x * s
    return value, s + value * (1 - s), s * (1 - s) * (2 + x * (1 - 2 * s))


class _Directions:
    """Values of one layer at the center (i) and the neighbor (j) of both directions: (2P, ...) each.

    The first half are the directions to `second`, the other half the way back.
    """

    def __init__(self, pairs: Pairs, layer: Layer) -> None:
        self.h, self.d = layer.heads, layer.channels // layer.heads
        self.c, self.n = layer.channels, pairs.n
        self.i = torch.cat([pairs.first, pairs.second])
        self.j = torch.cat([pairs.second, pairs.first])
        sign = torch.ones(2, 1, 1, dtype=pairs.edge.dtype, device=pairs.edge.device)
        sign[1] = -1
        self.geometry = pairs.geometry
        self.unit = (sign * pairs.geometry[:, 1:4]).reshape(-1, 1, 3, 1)
        self.sign = sign.expand(2, pairs.p, 1).reshape(-1, 1, 1, 1)
        self.phi, self.phi_r, self.vphi, self.vphi_r = (
            pairs.geometry[:, k].repeat(2).reshape(-1, 1, 1) for k in (4, 5, 6, 7)
        )

    def scalars(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """(N, C) as (2P or N, H, D)."""
        return (x if index is None else x.index_select(0, index)).reshape(-1, self.h, self.d)

    def vectors(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """(N, 3, C) as (2P or N, H, 3, D)."""
        x = x if index is None else x.index_select(0, index)
        return x.reshape(-1, 3, self.h, self.d).transpose(1, 2)

    def qkv(self, y: Tensor, kind: str, index: Tensor | None = None) -> tuple[Tensor, ...]:
        """q or k as (., H, D); the three parts of v likewise."""
        c = self.c
        if kind == "v":
            v = y[:, 2 * c :] if index is None else y[:, 2 * c :].index_select(0, index)
            return v.reshape(-1, self.h, 3, self.d).unbind(2)
        columns = y[:, :c] if kind == "q" else y[:, c : 2 * c]
        return (self.scalars(columns, index),)

    def filters(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(P, 4C) as four (P, H, D): of k, and of the three parts of v."""
        k = values[:, : self.c].reshape(-1, self.h, self.d)
        return (k, *values[:, self.c :].reshape(-1, self.h, 3, self.d).unbind(2))

    def joined(self, k: Tensor, v1: Tensor, v2: Tensor, v3: Tensor) -> Tensor:
        """The inverse of `filters`."""
        v = torch.stack([v1, v2, v3], dim=2).reshape(-1, 3 * self.c)
        return torch.cat([k.reshape(-1, self.c), v], dim=1)

    def both(self, values: Tensor) -> Tensor:
        """(P, ...) for both directions: (2P, ...)."""
        return torch.cat([values, values])

    def over_directions(self, values: Tensor) -> Tensor:
        """Sum of (2P, ...) over the two directions of each pair: (P, ...)."""
        half = values.shape[0] // 2
        return values[:half] + values[half:]

    def flat(self, vectors: Tensor) -> Tensor:
        """(., H, 3, D) as (., 3, C)."""
        return vectors.transpose(1, 2).reshape(-1, 3, self.c)

    def to_atoms(self, out: Tensor, values: Tensor, index: Tensor) -> None:
        """Add rows of (2P, ...) to the atoms of `index`."""
        out.index_add_(0, index, values.reshape(values.shape[0], *out.shape[1:]))


class TorchKernels:
    """The kernels as methods on tensors of any device; see `native.NativeKernels`."""

    def __init__(self, like: Tensor) -> None:
        self._like = like.detach()

    def like(self) -> TorchKernels:
        """The same kernels."""
        return self

    def empty(self, *shape: int) -> Tensor:
        """A tensor with arbitrary content."""
        return self._like.new_empty(shape)

    def zeros(self, *shape: int) -> Tensor:
        """A tensor of zeros."""
        return self._like.new_zeros(shape)

    def scratch(self) -> contextlib.AbstractContextManager[None]:
        """Results made inside are valid inside only."""
        return contextlib.nullcontext()

    def product(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
    ) -> Tensor:
        """a b + bias, or with `add` out + a b."""
        result = product(a, b, bias)
        if out is None:
            return result
        return out.add_(result) if add else out.copy_(result)

    def weight_gradient(self, g: Tensor, x: Tensor, more: tuple[Tensor, Tensor] | None) -> Tensor:
        """g^T x, plus that of a second pair."""
        out = product(g.t(), x)
        return out.contiguous() if more is None else out + product(more[0].t(), more[1])

    def column_sum(self, values: Tensor) -> Tensor:
        """Sum of the rows of (M, N): (N,)."""
        return values.sum(0)

    # -------------------------------------------------------------------------------------------------------- pairs

    def pairs(
        self, src: Tensor, dst: Tensor, shift: Tensor, pos: Tensor, system: Tensor, cutoff: float
    ) -> Pairs | None:
        """Pairs within the cutoff in Å; on a GPU those beyond it too. None if an edge lacks its other direction."""
        up = (shift[:, 0] > 0) | ((shift[:, 0] == 0) & ((shift[:, 1] > 0) | ((shift[:, 1] == 0) & (shift[:, 2] > 0))))
        keep = (src > dst) | ((src == dst) & up)
        if pos.device.type == "cpu":
            n = pos.shape[0]
            one, other = (src * n + dst)[keep], (dst * n + src)[~keep]
            if one.shape != other.shape or not torch.equal(one.sort().values, other.sort().values):
                return None
            chosen = keep.nonzero().flatten()
        else:  # stable order; every edge is one half of a pair, so that the shape is known
            chosen = torch.sort(keep.logical_not().to(torch.uint8), stable=True).indices[: src.shape[0] // 2]
        first, second = dst.index_select(0, chosen), src.index_select(0, chosen)
        edge = pos.index_select(0, second) + shift.index_select(0, chosen) - pos.index_select(0, first)
        if pos.device.type == "cpu":
            near = (~(edge.square().sum(1) > cutoff**2)).nonzero().flatten()
            first, second, edge = (t.index_select(0, near) for t in (first, second, edge))
        return Pairs(pos.shape[0], first, second, edge)

    def radial(
        self, pairs: Pairs, cutoff: float, vector_cutoff: bool, means: Tensor, betas: Tensor, derivative: bool
    ) -> None:
        """Set `geometry`, `rbf` and `rbf_r` of the pairs."""
        square = pairs.edge.square().sum(1)
        r = square.sqrt()
        unit = pairs.edge / r.masked_fill(r == 0, 1.0).unsqueeze(1)
        inside = (~(r >= cutoff)).to(r.dtype)
        angle = r * (math.pi / cutoff)
        phi = 0.5 * (torch.cos(angle) + 1.0) * inside
        phi_r = -0.5 * (math.pi / cutoff) * torch.sin(angle) * inside
        vphi, vphi_r = (phi, phi_r) if vector_cutoff else (inside, torch.zeros_like(r))
        pairs.geometry = torch.cat([r[:, None], unit, phi[:, None], phi_r[:, None], vphi[:, None], vphi_r[:, None]], 1)
        alpha = 5.0 / cutoff
        decay = torch.exp(-alpha * torch.cat([r, r.new_zeros(1)])).unsqueeze(1)
        away = decay - means
        value = torch.exp(-betas * away.square())
        pairs.rbf = torch.cat([phi, phi.new_ones(1)]).unsqueeze(1) * value
        if derivative:
            inner = 2.0 * alpha * betas * decay[:-1] * away[:-1]
            pairs.rbf_r = value[:-1] * (phi_r.unsqueeze(1) + phi.unsqueeze(1) * inner)

    def geometry_backward(self, pairs: Pairs, g_change: Tensor) -> Tensor:
        """Adjoints of the positions (N, 3)."""
        r, unit = pairs.geometry[:, :1], pairs.geometry[:, 1:4]
        g_unit = g_change[:, 1:]
        across = g_unit - unit * (unit * g_unit).sum(1, keepdim=True)
        g_edge = unit * g_change[:, :1] + across / r.masked_fill(r == 0, 1.0)
        g_pos = g_change.new_zeros(pairs.n, 3)
        return g_pos.index_add_(0, pairs.second, g_edge).index_add_(0, pairs.first, g_edge, alpha=-1)

    def geometry_tangent(self, pairs: Pairs, pos_t: Tensor) -> Tensor:
        """Changes of distances and unit vectors (P, 4)."""
        r, unit = pairs.geometry[:, :1], pairs.geometry[:, 1:4]
        edge_t = pos_t.index_select(0, pairs.second) - pos_t.index_select(0, pairs.first)
        r_t = (unit * edge_t).sum(1, keepdim=True)
        return torch.cat([r_t, (edge_t - unit * r_t) / r.masked_fill(r == 0, 1.0)], 1)

    # --------------------------------------------------------------------------------------- attention over the pairs

    def pair_forward(self, pairs: Pairs, layer: Layer) -> tuple[Tensor, Tensor]:
        """Sums of messages, scalar (N, C) and vector (N, 3, C); sets the layer's scores."""
        s, y, n = _Directions(pairs, layer), layer.y, pairs.n
        active = _silu(layer.pre + layer.filter_bias)[0]
        fk, f1, f2, f3 = (s.both(f) for f in s.filters(active[:-1]))
        (q,), (k,), (v1, v2, v3) = s.qkv(y, "q", s.i), s.qkv(y, "k", s.j), s.qkv(y, "v", s.j)
        score = (q * k * fk).sum(2)
        layer.score = torch.cat(score.chunk(2), 1)
        x_out, v_out = y.new_zeros(n, s.c), y.new_zeros(n, 3, s.c)
        s.to_atoms(x_out, v1 * f1 * (_silu(score)[0].unsqueeze(2) * s.phi), s.i)
        message = (v3 * f3 * s.vphi).unsqueeze(2) * s.unit
        if layer.vec is not None:
            message = message + s.vectors(layer.vec, s.j) * (v2 * f2 * s.vphi).unsqueeze(2)
        s.to_atoms(v_out, s.flat(message), s.i)

        fk, f1, f2, _ = s.filters(active[-1:])
        (q,), (k,), (v1, v2, _) = s.qkv(y, "q"), s.qkv(y, "k"), s.qkv(y, "v")
        layer.score_self = (q * k * fk).sum(2)
        x_out += (v1 * f1 * _silu(layer.score_self)[0].unsqueeze(2)).reshape(n, s.c)
        if layer.vec is not None:
            v_out += s.flat(s.vectors(layer.vec) * (v2 * f2).unsqueeze(2))
        return x_out, v_out

    def pair_backward(
        self, pairs: Pairs, layer: Layer, g_x: Tensor, g_v: Tensor, g_vec: Tensor | None, g_change: Tensor | None,
        filters: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Adjoints of [q | k | v] and, if asked for, of the filters; adds to those of vec and of the geometry."""
        s, y = _Directions(pairs, layer), layer.y
        active, slope, _ = _silu(layer.pre + layer.filter_bias)
        g_y = torch.zeros_like(y)
        # ------ pairs
        fk, f1, f2, f3 = (s.both(f) for f in s.filters(active[:-1]))
        (q,), (k,), (v1, v2, v3) = s.qkv(y, "q", s.i), s.qkv(y, "k", s.j), s.qkv(y, "v", s.j)
        gx, gv = s.scalars(g_x, s.i), s.vectors(g_v, s.i)
        a0, a1, _ = _silu(torch.cat(layer.score.chunk(2, 1)).unsqueeze(2))
        g_a = (gx * v1 * f1).sum(2, keepdim=True)
        ga, gm = g_a * a1 * s.phi, gx * (a0 * s.phi)
        along = (gv * s.unit).sum(2)
        g3 = along * s.vphi
        g2 = torch.zeros_like(g3)
        c = s.c
        s.to_atoms(g_y[:, :c], ga * k * fk, s.i)
        s.to_atoms(g_y[:, c : 2 * c], ga * q * fk, s.j)
        g_vphi = along * v3 * f3
        if layer.vec is not None:
            w = (gv * s.vectors(layer.vec, s.j)).sum(2)
            g2 = w * s.vphi
            s.to_atoms(g_vec, s.flat(gv * (v2 * f2 * s.vphi).unsqueeze(2)), s.j)
            g_vphi = g_vphi + w * v2 * f2
        s.to_atoms(g_y[:, 2 * c :], torch.stack([gm * f1, g2 * f2, g3 * f3], 2), s.j)
        gf = s.joined(*(s.over_directions(g) for g in (ga * q * k, gm * v1, g2 * v2, g3 * v3)))
        if g_change is not None:
            g_phi = s.over_directions((g_a * a0).sum((1, 2)))
            g_r = (gf * slope[:-1] * layer.pre_r).sum(1) + g_phi * pairs.geometry[:, 5]
            g_change[:, 0] += g_r + s.over_directions(g_vphi.sum((1, 2))) * pairs.geometry[:, 7]
            g_unit = (gv * (v3 * f3 * s.vphi).unsqueeze(2) * s.sign).sum((1, 3))
            g_change[:, 1:] += s.over_directions(g_unit)
        # ------ the atoms themselves
        fk, f1, f2, _ = s.filters(active[-1:])
        (q,), (k,), (v1, v2, _) = s.qkv(y, "q"), s.qkv(y, "k"), s.qkv(y, "v")
        gx, gv = s.scalars(g_x), s.vectors(g_v)
        a0, a1, _ = _silu(layer.score_self.unsqueeze(2))
        ga, gm = (gx * v1 * f1).sum(2, keepdim=True) * a1, gx * a0
        g2 = torch.zeros_like(gx)
        if layer.vec is not None:
            g2 = (gv * s.vectors(layer.vec)).sum(2)
            g_vec += s.flat(gv * (v2 * f2).unsqueeze(2))
        self._add_own(g_y, s, ga * k * fk, ga * q * fk, gm * f1, g2 * f2)
        if not filters:
            return g_y, None
        own = s.joined(*(g.sum(0, keepdim=True) for g in (ga * q * k, gm * v1, g2 * v2, torch.zeros_like(gm))))
        return g_y, torch.cat([gf, own]) * slope

    @staticmethod
    def _add_own(g_y: Tensor, s: _Directions, q: Tensor, k: Tensor, v1: Tensor, v2: Tensor) -> None:
        """Add adjoints of an atom's message to itself; it has no part along a direction."""
        v = torch.stack([v1, v2, torch.zeros_like(v1)], 2)
        g_y += torch.cat([q.reshape(-1, s.c), k.reshape(-1, s.c), v.reshape(-1, 3 * s.c)], 1)

    def pair_tangent(
        self, pairs: Pairs, layer: Layer, change: Tensor, y_t: Tensor, vec_t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tangents of both sums, and of the scores of pairs and of the atoms themselves."""
        s, y, n = _Directions(pairs, layer), layer.y, pairs.n
        active, slope, _ = _silu(layer.pre + layer.filter_bias)
        active_t = slope[:-1] * layer.pre_r * change[:, :1]
        fk, f1, f2, f3 = (s.both(f) for f in s.filters(active[:-1]))
        fk_t, f1_t, f2_t, f3_t = (s.both(f) for f in s.filters(active_t))
        phi_t, vphi_t, unit_t = self._changes(s, change)
        (q,), (k,), (v1, v2, v3) = s.qkv(y, "q", s.i), s.qkv(y, "k", s.j), s.qkv(y, "v", s.j)
        (q_t,), (k_t,), (v1_t, v2_t, v3_t) = s.qkv(y_t, "q", s.i), s.qkv(y_t, "k", s.j), s.qkv(y_t, "v", s.j)
        score_t = ((q_t * k + q * k_t) * fk + q * k * fk_t).sum(2, keepdim=True)
        a0, a1, _ = _silu(torch.cat(layer.score.chunk(2, 1)).unsqueeze(2))
        x_out, v_out = y.new_zeros(n, s.c), y.new_zeros(n, 3, s.c)
        value = (a1 * score_t * s.phi + a0 * phi_t) * v1 * f1 + a0 * s.phi * (v1_t * f1 + v1 * f1_t)
        s.to_atoms(x_out, value, s.i)
        n3, n3_t = v3 * f3 * s.vphi, (v3_t * f3 + v3 * f3_t) * s.vphi + v3 * f3 * vphi_t
        message = n3.unsqueeze(2) * unit_t + n3_t.unsqueeze(2) * s.unit
        if layer.vec is not None:
            n2, n2_t = v2 * f2 * s.vphi, (v2_t * f2 + v2 * f2_t) * s.vphi + v2 * f2 * vphi_t
            message = message + s.vectors(vec_t, s.j) * n2.unsqueeze(2) + s.vectors(layer.vec, s.j) * n2_t.unsqueeze(2)
        s.to_atoms(v_out, s.flat(message), s.i)

        fk, f1, f2, _ = s.filters(active[-1:])
        (q,), (k,), (v1, v2, _) = s.qkv(y, "q"), s.qkv(y, "k"), s.qkv(y, "v")
        (q_t,), (k_t,), (v1_t, v2_t, _) = s.qkv(y_t, "q"), s.qkv(y_t, "k"), s.qkv(y_t, "v")
        score_self_t = ((q_t * k + q * k_t) * fk).sum(2)
        a0, a1, _ = _silu(layer.score_self.unsqueeze(2))
        x_out += ((a1 * score_self_t.unsqueeze(2) * v1 + a0 * v1_t) * f1).reshape(n, s.c)
        if layer.vec is not None:
            message = s.vectors(vec_t) * (v2 * f2).unsqueeze(2) + s.vectors(layer.vec) * (v2_t * f2).unsqueeze(2)
            v_out += s.flat(message)
        return x_out, v_out, torch.cat(score_t.squeeze(2).chunk(2), 1), score_self_t

    @staticmethod
    def _changes(s: _Directions, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tangents of both cutoff functions and of the unit vectors, for both directions."""
        r_t = change[:, :1].repeat(2, 1).unsqueeze(2)
        return s.phi_r * r_t, s.vphi_r * r_t, change[:, 1:].repeat(2, 1).reshape(-1, 1, 3, 1) * s.sign

    def pair_reverse(
        self, pairs: Pairs, layer: Layer, change: Tensor, y_t: Tensor, vec_t: Tensor | None, score_t: Tensor,
        score_self_t: Tensor, g_x: Tensor, g_v: Tensor, m_x: Tensor, m_v: Tensor, m_vec: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Adjoints of [q | k | v], of the filters and of their derivatives by distance; adds to those of vec."""
        s, y, c = _Directions(pairs, layer), layer.y, layer.channels
        active, slope, bend = _silu(layer.pre + layer.filter_bias)
        pre_t = layer.pre_r * change[:, :1]
        m_y = torch.zeros_like(y)
        # ------ pairs
        fk, f1, f2, f3 = (s.both(f) for f in s.filters(active[:-1]))
        fk_t, f1_t, f2_t, f3_t = (s.both(f) for f in s.filters(slope[:-1] * pre_t))
        phi_t, vphi_t, unit_t = self._changes(s, change)
        (q,), (k,), (v1, v2, v3) = s.qkv(y, "q", s.i), s.qkv(y, "k", s.j), s.qkv(y, "v", s.j)
        (q_t,), (k_t,), (v1_t, v2_t, v3_t) = s.qkv(y_t, "q", s.i), s.qkv(y_t, "k", s.j), s.qkv(y_t, "v", s.j)
        gx, gv, mx, mv = s.scalars(g_x, s.i), s.vectors(g_v, s.i), s.scalars(m_x, s.i), s.vectors(m_v, s.i)
        a_t = torch.cat(score_t.chunk(2, 1)).unsqueeze(2)
        a0, a1, a2 = _silu(torch.cat(layer.score.chunk(2, 1)).unsqueeze(2))
        m = v1 * f1
        m_a = (mx * m + gx * (v1_t * f1 + v1 * f1_t)).sum(2, keepdim=True)
        m_at = (gx * m).sum(2, keepdim=True)
        score, score_d = m_a * a1 * s.phi + m_at * (a2 * a_t * s.phi + a1 * phi_t), m_at * a1 * s.phi
        s.to_atoms(m_y[:, :c], score * k * fk + score_d * (k_t * fk + k * fk_t), s.i)
        s.to_atoms(m_y[:, c : 2 * c], score * q * fk + score_d * (q_t * fk + q * fk_t), s.j)
        mk, mk_t = score * q * k + score_d * (q_t * k + q * k_t), score_d * q * k
        mm, mm_t = a0 * s.phi * mx + (a1 * a_t * s.phi + a0 * phi_t) * gx, a0 * s.phi * gx
        n3_t, n3 = (gv * s.unit).sum(2), (mv * s.unit + gv * unit_t).sum(2)
        own3, along3 = n3 * s.vphi + n3_t * vphi_t, n3_t * s.vphi
        own2 = along2 = torch.zeros_like(own3)
        if layer.vec is not None:
            w, w_t = s.vectors(layer.vec, s.j), s.vectors(vec_t, s.j)
            n2_t, n2 = (gv * w).sum(2), (mv * w + gv * w_t).sum(2)
            own2, along2 = n2 * s.vphi + n2_t * vphi_t, n2_t * s.vphi
            factor, factor_t = v2 * f2 * s.vphi, (v2_t * f2 + v2 * f2_t) * s.vphi + v2 * f2 * vphi_t
            s.to_atoms(m_vec, s.flat(mv * factor.unsqueeze(2) + gv * factor_t.unsqueeze(2)), s.j)
        parts = [mm * f1 + mm_t * f1_t, own2 * f2 + along2 * f2_t, own3 * f3 + along3 * f3_t]
        s.to_atoms(m_y[:, 2 * c :], torch.stack(parts, 2), s.j)
        values = (mk, mm * v1 + mm_t * v1_t, own2 * v2 + along2 * v2_t, own3 * v3 + along3 * v3_t)
        mf = s.joined(*(s.over_directions(value) for value in values))
        mf_t = s.joined(*(s.over_directions(value) for value in (mk_t, mm_t * v1, along2 * v2, along3 * v3)))
        # ------ the atoms themselves
        fk, f1, f2, _ = s.filters(active[-1:])
        (q,), (k,), (v1, v2, _) = s.qkv(y, "q"), s.qkv(y, "k"), s.qkv(y, "v")
        (q_t,), (k_t,), (v1_t, v2_t, _) = s.qkv(y_t, "q"), s.qkv(y_t, "k"), s.qkv(y_t, "v")
        gx, gv, mx, mv = s.scalars(g_x), s.vectors(g_v), s.scalars(m_x), s.vectors(m_v)
        a_t = score_self_t.unsqueeze(2)
        a0, a1, a2 = _silu(layer.score_self.unsqueeze(2))
        m_a = (mx * v1 * f1 + gx * v1_t * f1).sum(2, keepdim=True)
        m_at = (gx * v1 * f1).sum(2, keepdim=True)
        score, score_d = m_a * a1 + m_at * a2 * a_t, m_at * a1
        mm, mm_t = a0 * mx + a1 * a_t * gx, a0 * gx
        n2 = n2_t = torch.zeros_like(mm)
        if layer.vec is not None:
            w, w_t = s.vectors(layer.vec), s.vectors(vec_t)
            n2_t, n2 = (gv * w).sum(2), (mv * w + gv * w_t).sum(2)
            m_vec += s.flat(mv * (v2 * f2).unsqueeze(2) + gv * (v2_t * f2).unsqueeze(2))
        self._add_own(m_y, s, (score * k + score_d * k_t) * fk, (score * q + score_d * q_t) * fk, mm * f1, n2 * f2)
        values = (
            score * q * k + score_d * (q_t * k + q * k_t), mm * v1 + mm_t * v1_t, n2 * v2 + n2_t * v2_t,
            torch.zeros_like(mm),
        )  # fmt: skip
        own = s.joined(*(value.sum(0, keepdim=True) for value in values))
        m_pre = torch.cat([mf * slope[:-1] + mf_t * bend[:-1] * pre_t, own * slope[-1:]])
        return m_y, m_pre, mf_t * slope[:-1] * change[:, :1]

    # -------------------------------------------------------------------------------------------- neighbor embedding

    @staticmethod
    def _both_ways(pairs: Pairs, n: int, to_first: Tensor, to_second: Tensor) -> Tensor:
        out = to_first.new_zeros(n, to_first.shape[1])
        return out.index_add_(0, pairs.first, to_first).index_add_(0, pairs.second, to_second)

    def embed_forward(self, pairs: Pairs, bias: Tensor, pre: Tensor, emb: Tensor) -> Tensor:
        """Sum over neighbors (N, C)."""
        w = (pre + bias) * pairs.geometry[:, 4:5]
        return self._both_ways(pairs, pairs.n, emb[pairs.second] * w, emb[pairs.first] * w)

    def embed_backward(
        self, pairs: Pairs, bias: Tensor, pre: Tensor, pre_r: Tensor | None, emb: Tensor, g_out: Tensor,
        g_change: Tensor | None, filters: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Adjoints of the filters and of `emb`, if asked for; adds to those of the geometry."""
        phi, phi_r, x = pairs.geometry[:, 4:5], pairs.geometry[:, 5:6], pre + bias
        gi, gj = g_out[pairs.first], g_out[pairs.second]
        gw = gi * emb[pairs.second] + gj * emb[pairs.first]
        if g_change is not None:
            g_change[:, 0] += (gw * (pre_r * phi + x * phi_r)).sum(1)
        if not filters:
            return None, None
        return gw * phi, self._both_ways(pairs, pairs.n, gj * x * phi, gi * x * phi)

    def embed_tangent(
        self, pairs: Pairs, change: Tensor, bias: Tensor, pre: Tensor, pre_r: Tensor, emb: Tensor
    ) -> Tensor:
        """Tangent of the sum (N, C)."""
        w_t = (pre_r * pairs.geometry[:, 4:5] + (pre + bias) * pairs.geometry[:, 5:6]) * change[:, :1]
        return self._both_ways(pairs, pairs.n, emb[pairs.second] * w_t, emb[pairs.first] * w_t)

    def embed_reverse(
        self, pairs: Pairs, change: Tensor, bias: Tensor, pre: Tensor, pre_r: Tensor, emb: Tensor, g_out: Tensor,
        m_out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Adjoints of the filters, of their derivatives by distance, and of `emb`."""
        phi, r_t, x = pairs.geometry[:, 4:5], change[:, :1], pre + bias
        phi_t = pairs.geometry[:, 5:6] * r_t
        w, w_t = x * phi, pre_r * (r_t * phi) + x * phi_t
        gi, gj, mi, mj = g_out[pairs.first], g_out[pairs.second], m_out[pairs.first], m_out[pairs.second]
        ei, ej = emb[pairs.first], emb[pairs.second]
        mw, mw_t = mi * ej + mj * ei, gi * ej + gj * ei
        m_emb = self._both_ways(pairs, pairs.n, mj * w + gj * w_t, mi * w + gi * w_t)
        return mw * phi + mw_t * phi_t, mw_t * (r_t * phi), m_emb

    # ---------------------------------------------------------------------------------------------------- atoms

    def norm_forward(self, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized x, 1 / standard deviation, and the result."""
        away = x - x.mean(1, keepdim=True)
        inverse = (away.square().mean(1) + eps).rsqrt()
        unit = away * inverse.unsqueeze(1)
        return unit, inverse, unit * gamma + beta

    def norm_backward(
        self, unit: Tensor, inverse: Tensor, gamma: Tensor, g_out: Tensor, g_x: Tensor, parameters: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Adds to the adjoint `g_x`; adjoints of gamma and beta, if asked for."""
        b = g_out * gamma
        g_x += (b - b.mean(1, keepdim=True) - unit * (b * unit).mean(1, keepdim=True)) * inverse.unsqueeze(1)
        return ((g_out * unit).sum(0), g_out.sum(0)) if parameters else (None, None)

    def norm_tangent(self, unit: Tensor, inverse: Tensor, gamma: Tensor, x_t: Tensor) -> Tensor:
        """Tangent of the result."""
        w = x_t - x_t.mean(1, keepdim=True) - unit * (x_t * unit).mean(1, keepdim=True)
        return w * inverse.unsqueeze(1) * gamma

    def norm_reverse(
        self, unit: Tensor, inverse: Tensor, gamma: Tensor, x_t: Tensor, g_out: Tensor, m_out: Tensor, m_x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds to the adjoint `m_x`; adjoints of gamma and beta."""
        rs, b = inverse.unsqueeze(1), g_out * gamma
        slope = (x_t * unit).mean(1, keepdim=True)
        w = x_t - x_t.mean(1, keepdim=True) - unit * slope
        a = m_out * gamma - b * (slope * rs) - x_t * (rs * (b * unit).mean(1, keepdim=True))
        stretch = (a * unit).mean(1, keepdim=True) + rs * (b * w).mean(1, keepdim=True)
        m_x += (a - a.mean(1, keepdim=True) - unit * stretch) * rs
        return (m_out * unit + g_out * w * rs).sum(0), m_out.sum(0)

    @staticmethod
    def _dot(w: Tensor, other: Tensor) -> Tensor:
        """sum over xyz of w1 (of one) times w2 (of the other): (N, C)."""
        c = w.shape[2] // 3
        return (w[:, :, :c] * other[:, :, c : 2 * c]).sum(1)

    def update_forward(
        self, x: Tensor, vec: Tensor | None, o: Tensor, w: Tensor | None, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scalars and vectors after the layer."""
        o1, o2, o3 = o.chunk(3, 1)
        if w is None:
            return x + o3, v
        return x + self._dot(w, w) * o2 + o3, vec + w[:, :, 2 * x.shape[1] :] * o1.unsqueeze(1) + v

    def update_backward(
        self, o: Tensor, w: Tensor | None, g_x: Tensor, g_vec: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Adjoints of o and w."""
        if w is None:
            return torch.cat([torch.zeros_like(g_x), torch.zeros_like(g_x), g_x], 1), None
        (o1, o2, _), (w1, w2, w3) = o.chunk(3, 1), w.chunk(3, 2)
        gd = (g_x * o2).unsqueeze(1)
        g_o = torch.cat([(g_vec * w3).sum(1), g_x * (w1 * w2).sum(1), g_x], 1)
        return g_o, torch.cat([gd * w2, gd * w1, g_vec * o1.unsqueeze(1)], 2)

    def update_tangent(
        self, x_t: Tensor, vec_t: Tensor | None, o: Tensor, w: Tensor | None, o_t: Tensor, w_t: Tensor | None,
        v_t: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Tangents of scalars and vectors after the layer."""
        (o1, o2, _), (o1_t, o2_t, o3_t) = o.chunk(3, 1), o_t.chunk(3, 1)
        if w is None:
            return x_t + o3_t, v_t
        c = x_t.shape[1]
        dot_t = self._dot(w_t, w) + self._dot(w, w_t)
        vec_out = vec_t + w_t[:, :, 2 * c :] * o1.unsqueeze(1) + w[:, :, 2 * c :] * o1_t.unsqueeze(1) + v_t
        return x_t + dot_t * o2 + self._dot(w, w) * o2_t + o3_t, vec_out

    def update_reverse(
        self, o: Tensor, w: Tensor | None, o_t: Tensor, w_t: Tensor | None, g_x: Tensor, g_vec: Tensor, m_x: Tensor,
        m_vec: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Adjoints of o and w."""
        if w is None:
            return torch.cat([torch.zeros_like(m_x), torch.zeros_like(m_x), m_x], 1), None
        (o1, o2, _), (o1_t, o2_t, _) = (t.unsqueeze(1).chunk(3, 2) for t in (o, o_t))
        (w1, w2, w3), (t1, t2, t3) = w.chunk(3, 2), w_t.chunk(3, 2)
        g, m = g_x.unsqueeze(1), m_x.unsqueeze(1)
        md, md_t = m * o2 + g * o2_t, g * o2
        m2 = m_x * (w1 * w2).sum(1) + g_x * (t1 * w2 + w1 * t2).sum(1)
        m_o = torch.cat([(m_vec * w3 + g_vec * t3).sum(1), m2, m_x], 1)
        return m_o, torch.cat([md * w2 + md_t * t2, md * w1 + md_t * t1, m_vec * o1 + g_vec * o1_t], 2)

    # ---------------------------------------------------------------------------------------------------------- heads

    @staticmethod
    def _parts(ab: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """a (N, 3, I) and b (N, 3, O)."""
        ab = ab.view(-1, 3, ab.shape[1])
        return ab[:, :, :i], ab[:, :, i:]

    @staticmethod
    def _inverse(length: Tensor) -> Tensor:
        """1 / length, and 0 where it is 0: the derivative of the length of a zero vector is 0."""
        is_zero = length == 0
        return length.masked_fill(is_zero, 1.0).reciprocal().masked_fill(is_zero, 0.0)

    def length_forward(self, s: Tensor, ab: Tensor) -> Tensor:
        """[s | n] (N, 2I)."""
        return torch.cat([s, self._parts(ab, s.shape[1])[0].square().sum(1).sqrt()], 1)

    def length_backward(self, sn: Tensor, ab: Tensor, g_sn: Tensor, g_ab: Tensor) -> Tensor:
        """Adjoint of s; sets that of a in `g_ab`."""
        i = sn.shape[1] // 2
        factor = g_sn[:, i:] * self._inverse(sn[:, i:])
        self._parts(g_ab, i)[0].copy_(self._parts(ab, i)[0] * factor.unsqueeze(1))
        return g_sn[:, :i].contiguous()

    def length_tangent(self, sn: Tensor, ab: Tensor, s_t: Tensor, ab_t: Tensor) -> Tensor:
        """Tangent of [s | n]."""
        i = sn.shape[1] // 2
        dot = (self._parts(ab, i)[0] * self._parts(ab_t, i)[0]).sum(1)
        return torch.cat([s_t, dot * self._inverse(sn[:, i:])], 1)

    def length_reverse(
        self, sn: Tensor, ab: Tensor, sn_t: Tensor, ab_t: Tensor, g_sn: Tensor, m_sn: Tensor, m_ab: Tensor
    ) -> Tensor:
        """Adjoint of s; sets that of a in `m_ab`."""
        i = sn.shape[1] // 2
        inverse = self._inverse(sn[:, i:])
        g = g_sn[:, i:] * inverse
        m = m_sn[:, i:] * inverse - g * sn_t[:, i:] * inverse
        a, a_t = self._parts(ab, i)[0], self._parts(ab_t, i)[0]
        self._parts(m_ab, i)[0].copy_(m.unsqueeze(1) * a + g.unsqueeze(1) * a_t)
        return m_sn[:, :i].contiguous()

    def silu_forward(self, x: Tensor) -> Tensor:
        """silu(x)."""
        return torch.nn.functional.silu(x)

    def silu_backward(self, x: Tensor, g_out: Tensor) -> Tensor:
        """silu'(x) g."""
        return _silu(x)[1] * g_out

    def silu_reverse(self, x: Tensor, x_t: Tensor, g_out: Tensor, m_out: Tensor) -> Tensor:
        """silu'(x) m + silu''(x) x_t g."""
        _, slope, bend = _silu(x)
        return slope * m_out + bend * x_t * g_out

    def gate_forward(self, u: Tensor, ab: Tensor, activate: bool) -> tuple[Tensor, Tensor]:
        """Scalars (N, O) and vectors (N, 3, O) of the block."""
        out, gate = u.chunk(2, 1)
        s = self.silu_forward(out) if activate else out.clone()
        return s, self._parts(ab, ab.shape[1] - gate.shape[1])[1] * gate.unsqueeze(1)

    def gate_backward(
        self, u: Tensor, ab: Tensor, g_s: Tensor, g_v: Tensor, activate: bool
    ) -> tuple[Tensor, Tensor]:
        """Adjoints of u, and of [a | b] with that of a still open."""
        out, gate = u.chunk(2, 1)
        g_ab, i = torch.empty_like(ab), ab.shape[1] - gate.shape[1]
        self._parts(g_ab, i)[1].copy_(g_v * gate.unsqueeze(1))
        g_out = self.silu_backward(out, g_s) if activate else g_s
        return torch.cat([g_out, (g_v * self._parts(ab, i)[1]).sum(1)], 1), g_ab

    def gate_tangent(
        self, u: Tensor, ab: Tensor, u_t: Tensor, ab_t: Tensor, activate: bool
    ) -> tuple[Tensor, Tensor]:
        """Tangents of scalars and vectors of the block."""
        (out, gate), (out_t, gate_t) = u.chunk(2, 1), u_t.chunk(2, 1)
        i = ab.shape[1] - gate.shape[1]
        b, b_t = self._parts(ab, i)[1], self._parts(ab_t, i)[1]
        s_t = self.silu_backward(out, out_t) if activate else out_t.clone()
        return s_t, b_t * gate.unsqueeze(1) + b * gate_t.unsqueeze(1)

    def gate_reverse(
        self, u: Tensor, ab: Tensor, u_t: Tensor, ab_t: Tensor, g_s: Tensor, g_v: Tensor, m_s: Tensor, m_v: Tensor,
        activate: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Adjoints of u, and of [a | b] with that of a still open."""
        (out, gate), (out_t, gate_t) = u.chunk(2, 1), u_t.chunk(2, 1)
        m_ab, i = torch.empty_like(ab), ab.shape[1] - gate.shape[1]
        b, b_t = self._parts(ab, i)[1], self._parts(ab_t, i)[1]
        self._parts(m_ab, i)[1].copy_(m_v * gate.unsqueeze(1) + g_v * gate_t.unsqueeze(1))
        m_out = self.silu_reverse(out, out_t, g_s, m_s) if activate else m_s
        return torch.cat([m_out, (m_v * b + g_v * b_t).sum(1)], 1), m_ab
