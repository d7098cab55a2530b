"""OC20 S2EF on a sample: supervised training, DeNS and NDeM with a tiny EquiformerV2 at equal wall time.

Everybody trains on the frames of 20 relaxations and is judged on those of 4 others, of which every `--stride`-th counts;
one thread, the same wall time (a cosine schedule follows the clock), weights, order and noise by seed. What is judged is
the weight average at the end: there is no selection. Errors are those of OC20, over free atoms.

    python benchmarks/accuracy/bench_oc20_s2ef.py --data-dir ../shared/data/oc20 --minutes 3 --seeds 3

Fresh temporaries cost a fifth of the time unless glibc keeps its memory; the figures were made with
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 in the environment. `--data-dir` has the folders s2ef_train and s2ef_val, in OC20's text layout. Finished runs are kept, so that the script can
be interrupted and called again; writes ``results/oc20_s2ef.json`` and the table made from it beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ndem_zoo import NDeMEquiformerV2, load_oc20
from ndem_zoo.checkpoint import save_json, write_text

RESULTS = Path(__file__).parent / "results"

#: Everything else is the preset's. DeNS corrupts a structure with probability 0.5, as on OC20's 2M split.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "supervised": {"objective": "supervised"},
    "dens": {"objective": "dens", "objective_options": {"probability": 0.5, "ratio": 0.5}, "weight": 10.0},
    "ndem": {"objective": "ndem", "objective_options": {"ratio": 0.5}, "weight": 1.0},
}
SHOWN = ("forces_mae", "forces_cosine", "energy_mae")


def train_and_test(name: str, parts: tuple, minutes: float, seed: int) -> dict[str, Any]:
    """One run."""
    train, test = parts
    model = NDeMEquiformerV2(preset="oc20_tiny", seed=seed, unknown_elements="warn", progress=False, **OBJECTIVES[name])
    begin = time.perf_counter()
    model.fit(train, max_time=60 * minutes)
    seconds = time.perf_counter() - begin
    errors = model.evaluate(test, metrics=list(SHOWN))
    record = {"objective": name, "seed": seed, "steps": int(model.history_[-1]["step"]), "seconds": seconds}
    return record | {"parameters": model.potential_.n_parameters, "test": errors}


def constants(train: Any, test: Any) -> dict[str, float]:
    """Errors of knowing nothing: zero forces, and the mean energy of the training data."""
    free = slice(None) if test.fixed is None else ~test.fixed
    energy = test.targets["energy"] - train.targets["energy"].mean()
    return {"forces_mae": float(abs(test.targets["forces"][free]).mean()), "energy_mae": float(abs(energy).mean())}


def table(record: dict[str, Any]) -> str:
    """Mean, spread and paired difference as markdown."""
    lines = [
        "# OC20 S2EF, a sample of 24 relaxations: errors on four that were not trained on",
        "",
        f"`{record['command']}`; {record['machine']}. EquiformerV2, preset `oc20_tiny`, {record['minutes']:g} minutes of training "
        f"for each run; {record['n_train']:,} training frames of 20 relaxations, {record['n_test']} test frames of 4 others. Forces: "
        "free atoms, per component. ± is the standard deviation over seeds; the difference is paired by seed, with its standard "
        "error. Four relaxations and some minutes say nothing about OC20 itself: energies above all depend on which four, and three "
        "of them contain an element (Ti, Ir, Nb) that no training frame has.",
        "",
        "| objective | seeds | steps | force MAE (meV/Å) | difference to supervised | cosine | energy MAE (eV) |",
        "|" + "---|" * 7,
    ]
    runs = {name: [run for run in record["runs"] if run["objective"] == name] for name in OBJECTIVES}
    base = {run["seed"]: run["test"]["forces_mae"] for run in runs["supervised"]}
    for name, found in runs.items():
        if not found:
            continue
        columns = {key: [run["test"][key] for run in found] for key in SHOWN}
        pairs = [run["test"]["forces_mae"] / base[run["seed"]] - 1 for run in found if run["seed"] in base]
        difference = (
            f"{100 * statistics.mean(pairs):+.1f} % ± {100 * _error(pairs):.1f} %" if name != "supervised" else ""
        )
        cells = [
            f"{1e3 * statistics.mean(columns['forces_mae']):.1f} ± {1e3 * _spread(columns['forces_mae']):.1f}",
            difference,
            f"{statistics.mean(columns['forces_cosine']):.3f} ± {_spread(columns['forces_cosine']):.3f}",
            f"{statistics.mean(columns['energy_mae']):.2f} ± {_spread(columns['energy_mae']):.2f}",
        ]
        steps = round(statistics.mean(run["steps"] for run in found))
        lines.append(f"| {name} | {len(found)} | {steps:,} | {' | '.join(cells)} |")
    zero = record["constants"]
    lines.append(f"| zero forces, mean energy | | | {1e3 * zero['forces_mae']:.1f} | | 0 | {zero['energy_mae']:.2f} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def _error(values: list[float]) -> float:
    return _spread(values) / len(values) ** 0.5


def main() -> None:
    """Run what is missing, and write the record after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with s2ef_train and s2ef_val")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stride", type=int, default=6, help="every so many of the test frames are used")
    parser.add_argument("--out", type=Path, default=RESULTS / "oc20_s2ef.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (load_oc20("s2ef", "all", args.data_dir / name)[1][0] for name in ("s2ef_train", "s2ef_val"))
    test = test[:: args.stride]
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    if not record:
        record = {
            "command": f"python benchmarks/accuracy/bench_oc20_s2ef.py --data-dir DIR --minutes {args.minutes:g} "
            f"--seeds {args.seeds} --stride {args.stride}",
            "machine": f"{platform.machine()}, torch {torch.__version__}, one thread",
            "minutes": args.minutes,
            "n_train": len(train),
            "n_test": len(test),
            "constants": constants(train, test),
            "objectives": OBJECTIVES,
            "runs": [],
        }
    done = {(run["objective"], run["seed"]) for run in record["runs"]}
    for seed, name in itertools.product(range(args.seeds), OBJECTIVES):
        if (name, seed) not in done:
            run = train_and_test(name, (train, test), args.minutes, seed)
            record["runs"].append(run)
            save_json(args.out, record)
            print(run, flush=True)
    write_text(args.out.with_suffix(".md"), table(record))
    print(table(record))


if __name__ == "__main__":
    main()
