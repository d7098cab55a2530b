"""Internal coordinates that are smooth everywhere: lengths and cosines."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ndem_zoo.physics import safe_norm


def length(a: Float[Tensor, "... 3"], b: Float[Tensor, "... 3"]) -> Float[Tensor, ...]:
    """Distance in Å; derivative 0 where the points coincide."""
    return safe_norm(b - a)


def unit(vector: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    """Vector of length 1; zero for a zero vector."""
    norm = safe_norm(vector, keepdim=True)
    return vector / norm.masked_fill(norm == 0, 1.0)


def cosine(a: Float[Tensor, "... 3"], b: Float[Tensor, "... 3"], c: Float[Tensor, "... 3"]) -> Float[Tensor, ...]:
    """Cosine of the angle at `b`."""
    return (unit(a - b) * unit(c - b)).sum(-1)
