"""Spherical tensors of EquiformerV2: their layout, rotation matrices of edges, Wigner matrices, grids on the sphere.

Coefficients are e3nn's: real spherical harmonics in the order l² + l + m, polar axis y, degree 1 is (x, y, z). Inside an
edge's frame they are sorted by order m instead, because the convolutions mix degrees of one order. No weights here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ndem_zoo.physics import safe_norm

#: Choice: height on the unit sphere at which the roll of an edge's frame changes: no plane of symmetry of a crystal or a
#: molecule is there, so that rounding does not decide between the two rolls.
SEAM = -0.1732


@dataclass(frozen=True)
class Layout:
    """Which coefficients up to degree L have an order |m| <= M, and how an edge's frame sorts them.

    Blocks follow each other by m: first m = 0 with degrees 0..L, then for each m the rows of +m with degrees m..L and
    the rows of -m.

    Attributes
    ----------
    lmax, mmax
        L and M.
    degrees : tuple of int
        Degree l of every row.
    index : tuple of int
        Where every row stands among all (L + 1)² coefficients.
    radial : tuple of int
        Which of the R = sum_m (L - m + 1) radial weights a row has: +m and -m share them.
    blocks : tuple of (start, rows)
        For every m; from m = 1 on, `rows` counts the rows of one sign.
    """

    lmax: int
    mmax: int
    degrees: tuple[int, ...]
    index: tuple[int, ...]
    radial: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Number of rows K_M."""
        return len(self.degrees)

    @property
    def n_radial(self) -> int:
        """Number of radial weights R of a channel."""
        return sum(rows for _, rows in self.blocks)

    @property
    def scales(self) -> tuple[float, ...]:
        """sqrt((2l+1)/(2M+1)) for degrees of which orders are left out, 1 for the others."""
        return tuple(
            math.sqrt((2 * degree + 1) / (2 * self.mmax + 1)) if degree > self.mmax else 1.0 for degree in self.degrees
        )


@lru_cache(maxsize=64)
def layout(lmax: int, mmax: int) -> Layout:
    """The layout for degrees up to `lmax` and orders up to `mmax`."""
    degrees, index, radial, blocks = [], [], [], []
    before = 0
    for m in range(mmax + 1):
        blocks.append((len(degrees), lmax - m + 1))
        for sign in (1,) if m == 0 else (1, -1):
            for degree in range(m, lmax + 1):
                degrees.append(degree)
                index.append(degree * degree + degree + sign * m)
                radial.append(before + degree - m)
        before += lmax - m + 1
    return Layout(lmax, mmax, tuple(degrees), tuple(index), tuple(radial), tuple(blocks))


@lru_cache(maxsize=256)
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A short tuple of numbers as a tensor that is made once per device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def degrees_of_all(lmax: int, device: torch.device) -> Tensor:
    """Degree l of each of the K = (L + 1)² coefficients, (K,)."""
    return constant(tuple(degree for degree in range(lmax + 1) for _ in range(2 * degree + 1)), torch.long, device)


# ------------------------------------------------------------------------------------------------------- rotations


def edge_rotations(vectors: Float[Tensor, "E 3"], roll: Float[Tensor, " E"] | None = None) -> Float[Tensor, "E 3 3"]:
    """Rotations R with R v = |v| y, which turn edges onto the polar axis.

    The roll about the edge is a convention. This one turns by the smallest angle for edges above the plane y = `SEAM`,
    and, below, does so after half a turn about the x axis. Entries are rational functions of v/|v| without a pole, so
    that derivatives of any order exist for every edge, those along an axis included. Across the seam the frame jumps: a
    change of roll, which the network does not see but for its grids.

    Parameters
    ----------
    vectors : (E, 3)
        Edges; of any length but 0.
    roll : (E,), optional
        Angles in radians by which frames are rolled further.
    """
    length = safe_norm(vectors, keepdim=True)
    x, y, z = (vectors / length.masked_fill(length == 0, 1.0)).unbind(-1)
    sign = torch.where(y >= SEAM, 1.0, -1.0).to(y.dtype)
    p = 1.0 / (1.0 + sign * y)
    # Eq.: R = 1 + [w] + [w]²/(1 + y) with w the cross product of v and y; columns y, z change sign below the seam.
    first = torch.stack([1.0 - x * x * p, -x * sign, -x * z * p], dim=-1)
    second = torch.stack([x, y, z], dim=-1)
    third = torch.stack([-x * z * p * sign, -z, (1.0 - z * z * p) * sign], dim=-1)
    if roll is not None:
        cos, sin = torch.cos(roll).unsqueeze(-1), torch.sin(roll).unsqueeze(-1)
        first, third = cos * first + sin * third, cos * third - sin * first
    return torch.stack([first, second, third], dim=1)


@lru_cache(maxsize=64)
def _coupling(degree: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthogonal projection (2l + 1, 3 (2l - 1)) of products of degree 1 and l - 1 on degree l."""
    from e3nn import o3

    with torch.inference_mode(False):
        coupled = o3.wigner_3j(1, degree - 1, degree, dtype=torch.float64)  # (3, 2l - 1, 2l + 1)
        matrix = coupled.reshape(-1, 2 * degree + 1).T * math.sqrt(2 * degree + 1)
        return matrix.to(device=device, dtype=dtype).contiguous()


def wigner_blocks(rotation: Float[Tensor, "E 3 3"], lmax: int) -> list[Tensor]:
    """Wigner matrices D^l (E, 2l + 1, 2l + 1) of rotations, for l = 0..L.

    Eq.: D^l = C (R x D^(l-1)) C^T, with C the coupling of degrees 1 and l - 1 to l: polynomials in the entries of R, without
    angles, so that no rotation is special.
    """
    blocks = [rotation.new_ones((len(rotation), 1, 1)), rotation]
    for degree in range(2, lmax + 1):
        coupling = _coupling(degree, rotation.dtype, rotation.device)
        product = torch.einsum("eab,eij->eaibj", rotation, blocks[-1])
        size = 3 * (2 * degree - 1)
        blocks.append(coupling @ product.reshape(-1, size, size) @ coupling.T)
    return blocks[: lmax + 1]


def wigner_rows(rotation: Float[Tensor, "E 3 3"], lmax: int, mmax: int) -> Float[Tensor, "E KM K"]:
    """Matrices that turn all K coefficients into the edges' frames and keep orders up to M, sorted as in `Layout`."""
    chosen = layout(lmax, mmax)
    rows = []
    for degree, block in enumerate(wigner_blocks(rotation, lmax)):
        m = min(degree, mmax)
        kept = block[:, degree - m : degree + m + 1]
        rows.append(F.pad(kept, (degree * degree, (lmax + 1) ** 2 - (degree + 1) ** 2)))
    present = sorted(chosen.index)
    order = constant(tuple(present.index(i) for i in chosen.index), torch.long, rotation.device)
    return torch.cat(rows, dim=1).index_select(1, order)


# ----------------------------------------------------------------------------------------------------------- grids


def default_resolution(lmax: int, mmax: int) -> tuple[int, int]:
    """Latitudes and longitudes of the published default: as few as represent the coefficients."""
    return 2 * (lmax + 1), (2 * (lmax + 1) if lmax == mmax else 2 * mmax) + 1


@lru_cache(maxsize=64)
def grid_matrices(
    lmax: int, mmax: int, resolution: tuple[int, int], by_order: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "P KM"], Float[Tensor, "P KM"]]:
    """Values of the coefficients' harmonics on the points of a grid, and the weights that give the coefficients back.

    Parameters
    ----------
    lmax, mmax
        L and M. Where M < L, columns of degrees above M are enlarged in both matrices, to make up for the orders that
        are left out.
    resolution
        Latitudes (an even number) and longitudes.
    by_order
        Whether columns are sorted as in `Layout`; otherwise as the coefficients of atoms are.
    dtype, device
        Of the result; calculated in float64.
    """
    from e3nn import o3

    latitudes, longitudes = resolution
    with torch.inference_mode(False), torch.no_grad():
        polar = (torch.arange(latitudes, dtype=torch.float64) + 0.5) * (math.pi / latitudes)
        azimuth = torch.arange(longitudes, dtype=torch.float64) * (2 * math.pi / longitudes)
        ring, height = torch.sin(polar).unsqueeze(1), torch.cos(polar).unsqueeze(1)
        parts = (ring * torch.sin(azimuth), height.expand(-1, longitudes), ring * torch.cos(azimuth))
        points = torch.stack(parts, dim=-1).reshape(-1, 3)
        harmonics = o3.spherical_harmonics(list(range(lmax + 1)), points, normalize=False, normalization="component")
        chosen = layout(lmax, mmax)
        columns = list(zip(chosen.index, chosen.degrees, chosen.scales, strict=True))
        index, degrees, scales = zip(*(columns if by_order else sorted(columns)), strict=True)
        # Eq.: e3nn's "component" normalization of a signal: every coefficient has variance 1 / ((L + 1)(2l + 1)).
        size = 1.0 / torch.sqrt((2.0 * torch.tensor(degrees, dtype=torch.float64) + 1.0) * (lmax + 1))
        values, enlarged = harmonics[:, list(index)], torch.tensor(scales, dtype=torch.float64)
        weight = (quadrature(latitudes) / (2 * longitudes)).repeat_interleave(longitudes).unsqueeze(1)
        matrices = (values * size * enlarged, values * weight / size * enlarged)
        first, second = (matrix.to(device=device, dtype=dtype).contiguous() for matrix in matrices)
    return first, second


def quadrature(latitudes: int) -> Float[Tensor, " B"]:
    """Weights of equidistant latitudes, with sum 2, that integrate polynomials of degree below their number exactly.

    Eq.: w_j = 2/b sin(beta_j) sum_k sin((2k + 1) beta_j) / (2k + 1) with b latitudes on half the sphere, k < b (Driscoll
    and Healy, Adv. Appl. Math. 15, 202 (1994)).
    """
    half = latitudes // 2
    polar = (torch.arange(latitudes, dtype=torch.float64) + 0.5) * (math.pi / latitudes)
    odd = 2.0 * torch.arange(half, dtype=torch.float64) + 1.0
    return (2.0 / half) * torch.sin(polar) * (torch.sin(polar.unsqueeze(1) * odd) / odd).sum(1)


def vector_harmonics(vectors: Float[Tensor, "N 3"], lmax: int) -> Float[Tensor, "N K"]:
    """|v|/sqrt(3) times the component-normalized harmonics of v's direction; zeros for a zero vector."""
    from e3nn import o3

    harmonics = o3.spherical_harmonics(list(range(lmax + 1)), vectors, normalize=True, normalization="component")
    return harmonics * (safe_norm(vectors, keepdim=True) / math.sqrt(3.0))
