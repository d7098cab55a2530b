"""The heavy steps of EquiformerV2 as differentiable functions that keep only their inputs for the backward pass.

Tensors with one row per edge and channel, or per point of a grid, are made for some edges or atoms at a time, while they
are in the cache, and made again backwards. Each step is written twice: `plain`, one line per equation, which is the
reference and gives the second derivatives, and the chunked pass. No weights here; layers are in `attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ndem_zoo.graph import sum_by_index
from ndem_zoo.models.equiformer_v2.products import linear, product
from ndem_zoo.models.equiformer_v2.so3 import Layout, constant

#: Choice: bytes of the largest intermediate tensor of a chunk, by type of device: on a CPU, values on grids fit into its
#: second-level cache, and edges are enough for matrix products at full speed; on a GPU, launches are negligible.
GRID_BYTES = {"cpu": 5 << 19}
EDGE_BYTES = {"cpu": 1 << 22}
MOST_BYTES = 512 << 20


def chunks(rows: int, bytes_per_row: int, limit: dict[str, int], device: torch.device) -> Iterator[slice]:
    """Ranges of rows that are treated together."""
    step = max(16, limit.get(device.type, MOST_BYTES) // max(bytes_per_row, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Recomputed(torch.autograd.Function):
    """Base of the steps: subclasses give `plain`, `quick` and `quick_backward`.

    Second derivatives differentiate `plain` again, at the inputs that were saved.
    """

    @staticmethod
    def plain(constants: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The step in plain operations."""
        raise NotImplementedError

    @staticmethod
    def quick(constants: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The step in chunks, without autograd."""
        raise NotImplementedError

    @staticmethod
    def quick_backward(
        constants: Any, needs: tuple[bool, ...], gradients: tuple[Tensor, ...], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients by the tensors, in chunks."""
        raise NotImplementedError

    @classmethod
    def run(cls, constants: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Apply the step."""
        return cls.apply(cls, constants, *tensors)

    @staticmethod
    def forward(ctx: Any, step: type[Recomputed], constants: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The quick step; only the inputs are kept."""
        ctx.step, ctx.constants = step, constants
        ctx.save_for_backward(*tensors)
        return step.quick(constants, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in chunks; by way of `plain`, where they are to be differentiated again."""
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if not torch.is_grad_enabled():
            found = ctx.step.quick_backward(ctx.constants, needs, gradients, *tensors)
            pairs = zip(found, tensors, strict=True)
            return None, None, *(None if g is None or t is None else g.to(t.dtype) for g, t in pairs)
        with torch.enable_grad():
            outputs = ctx.step.plain(ctx.constants, *tensors)
            wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
            found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needs)


def total_of(tensor: Tensor) -> Tensor:
    """Zeros to add a gradient of `tensor` to; in float32 where the tensor is shorter."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------ SO(2) convolution


def signed_weight(weight: Float[Tensor, "O I"]) -> Float[Tensor, "O 2I"]:
    """[[Wr, -Wi], [Wi, Wr]] of the two halves of `weight`: acts on the rows of +m and -m together."""
    real, imaginary = weight.chunk(2)
    return torch.cat([torch.cat([real, -imaginary], dim=1), torch.cat([imaginary, real], dim=1)])


def three_weights(weight: Float[Tensor, "O I"]) -> tuple[Tensor, Tensor, Tensor]:
    """Wr, Wi - Wr and Wr + Wi, with which a product of complex numbers takes three real products instead of four.

    Eq.: with k = Wr (x+ + x-): Wr x+ - Wi x- = k - (Wr + Wi) x- and Wr x- + Wi x+ = k + (Wi - Wr) x+.
    """
    real, imaginary = weight.chunk(2)
    return real.contiguous(), imaginary - real, real + imaginary


def so2_ranges(chosen: Layout) -> list[tuple[int, int]]:
    """First row and number of rows of each order's block, both signs together."""
    return [(start, rows if m == 0 else 2 * rows) for m, (start, rows) in enumerate(chosen.blocks)]


def so2_plain(
    chosen: Layout, width: int, z: Tensor, weight: Tensor, bias: Tensor, *signed: Tensor
) -> tuple[Tensor, Tensor]:
    """(E, K_M, I) -> extra scalars (E, X) and (E, K_M, `width`): one matrix per order; extra outputs come first."""
    parts = []
    for (start, rows), matrix in zip(so2_ranges(chosen), (weight, *(signed_weight(w) for w in signed)), strict=True):
        parts.append(F.linear(z[:, start : start + rows].flatten(1), matrix, None if parts else bias))
    n_extra = len(weight) - chosen.blocks[0][1] * width
    extra, parts[0] = parts[0][:, :n_extra], parts[0][:, n_extra:]
    return extra, torch.cat(parts, dim=1).reshape(len(z), chosen.size, width)


class SO2(NamedTuple):
    """Shape of an SO(2) convolution: layout of the rows and output channels."""

    chosen: Layout
    width: int


def _signed_rows(chosen: Layout) -> list[tuple[int, int, int]]:
    """First row, number of rows and first radial weight of every block, those of +m and -m apart."""
    found, radial = [], 0
    for m, (start, rows) in enumerate(chosen.blocks):
        found += [(start + sign * rows, rows, radial) for sign in range(1 if m == 0 else 2)]
        radial += rows
    return found


def _split(chosen: Layout, z: Tensor, radial: Tensor | None = None) -> list[Tensor]:
    """Blocks of `z` (e, K_M, C), times their radial weights (e, R, C): contiguous, (e, rows C) each."""
    parts = []
    for start, rows, first in _signed_rows(chosen):
        part = z[:, start : start + rows]
        parts.append((part if radial is None else part * radial[:, first : first + rows]).flatten(1).contiguous())
    return parts


def _so2_into(
    shape: SO2,
    parts: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    threes: list[tuple],
    out: Tensor,
    extra: Tensor | None,
) -> None:
    """`so2_plain` of some edges, given as blocks; written into `out` (e, K_M, O) and `extra` (e, X)."""
    rows, size = shape.chosen.blocks[0][1], out.shape[2:]
    both = linear(parts[0], weight, bias)
    n_extra = len(weight) - rows * shape.width
    out[:, :rows] = both[:, n_extra:].unflatten(1, (rows, *size))
    if extra is not None:
        extra.copy_(both[:, :n_extra])
    for m, ((start, rows), (real, less, more)) in enumerate(zip(shape.chosen.blocks[1:], threes, strict=True)):
        plus, minus = parts[1 + 2 * m], parts[2 + 2 * m]
        both = linear(plus + minus, real)
        shaped = [value.unflatten(1, (rows, *size)) for value in (both, linear(minus, more), linear(plus, less))]
        torch.sub(shaped[0], shaped[1], out=out[:, start : start + rows])
        torch.add(shaped[0], shaped[2], out=out[:, start + rows : start + 2 * rows])


def _so2_backward(
    shape: SO2,
    parts: list[Tensor],
    weight: Tensor,
    threes: list[tuple],
    g: Tensor,
    g_extra: Tensor | None,
    sums: list | None,
) -> list[Tensor]:
    """Gradients by the blocks of some edges; those by weight, bias and the three of each sign pair are added to `sums`."""
    upstream = _split(shape.chosen, g)
    given = upstream[0] if g_extra is None else torch.cat([g_extra, upstream[0]], dim=1)
    found = [product(given, weight)]
    if sums is not None:
        sums[0].add_(product(given.T, parts[0]))
        sums[1].add_(given.sum(0))
    for m, (real, less, more) in enumerate(threes):
        (plus, minus), (g_plus, g_minus) = (values[1 + 2 * m : 3 + 2 * m] for values in (parts, upstream))
        both = g_plus + g_minus
        common = product(both, real)
        found += [common + product(g_minus, less), common.sub_(product(g_plus, more))]
        if sums is not None:
            for total, a, b in zip(sums[2 + m], (both, g_minus, g_plus), (plus + minus, plus, minus), strict=True):
                total.add_(product(a.T, b))
    return found


def _so2_sums(weight: Tensor, bias: Tensor, threes: list[tuple], wanted: bool) -> list | None:
    """Zeros to add gradients of the weights to."""
    if not wanted:
        return None
    return [total_of(weight), total_of(bias), *(tuple(total_of(w) for w in three) for three in threes)]


def _so2_gradients(sums: list | None, n: int) -> tuple[Tensor | None, ...]:
    """Gradients by weight, bias and the n signed weights."""
    if sums is None:
        return (None,) * (2 + n)
    # Eq.: of the three products, that with Wr + Wi is subtracted.
    return sums[0], sums[1], *(torch.cat([real - more - less, less - more]) for real, less, more in sums[2:])


class SO2Convolution(Recomputed):
    """z (E, K_M, I), weight, bias and signed weights -> (E, K_M, O): convolution without extra outputs; constants: `SO2`."""

    @staticmethod
    def plain(constants, z, weight, bias, *signed):
        return (so2_plain(*constants, z, weight, bias, *signed)[1],)

    @staticmethod
    def quick(constants, z, weight, bias, *signed):
        out, threes = z.new_empty((len(z), constants.chosen.size, constants.width)), [three_weights(w) for w in signed]
        for rows in _row_chunks(z):
            _so2_into(constants, _split(constants.chosen, z[rows]), weight, bias, threes, out[rows], None)
        return (out,)

    @staticmethod
    def quick_backward(constants, needs, gradients, z, weight, bias, *signed):
        threes, g_z = [three_weights(w) for w in signed], torch.empty_like(z)
        sums = _so2_sums(weight, bias, threes, any(needs[1:]))
        for rows in _row_chunks(z):
            parts = _split(constants.chosen, z[rows])
            found = _so2_backward(constants, parts, weight, threes, gradients[0][rows], None, sums)
            torch.cat(found, dim=1, out=g_z[rows].flatten(1))
        return g_z, *_so2_gradients(sums, len(signed))


class Edges(NamedTuple):
    """Constants of `EdgeConvolution`: its shape, and neighbors and centers of the edges."""

    shape: SO2
    src: Tensor
    dst: Tensor


class EdgeConvolution(Recomputed):
    """First convolution of an attention layer, from the features of atoms to messages in the edges' frames.

    x (N, K, C), Wigner rows (E, K_M, K), hidden radial features (E, c), their last linear map to R 2C weights (weight and
    bias), and the convolution's weight, bias and signed weights -> messages (E, K_M, H), extra scalars (E, X).
    """

    @staticmethod
    def plain(constants, x, wigner, hidden, radial_weight, radial_bias, weight, bias, *signed):
        shape, src, dst = constants
        pairs = torch.cat([x.index_select(0, src), x.index_select(0, dst)], dim=-1)  # (E, K, 2C)
        radial = F.linear(hidden, radial_weight, radial_bias).unflatten(1, (shape.chosen.n_radial, 2 * x.shape[-1]))
        index = constant(shape.chosen.radial, torch.long, x.device)
        z = torch.bmm(wigner, pairs) * radial.index_select(1, index)  # (E, K_M, 2C)
        extra, out = so2_plain(*shape, z, weight, bias, *signed)
        return out, extra

    @staticmethod
    def quick(constants, x, wigner, hidden, radial_weight, radial_bias, weight, bias, *signed):
        shape, threes = constants.shape, [three_weights(w) for w in signed]
        n_edges = len(constants.src)
        out = x.new_empty((n_edges, shape.chosen.size, shape.width))
        extra = x.new_empty((n_edges, len(weight) - shape.chosen.blocks[0][1] * shape.width))
        for rows in _edge_chunks(constants, x):
            z, radial = _rotated(constants, rows, x, wigner, hidden, radial_weight, radial_bias)
            _so2_into(shape, _split(shape.chosen, z, radial), weight, bias, threes, out[rows], extra[rows])
        return out, extra

    @staticmethod
    def quick_backward(
        constants, needs, gradients, x, wigner, hidden, radial_weight, radial_bias, weight, bias, *signed
    ):
        (shape, src, dst), channels = constants, x.shape[-1]
        threes = [three_weights(w) for w in signed]
        g_x, g_hidden = total_of(x), torch.empty_like(hidden)
        g_wigner = torch.empty_like(wigner) if needs[1] else None
        trains = any(needs[3:])
        g_radial = [total_of(radial_weight), total_of(radial_bias)] if trains else [None, None]
        sums = _so2_sums(weight, bias, threes, trains)
        for rows in _edge_chunks(constants, x):
            z, radial = _rotated(constants, rows, x, wigner, hidden, radial_weight, radial_bias)
            parts = _split(shape.chosen, z, radial)
            g, g_extra = gradients[0][rows], gradients[1][rows]
            found = _so2_backward(shape, parts, weight, threes, g, g_extra, sums)
            g_weights, g_z = _by_rotated(shape.chosen, found, z, radial)
            g_hidden[rows] = product(g_weights, radial_weight)
            if trains:
                g_radial[0].add_(product(g_weights.T, hidden[rows]))
                g_radial[1].add_(g_weights.sum(0))
            if g_wigner is not None:
                pairs = torch.cat([x.index_select(0, src[rows]), x.index_select(0, dst[rows])], dim=-1)
                g_wigner[rows] = torch.bmm(g_z, pairs.transpose(1, 2))
            g_pairs = torch.bmm(wigner[rows].transpose(1, 2), g_z).to(g_x.dtype)
            # Pitfall: adding rows that are not contiguous is many times slower.
            g_x.index_add_(0, src[rows], g_pairs[..., :channels].contiguous())
            g_x.index_add_(0, dst[rows], g_pairs[..., channels:].contiguous())
        return g_x, g_wigner, g_hidden, *g_radial, *_so2_gradients(sums, len(signed))


def _edge_chunks(constants: Edges, x: Tensor) -> Iterator[slice]:
    """Ranges of edges, by the size of their rotated pairs."""
    bytes_per_row = constants.shape.chosen.size * 2 * x.shape[-1] * x.element_size()
    return chunks(len(constants.src), bytes_per_row, EDGE_BYTES, x.device)


def _rotated(constants, rows, x, wigner, hidden, radial_weight, radial_bias) -> tuple[Tensor, Tensor]:
    """Features of both ends of some edges in the edges' frames (e, K_M, 2C), and their radial weights (e, R, 2C)."""
    _, src, dst = constants
    pairs = torch.cat([x.index_select(0, src[rows]), x.index_select(0, dst[rows])], dim=-1)
    radial = linear(hidden[rows], radial_weight, radial_bias)
    return torch.bmm(wigner[rows], pairs), radial.unflatten(1, (constants.shape.chosen.n_radial, -1))


def _by_rotated(chosen: Layout, found: list[Tensor], z: Tensor, radial: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by radial weights (e, R 2C) and, in place of `z`, by rotated pairs, from those by their products."""
    g_weights = torch.empty_like(radial)
    for block, (start, rows, first) in enumerate(_signed_rows(chosen)):
        g, values = found[block].unflatten(1, (rows, -1)), z[:, start : start + rows]
        weights, target = radial[:, first : first + rows], g_weights[:, first : first + rows]
        if block and block % 2 == 0:  # the rows of -m share the weights of +m
            target.addcmul_(g, values)
        else:
            torch.mul(g, values, out=target)
        torch.mul(g, weights, out=values)
    return g_weights.flatten(1), z


def _row_chunks(z: Tensor) -> Iterator[slice]:
    """Ranges of edges, by the size of their rows."""
    return chunks(len(z), z.shape[1:].numel() * z.element_size(), EDGE_BYTES, z.device)


# ----------------------------------------------------------------------------------------------------------- sphere


class Grid(NamedTuple):
    """Constants of the steps on a grid: matrices (P, K) to its points and back, and whether l = 0 goes another way."""

    to: Tensor
    back: Tensor
    separable: bool


def silu_backward(g: Tensor, x: Tensor) -> Tensor:
    """`g` times the derivative of SiLU at `x`, in one pass."""
    return torch.ops.aten.silu_backward(g, x)


class SphereActivation(Recomputed):
    """SiLU of a function on the sphere: y (E, K, C), gates (E, C) or None -> (E, K, C).

    Separable: the result for l = 0 is SiLU of the gates instead.
    """

    @staticmethod
    def plain(constants, y, gates):
        out = torch.einsum("pk,epc->ekc", constants.back, F.silu(torch.einsum("pk,ekc->epc", constants.to, y)))
        if constants.separable:
            out = torch.cat([F.silu(gates).unsqueeze(1), out[:, 1:]], dim=1)
        return (out,)

    @staticmethod
    def quick(constants, y, gates):
        to, back = constants.to, constants.back.T
        out = torch.empty_like(y)
        for rows in _grid_chunks(constants, y):
            values = product(to, y[rows].transpose(0, 1).flatten(1))  # (P, e C)
            out[rows] = _rows(product(back, F.silu(values, inplace=True)), y)
        if constants.separable:
            out[:, 0] = F.silu(gates)
        return (out,)

    @staticmethod
    def quick_backward(constants, needs, gradients, y, gates):
        (g,), to = gradients, constants.to
        first = 1 if constants.separable else 0
        back = constants.back[:, first:].contiguous()
        g_y = torch.empty_like(y)
        for rows in _grid_chunks(constants, y):
            values = product(to, y[rows].transpose(0, 1).flatten(1))
            upstream = product(back, g[rows, first:].transpose(0, 1).flatten(1))
            g_y[rows] = _rows(product(to.T, silu_backward(upstream, values)), y)
        return g_y, silu_backward(g[:, 0], gates) if constants.separable else None


class SphereNetwork(Recomputed):
    """Coefficients of SiLU(W SiLU(f)), point by point, of a function f on the sphere: y (N, K, F), W (F, F) -> (N, K, F)."""

    @staticmethod
    def plain(constants, y, weight):
        values = F.silu(torch.einsum("pk,nkc->npc", constants.to, y))
        return (torch.einsum("pk,npc->nkc", constants.back, F.silu(F.linear(values, weight))),)

    @staticmethod
    def quick(constants, y, weight):
        out, channels = torch.empty_like(y), y.shape[-1]
        for rows in _grid_chunks(constants, y):
            values = F.silu(product(constants.to, y[rows].transpose(0, 1).flatten(1)), inplace=True)  # (P, n F)
            values = F.silu(linear(values.reshape(-1, channels), weight), inplace=True).reshape(values.shape)
            out[rows] = _rows(product(constants.back.T, values), y)
        return (out,)

    @staticmethod
    def quick_backward(constants, needs, gradients, y, weight):
        g_y, g_weight, channels = torch.empty_like(y), total_of(weight), y.shape[-1]
        for rows in _grid_chunks(constants, y):
            first = product(constants.to, y[rows].transpose(0, 1).flatten(1))
            values = F.silu(first).reshape(-1, channels)  # (P n, F)
            upstream = product(constants.back, gradients[0][rows].transpose(0, 1).flatten(1)).reshape(values.shape)
            g = silu_backward(upstream, linear(values, weight))
            g_weight.add_(product(g.T, values))
            g = silu_backward(product(g, weight).reshape(first.shape), first)
            g_y[rows] = _rows(product(constants.to.T, g), y)
        return g_y, g_weight


def _grid_chunks(constants: Grid, y: Tensor) -> Iterator[slice]:
    """Ranges of edges or atoms, by the size of their grids."""
    return chunks(len(y), len(constants.to) * y.shape[-1] * y.element_size(), GRID_BYTES, y.device)


def _rows(columns: Tensor, like: Tensor) -> Tensor:
    """(K, n C) as (n, K, C)."""
    return columns.unflatten(1, (-1, like.shape[-1])).transpose(0, 1)


# ---------------------------------------------------------------------------------------------------------- messages


class Sum(NamedTuple):
    """Constants of `MessageSum`: centers of the edges, number of atoms."""

    dst: Tensor
    n_atoms: int


class MessageSum(Recomputed):
    """Messages times attention, turned back from the edges' frames, summed over the neighbors of each center.

    values (E, K_M, h v), attention (E, h), Wigner rows (E, K_M, K) -> (N, K, h v).
    """

    @staticmethod
    def plain(constants, values, attention, wigner):
        turned = torch.bmm(wigner.transpose(1, 2), _weighted(values, attention)).to(attention.dtype)
        return (sum_by_index(turned, constants.dst, constants.n_atoms),)

    @staticmethod
    def quick(constants, values, attention, wigner):
        out = attention.new_zeros((constants.n_atoms, wigner.shape[2], values.shape[2]))
        for rows in _value_chunks(values):
            turned = torch.bmm(wigner[rows].transpose(1, 2), _weighted(values[rows], attention[rows]))
            out.index_add_(0, constants.dst[rows], turned.to(out.dtype))
        return (out,)

    @staticmethod
    def quick_backward(constants, needs, gradients, values, attention, wigner):
        g_values, g_attention = torch.empty_like(values), torch.empty_like(attention)
        g_wigner = torch.empty_like(wigner) if needs[2] else None
        heads = attention.shape[1]
        for rows in _value_chunks(values):
            g = gradients[0].index_select(0, constants.dst[rows]).to(values.dtype)
            turned = torch.bmm(wigner[rows], g)
            if g_wigner is not None:
                g_wigner[rows] = torch.bmm(_weighted(values[rows], attention[rows]), g.transpose(1, 2))
            product = (turned * values[rows]).sum(1).unflatten(1, (heads, -1))
            g_attention[rows] = product.sum(-1).to(attention.dtype)
            g_values[rows] = _weighted(turned, attention[rows])
        return g_values, g_attention, g_wigner


def _weighted(values: Tensor, attention: Tensor) -> Tensor:
    """Each head's channels of `values` (e, K, h v) times its attention (e, h)."""
    heads = attention.to(values.dtype).repeat_interleave(values.shape[2] // attention.shape[1], dim=1)
    return values * heads.unsqueeze(1)


def _value_chunks(values: Tensor) -> Iterator[slice]:
    """Ranges of edges, by the size of their values."""
    return chunks(len(values), values.shape[1:].numel() * values.element_size(), EDGE_BYTES, values.device)
