"""Matrix products of the steps in `passes`: by oneDNN on a CPU, which on some processors is twice as fast as torch's own.

torch hands float32 products on a CPU to MKL, which does not use all of what processors of other makers have. Its operation
for oneDNN is private, so it is looked for, tried once, and done without where it is absent or inexact.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

#: Relative error of a float32 product; one in bfloat16 has some 1e-3.
EXACT = 5e-6


@lru_cache(maxsize=1)
def has_onednn() -> bool:
    """Whether torch has the operation, and it calculates in full float32 here."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((24, 64), (48, 64)))
    exact = a @ b.T
    try:
        found = torch.ops.mkldnn._linear_pointwise(a.float(), b.float(), None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool((found - exact).norm() < EXACT * exact.norm())


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether this product goes to oneDNN."""
    takes = a.dtype == b.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.enabled
    return takes and a.numel() > 0 and b.numel() > 0 and has_onednn()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product of x and the transpose of `weight`, plus `bias`; without autograd."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product a b, without autograd.

    Pitfall: oneDNN is a thousand times slower for transposes of views with gaps between their rows; for contiguous
    tensors and their transposes it is fast.
    """
    return linear(a, b.T)
