"""EquiformerV2 side by side with fairchem-core 1.10's: time of a training step, peak memory; and our graphs at 12 Å.

    pip install -r benchmarks/equiformer/requirements.txt && pip install --no-deps fairchem-core==1.10.0
    python benchmarks/equiformer/bench_equiformer.py --data-dir DIR      # DIR holds OC20's s2ef_mini100/0.extxyz.xz
    python benchmarks/equiformer/bench_equiformer.py --data-dir DIR --sizes tiny --rounds 3

Same weights, same frame, same edges and frames of the edges, dropout off; a step is forward and backward of energies and
direct forces. Agreement is checked before anything is timed. Contestants take turns in one process; memory is that of
processes of their own. Without fairchem-core, graphs alone are measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.speed import machine, timing  # noqa: E402
from benchmarks.speed.fresh import status_bytes  # noqa: E402
from ndem_zoo.checkpoint import save_json, write_text  # noqa: E402
from ndem_zoo.graph import Batch, Nearest, make_batch  # noqa: E402
from ndem_zoo.models.equiformer_v2.model import EquiformerV2  # noqa: E402
from ndem_zoo.models.equiformer_v2.presets import PRESETS  # noqa: E402
from ndem_zoo.models.potential import Potential  # noqa: E402

#: What issue and design ask for: times as fast, share of the memory, milliseconds a frame.
FASTER, MEMORY, GRAPH_MS = 2.0, 0.6, 6.0
#: Largest relative difference of energies, forces and of gradients of all weights, in float32.
AGREEMENT = {"energy": 1e-5, "forces": 3e-5, "gradients": 1e-4}
ATOMS = 80
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
BASELINES: dict[str, dict[str, str]] = {"shipped": {}, "allocator": ALLOCATOR}


def golden_script() -> ModuleType:
    """The script that knows fairchem's model and the names of its weights."""
    spec = importlib.util.spec_from_file_location("golden", ROOT / "scripts" / "make_golden_equiformer_v2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def frames(folder: Path) -> list[Any]:
    """OC20 frames, those of about 80 atoms first."""
    from ase.io import read

    path = folder / "s2ef_mini100" / "0.extxyz.xz"
    if not path.exists():
        raise SystemExit(f"{path} does not exist: give the folder of OC20 samples as --data-dir")
    with lzma.open(path, "rt") as file:
        return sorted(read(file, ":", format="extxyz"), key=lambda atoms: abs(len(atoms) - ATOMS))


def batch_of_frame(atoms: Any) -> Batch:
    """One frame as a batch with its 20 nearest neighbors within 12 Å."""
    counts, pbc = np.array([len(atoms)]), np.ones((1, 3), dtype=bool)
    cell = atoms.cell.array[None]
    return make_batch(atoms.numbers, atoms.positions, counts, 12.0, nearest=Nearest(20), cell=cell, pbc=pbc)


def has_rival() -> bool:
    """Whether fairchem-core 1.10 is there."""
    return (machine.version("fairchem-core") or "").startswith("1.10.")


class Contest:
    """Both networks with equal weights, on one frame.

    Parameters
    ----------
    size
        Preset of `EquiformerV2`.
    batch
        The frame.
    names
        ``"ours"``, ``"fairchem"``: who is built; the other is not in memory.
    """

    def __init__(self, size: str, batch: Batch, names: tuple[str, ...]) -> None:
        golden = golden_script()
        values = {name: sourced.value for name, sourced in PRESETS[size].items()}
        self.options = values | {"alpha_drop": 0.0, "drop_path_rate": 0.0}
        self.batch, self.outputs = batch, golden.fairchem_outputs
        torch.manual_seed(0)
        self.ours = Potential(EquiformerV2(**self.options), forces="direct").train()
        if "fairchem" in names:
            self.rival = golden.fairchem_model(self.options).train()
            golden.copy_weights(self.ours, self.rival, self.options)
            self.data = golden.fairchem_data(batch, self.options)
        self.theirs = golden.their_name
        if "ours" not in names:
            del self.ours
        self.works = {name: getattr(self, f"step_{name}") for name in names}

    def step_ours(self, _: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of ours."""
        self.ours.zero_grad(set_to_none=True)
        prediction = self.ours(self.batch)
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        return prediction.energy.detach(), prediction.forces.detach()

    def step_fairchem(self, _: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of fairchem's."""
        self.rival.zero_grad(set_to_none=True)
        found = self.outputs(self.rival, self.data)
        (found["energy"].sum() + found["forces"].square().sum()).backward()
        return found["energy"].detach(), found["forces"].detach()

    def agreement(self) -> dict[str, float]:
        """Relative differences; raises if they are too large."""
        ours, theirs = self.step_ours(), self.step_fairchem()
        pairs = zip(("energy", "forces"), ours, theirs, strict=True)
        found = {name: float((a - b).abs().max() / b.abs().max()) for name, a, b in pairs}
        gradients = {name: p.grad for name, p in self.rival.named_parameters() if p.grad is not None}
        largest = max(float(g.abs().max()) for g in gradients.values())
        found["gradients"] = 0.0
        for name, p in self.ours.named_parameters():
            if p.grad is not None:
                difference = p.grad - gradients[self.theirs(name, self.options)].reshape(p.shape)
                found["gradients"] = max(found["gradients"], float(difference.abs().max()) / largest)
        for name, limit in AGREEMENT.items():
            if not found[name] < limit:
                raise RuntimeError(f"{name} differ by {found[name]:.1e}, allowed {limit}: nothing is timed")
        return found


# ---------------------------------------------------------------------------------------------------------- children


def child_time(size: str, rounds: int, folder: str) -> dict[str, Any]:
    """Interleaved steps of both."""
    contest = Contest(size, batch_of_frame(frames(Path(folder))[0]), ("ours", "fairchem"))
    agreement = contest.agreement()
    times = timing.interleave(contest.works, [None], rounds)
    ratio = timing.ratio(times, "fairchem", "ours")
    values = torch.randn(1 << 18)
    silu = machine.seconds_of(lambda: torch.nn.functional.silu(values)) / values.numel()
    found = {"agreement": agreement, "times": timing.summary(times), "ratio": ratio, "silu_ns": 1e9 * silu}
    return found | {"load_average": list(os.getloadavg()), "edges": len(contest.batch.src)}


def child_memory(size: str, name: str, folder: str) -> dict[str, Any]:
    """Most memory of two steps beyond libraries; weights and their gradients included."""
    batch = batch_of_frame(frames(Path(folder))[0])
    small = Contest("tiny", batch, (name,))
    small.works[name]()  # everything that is imported late
    del small
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the small step left is not there for the measured ones
    before = status_bytes("VmRSS")
    contest = Contest(size, batch, (name,))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # begin to look for the maximum anew
    for _ in range(2):
        contest.works[name]()
    return {"peak_MB": (status_bytes("VmHWM") - before) / 1e6, "libraries_MB": before / 1e6}


def child_graph(rounds: int, folder: str) -> dict[str, Any]:
    """Milliseconds that a frame of about 80 atoms takes from positions to a batch with 20 neighbors."""
    chosen = frames(Path(folder))[:20]
    times = []
    for _ in range(max(rounds, 5)):
        for atoms in chosen:
            begin = time.process_time()
            batch_of_frame(atoms)
            times.append(1e3 * (time.process_time() - begin))
    atoms = [len(a) for a in chosen]
    return {"ms": float(np.median(times)), "ms_quartiles": timing.quartiles(times), "atoms": [min(atoms), max(atoms)]}


def run_child(kind: str, environment: dict[str, str], **arguments: Any) -> dict[str, Any]:
    """Measure in a process of its own; its last line is the result."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    env = kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | environment
    task = json.dumps({"kind": kind, **arguments})
    command = [sys.executable, str(Path(__file__).resolve()), "--child", task]
    output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------- table


def mark(reached: bool) -> str:
    """Whether a target is reached."""
    return "✓" if reached else "✗"


def render(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = [
        "# EquiformerV2 and fairchem-core 1.10",
        "",
        f"One OC20 frame of about {ATOMS} atoms with 20 neighbors each, float32, one thread, process CPU time. Ratios are "
        f"fairchem's over ours: median of {record['rounds']} interleaved rounds with quartiles; a target is reached if the "
        "lower quartile does.",
        "",
        "| model | baseline | ours, ms | fairchem, ms | times as fast | target |",
        "|---|---|---|---|---|---|",
    ]
    for key, found in record["steps"].items():
        size, baseline = key.split("/")
        low, high = found["ratio"]["quartiles"]
        goal = f"{FASTER} {mark(low >= FASTER)}" if baseline == "shipped" else ""
        ours, theirs = (found["times"][name]["ms"] for name in ("ours", "fairchem"))
        rows.append(
            f"| {size} | {baseline} | {ours:.0f} | {theirs:.0f} | {found['ratio']['median']:.2f} ({low:.2f} to {high:.2f}) | {goal} |"
        )
    rows += ["", "| model | ours, MB | fairchem, MB | share | target |", "|---|---|---|---|---|"]
    for size, found in record["memory"].items():
        share = found["ours"]["peak_MB"] / found["fairchem"]["peak_MB"]
        sizes = " | ".join(f"{found[name]['peak_MB']:.0f}" for name in ("ours", "fairchem"))
        rows.append(f"| {size} | {sizes} | {share:.2f} | {MEMORY} {mark(share <= MEMORY)} |")
    graph = record["graph"]
    low, high = graph["ms_quartiles"]
    rows += [
        "",
        f"Graphs (12 Å, 20 nearest, {graph['atoms'][0]} to {graph['atoms'][1]} atoms): {graph['ms']:.1f} ms a frame "
        f"({low:.1f} to {high:.1f}); target {GRAPH_MS} {mark(high <= GRAPH_MS)}.",
        "",
        "Largest relative differences before timing: "
        + "; ".join(
            f"{key}: " + ", ".join(f"{name} {value:.0e}" for name, value in found["agreement"].items())
            for key, found in record["steps"].items()
        )
        + ".",
        "",
        f"Machine: {json.dumps(record['machine'])}.",
    ]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Measure, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "shared" / "data" / "oc20")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "31M"], choices=[*PRESETS])
    parser.add_argument("--baselines", nargs="+", default=[*BASELINES], choices=[*BASELINES])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "equiformer.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(1)
        task = json.loads(args.child)
        print(json.dumps({"time": child_time, "memory": child_memory, "graph": child_graph}[task.pop("kind")](**task)))
        return
    folder = str(args.data_dir.resolve())
    described = machine.describe()
    described["versions"] |= {name: machine.version(name) for name in ("fairchem-core", "e3nn", "vesin")}
    record: dict[str, Any] = {"rounds": args.rounds, "machine": described, "steps": {}, "memory": {}}
    record["graph"] = run_child("graph", {}, rounds=args.rounds, folder=folder)
    for size in args.sizes if has_rival() else []:
        for baseline in args.baselines:
            found = run_child("time", BASELINES[baseline], size=size, rounds=args.rounds, folder=folder)
            record["steps"][f"{size}/{baseline}"] = found
            print(size, baseline, found["ratio"], f"silu {found['silu_ns']:.2f} ns", flush=True)
        contestants = ("ours", "fairchem")
        record["memory"][size] = {n: run_child("memory", {}, size=size, name=n, folder=folder) for n in contestants}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_json(args.out, record)
    write_text(args.out.with_suffix(".md"), render(record))
    print(render(record))


if __name__ == "__main__":
    main()
