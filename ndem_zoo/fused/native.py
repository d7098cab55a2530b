"""The kernels of `kernels.cpp`: compiled on first use, kept for later, called through their C interface.

Installing the package needs no compiler. The first fused pass on a CPU calls the one that is there (CXX, or c++, g++,
clang++) once, for some 20 seconds, and keeps the library in the user's cache folder under a name that holds a hash of
source, compiler, flags and processor. Where that is impossible, `library` returns None, and the same passes run on
`torch_kernels.TorchKernels`.
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
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ndem_zoo.fused.pairs import Layer, Pairs

SOURCE = Path(__file__).with_name("kernels.cpp")

#: No -ffast-math: NaN must pass through, and linking with it changes how the whole process treats tiny numbers.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w"]

#: Choice: a compiler that takes longer than this (s) is given up.
TIMEOUT = 300

#: How many native kernels have run in this process: what a count of launches adds to those that torch sees.
calls = 0


def cache_folder() -> Path:
    """Where compiled kernels are kept: NDEM_ZOO_CACHE, or ``ndem_zoo`` in the user's cache folder."""
    chosen = os.environ.get("NDEM_ZOO_CACHE")
    if chosen:
        return Path(chosen) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ndem_zoo" / "kernels"


def _compiler() -> str | None:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def _processor() -> str:
    """Model and instruction sets: a library made for one processor must not be used on another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor() + platform.machine()


def _run(command: list[str]) -> str:
    """Output of a command.

    Raises
    ------
    RuntimeError
        If it fails; holds the last lines of what it said.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {' '.join((done.stderr or done.stdout).split()[-60:])}")
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
    identity = "\n".join([SOURCE.read_text(encoding="utf-8"), version, " ".join(FLAGS), _processor()])
    library = folder / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.so"
    if library.exists():
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
        os.replace(result, library)
    return library


def _compile(compiler: str, extra: list[str], scratch: Path, result: Path) -> None:
    """Compile and link; torch's own OpenMP library, already loaded, serves the threads where its symbols are found."""
    shared = [flag for flag in FLAGS if flag != "-shared"]
    obj = scratch / "kernels.o"
    _run([compiler, *shared, *extra, "-c", str(SOURCE), "-o", str(obj)])
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
            f"the native kernels are not available ({error}); the fused plan runs on PyTorch's own operations instead, "
            "with the same results and less speed",
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
            function.restype = ctypes.c_int64 if name == "find_pairs" else None
            kinds = {float: ctypes.c_double, int: ctypes.c_int64}
            function.argtypes = [kinds.get(type(argument), ctypes.c_void_p) for argument in arguments]
            self._functions[name, dtype] = function
        return function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


class Workspace:
    """Memory for values that live as long as one evaluation of the network, used again by the next.

    Fresh memory costs more than filling it: the system hands it out page by page.
    """

    #: Choice: numbers in a block.
    BLOCK = 1 << 22
    _free: ClassVar[dict[torch.dtype, list[Tensor]]] = {torch.float32: [], torch.float64: []}

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._blocks, self._block, self._used = dtype, [], -1, 0
        weakref.finalize(self, self._free[dtype].extend, self._blocks)

    def empty(self, *shape: int) -> Tensor:
        """A tensor with arbitrary content, valid until this workspace is deleted or goes back before it."""
        size = (math.prod(shape) + 15) & ~15
        while self._block < 0 or self._used + size > self._blocks[self._block].shape[0]:
            self._next_block(size)
        strides = [1]
        for length in shape[:0:-1]:
            strides.insert(0, strides[0] * length)
        tensor = self._blocks[self._block].as_strided(shape, strides, self._used)
        self._used += size
        return tensor

    def _next_block(self, size: int) -> None:
        self._block += 1
        self._used = 0
        if self._block == len(self._blocks):
            free = self._free[self._dtype]
            fitting = next((i for i, block in enumerate(free) if block.shape[0] >= size), None)
            fresh = torch.empty(max(size, self.BLOCK), dtype=self._dtype) if fitting is None else free.pop(fitting)
            self._blocks.append(fresh)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """What is taken inside is given back at the end."""
        mark = self._block, self._used
        try:
            yield
        finally:
            self._block, self._used = mark


class NativeKernels:
    """The kernels as methods on CPU tensors, float32 or float64.

    Same interface as `torch_kernels.TorchKernels`; see `kernels.cpp` for what each one computes. Arguments must be
    contiguous, of one dtype: the plan takes care of that. Results live in a workspace, as long as this object does.
    """

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        self._library, self._dtype, self._call, self._workspace = library, dtype, library.call, Workspace(dtype)
        self._threads = torch.get_num_threads()

    def like(self) -> NativeKernels:
        """The same kernels with a workspace of their own."""
        return NativeKernels(self._library, self._dtype)

    def empty(self, *shape: int) -> Tensor:
        """A tensor with arbitrary content."""
        return self._workspace.empty(*shape)

    def _like(self, tensor: Tensor) -> Tensor:
        return self._workspace.empty(*tensor.shape)

    def zeros(self, *shape: int) -> Tensor:
        """A tensor of zeros."""
        return self._workspace.empty(*shape).zero_()

    def scratch(self) -> contextlib.AbstractContextManager[None]:
        """Results made inside are valid inside only."""
        return self._workspace.scratch()

    def product(
        self, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
    ) -> Tensor:
        """a b + bias, or with `add` out + a b; `a` (M, K) of any strides, rows of `b` (K, N) contiguous."""
        (m, k), n = a.shape, b.shape[1]
        out = self._workspace.empty(m, n) if out is None else out
        strides = (a.stride(0), a.stride(1), b, b.stride(0), bias, out, out.stride(0))
        self._call("product", a.dtype, m, n, k, a, *strides, int(add), self._threads)
        return out

    def weight_gradient(self, g: Tensor, x: Tensor, more: tuple[Tensor, Tensor] | None) -> Tensor:
        """g^T x, plus that of a second pair, in memory of its own."""
        out = g.new_empty(g.shape[1], x.shape[1])
        self.product(g.t(), x, out=out)
        return out if more is None else self.product(more[0].t(), more[1], out=out, add=True)

    def column_sum(self, values: Tensor) -> Tensor:
        """Sum of the rows of (M, N), in memory of its own: (N,)."""
        out = torch.empty(values.shape[1], dtype=values.dtype)
        self._call("column_sum", values.dtype, *values.shape, values, out)
        return out

    # -------------------------------------------------------------------------------------------------------- pairs

    def pairs(
        self, src: Tensor, dst: Tensor, shift: Tensor, pos: Tensor, system: Tensor, cutoff: float
    ) -> Pairs | None:
        """Pairs within the cutoff in Å; None if the edges do not hold both directions of each."""
        room = src.shape[0] // 2 + 1
        first, second = (torch.empty(room, dtype=torch.int32) for _ in range(2))
        edge = self.empty(room, 3)
        arguments = (src.contiguous(), dst.contiguous(), shift.contiguous(), pos, cutoff)
        found = self._call("find_pairs", pos.dtype, src.shape[0], *arguments, first, second, edge)
        if found < 0:
            return None
        first, second = first[:found], second[:found]
        pair_ptr, atom_ptr = _ranges(first, system, torch.get_num_threads())
        return Pairs(pos.shape[0], first, second, edge[:found], pair_ptr, atom_ptr)

    def radial(
        self, pairs: Pairs, cutoff: float, vector_cutoff: bool, means: Tensor, betas: Tensor, derivative: bool
    ) -> None:
        """Set `geometry`, `rbf` and `rbf_r` of the pairs."""
        p, k = pairs.p, means.shape[0]
        pairs.geometry = self.empty(p, 8)
        pairs.rbf = self.empty(p + 1, k)
        pairs.rbf_r = self.empty(p, k) if derivative else None
        arguments = (pairs.edge, means, betas, pairs.geometry, pairs.rbf, pairs.rbf_r)
        self._call("radial", pairs.edge.dtype, p, k, float(cutoff), int(vector_cutoff), *arguments)

    def geometry_backward(self, pairs: Pairs, g_change: Tensor) -> Tensor:
        """Adjoints of the positions (N, 3)."""
        g_pos = self.empty(pairs.n, 3)
        arguments = (pairs.first, pairs.second, pairs.geometry, g_change, g_pos)
        self._call("geometry_backward", g_change.dtype, pairs.n, pairs.p, *arguments)
        return g_pos

    def geometry_tangent(self, pairs: Pairs, pos_t: Tensor) -> Tensor:
        """Changes of distances and unit vectors (P, 4)."""
        change = self.empty(pairs.p, 4)
        arguments = (pairs.first, pairs.second, pairs.geometry, pos_t, change)
        self._call("geometry_tangent", pos_t.dtype, pairs.p, *arguments)
        return change

    # --------------------------------------------------------------------------------------- attention over the pairs

    def _pair(self, name: str, pairs: Pairs, layer: Layer, *arguments: Tensor | None) -> None:
        sizes = (layer.width, pairs.n, pairs.p, layer.channels, layer.heads, pairs.atom_ptr.shape[0] - 1)
        ranges = (pairs.pair_ptr, pairs.atom_ptr, pairs.first, pairs.second, pairs.geometry)
        self._call(name, layer.y.dtype, *sizes, *ranges, *arguments)

    def pair_forward(self, pairs: Pairs, layer: Layer) -> tuple[Tensor, Tensor]:
        """Sums of messages, scalar (N, C) and vector (N, 3, C); sets the layer's scores."""
        y, n, c, h = layer.y, pairs.n, layer.channels, layer.heads
        layer.score, layer.score_self = self.empty(pairs.p, 2 * h), self.empty(n, h)
        x_out, v_out = self.empty(n, c), self.empty(n, 3, c)
        arguments = (layer.filter_bias, layer.pre, y, layer.vec, layer.score, layer.score_self, x_out, v_out)
        self._pair("pair_forward", pairs, layer, *arguments)
        return x_out, v_out

    def pair_backward(
        self, pairs: Pairs, layer: Layer, g_x: Tensor, g_v: Tensor, g_vec: Tensor | None, g_change: Tensor | None,
        filters: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Adjoints of [q | k | v] and, if asked for, of the filters; adds to those of vec and of the geometry."""
        g_y = self._like(layer.y)
        g_pre = self._like(layer.pre) if filters else None
        arguments = (layer.filter_bias, layer.pre, layer.pre_r, layer.y, layer.vec, layer.score, layer.score_self)
        self._pair("pair_backward", pairs, layer, *arguments, g_x, g_v, g_y, g_vec, g_change, g_pre)
        return g_y, g_pre

    def pair_tangent(
        self, pairs: Pairs, layer: Layer, change: Tensor, y_t: Tensor, vec_t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tangents of both sums, and of the scores of pairs and of the atoms themselves."""
        score_t, score_self_t = self._like(layer.score), self._like(layer.score_self)
        x_t, v_t = self.empty(pairs.n, layer.channels), self.empty(pairs.n, 3, layer.channels)
        values = (layer.filter_bias, layer.pre, layer.pre_r, layer.y, y_t, layer.vec, vec_t)
        scores = (layer.score, layer.score_self, score_t, score_self_t)
        self._pair("pair_tangent", pairs, layer, change, *values, *scores, x_t, v_t)
        return x_t, v_t, score_t, score_self_t

    def pair_reverse(
        self, pairs: Pairs, layer: Layer, change: Tensor, y_t: Tensor, vec_t: Tensor | None, score_t: Tensor,
        score_self_t: Tensor, g_x: Tensor, g_v: Tensor, m_x: Tensor, m_v: Tensor, m_vec: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Adjoints of [q | k | v], of the filters and of their derivatives by distance; adds to those of vec."""
        m_y, m_pre, m_pre_r = (self._like(t) for t in (layer.y, layer.pre, layer.pre_r))
        values = (layer.filter_bias, layer.pre, layer.pre_r, layer.y, y_t, layer.vec, vec_t)
        scores = (layer.score, layer.score_self, score_t, score_self_t)
        self._pair(
            "pair_reverse", pairs, layer, change, *values, *scores, g_x, g_v, m_x, m_v, m_y, m_vec, m_pre, m_pre_r
        )
        return m_y, m_pre, m_pre_r

    # -------------------------------------------------------------------------------------------- neighbor embedding

    def _embed(self, name: str, pairs: Pairs, bias: Tensor, *arguments: Tensor | None) -> None:
        c = bias.shape[0]
        self._call(name, bias.dtype, lanes(c), pairs.n, pairs.p, c, pairs.first, pairs.second, pairs.geometry, *arguments)

    def embed_forward(self, pairs: Pairs, bias: Tensor, pre: Tensor, emb: Tensor) -> Tensor:
        """Sum over neighbors (N, C)."""
        out = self._like(emb)
        self._embed("embed_forward", pairs, bias, bias, pre, emb, out)
        return out

    def embed_backward(
        self, pairs: Pairs, bias: Tensor, pre: Tensor, pre_r: Tensor | None, emb: Tensor, g_out: Tensor,
        g_change: Tensor | None, filters: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Adjoints of the filters and of `emb`, if asked for; adds to those of the geometry."""
        g_pre, g_emb = (self._like(pre), self._like(emb).zero_()) if filters else (None, None)
        self._embed("embed_backward", pairs, bias, bias, pre, pre_r, emb, g_out, g_change, g_pre, g_emb)
        return g_pre, g_emb

    def embed_tangent(
        self, pairs: Pairs, change: Tensor, bias: Tensor, pre: Tensor, pre_r: Tensor, emb: Tensor
    ) -> Tensor:
        """Tangent of the sum (N, C)."""
        out_t = self._like(emb)
        self._embed("embed_tangent", pairs, bias, change, bias, pre, pre_r, emb, out_t)
        return out_t

    def embed_reverse(
        self, pairs: Pairs, change: Tensor, bias: Tensor, pre: Tensor, pre_r: Tensor, emb: Tensor, g_out: Tensor,
        m_out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Adjoints of the filters, of their derivatives by distance, and of `emb`."""
        m_pre, m_pre_r, m_emb = self._like(pre), self._like(pre_r), self._like(emb).zero_()
        arguments = (change, bias, pre, pre_r, emb, g_out, m_out, m_pre, m_pre_r, m_emb)
        self._embed("embed_reverse", pairs, bias, *arguments)
        return m_pre, m_pre_r, m_emb

    # ---------------------------------------------------------------------------------------------------- atoms

    def _atoms(self, name: str, like: Tensor, *arguments: Tensor | float | None) -> None:
        n, c = like.shape
        self._call(name, like.dtype, lanes(c), n, c, *arguments)

    def norm_forward(self, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized x, 1 / standard deviation, and the result."""
        unit, inverse, out = self._like(x), self.empty(x.shape[0]), self._like(x)
        self._atoms("norm_forward", x, float(eps), x, gamma, beta, unit, inverse, out)
        return unit, inverse, out

    def norm_backward(
        self, unit: Tensor, inverse: Tensor, gamma: Tensor, g_out: Tensor, g_x: Tensor, parameters: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Adds to the adjoint `g_x`; adjoints of gamma and beta, if asked for."""
        g_gamma, g_beta = (torch.zeros_like(gamma), torch.zeros_like(gamma)) if parameters else (None, None)
        self._atoms("norm_backward", unit, unit, inverse, gamma, g_out, g_x, g_gamma, g_beta)
        return g_gamma, g_beta

    def norm_tangent(self, unit: Tensor, inverse: Tensor, gamma: Tensor, x_t: Tensor) -> Tensor:
        """Tangent of the result."""
        out_t = self._like(unit)
        self._atoms("norm_tangent", unit, unit, inverse, gamma, x_t, out_t)
        return out_t

    def norm_reverse(
        self, unit: Tensor, inverse: Tensor, gamma: Tensor, x_t: Tensor, g_out: Tensor, m_out: Tensor, m_x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds to the adjoint `m_x`; adjoints of gamma and beta."""
        m_gamma, m_beta = torch.zeros_like(gamma), torch.zeros_like(gamma)
        self._atoms("norm_reverse", unit, unit, inverse, gamma, x_t, g_out, m_out, m_x, m_gamma, m_beta)
        return m_gamma, m_beta

    def update_forward(
        self, x: Tensor, vec: Tensor | None, o: Tensor, w: Tensor | None, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scalars and vectors after the layer."""
        x_out, vec_out = self._like(x), self._like(v)
        self._atoms("update_forward", x, x, vec, o, w, v, x_out, vec_out)
        return x_out, vec_out

    def update_backward(
        self, o: Tensor, w: Tensor | None, g_x: Tensor, g_vec: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Adjoints of o and w."""
        g_o, g_w = self._like(o), None if w is None else self._like(w)
        self._atoms("update_backward", g_x, o, w, g_x, g_vec, g_o, g_w)
        return g_o, g_w

    def update_tangent(
        self, x_t: Tensor, vec_t: Tensor | None, o: Tensor, w: Tensor | None, o_t: Tensor, w_t: Tensor | None,
        v_t: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Tangents of scalars and vectors after the layer."""
        x_out, vec_out = self._like(x_t), self._like(v_t)
        self._atoms("update_tangent", x_t, x_t, vec_t, o, w, o_t, w_t, v_t, x_out, vec_out)
        return x_out, vec_out

    def update_reverse(
        self, o: Tensor, w: Tensor | None, o_t: Tensor, w_t: Tensor | None, g_x: Tensor, g_vec: Tensor, m_x: Tensor,
        m_vec: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Adjoints of o and w."""
        m_o, m_w = self._like(o), None if w is None else self._like(w)
        self._atoms("update_reverse", g_x, o, w, o_t, w_t, g_x, g_vec, m_x, m_vec, m_o, m_w)
        return m_o, m_w


    # ---------------------------------------------------------------------------------------------------------- heads

    def _block(self, name: str, i: int, o: int, *arguments: Tensor | int) -> None:
        lanes_of = lanes(i) if name.startswith("length") else lanes(o)
        n = arguments[-1].shape[0]
        self._call(name, self._dtype, lanes_of, n, i, o, *arguments)

    def length_forward(self, s: Tensor, ab: Tensor) -> Tensor:
        """[s | n] (N, 2I)."""
        i = s.shape[1]
        sn = self.empty(s.shape[0], 2 * i)
        self._block("length_forward", i, ab.shape[1] - i, s, ab, sn)
        return sn

    def length_backward(self, sn: Tensor, ab: Tensor, g_sn: Tensor, g_ab: Tensor) -> Tensor:
        """Adjoint of s; sets that of a in `g_ab`."""
        i = sn.shape[1] // 2
        g_s = self.empty(sn.shape[0], i)
        self._block("length_backward", i, ab.shape[1] - i, sn, ab, g_sn, g_ab, g_s)
        return g_s

    def length_tangent(self, sn: Tensor, ab: Tensor, s_t: Tensor, ab_t: Tensor) -> Tensor:
        """Tangent of [s | n]."""
        i, sn_t = sn.shape[1] // 2, self._like(sn)
        self._block("length_tangent", i, ab.shape[1] - i, sn, ab, s_t, ab_t, sn_t)
        return sn_t

    def length_reverse(
        self, sn: Tensor, ab: Tensor, sn_t: Tensor, ab_t: Tensor, g_sn: Tensor, m_sn: Tensor, m_ab: Tensor
    ) -> Tensor:
        """Adjoint of s; sets that of a in `m_ab`."""
        i = sn.shape[1] // 2
        m_s = self.empty(sn.shape[0], i)
        self._block("length_reverse", i, ab.shape[1] - i, sn, ab, sn_t, ab_t, g_sn, m_sn, m_ab, m_s)
        return m_s

    def _silu(self, name: str, x: Tensor, *arguments: Tensor) -> Tensor:
        out = self._like(x)
        self._call(name, x.dtype, lanes(x.numel()), x.numel(), x, *arguments, out)
        return out

    def silu_forward(self, x: Tensor) -> Tensor:
        """silu(x)."""
        return self._silu("silu_forward", x)

    def silu_backward(self, x: Tensor, g_out: Tensor) -> Tensor:
        """silu'(x) g."""
        return self._silu("silu_backward", x, g_out)

    def silu_reverse(self, x: Tensor, x_t: Tensor, g_out: Tensor, m_out: Tensor) -> Tensor:
        """silu'(x) m + silu''(x) x_t g."""
        return self._silu("silu_reverse", x, x_t, g_out, m_out)

    def gate_forward(self, u: Tensor, ab: Tensor, activate: bool) -> tuple[Tensor, Tensor]:
        """Scalars (N, O) and vectors (N, 3, O) of the block."""
        n, o = u.shape[0], u.shape[1] // 2
        s, v = self.empty(n, o), self.empty(n, 3, o)
        self._block("gate_forward", ab.shape[1] - o, o, int(activate), u, ab, s, v)
        return s, v

    def gate_backward(
        self, u: Tensor, ab: Tensor, g_s: Tensor, g_v: Tensor, activate: bool
    ) -> tuple[Tensor, Tensor]:
        """Adjoints of u, and of [a | b] with that of a still open."""
        o, g_ab, g_u = u.shape[1] // 2, self._like(ab), self._like(u)
        self._call("gate_backward", u.dtype, lanes(o), u.shape[0], ab.shape[1] - o, o, int(activate), u, ab, g_s, g_v,
                   g_u, g_ab)  # fmt: skip
        return g_u, g_ab

    def gate_tangent(
        self, u: Tensor, ab: Tensor, u_t: Tensor, ab_t: Tensor, activate: bool
    ) -> tuple[Tensor, Tensor]:
        """Tangents of scalars and vectors of the block."""
        n, o = u.shape[0], u.shape[1] // 2
        s_t, v_t = self.empty(n, o), self.empty(n, 3, o)
        self._block("gate_tangent", ab.shape[1] - o, o, int(activate), u, ab, u_t, ab_t, s_t, v_t)
        return s_t, v_t

    def gate_reverse(
        self, u: Tensor, ab: Tensor, u_t: Tensor, ab_t: Tensor, g_s: Tensor, g_v: Tensor, m_s: Tensor, m_v: Tensor,
        activate: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Adjoints of u, and of [a | b] with that of a still open."""
        o, m_ab, m_u = u.shape[1] // 2, self._like(ab), self._like(u)
        self._call("gate_reverse", u.dtype, lanes(o), u.shape[0], ab.shape[1] - o, o, int(activate), u, ab, u_t, ab_t,
                   g_s, g_v, m_s, m_v, m_u, m_ab)  # fmt: skip
        return m_u, m_ab


def lanes(channels: int) -> int:
    """The largest power of two up to 16 that divides `channels`: how many of them one operation works on."""
    return min(16, channels & -channels)


def _ranges(first: Tensor, system: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    """Pairs and atoms cut into ranges of whole structures, several for each thread: (R + 1,) each."""
    n, p = system.shape[0], first.shape[0]
    ends = torch.tensor([0, n]), torch.tensor([0, p])
    if threads == 1 or n == 0:
        return ends[1], ends[0]
    begins = torch.cat([ends[0][:1], (system[1:] != system[:-1]).nonzero().flatten() + 1])  # first atom of each structure
    wanted = torch.arange(1, 4 * threads) * n // (4 * threads)
    inner = begins[torch.searchsorted(begins, wanted).clamp(max=len(begins) - 1)].unique()
    atom_ptr = torch.cat([ends[0][:1], inner[inner > 0], ends[0][1:]])
    pair_ptr = torch.searchsorted(first.long(), atom_ptr[1:-1])
    return torch.cat([ends[1][:1], pair_ptr, ends[1][1:]]), atom_ptr
