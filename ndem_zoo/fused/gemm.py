"""Matrix products of the fused plan without native kernels, on the faster of torch's two CPU libraries.

MKL takes its AVX2 code on AMD processors, where oneDNN reaches twice its rate in full float32 (measure it:
``benchmarks/speed``). torch has no public switch that is exact on every processor, but an operator that always calls
oneDNN; it is used where it exists, where the processor is AMD's, and where a test product agrees with float64.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias for `a` (M, K) and `b` (K, N) of any strides: (M, N)."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and 0 not in a.shape and _onednn_is_better():
        if b.shape[1] <= 64 < a.shape[0] and bias is None:  # skinny: twice as fast the other way round
            return _onednn(b.t(), a, None).t()
        return _onednn(a, b.t(), bias)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


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
