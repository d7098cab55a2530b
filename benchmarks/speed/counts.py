"""What a step asks of any machine: operations launched, matrix-product FLOPs, bytes written. Counted, not timed.

    python benchmarks/speed/counts.py --gate

counts one training step and one inference of the MD17 network on aspirin, batch 8, for our plans and, where it is
installed, torchmd-net, and compares the fused plan with its gates. The numbers do not depend on the machine or its
load; they move with the version of torch, which decides how many kernels its own operations are made of.

Views and bare allocations are no launches. The optimizer is counted apart. What is launched inside an operation of our
own (or of a library) is invisible to torch's dispatcher: native kernels are read off the counters of
`ndem_zoo.fused.native`, and operations from outside torch are listed by name.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

#: Upper bounds for the training step of the fused plan, aspirin batch 8: a little above what it has. It makes the
#: filters of pairs anew in every pass, which is more arithmetic than the prototype's 4.38 GFLOP, and fewer bytes than its
#: 182 MB.
GATES = {"launches": 150, "gflop": 4.6, "megabytes": 60.0}

_ALLOCATIONS = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
#: Operations whose result's size depends on the numbers: a GPU would have to be waited for.
_DATA_DEPENDENT = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive"}
_KNOWN_NAMESPACES = {"aten", "prim", "prims", "profiler"}


@dataclass
class Counts:
    """Totals of everything that ran under an `OpCounter`, native kernels included.

    Attributes
    ----------
    launches
        Operations that write something.
    flops
        Of matrix products; a multiplication and an addition are two.
    bytes_written
        By those operations, their results and what they change in place.
    syncs
        Reads of a number, and results whose size depends on numbers: a GPU would wait there.
    native_calls
        Kernels of ours called past torch's dispatcher; contained in `launches`.
    by_op
        Launches by name.
    foreign
        Names of launched operations that are not torch's own: what they do inside is not in the other numbers.
    uncounted
        Of ``flops`` and ``bytes_written``, those that the native kernels which ran keep no count of: too small here.
    """

    launches: int = 0
    flops: int = 0
    bytes_written: int = 0
    syncs: int = 0
    native_calls: int = 0
    by_op: dict[str, int] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    uncounted: list[str] = field(default_factory=list)

    @property
    def gflop(self) -> float:
        """`flops` in 10⁹."""
        return self.flops / 1e9

    @property
    def megabytes(self) -> float:
        """`bytes_written` in 10⁶."""
        return self.bytes_written / 1e6


class OpCounter(TorchDispatchMode):
    """Counts operations below autograd: those of the forward pass, and of every backward pass made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes_written = self.syncs = 0
        self.by_op: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # there alone, whole compositions arrive: matmul, linear, reshape
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        name = func._schema.name
        if _waits(name, args, out):
            self.syncs += 1
        self.flops += gemm_flops(name, func._schema.overload_name, args)
        written = _written(func, args, kwargs, out)
        if written is not None and name not in _ALLOCATIONS:
            self.by_op[name] += 1
            self.bytes_written += written
        return out


def _tensors(values: Any) -> Iterable[Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _waits(name: str, args: tuple, out: Any) -> bool:
    """Whether a GPU would have to be waited for."""
    by_mask = name == "aten::index" and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:]))
    is_number = isinstance(out, (bool, int, float)) and any(True for _ in _tensors(args))
    return name in _DATA_DEPENDENT or by_mask or is_number


def _written(func: Any, args: tuple, kwargs: dict, out: Any) -> int | None:
    """Bytes that an operation writes; None for a view, or if there is no tensor among its results."""
    changed = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    inputs = {t.untyped_storage()._cdata for t in _tensors([*args, *kwargs.values()])}
    fresh = [t for t in _tensors(out) if t.untyped_storage()._cdata not in inputs]
    if not changed and not fresh:
        return None
    return sum(t.numel() * t.element_size() for t in [*changed, *fresh])


def gemm_flops(name: str, overload: str, args: tuple) -> int:
    """FLOPs of a matrix product by the shapes of its arguments; 0 for anything else."""
    if name in ("aten::mm", "aten::bmm"):
        return 2 * args[0].numel() * args[1].shape[-1]
    if name in ("aten::addmm", "aten::baddbmm", "aten::addmm_", "aten::baddbmm_"):
        return 2 * args[1].numel() * args[2].shape[-1]
    if name == "mkldnn::_linear_pointwise":
        weight = args[2] if overload == "binary" else args[1]  # binary: (input, other, weight, ...)
        return 2 * args[0].numel() * weight.shape[0]
    return 0


def native_counters() -> dict[str, int]:
    """Running totals of the native kernels: ``calls``, and ``flops`` and ``bytes_written`` where they are kept."""
    try:
        native = importlib.import_module("ndem_zoo.fused.native")
    except ImportError:
        return {}
    names = ("calls", "flops", "bytes_written")
    return {name: int(getattr(native, name)) for name in names if hasattr(native, name)}


def count(work: Callable[[], Any]) -> Counts:
    """Counts of one call of `work`."""
    before = native_counters()
    with OpCounter() as counter:
        work()
    native = {name: total - before.get(name, 0) for name, total in native_counters().items()}
    calls = native.get("calls", 0)
    return Counts(
        launches=counter.by_op.total() + calls,
        flops=counter.flops + native.get("flops", 0),
        bytes_written=counter.bytes_written + native.get("bytes_written", 0),
        syncs=counter.syncs,
        native_calls=calls,
        by_op=dict(counter.by_op.most_common()),
        foreign=sorted(name for name in counter.by_op if name.split("::")[0] not in _KNOWN_NAMESPACES),
        uncounted=[name for name in ("flops", "bytes_written") if calls and name not in native],
    )


def count_entrant(entrant: Any, inputs: Any, optimizer: bool = False) -> Counts:
    """Counts of a training step of a contestant (see `contestants`), or of its optimizer alone.

    A first step is made uncounted: caches are filled in it, and the optimizer's state is made.
    """
    entrant.step(inputs)
    entrant.zero_grad()
    if not optimizer:
        return count(lambda: entrant.backward(entrant.loss(inputs)))
    entrant.backward(entrant.loss(inputs))
    return count(entrant.optimizer.step)


def above_gates(counts: Counts) -> list[str]:
    """What exceeds `GATES`, or cannot be compared with them, in words."""
    unknown = [f"{name}: the native kernels keep no count of it" for name in counts.uncounted]
    found = {name: getattr(counts, name) for name in GATES}
    # The gates are rounded numbers: so is what they are compared with.
    rounded = {"launches": found["launches"], "gflop": round(found["gflop"], 2), "megabytes": round(found["megabytes"])}
    above = [f"{name}: {found[name]:.6g}, allowed {GATES[name]:.6g}" for name in GATES if rounded[name] > GATES[name]]
    return above + unknown


def count_all(molecule: str = "aspirin", batch_size: int = 8) -> dict[str, dict[str, Counts]]:
    """Counts by contestant and work, of all contestants that are installed."""
    from benchmarks.speed import contestants, structures

    inputs = structures.molecule_sets(molecule, batch_size, n_sets=1)[0]
    result = {}
    for name in contestants.available_plans():
        result[f"ours, {name}"] = _of_one(contestants.Ours(plan=name), inputs)
    if contestants.torchmd_net_version() is not None:
        result["torchmd-net"] = _of_one(contestants.TorchMDNetRival(own_optimizer=True), inputs)
    return result


def _of_one(entrant: Any, inputs: Any) -> dict[str, Counts]:
    """Training step, optimizer and inference."""
    result = {"train": count_entrant(entrant, inputs), "optimizer": count_entrant(entrant, inputs, optimizer=True)}
    entrant.freeze()
    entrant.infer(inputs)
    return result | {"inference": count(lambda: entrant.infer(inputs))}


def table(results: dict[str, dict[str, Counts]]) -> str:
    """All counts as markdown; a lower bound where native kernels keep no count."""
    mark = {False: "", True: "> "}
    lines = [
        "| | work | launches | native kernels among them | GEMM GFLOP | MB written | synchronizations |",
        "|" + "---|" * 7,
    ]
    for name, works in results.items():
        for work, c in works.items():
            lines.append(
                f"| {name} | {work} | {c.launches:,} | {c.native_calls:,} | {mark['flops' in c.uncounted]}{c.gflop:.2f} "
                f"| {mark['bytes_written' in c.uncounted]}{c.megabytes:,.0f} | {c.syncs} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", choices=["aspirin", "ethanol"], default="aspirin")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--gate", action="store_true", help="exit with 1 if the fused plan exceeds its gates")
    parser.add_argument("--out", type=Path, default=None, help="also write all counts as JSON")
    args = parser.parse_args()
    from ndem_zoo.checkpoint import save_json

    results = count_all(args.molecule, args.batch_size)
    print(f"{args.molecule}, batch {args.batch_size}, torch {torch.__version__}\n\n{table(results)}")
    for name, works in results.items():
        if works["train"].foreign:
            print(f"{name}: also {', '.join(works['train'].foreign)}, whose inside is not counted")
    if args.out is not None:
        save_json(args.out, {n: {w: asdict(c) for w, c in works.items()} for n, works in results.items()})
    if not args.gate:
        return 0
    if "ours, fused" not in results:
        print("there is no fused plan here: nothing to compare with the gates", file=sys.stderr)
        return 1
    failures = above_gates(results["ours, fused"]["train"])
    print("\n".join(failures) or "within the gates", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
