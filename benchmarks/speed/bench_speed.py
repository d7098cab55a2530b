"""Side by side with torchmd-net 3.1: steps, inference, memory, data path, growth with size.

    pip install -r benchmarks/speed/requirements.txt
    python benchmarks/speed/bench_speed.py                        # everything
    python benchmarks/speed/bench_speed.py --only train infer --baselines strict
    python benchmarks/speed/bench_speed.py --quick                # minutes: does everything work?

writes ``results/speed.json`` and the table made from it beside this file; parts that are not measured keep the figures
that are there. Each of the three baselines is a process of its own, in which the contestants take turns: torchmd-net as
shipped, the allocator tuned for both, and strict (the matrix products of both by oneDNN as well).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.speed import fresh, table  # noqa: E402

RESULTS = HERE / "results"

#: glibc gives large blocks back to the system after each use otherwise, and faults them in again.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
IN_BASELINES = ("train", "ndem", "infer", "systems", "system-steps", "pairs", "fit")
IN_FRESH = ("memory", "first-step")
MEMORY_BATCHES = (8, 128)
#: Rough need at that batch in bytes of what keeps edge tensors: torchmd-net, and with all pairs our eager plan. Where
#: there is less, it is left out.
MEMORY_NEED = {"torchmd-net": {8: 2e9, 128: 18e9}, "eager": {8: 3e9, 128: 24e9}, "fused": {8: 1e9, 128: 4e9}}


def environment(baseline: str, threads: int) -> dict[str, str]:
    """Variables of a child process; whatever tunes the allocator is removed, or set, for both contestants."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    kept |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return kept | ({} if baseline == "shipped" else ALLOCATOR)


# ---------------------------------------------------------------------------------------------------------- the child


def child(task: dict[str, Any], out: Path) -> None:
    """Measure some parts in this process; each goes into the record as soon as it is finished."""
    import torch

    torch.set_num_threads(task["settings"]["threads"])
    from benchmarks.speed import machine, parts

    settings = parts.Settings(**task["settings"])
    calibration, described = machine.calibrate(), machine.describe()
    print(f"-- {table.BASELINES[settings.baseline]}: {json.dumps(calibration)}\n   {json.dumps(described)}", flush=True)
    common: dict[str, Any] = {"machine": described, "calibration": calibration, "settings": asdict(settings)}
    refused = None
    if settings.threads > 1 and calibration["two_thread_gain"] < machine.TWO_THREAD_GAIN:
        refused = f"2 threads are {calibration['two_thread_gain']:.2f} times as fast as 1; {machine.TWO_THREAD_GAIN} is needed"
    if settings.baseline == "strict" and refused is None:
        try:
            common["strict"] = machine.enable_strict()
            print(f"   products by oneDNN, exact to {max(common['strict']['errors'].values()):.1e}", flush=True)
        except machine.StrictRefusedError as error:
            refused = str(error)
    for part in task["parts"]:
        if refused is None:
            rows = parts.PARTS[part][0](settings)
            for row in rows:
                add_ratios(row)
            add_section(out, part, settings.baseline, common | {"rows": rows})
        else:
            print(f"   refused: {refused}", flush=True)
            add_section(out, part, settings.baseline, common | {"refused": refused})


def add_ratios(row: dict[str, Any]) -> None:
    """Ratios that do not have ours as their denominator, round by round."""
    times = {name: {"cpu": t["rounds_ms"]} for name, t in row.get("times", {}).items()}
    from benchmarks.speed import timing

    if "ours, supervised" in times:
        row["own_cost"] = timing.ratio(times, "ours", "ours, supervised")
    if "torchmd-net" in times and ("ours, eager" in times or row.get("plan") == "eager"):
        row["eager_gain"] = timing.ratio(times, "torchmd-net", "ours, eager" if "ours, eager" in times else "ours")


def run_child(baseline: str, chosen: list[str], args: argparse.Namespace) -> bool:
    """Measure in a child process; whether it came to its end."""
    settings = {
        "rounds": args.rounds, "quick": args.quick, "baseline": baseline, "threads": args.threads, "plan": args.plan,
    }  # fmt: skip
    task = json.dumps({"settings": settings, "parts": chosen})
    command = [sys.executable, str(Path(__file__).resolve()), "--child", task, "--out", str(args.out)]
    return subprocess.run(command, env=environment(baseline, args.threads)).returncode == 0


def add_section(out: Path, part: str, baseline: str, section: dict[str, Any]) -> None:
    """Write a part into the record, and the table anew; only one process does so at a time."""
    from ndem_zoo.checkpoint import save_json, write_text

    record = json.loads(out.read_text(encoding="utf-8"))
    record["sections"][f"{part}/{baseline}"] = section
    save_json(out, record)
    write_text(out.with_suffix(".md"), table.render(record))


# --------------------------------------------------------------------------------------------------- fresh processes


def measure_memory(baseline: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of supervised training steps on aspirin, of both contestants."""
    from benchmarks.speed import contestants, machine

    contenders = {"ours": args.plan or contestants.best_plan()}
    if machine.version("torchmd-net") is not None:
        contenders["torchmd-net"] = "torchmd-net"
    rows = []
    for n in MEMORY_BATCHES[:1] if args.quick else MEMORY_BATCHES:
        row: dict[str, Any] = {"item": f"aspirin b{n}", "batch_size": n, "left_out": []}
        for name, kind in contenders.items():
            need = MEMORY_NEED[kind][n]
            if machine.memory_bytes("MemAvailable") < need:
                row["left_out"].append(f"{kind} needs about {need / 1e9:.0f} GB")
                continue
            options = {"contestant": name, "molecule": "aspirin", "batch_size": n, "objective": "supervised"}
            row[name] = fresh.run("memory", environment(baseline, 1), plan=args.plan, **options)
        print(row, flush=True)
        rows.append(row)
    return rows


def measure_first_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time to the first step of `fit`: one process that may fill caches, then the measured ones."""
    env = environment("shipped", 1)
    cold = fresh.run("first_step", env, plan=args.plan)
    runs = [fresh.run("first_step", env, plan=args.plan) for _ in range(1 if args.quick else 5)]
    row = {"item": "ndem, aspirin b8", "cold_s": cold["first_step_s"], "runs": runs}
    row |= {name: statistics.median(run[name] for run in runs) for name in ("first_step_s", "import_s")}
    print(row, flush=True)
    return [row]


def measure_fresh(baseline: str, args: argparse.Namespace) -> None:
    """The parts that are fresh processes, into the record."""
    from benchmarks.speed import machine

    common = {"machine": machine.describe(), "settings": {"rounds": 1, "quick": args.quick, "baseline": baseline}}
    if "memory" in args.only and baseline != "strict":
        add_section(args.out, "memory", baseline, common | {"rows": measure_memory(baseline, args)})
    if "first-step" in args.only and baseline == "shipped":
        add_section(args.out, "first-step", baseline, common | {"rows": measure_first_step(args)})


# --------------------------------------------------------------------------------------------------------- the parent


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*IN_BASELINES, *IN_FRESH]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="PART", help=", ".join(every))
    parser.add_argument("--baselines", nargs="+", choices=list(table.BASELINES), default=list(table.BASELINES))
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds; default 9, with --quick 3")
    parser.add_argument("--quick", action="store_true", help="few rounds and sizes; written to runs/, not to results/")
    parser.add_argument("--threads", type=int, choices=[1, 2], default=1, help="2: wall time, if 2 are really there")
    parser.add_argument("--plan", choices=["eager", "fused"], default=None, help="ours; default: the best there is")
    parser.add_argument("--out", type=Path, default=None, help="record to write and to continue (JSON)")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 9)
    suffix = "" if args.threads == 1 else f"_{args.threads}threads"
    args.out = args.out or (
        ROOT / "runs" / f"speed_quick{suffix}.json" if args.quick else RESULTS / f"speed{suffix}.json"
    )
    return args


def main() -> int:
    """Measure what is chosen; record and table are written after every part."""
    args = parse()
    if args.child is not None:
        child(json.loads(args.child), args.out)
        return 0
    from benchmarks.speed.parts import PARTS
    from ndem_zoo.checkpoint import save_json

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, which ends the child too
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"sections": {}}
    record |= {"command": "python benchmarks/speed/bench_speed.py" + " --quick" * args.quick, "quick": args.quick}
    save_json(args.out, record)
    failed = []
    for baseline in args.baselines:
        chosen = [part for part in IN_BASELINES if part in args.only and baseline in PARTS[part][1]]
        if chosen and not run_child(baseline, chosen, args):
            failed.append(baseline)
        measure_fresh(baseline, args)
    print("\n" + args.out.with_suffix(".md").read_text(encoding="utf-8"))
    if failed:
        print(f"not finished: {', '.join(failed)}; what was finished is in {args.out}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
