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
from ndem_zoo.models.equiformer_v2.so3 import Layout, constant

#: Choice: bytes of the largest intermediate tensor of a chunk, by type of device: on a CPU, values on grids fit into its
#: second-level cache, and edges are enough for matrix products at full speed; on a GPU, launches are negligible.
GRID_BYTES = {"cpu": 5 << 18}
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
        ctx.step, ctx.constants = step, constants
        ctx.save_for_backward(*tensors)
        return step.quick(constants, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
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


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product a b to `total`, in place."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


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


def _halves(flat: Tensor, start: int, rows: int, channels: int) -> tuple[Tensor, Tensor]:
    """Columns of +m and of -m, views of (e, rows channels)."""
    middle = start + rows
    return flat[:, start * channels : middle * channels], flat[:, middle * channels : (middle + rows) * channels]


def _so2_into(
    shape: SO2, z: Tensor, weight: Tensor, bias: Tensor, threes: list[tuple], out: Tensor, extra: Tensor | None
) -> None:
    """`so2_plain` of some edges, written into `out` (e, K_M, O) and `extra` (e, X)."""
    flat, result = z.flatten(1), out.flatten(1)
    channels, width = z.shape[-1], shape.width
    rows = shape.chosen.blocks[0][1]
    n_extra, columns = len(weight) - rows * width, flat[:, : rows * channels]
    torch.addmm(bias[n_extra:], columns, weight[n_extra:].T, out=result[:, : rows * width])
    if extra is not None:
        torch.addmm(bias[:n_extra], columns, weight[:n_extra].T, out=extra)
    for (start, rows), (real, less, more) in zip(shape.chosen.blocks[1:], threes, strict=True):
        plus, minus = _halves(flat, start, rows, channels)
        out_plus, out_minus = _halves(result, start, rows, width)
        torch.mm(plus + minus, real.T, out=out_plus)
        out_minus.copy_(out_plus)
        out_plus.addmm_(minus, more.T, alpha=-1)
        out_minus.addmm_(plus, less.T)


def _so2_backward(
    shape: SO2,
    z: Tensor,
    weight: Tensor,
    threes: list[tuple],
    g: Tensor,
    g_extra: Tensor | None,
    g_z: Tensor,
    sums: list | None,
) -> None:
    """Gradient by `z` of some edges into `g_z`; those by weight, bias and the three of each sign pair added to `sums`."""
    flat, upstream, result = z.flatten(1), g.flatten(1), g_z.flatten(1)
    channels, width = z.shape[-1], shape.width
    rows = shape.chosen.blocks[0][1]
    given, columns = upstream[:, : rows * width], flat[:, : rows * channels]
    if g_extra is not None:
        given = torch.cat([g_extra, given], dim=1)
    torch.mm(given, weight, out=result[:, : rows * channels])
    if sums is not None:
        add_product(sums[0], given.T, columns)
        sums[1].add_(given.sum(0))
    for m, ((start, rows), (real, less, more)) in enumerate(zip(shape.chosen.blocks[1:], threes, strict=True)):
        plus, minus = _halves(flat, start, rows, channels)
        g_plus, g_minus = _halves(upstream, start, rows, width)
        z_plus, z_minus = _halves(result, start, rows, channels)
        both = g_plus + g_minus
        torch.mm(both, real, out=z_plus)
        z_minus.copy_(z_plus)
        z_plus.addmm_(g_minus, less)
        z_minus.addmm_(g_plus, more, alpha=-1)
        if sums is not None:
            for total, a, b in zip(sums[2 + m], (both, g_minus, g_plus), (plus + minus, plus, minus), strict=True):
                add_product(total, a.T, b)


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
    """z (E, K_M, I), weight, bias, *signed -> (E, K_M, O): convolution without extra outputs. Constants: `SO2`."""

    @staticmethod
    def plain(constants, z, weight, bias, *signed):
        return (so2_plain(*constants, z, weight, bias, *signed)[1],)

    @staticmethod
    def quick(constants, z, weight, bias, *signed):
        out = z.new_empty((len(z), constants.chosen.size, constants.width))
        _so2_into(constants, z, weight, bias, [three_weights(w) for w in signed], out, None)
        return (out,)

    @staticmethod
    def quick_backward(constants, needs, gradients, z, weight, bias, *signed):
        threes, g_z = [three_weights(w) for w in signed], torch.empty_like(z)
        sums = _so2_sums(weight, bias, threes, any(needs[1:]))
        _so2_backward(constants, z, weight, threes, gradients[0].contiguous(), None, g_z, sums)
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
            _scale(shape.chosen, z, radial)
            _so2_into(shape, z, weight, bias, threes, out[rows], extra[rows])
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
            rotated = z.clone()
            _scale(shape.chosen, z, radial)
            g_z = torch.empty_like(z)
            _so2_backward(
                shape, z, weight, threes, gradients[0][rows].contiguous(), gradients[1][rows], g_z, sums
            )  # fmt: skip
            g_weights = _by_radial(shape.chosen, rotated.mul_(g_z)).flatten(1)
            torch.mm(g_weights, radial_weight, out=g_hidden[rows])
            if trains:
                add_product(g_radial[0], g_weights.T, hidden[rows])
                g_radial[1].add_(g_weights.sum(0))
            _scale(shape.chosen, g_z, radial)
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
    radial = torch.addmm(radial_bias, hidden[rows], radial_weight.T)
    return torch.bmm(wigner[rows], pairs), radial.unflatten(1, (constants.shape.chosen.n_radial, -1))


def _scale(chosen: Layout, z: Tensor, radial: Tensor) -> None:
    """Multiply the rows of `z` by their radial weights, in place."""
    first = 0
    for m, (start, rows) in enumerate(chosen.blocks):
        for sign in range(1 if m == 0 else 2):
            begin = start + sign * rows
            z[:, begin : begin + rows].mul_(radial[:, first : first + rows])
        first += rows


def _by_radial(chosen: Layout, z: Tensor) -> Tensor:
    """Sum rows that share a radial weight: (e, R, 2C)."""
    parts = []
    for m, (start, rows) in enumerate(chosen.blocks):
        part = z[:, start : start + rows]
        parts.append(part if m == 0 else part + z[:, start + rows : start + 2 * rows])
    return torch.cat(parts, dim=1)


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
            values = to @ y[rows].transpose(0, 1).flatten(1)  # (P, e C)
            out[rows] = (back @ F.silu(values, inplace=True)).unflatten(1, (-1, y.shape[-1])).transpose(0, 1)
        if constants.separable:
            out[:, 0] = F.silu(gates)
        return (out,)

    @staticmethod
    def quick_backward(constants, needs, gradients, y, gates):
        (g,), to, back = gradients, constants.to, constants.back
        first = 1 if constants.separable else 0
        g_y = torch.empty_like(y)
        for rows in _grid_chunks(constants, y):
            values = to @ y[rows].transpose(0, 1).flatten(1)
            upstream = back[:, first:] @ g[rows, first:].transpose(0, 1).flatten(1)
            g_y[rows] = (to.T @ silu_backward(upstream, values)).unflatten(1, (-1, y.shape[-1])).transpose(0, 1)
        return g_y, silu_backward(g[:, 0], gates) if constants.separable else None


class SphereNetwork(Recomputed):
    """Coefficients of SiLU(W SiLU(f)), point by point, of a function f on the sphere: y (N, K, F), W (F, F) -> (N, K, F)."""

    @staticmethod
    def plain(constants, y, weight):
        values = F.silu(torch.einsum("pk,nkc->npc", constants.to, y))
        return (torch.einsum("pk,npc->nkc", constants.back, F.silu(F.linear(values, weight))),)

    @staticmethod
    def quick(constants, y, weight):
        out = torch.empty_like(y)
        for rows in _grid_chunks(constants, y):
            values = F.silu(_on_points(constants.to, y[rows]), inplace=True)
            values = F.silu(values.flatten(0, 1) @ weight.T, inplace=True).unflatten(0, values.shape[:2])
            out[rows] = _on_points(constants.back.T, values)
        return (out,)

    @staticmethod
    def quick_backward(constants, needs, gradients, y, weight):
        g_y, g_weight = torch.empty_like(y), total_of(weight)
        for rows in _grid_chunks(constants, y):
            first = _on_points(constants.to, y[rows])
            shape = first.shape
            values = F.silu(first).flatten(0, 1)
            upstream = _on_points(constants.back, gradients[0][rows]).flatten(0, 1)
            g = silu_backward(upstream, values @ weight.T)
            add_product(g_weight, g.T, values)
            g_y[rows] = _on_points(constants.to.T, silu_backward((g @ weight).unflatten(0, shape[:2]), first))
        return g_y, g_weight


def _grid_chunks(constants: Grid, y: Tensor) -> Iterator[slice]:
    """Ranges of edges or atoms, by the size of their grids."""
    return chunks(len(y), len(constants.to) * y.shape[-1] * y.element_size(), GRID_BYTES, y.device)


def _on_points(matrix: Tensor, y: Tensor) -> Tensor:
    """`matrix` (P, K) times every one of (n, K, C)."""
    return torch.bmm(matrix.expand(len(y), -1, -1), y)


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
