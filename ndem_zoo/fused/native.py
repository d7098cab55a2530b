"""The passes and kernels of `source/`: compiled on first use, kept for later, called through their C interface.

Installing the package needs no compiler. The first fused pass on a CPU calls the one that is there (CXX, or c++, g++,
clang++) once, for some ten seconds, and keeps the library in the user's cache folder under a name that holds a hash of
source, compiler, flags and processor. Where that is impossible, `library` returns None, and networks run their eager
plan.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("source")

#: No -ffast-math: NaN must pass through, and linking with it changes how the whole process treats tiny numbers.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-w"]

#: Choice: a compiler that takes longer than this (s) is given up.
TIMEOUT = 300

#: What there are compiled forms for.
DTYPES = (torch.float32, torch.float64)

_RETURN_A_NUMBER = ("find_pairs", "network_size", "head_size")

#: Running totals of this process, for counts of work (``benchmarks/speed/counts.py``): native functions called, and bytes
#: of their results. `flops`, of their matrix products, is kept by the library.
calls = bytes_written = 0


def __getattr__(name: str) -> int:
    if name == "flops":
        found = library()
        return 0 if found is None else found.flops()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def count_written(*tensors: Tensor | None) -> None:
    """Add results of native functions to `bytes_written`."""
    global bytes_written
    bytes_written += sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def cache_folder() -> Path:
    """Where compiled kernels are kept: NDEM_ZOO_CACHE, or ``ndem_zoo`` in the user's cache folder."""
    chosen = os.environ.get("NDEM_ZOO_CACHE")
    if chosen:
        return Path(chosen) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ndem_zoo" / "kernels"


def _compiler() -> str | None:
    """The chosen compiler, or the first that is found; None if there is none."""
    if os.environ.get("CXX"):
        return os.environ["CXX"]
    return next((path for path in map(shutil.which, ["c++", "g++", "clang++"]) if path), None)


def _processor() -> str:
    """Model and instruction sets: a library made for one processor must not be used on another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor() + platform.machine()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: list[str]) -> str:
    """Output of a command.

    Raises
    ------
    RuntimeError
        If it fails; holds the first error that it reported.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing was said"]
        reason = next((line for line in said if "error" in line), said[-1])
        raise RuntimeError(f"{command[0]} failed: {reason.strip()[:300]}")
    return done.stdout


def build(folder: Path) -> Path:
    """Compile the kernels for this processor into `folder`, unless they are there; returns the library.

    Raises
    ------
    RuntimeError
        If there is no compiler, or it fails.
    OSError
        If the folder cannot be written.
    """
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("there is no C++ compiler (CXX, c++, g++ or clang++)")
    version = _run([compiler, "--version"])
    source = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.iterdir()) if path.suffix in (".h", ".cpp")]
    identity = "\n".join([*source, version, " ".join(FLAGS), _processor()])
    library = folder / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.so"
    checksum = library.with_suffix(".sha256")  # a library that was cut short could end the whole process
    if library.exists() and checksum.exists() and checksum.read_text(encoding="ascii") == _sha256(library):
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as scratch:
        result = Path(scratch) / library.name
        # The best first: all vector instructions of this processor and threads. Compilers differ in what they know.
        native = ["-march=native"] if platform.machine() in ("x86_64", "AMD64") else ["-mcpu=native"]
        wide = ["-mprefer-vector-width=512"] if "avx512f" in _processor() else []
        attempts = [[*native, *wide, "-fopenmp"], [*native, "-fopenmp"], native, []]
        for attempt, extra in enumerate(attempts):
            try:
                _compile(compiler, extra, Path(scratch), result)
                break
            except RuntimeError:
                if attempt == len(attempts) - 1:
                    raise
        written = Path(scratch) / checksum.name
        written.write_text(_sha256(result), encoding="ascii")
        os.replace(result, library)
        os.replace(written, checksum)
    return library


def _compile(compiler: str, extra: list[str], scratch: Path, result: Path) -> None:
    """Compile and link; torch's own OpenMP library, already loaded, serves the threads where its symbols are found."""
    obj = scratch / "kernels.o"
    _run([compiler, *FLAGS, *extra, "-c", str(SOURCE / "interface.cpp"), "-o", str(obj)])
    _run([compiler, "-shared", "-fPIC", str(obj), "-o", str(result)])  # without -fopenmp: see above
    try:
        ctypes.CDLL(str(result), mode=os.RTLD_NOW)
    except OSError as error:
        raise RuntimeError(f"the compiled kernels cannot be loaded: {error}") from error


@functools.lru_cache(maxsize=1)
def library() -> Library | None:
    """The compiled kernels; None, after one warning, where they cannot be had (or NDEM_ZOO_NATIVE=0)."""
    if os.environ.get("NDEM_ZOO_NATIVE", "1") == "0":
        return None
    try:
        return Library(build(cache_folder()))
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"the native kernels are not available ({error}); the eager plan is used instead, with the same results and "
            "less speed",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class Library:
    """The compiled functions, called with tensors and numbers."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._functions: dict[tuple[str, torch.dtype], ctypes._CFuncPtr] = {}

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | float | int | None) -> int:
        """Call the form of a function for `dtype`."""
        global calls
        calls += 1
        function = self._functions.get((name, dtype))
        if function is None:
            function = getattr(self._library, f"{name}_{'f32' if dtype == torch.float32 else 'f64'}")
            function.restype = ctypes.c_int64 if name in _RETURN_A_NUMBER else None
            kinds = {float: ctypes.c_double, int: ctypes.c_int64}
            function.argtypes = [kinds.get(type(argument), ctypes.c_void_p) for argument in arguments]
            self._functions[name, dtype] = function
        return function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])

    def flops(self) -> int:
        """Floating-point operations of all matrix products so far."""
        function = self._library.count_flops
        function.restype, function.argtypes = ctypes.c_int64, []
        return function()


class Workspace:
    """Memory for values that live as long as one evaluation of the network, used again by the next.

    Fresh memory costs more than filling it: the system hands it out page by page.
    """

    #: Choice: blocks hold multiples of so many numbers.
    BLOCK = 1 << 20
    _free: ClassVar[dict[torch.dtype, list[Tensor]]] = {torch.float32: [], torch.float64: []}
    _lock: ClassVar[threading.Lock] = threading.Lock()  # two threads must not take one block

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._blocks, self._used = dtype, [], 0
        weakref.finalize(self, self._free[dtype].extend, self._blocks)

    def empty(self, *shape: int) -> Tensor:
        """A tensor with arbitrary content, valid until this workspace is deleted."""
        size = (math.prod(shape) + 15) & ~15
        if not self._blocks or self._used + size > self._blocks[-1].shape[0]:
            self._blocks.append(self._block(size))
            self._used = 0
        strides = [1]
        for length in shape[:0:-1]:
            strides.insert(0, strides[0] * length)
        tensor = self._blocks[-1].as_strided(shape, strides, self._used)
        self._used += size
        count_written(tensor)
        return tensor

    def _block(self, size: int) -> Tensor:
        with self._lock:
            free = self._free[self._dtype]
            fitting = next((i for i, block in enumerate(free) if block.shape[0] >= size), None)
            if fitting is not None:
                return free.pop(fitting)
            if free:  # too small: replaced, so that memory does not grow with the number of different sizes
                free.pop()
        return torch.empty(-(-size // self.BLOCK) * self.BLOCK, dtype=self._dtype)


class Kernels:
    """The compiled functions as methods on CPU tensors of float32 or float64.

    Arguments must be contiguous, of one dtype. Results live in a workspace, as long as this object does.
    """

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        self._library, self._dtype, self._call, self._workspace = library, dtype, library.call, Workspace(dtype)
        self._threads = torch.get_num_threads()

    def call(self, name: str, *arguments: Tensor | float | int | None) -> int:
        """Call a function in the form for this dtype."""
        return self._call(name, self._dtype, *arguments)

    def like(self) -> Kernels:
        """The same kernels with a workspace of their own."""
        return Kernels(self._library, self._dtype)

    def empty(self, *shape: int) -> Tensor:
        """A tensor with arbitrary content."""
        return self._workspace.empty(*shape)

    def product(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
    ) -> Tensor:
        """Matrix product a b + bias, or with `add` out + a b; `a` (M, K) of any strides, rows of `b` (K, N) contiguous."""
        (m, k), n = a.shape, b.shape[1]
        out = self._workspace.empty(m, n) if out is None else out
        strides = (a.stride(0), a.stride(1), b, b.stride(0), bias, out, out.stride(0))
        self._call("product", a.dtype, m, n, k, a, *strides, int(add), self._threads)
        return out


def lanes(channels: int) -> int:
    """The largest power of two up to 16 that divides `channels`: how many of them one operation works on."""
    return min(16, channels & -channels)


def can_read(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether native code, which sees addresses only, reads these tensors right as numbers of `dtype`."""
    return {tensor.dtype for tensor in tensors} <= {dtype} and all(map(Tensor.is_contiguous, tensors))


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    """Where the tensors lie, as an array for native code."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
