"""Which objective gives the best force field from few frames? MD17, one backbone, paired seeds.

Compares supervised training, Noisy Nodes (separate branch), NDeM with stopped gradient and NDeM with flowing gradient,
at equal numbers of steps and at equal wall time. The split is TorchMD-NET's (seed 1); the 1,000 test frames are the
same for every run; a seed means the weights, the order of the batches and the noise. Every run is a process with one
thread; finished runs are kept, so that the script can be interrupted and called again.

    python benchmarks/accuracy/bench_md17_objectives.py --data-dir ../shared/data/md17 --jobs 2

writes ``results/md17_<molecule>_objectives.json`` and the table made from it (``.md``) beside this file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.paired import ALLOCATOR, mean_and_spread, paired_difference  # noqa: E402

RESULTS = Path(__file__).parent / "results"

#: name -> (objective, its options). Everything not named here is the same for all.
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("supervised", {}),
    "noisy_nodes": ("noisy_nodes", {"separate_branch": True, "sigma": 0.05, "ratio": 0.25}),
    "ndem_stop": ("ndem", {"grad_main": "stop", "sigma": 0.05, "ratio": 0.25}),
    "ndem_flow": ("ndem", {"grad_main": "flow", "sigma": 0.05, "ratio": 0.25}),
}
#: Equal wall time means: the time that this one needs for the given number of steps.
ANCHOR = "ndem_stop"

SETTINGS: dict[str, Any] = {
    "preset": "md17_fast",
    "batch_size": 8,
    "backbone_options": {"hidden_channels": 64, "num_layers": 3},
    "weight": 1.0,
    "progress": False,
}


def load(molecule: str, data_dir: str, n_train: int, n_test: int) -> tuple[Any, Any, Any]:
    """Training, validation and test frames; the test frames do not depend on n_train."""
    import warnings

    from ndem_zoo import load_md17

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checksum of a subset is not the official one
        _, (train, valid, rest), _ = load_md17(molecule, n_train=950, n_valid=50, seed=1, data_dir=data_dir)
    return train[:n_train], valid, rest[:n_test]


def run_one(task: dict[str, Any]) -> dict[str, Any]:
    """Train and test one model."""
    import torch

    torch.set_num_threads(1)
    from ndem_zoo import NDeMTorchMDNet

    train, valid, test = load(task["molecule"], task["data_dir"], task["n_train"], task["n_test"])
    objective, options = OBJECTIVES[task["objective"]]
    model = NDeMTorchMDNet(
        **SETTINGS, objective=objective, objective_options=options, seed=task["seed"], device=task["device"]
    )
    begin_wall, begin_cpu = time.perf_counter(), time.process_time()
    model.fit(train, valid, max_steps=task["steps"])
    wall, cpu = time.perf_counter() - begin_wall, time.process_time() - begin_cpu
    errors = model.evaluate(test)
    history = [{k: row[k] for k in ("step", "train_loss", "valid_forces_mae")} for row in model.history_]
    return task | {"wall_s": wall, "cpu_s": cpu, "test": errors, "history": history}


def measure_step_times(molecule: str, data_dir: str, device: str, rounds: int = 9, steps: int = 12) -> dict[str, Any]:
    """Relative cost of a step of each objective: interleaved rounds, median of the per-round ratios to supervised."""
    import torch

    torch.set_num_threads(1)
    from ndem_zoo import NDeMTorchMDNet

    train, _, _ = load(molecule, data_dir, 950, 1)
    times: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for _ in range(rounds):
        for name, (objective, options) in OBJECTIVES.items():
            model = NDeMTorchMDNet(**SETTINGS, objective=objective, objective_options=options, device=device)
            model.fit(train, max_steps=5)  # warm-up
            begin = time.process_time()  # of one thread; unlike wall time it does not depend on what else is running
            model.partial_fit(train, max_steps=steps)
            times[name].append((time.process_time() - begin) / steps)
    ratios = {n: [a / b for a, b in zip(t, times["supervised"], strict=True)] for n, t in times.items()}
    return {
        n: {
            "ratio": statistics.median(r),
            "quartiles": statistics.quantiles(r, n=4),
            "ms": 1e3 * statistics.median(times[n]),
        }
        for n, r in ratios.items()
    }


def equal_time_steps(name: str, steps: int, step_times: dict[str, Any]) -> int:
    """Steps in the time that the anchor needs for `steps`; the same number where the costs differ by less than 5 %."""
    scaled = steps * step_times[ANCHOR]["ratio"] / step_times[name]["ratio"]
    return steps if abs(scaled / steps - 1) < 0.05 else round(scaled)


def plan(args: argparse.Namespace, step_times: dict[str, Any]) -> list[dict[str, Any]]:
    """All runs: seed by seed, so that what is finished early is paired; of a seed the longest first."""
    base = {"molecule": args.molecule, "data_dir": args.data_dir, "n_test": args.n_test, "device": args.device}
    tasks = []
    for n_train, seed, name in itertools.product(args.n_train, range(args.seeds), OBJECTIVES):
        for budget, steps in (("steps", args.steps), ("time", equal_time_steps(name, args.steps, step_times))):
            if args.budget not in ("both", budget) or (budget == "time" and steps == args.steps):
                continue  # the two runs would be one
            tasks.append(base | {"n_train": n_train, "seed": seed, "objective": name, "budget": budget, "steps": steps})
    return sorted(tasks, key=lambda t: (t["seed"], -t["steps"] * step_times[t["objective"]]["ratio"]))


def key(run: dict[str, Any]) -> tuple:
    """What makes a run unique."""
    return run["n_train"], run["seed"], run["objective"], run["budget"]


def table(record: dict[str, Any]) -> str:
    """Mean, spread and paired difference as markdown."""
    lines = [
        f"# MD17 {record['molecule']}: test error by objective",
        "",
        f"`{record['command']}`; {record['machine']}. TorchMDNet with 64 channels and 3 layers, batch 8, cosine schedule, "
        f"weight average 0.999, E:F = 1:30, {record['steps']:,} steps (equal steps), {record['n_test']:,} test frames. "
        "Errors in kcal/mol/Å (forces, per component) and kcal/mol (energy); ± is the standard deviation over seeds; the "
        "difference is paired by seed, with its standard error. The cost of a step is its CPU time relative to supervised "
        "training. Auxiliary weights are 1 for all; Noisy Nodes averages over components, as published, and NDeM sums over "
        "x, y, z, as in its paper, so that NDeM's term counts three times as much.",
    ]
    for n_train, budget in itertools.product(record["n_train"], ("steps", "time")):
        steps = dict.fromkeys(OBJECTIVES, record["steps"])
        if budget == "time":
            steps = {name: equal_time_steps(name, n, record["step_times"]) for name, n in steps.items()}
        runs = {
            name: [
                r for r in record["runs"] if (r["n_train"], r["objective"], r["steps"]) == (n_train, name, steps[name])
            ]
            for name in OBJECTIVES
        }
        if not all(runs.values()):
            continue
        lines += ["", f"## {n_train} training frames, equal {budget}", ""]
        lines += [
            "| objective | steps | seeds | cost of a step | force MAE | difference to supervised | energy MAE |",
            "|" + "---|" * 7,
        ]
        base = {r["seed"]: r["test"]["forces_mae_kcal"] for r in runs["supervised"]}
        for name, found in runs.items():
            force = {r["seed"]: r["test"]["forces_mae_kcal"] for r in found}
            energy = [r["test"]["energy_mae_kcal"] for r in found]
            difference = "" if name == "supervised" else paired_difference(force, base)
            lines.append(
                f"| {name} | {found[0]['steps']:,} | {len(found)} | {record['step_times'][name]['ratio']:.2f} | "
                f"{mean_and_spread(list(force.values()))} | {difference} | {mean_and_spread(energy)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the record after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", default="ethanol")
    parser.add_argument("--data-dir", default=None, help="folder with the MD17 npz files; default: download them")
    parser.add_argument("--n-train", type=int, nargs="+", default=[950, 100])
    parser.add_argument("--n-test", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--budget", choices=["both", "steps", "time"], default="both")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=None, help="begin no run that would not end within so many s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="record to write and to continue (JSON)")
    args = parser.parse_args()
    from ndem_zoo.checkpoint import save_json, write_text

    os.environ |= ALLOCATOR
    context = multiprocessing.get_context("spawn")
    out = args.out or RESULTS / f"md17_{args.molecule}_objectives.json"
    record = json.loads(out.read_text()) if out.exists() else {}
    if not record:
        import torch

        record = {
            "command": f"python benchmarks/accuracy/bench_md17_objectives.py --molecule {args.molecule} --data-dir DIR "
            f"--steps {args.steps} --seeds {args.seeds} --n-train {' '.join(map(str, args.n_train))}",
            "machine": f"{platform.machine()}, torch {torch.__version__}, one thread a run, device {args.device}",
            "molecule": args.molecule, "n_train": args.n_train, "n_test": args.n_test, "steps": args.steps,
            "settings": SETTINGS, "objectives": OBJECTIVES, "runs": [],
        }  # fmt: skip
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            times = pool.submit(measure_step_times, args.molecule, args.data_dir, args.device)
            record["step_times"] = times.result()
        save_json(out, record)
        print(json.dumps(record["step_times"], indent=1), flush=True)
    done = {key(run) for run in record["runs"]}
    tasks = [task for task in plan(args, record["step_times"]) if key(task) not in done]
    begin, slowdown = time.monotonic(), 1.3  # a busy machine is slower than the quiet one that was measured
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running: set[concurrent.futures.Future] = set()
        while tasks or running:
            while tasks and len(running) < args.jobs:
                task = tasks.pop(0)
                expected = slowdown * task["steps"] * record["step_times"][task["objective"]]["ms"] / 1e3
                if args.deadline is None or time.monotonic() - begin + expected < args.deadline:
                    running.add(pool.submit(run_one, task))
            finished, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                run = future.result()
                del run["data_dir"]
                per_step = 1e3 * run["wall_s"] / run["steps"]
                slowdown = max(slowdown, per_step / record["step_times"][run["objective"]]["ms"])
                record["runs"] = sorted([*record["runs"], run], key=key)
                save_json(out, record)
                print(key(run), f"{run['test']['forces_mae_kcal']:.4f} kcal/mol/Å, {run['wall_s']:.0f} s", flush=True)
    write_text(out.with_suffix(".md"), table(record))
    print(table(record))


if __name__ == "__main__":
    main()
