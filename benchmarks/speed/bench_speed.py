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
import statistics
import subprocess
import sys
import tempfile
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
#: Rough need of torchmd-net at that batch in bytes; it is left out where there is less.
MEMORY_NEED = {8: 2e9, 128: 12e9}


def environment(baseline: str, threads: int) -> dict[str, str]:
    """Variables of a child process; whatever tunes the allocator is removed, or set, for both contestants."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    kept |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return kept | ({} if baseline == "shipped" else ALLOCATOR)


# ---------------------------------------------------------------------------------------------------------- the child


def child(task: dict[str, Any], out: Path) -> None:
    """Measure some parts in this process; what is finished is written after each of them."""
    import torch

    torch.set_num_threads(task["settings"]["threads"])
    from benchmarks.speed import machine, parts
    from ndem_zoo.checkpoint import save_json

    settings = parts.Settings(**task["settings"])
    calibration, described = machine.calibrate(), machine.describe()
    print(f"-- {table.BASELINES[settings.baseline]}: {json.dumps(calibration)}\n   {json.dumps(described)}", flush=True)
    common: dict[str, Any] = {"machine": described, "calibration": calibration, "settings": asdict(settings)}
    sections: dict[str, Any] = {}
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
            sections[part] = common | {"rows": rows}
        else:
            print(f"   refused: {refused}", flush=True)
            sections[part] = common | {"refused": refused}
        save_json(out, sections)


def add_ratios(row: dict[str, Any]) -> None:
    """Ratios that do not have ours as their denominator, round by round."""
    times = {name: {"cpu": t["rounds_ms"]} for name, t in row.get("times", {}).items()}
    from benchmarks.speed import timing

    if "ours, supervised" in times:
        row["own_cost"] = timing.ratio(times, "ours", "ours, supervised")
    if "torchmd-net" in times and ("ours, eager" in times or row.get("plan") == "eager"):
        row["eager_gain"] = timing.ratio(times, "torchmd-net", "ours, eager" if "ours, eager" in times else "ours")


def run_child(baseline: str, chosen: list[str], args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Sections of a child process by part, and whether it came to its end."""
    settings = {
        "rounds": args.rounds, "quick": args.quick, "baseline": baseline, "threads": args.threads, "plan": args.plan,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sections.json"
        task = json.dumps({"settings": settings, "parts": chosen})
        command = [sys.executable, str(Path(__file__).resolve()), "--child", task, "--out", str(out)]
        code = subprocess.run(command, env=environment(baseline, args.threads)).returncode
        return (json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}), code == 0


# --------------------------------------------------------------------------------------------------- fresh processes


def measure_memory(baseline: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of supervised training steps on aspirin, of both contestants."""
    from benchmarks.speed import machine

    rows = []
    for n in MEMORY_BATCHES[:1] if args.quick else MEMORY_BATCHES:
        row: dict[str, Any] = {"item": f"aspirin b{n}", "batch_size": n}
        options = {"molecule": "aspirin", "batch_size": n, "objective": "supervised"}
        env = environment(baseline, 1)
        fits = machine.memory_bytes("MemAvailable") > MEMORY_NEED[n]
        row["ours"] = fresh.run("memory", env, contestant="ours", plan=args.plan, **options)
        if machine.version("torchmd-net") is None:
            row["left_out"] = "torchmd-net is not installed"
        elif not fits:
            row["left_out"] = f"torchmd-net needs about {MEMORY_NEED[n] / 1e9:.0f} GB"
        else:
            row["torchmd-net"] = fresh.run("memory", env, contestant="torchmd-net", plan=None, **options)
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


def measure_fresh(baseline: str, chosen: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Sections of the parts that are fresh processes."""
    from benchmarks.speed import machine

    common = {"machine": machine.describe(), "settings": {"rounds": 1, "quick": args.quick, "baseline": baseline}}
    sections = {}
    if "memory" in chosen and baseline != "strict":
        sections["memory"] = common | {"rows": measure_memory(baseline, args)}
    if "first-step" in chosen and baseline == "shipped":
        sections["first-step"] = common | {"rows": measure_first_step(args)}
    return sections


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
    """Measure what is chosen, and write record and table after every process."""
    args = parse()
    if args.child is not None:
        child(json.loads(args.child), args.out)
        return 0
    from benchmarks.speed.parts import PARTS
    from ndem_zoo.checkpoint import save_json, write_text

    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"sections": {}}
    record |= {"command": "python benchmarks/speed/bench_speed.py" + " --quick" * args.quick, "quick": args.quick}
    failed = []
    for baseline in args.baselines:
        chosen = [part for part in IN_BASELINES if part in args.only and baseline in PARTS[part][1]]
        sections, ok = run_child(baseline, chosen, args) if chosen else ({}, True)
        failed += [] if ok else [baseline]
        sections |= measure_fresh(baseline, args.only, args)
        record["sections"] |= {f"{part}/{baseline}": section for part, section in sections.items()}
        save_json(args.out, record)
        write_text(args.out.with_suffix(".md"), table.render(record))
    print("\n" + table.render(record))
    if failed:
        print(f"not finished: {', '.join(failed)}; what was finished is in {args.out}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
