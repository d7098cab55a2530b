"""How fast is this machine right now, and what are its limits? Calibration, versions, and the strict GEMM setting.

Ratios are taken inside one process; these numbers let readers compare runs of different days and machines.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]

#: Rows, inner size, columns of matrix products of the MD17 network on aspirin batch 8: q,k,v; vectors; filters.
MODEL_SIZES = [(168, 128, 640), (504, 128, 384), (2450, 32, 512)]

#: Two-thread figures mean something only where two threads are really there.
TWO_THREAD_GAIN = 1.6

#: Relative error of a float32 product with inner size 1024: about 3e-7; bfloat16 would give about 2e-3.
EXACT = 2e-6


def seconds_of(work: Callable[[], Any], clock: Callable[[], float] = time.process_time, budget: float = 0.04) -> float:
    """Least seconds per call over five bursts of about `budget` seconds each."""
    work()
    begin = clock()
    work()
    n = max(1, int(budget / max(clock() - begin, 1e-7)))
    best = float("inf")
    for _ in range(5):
        begin = clock()
        for _ in range(n):
            work()
        best = min(best, (clock() - begin) / n)
    return best


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T by oneDNN, in full float32; a private operation of torch."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def has_onednn_linear() -> bool:
    """Whether this torch has the operation above."""
    try:
        onednn_linear(torch.ones(2, 2), torch.ones(2, 2))
    except (AttributeError, RuntimeError):
        return False
    return True


def sgemm_rates(sizes: list[tuple[int, int, int]]) -> dict[str, dict[str, float]]:
    """GFLOP/s of x W^T by size, for torch's own product and for oneDNN's."""
    kinds: dict[str, Callable] = {"mm": lambda x, w: torch.mm(x, w.T)}
    if has_onednn_linear():
        kinds["onednn"] = onednn_linear
    rates: dict[str, dict[str, float]] = {}
    for m, k, n in sizes:
        x, weight = torch.randn(m, k), torch.randn(n, k)
        rates[f"{m}x{k}x{n}"] = {
            name: 2e-9 * m * k * n / seconds_of(lambda f=product, x=x, w=weight: f(x, w))
            for name, product in kinds.items()
        }
    return rates


def calibrate() -> dict[str, Any]:
    """Rates of products and of small additions, gain of a second thread, load."""
    torch.manual_seed(0)
    x, small = torch.randn(1024, 1024), torch.ones(8)
    begin = time.process_time()
    for _ in range(100_000):
        small.add(1.0)
    additions = time.process_time() - begin
    one = seconds_of(lambda: torch.mm(x, x), time.perf_counter)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    two = seconds_of(lambda: torch.mm(x, x), time.perf_counter)
    torch.set_num_threads(threads)
    return {
        "sgemm_gflops": sgemm_rates([(1024, 1024, 1024), *MODEL_SIZES]),
        "small_additions_100k_s": additions,
        "two_thread_gain": one / two,
        "load_average": list(os.getloadavg()),
    }


def best_rate(calibration: dict[str, Any]) -> float:
    """Highest measured sgemm rate in GFLOP/s: what the distance to the limit is measured with."""
    return max(rate for rates in calibration["sgemm_gflops"].values() for rate in rates.values())


def describe() -> dict[str, Any]:
    """CPU, memory, versions, revision of the package."""
    names = ("torch", "torchmd-net", "torch-cluster", "warp-lang", "vesin", "numpy")
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "memory_GiB": round(memory_bytes("MemTotal") / 2**30, 1),
        "amx": has_amx(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in names},
        "revision": revision(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def version(name: str) -> str | None:
    """Of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """Commit of the working tree; None outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_info(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty elsewhere than on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field), "")


def cpu_model() -> str:
    """Name of the processor."""
    vendor = f"family {cpu_info('cpu family')} model {cpu_info('model')}" if cpu_info("cpu family") else ""
    return " ".join(part for part in (cpu_info("model name") or platform.processor(), vendor) if part)


def memory_bytes(field: str) -> int:
    """A field of /proc/meminfo in bytes: ``MemTotal``, ``MemAvailable``."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(f"/proc/meminfo has no {field}")


def has_amx() -> bool:
    """Whether the processor has matrix tiles, on which ``bf16`` would mean bfloat16."""
    in_torch = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "amx" in cpu_info("flags") or bool(in_torch())


# -------------------------------------------------------------------------------------------------------------- strict


class StrictRefusedError(RuntimeError):
    """The strict setting is not possible, or not exact, on this machine."""


def enable_strict() -> dict[str, Any]:
    """Route every float32 product of this process through oneDNN, after making sure that it stays float32.

    Returns
    -------
    report : dict
        Largest relative error of all products against float64, and the rates before and after.

    Raises
    ------
    StrictRefusedError
        On a CPU with AMX, with a torch that has no such switch, or if a product is not exact to float32.
    """
    if has_amx():
        raise StrictRefusedError("this CPU has AMX: the switch would compute in bfloat16")
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None or not hasattr(settings, "fp32_precision"):
        raise StrictRefusedError(f"torch {torch.__version__} cannot route products to oneDNN (2.9 or newer can)")
    size = MODEL_SIZES[1:2]
    before = sgemm_rates(size)
    previous, settings.fp32_precision = settings.fp32_precision, "bf16"
    errors = product_errors()
    if max(errors.values()) > EXACT:
        settings.fp32_precision = previous
        raise StrictRefusedError(f"products by oneDNN are not exact here: {errors}")
    return {"errors": errors, "gflops_before": before, "gflops_after": sgemm_rates(size)}


def product_errors() -> dict[str, float]:
    """Relative error against float64 of all kinds of products, at all model sizes; each the largest."""
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    for m, k, n in [(1024, 1024, 1024), *MODEL_SIZES]:
        x, w, g = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (m, n)))
        pairs = {"x W^T": (x, w.T), "g W": (g, w), "g^T x": (g.T, x)}
        for name, (a, b) in pairs.items():
            exact = a.double() @ b.double()
            found = {
                name: torch.mm(a, b),
                f"{name} + 0": torch.addmm(torch.zeros(b.shape[1]), a, b),
                f"{name}, batched": torch.bmm(a.expand(2, *a.shape), b.expand(2, *b.shape))[1],
            }
            for kind, value in found.items():
                errors[kind] = max(errors.get(kind, 0.0), float((value - exact).norm() / exact.norm()))
    return errors


def global_settings() -> dict[str, Any]:
    """Settings of the process that no contestant may change under the other."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return {
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "mkldnn_matmul": getattr(matmul, "fp32_precision", None),
        "dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
    }
