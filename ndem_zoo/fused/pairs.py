"""What the kernels of the fused plan work on: pairs of atoms with their geometry, and the values of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Pairs:
    """Pairs {i, j} within the cutoff; each stands for both directions.

    Attributes
    ----------
    n : int
        Atoms N.
    first, second : (P,)
        Atoms i and j, by structure.
    edge : (P, 3)
        Vectors from i to j in Å.
    pair_ptr, atom_ptr : (R + 1,) int64 or None
        Ranges of pairs and atoms that can be worked on at the same time.
    geometry : (P, 8)
        Distance, unit vector, cutoff function and its derivative, and those of vector messages.
    rbf : (P + 1, K)
        Radial functions times the cutoff function; the last row is that of an atom and itself.
    rbf_r : (P, K) or None
        Their derivatives by the distance.
    active : (P + 1,) or None
        Radial functions from this one on are 0 at the distance.
    """

    n: int
    first: Tensor
    second: Tensor
    edge: Tensor
    pair_ptr: Tensor | None = None
    atom_ptr: Tensor | None = None
    geometry: Tensor | None = None
    rbf: Tensor | None = None
    rbf_r: Tensor | None = None
    active: Tensor | None = None

    @property
    def p(self) -> int:
        """Number of pairs P."""
        return self.first.shape[0]


@dataclass(slots=True)
class Layer:
    """Weights of one layer as the plan uses them, and the values that its passes share.

    Attributes
    ----------
    channels, heads : int
        C and H.
    qkv_weight, qkv_bias : (5C, C), (5C,)
        Projections to [q | k | v]; v by head, then part, then channel.
    filter_weight_t, filter_bias : (K, 4C), (4C,)
        Projections of the radial functions to the filters of k and v.
    o_weight, vec_weight : (3C, C)
        Projections of sums of scalar messages, and of vectors.
    qkv_weight_t, o_weight_t, vec_weight_t
        Their transposes.
    unit, inverse, normed, y : (N, C), (N,), (N, C), (N, 5C)
        Normalized scalars before weights, 1 / standard deviation, normalized scalars, [q | k | v].
    vec, w : (N, 3, C), (N, 3, 3C) or None
        Vectors and their projections; None while they are 0.
    pre, pre_r : (P + 1, 4C), (P, 4C)
        Filters before bias and activation, and their derivatives by the distance.
    score, score_self : (P, 2H), (N, H)
        Attention before activation, of both directions of a pair, and of an atom with itself.
    x_sum, o : (N, C), (N, 3C)
        Sum of scalar messages, and its projections.
    """

    channels: int
    heads: int
    qkv_weight: Tensor
    qkv_bias: Tensor
    filter_weight_t: Tensor
    filter_bias: Tensor
    o_weight: Tensor
    vec_weight: Tensor
    qkv_weight_t: Tensor | None = None
    o_weight_t: Tensor | None = None
    vec_weight_t: Tensor | None = None
    unit: Tensor | None = None
    inverse: Tensor | None = None
    normed: Tensor | None = None
    y: Tensor | None = None
    vec: Tensor | None = None
    w: Tensor | None = None
    pre: Tensor | None = None
    pre_r: Tensor | None = None
    score: Tensor | None = None
    score_self: Tensor | None = None
    x_sum: Tensor | None = None
    o: Tensor | None = None

    def transpose(self) -> None:
        """Set the transposed weights."""
        self.qkv_weight_t, self.o_weight_t = self.qkv_weight.t().contiguous(), self.o_weight.t().contiguous()
        self.vec_weight_t = self.vec_weight.t().contiguous()
