"""Internal coordinates that are smooth everywhere: lengths, cosines, and torsions that vanish where angles are straight."""

from __future__ import annotations

import torch
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


def smooth_torsion(
    a: Float[Tensor, "... 3"], b: Float[Tensor, "... 3"], c: Float[Tensor, "... 3"], d: Float[Tensor, "... 3"]
) -> Float[Tensor, ...]:
    """sin(abc) sin(bcd) cos(phi), phi the torsion about b-c: without the pole that cos(phi) has at straight angles."""
    first, axis, last = unit(b - a), unit(c - b), unit(d - c)
    return (torch.linalg.cross(first, axis) * torch.linalg.cross(axis, last)).sum(-1)


def triple(
    center: Float[Tensor, "... 3"], a: Float[Tensor, "... 3"], b: Float[Tensor, "... 3"], c: Float[Tensor, "... 3"]
) -> Float[Tensor, ...]:
    """Volume that the unit vectors to three neighbors span: 0 where they are in one plane."""
    return (unit(a - center) * torch.linalg.cross(unit(b - center), unit(c - center))).sum(-1)
