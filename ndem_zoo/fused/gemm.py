"""Matrix products of the fused plan, on the faster of torch's two CPU libraries.

MKL takes its AVX2 code on AMD processors, where oneDNN reaches twice its rate in full float32 (measure it:
``benchmarks/speed``). torch has no public switch that is exact on every processor, but an operator that always calls
oneDNN; it is used where it exists, where the processor is AMD's, and where a test product agrees with float64.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias for `x` (M, K) and `weight` (N, K), both of any strides: (M, N)."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[0] and _onednn_is_better():
        return _onednn(x, weight, bias)
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight for `x` (M, N) and `weight` (N, K): (M, K)."""
    return linear(x, weight.t())


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g^T x for `g` (M, N) and `x` (M, K): (N, K), the gradient of a weight."""
    if not g.shape[0]:
        return g.new_zeros(g.shape[1], x.shape[1])
    if x.shape[1] <= 64 < g.shape[1]:  # skinny: oneDNN is twice as fast on the transposed problem
        return linear(x.t(), g.t()).t().contiguous()
    return linear(g.t(), x.t())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Pitfall: for a slice of columns it takes its reference code, 300 times slower.
    x, weight = (t if t.is_contiguous() or t.t().is_contiguous() else t.contiguous() for t in (x, weight))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.lru_cache(maxsize=1)
def _onednn_is_better() -> bool:
    """Whether oneDNN is faster than MKL here, and exact."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    if "AuthenticAMD" not in flags or "amx_" in flags or not torch.backends.mkl.is_available():
        return False
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 64, generator=rng), torch.randn(16, 64, generator=rng)
    exact = x.double() @ weight.double().t()
    try:
        found = _onednn(x, weight, None).double()
    except (AttributeError, NotImplementedError, RuntimeError):  # not in this build of torch
        return False
    return bool((found - exact).abs().max() < 1e-4)
