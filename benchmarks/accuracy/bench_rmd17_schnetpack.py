"""Does NDeM make SchNetPack's PaiNN better? Genuine rMD17, ``spktrain``, two configurations, paired seeds.

The stock run is ``spktrain experiment=rmd17``, ours ``spktrain experiment=ndem_rmd17``; everything else on the two command
lines is the same (`COMMON`, `overrides`). Training and validation frames are those of an official training list, the 1,000
test frames those of the official test list. A seed means the weights, the order of the batches and the noise: both runs of a
seed begin with the same weights and see the same batches. Runs come one after the other, with one thread, and finished
ones are kept, so that the script can be interrupted and called again.

    python benchmarks/accuracy/bench_rmd17_schnetpack.py --data-dir ../shared/data/rmd17

writes one JSON a run into ``results/rmd17_<molecule>_schnetpack/`` and the table made from them beside that folder.
Needs schnetpack (the full stack has it).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.paired import ALLOCATOR, mean_and_spread, paired_difference  # noqa: E402

RESULTS = Path(__file__).parent / "results"

#: The two configurations: nothing else differs.
EXPERIMENTS = {"stock": "rmd17", "ndem": "ndem_rmd17"}
SIZES = {"n_train": 950, "n_valid": 50}
BATCH = 10  # SchNetPack's own
CUTOFF = 5.0
#: Choice: SchNetPack's plateau schedule never acts within so few epochs; a cosine ends both runs at a learning rate of 0.
COMMON = (
    "trainer.accelerator=cpu",
    "+trainer.enable_progress_bar=false",
    "data.num_workers=0",
    "+data.val_batch_size=50",
    "logger=csv",
    "task.scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR",
    "task.scheduler_monitor=null",
    "~task.scheduler_args",
)


def load(molecule: str, data_dir: str) -> tuple[Any, Any, Any]:
    """Training, validation and test frames of the first official split."""
    from ndem_zoo import load_md17

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checksum of a subset is not the official one
        return load_md17(molecule, revised=True, split=1, data_dir=data_dir, **SIZES)[1]


def prepare(molecule: str, data_dir: str, folder: Path) -> None:
    """Write the database and the split that both configurations read; keep those that are there."""
    from ndem_zoo import MolecularDataset
    from ndem_zoo.schnetpack import write_ase_db

    parts = load(molecule, data_dir)
    database = folder / f"{molecule}.db"
    if not database.exists():
        units = {"energy": "kcal/mol", "forces": "kcal/mol/Ang"}
        whole = MolecularDataset.concatenate(parts)
        write_ase_db(whole, database, units=units, metadata={"molecule": molecule})
    ends = np.cumsum([0, *(len(part) for part in parts)])
    rows = {f"{name}_idx": np.arange(*ends[i : i + 2]) for i, name in enumerate(("train", "val", "test"))}
    np.savez(folder / "split.npz", **rows)


def overrides(args: argparse.Namespace, seed: int) -> list[str]:
    """Options of ``spktrain`` that both configurations get."""
    folder = args.work_dir.resolve()
    return [
        *COMMON,
        f"+task.scheduler_args={{T_max: {args.epochs}}}",
        f"trainer.max_epochs={args.epochs}",
        f"model.representation.n_atom_basis={args.width}",
        f"data.molecule={args.molecule}",
        f"data.datapath={folder / args.molecule}.db",
        f"+data.split_file={folder / 'split.npz'}",
        f"run.data_dir={folder}",
        "run.path=.",
        f"+seed={seed}",
    ]


def run_one(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train with ``spktrain`` in a folder of its own; an interrupted run there goes on from its last checkpoint."""
    run = f"{name}_{seed}"
    command = [sys.executable, str(Path(sys.executable).parent / "spktrain"), f"experiment={EXPERIMENTS[name]}"]
    command += [*overrides(args, seed), f"run.id={run}"]
    search = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    folder = args.work_dir.resolve()
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search, "PWD": str(folder)}
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with (folder / f"{run}.log").open("a") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    rows = list(read_metrics(folder / run))
    return {
        "configuration": name,
        "experiment": EXPERIMENTS[name],
        "seed": seed,
        "epochs": args.epochs,
        "steps": args.epochs * SIZES["n_train"] // BATCH,
        "width": args.width,
        "wall_s": time.perf_counter() - begin,
        "cpu_s": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before,
        "test": test_errors(folder / run / "best_model", load(args.molecule, args.data_dir)[2]),
        "test_schnetpack": {k: v for row in rows for k, v in row.items() if k.startswith("test_")},
        "history": [row for row in rows if "val_forces_mae" in row],
    }


def read_metrics(folder: Path) -> Iterator[dict[str, float]]:
    """Rows of Lightning's ``metrics.csv``, without what they leave empty and what is said of each step."""
    for file in sorted(folder.glob("csv/version_*/metrics.csv")):
        with file.open(newline="") as stream:
            for row in csv.DictReader(stream):
                yield {k: float(v) for k, v in row.items() if v and not k.startswith(("train_", "lr-"))}


def test_errors(file: Path, test: Any) -> dict[str, float]:
    """Errors of a ``best_model`` in eV and in kcal/mol, with this package's metrics instead of SchNetPack's."""
    import schnetpack as spk
    import torch

    from ndem_zoo.metrics import error_metrics
    from ndem_zoo.physics import KCAL_PER_MOL
    from ndem_zoo.sampling import Collator
    from ndem_zoo.schnetpack import to_schnetpack

    model = spk.utils.load_model(str(file), device="cpu").eval()
    collate = Collator(test, CUTOFF, with_targets=False)
    found: dict[str, list[torch.Tensor]] = {"energy": [], "forces": []}
    for rows in np.array_split(np.arange(len(test)), max(1, len(test) // 50)):
        output = model(to_schnetpack(collate(rows), CUTOFF))
        for key, values in found.items():
            values.append(output[key].detach().double() * KCAL_PER_MOL)
    predicted = {key: torch.cat(values).numpy() for key, values in found.items()}
    return error_metrics(predicted, test.targets, test.z, test.ptr)


# --------------------------------------------------------------------------------------------------- cost of a step


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make a folder the current one for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Stepper:
    """Training steps of a configuration as ``spktrain`` takes them, batches included, without the trainer around them."""

    def __init__(self, experiment: str, options: Sequence[str]) -> None:
        from hydra import compose, initialize_config_module
        from hydra.utils import instantiate

        with initialize_config_module("schnetpack.configs", version_base="1.2"):
            config = compose("train", [f"experiment={experiment}", *options, "run.work_dir=."])
        self.data = instantiate(config.data)
        with working_in(Path(config.run.data_dir)):  # it leaves a lock where it is
            self.data.prepare_data()
            self.data.setup()
        model = instantiate(config.model)
        model.initialize_transforms(self.data)
        self.outputs, self.model = [instantiate(output) for output in config.task.outputs], model.train()
        import torch

        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.globals.lr, weight_decay=0.0)
        self.batches = self.endless()

    def endless(self) -> Iterator[dict[str, Any]]:
        """Training batches, epoch after epoch."""
        while True:
            yield from self.data.train_dataloader()

    def step(self) -> None:
        """Load, predict, differentiate, update."""
        batch = next(self.batches)
        labels = {output.target_property: batch[output.target_property] for output in self.outputs}
        self.model.do_postprocessing = False
        found = self.model(batch)
        loss = sum(output.calculate_loss(found, labels) for output in self.outputs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def measure_step_times(args: argparse.Namespace, rounds: int = 15, steps: int = 8) -> dict[str, Any]:
    """CPU time of a step relative to the stock configuration: interleaved rounds, median of the ratios of a round."""
    import torch

    torch.set_num_threads(1)
    steppers = {name: Stepper(experiment, overrides(args, 0)) for name, experiment in EXPERIMENTS.items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(rounds + 1):
        for name, stepper in steppers.items():
            begin = time.process_time()  # of one thread; unlike wall time it does not depend on what else is running
            for _ in range(steps):
                stepper.step()
            if turn:  # the first round warms up
                times[name].append((time.process_time() - begin) / steps)
    ratios = [ours / stock for ours, stock in zip(times["ndem"], times["stock"], strict=True)]
    return {
        "rounds": rounds,
        "steps_per_round": steps,
        "ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
    }


# --------------------------------------------------------------------------------------------------------- the table


def table(record: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """Mean, spread and paired difference as markdown."""
    by_name = {name: [run for run in runs if run["configuration"] == name] for name in EXPERIMENTS}
    if not all(by_name.values()):
        return ""
    cost = record["step_times"]
    one = by_name["stock"][0]
    ratios = {"stock": "1.00", "ndem": "{:.2f} ({:.2f} to {:.2f})".format(cost["ratio"], *cost["quartiles"][::2])}
    lines = [
        f"# rMD17 {record['molecule']}: SchNetPack's PaiNN, stock and with NDeM",
        "",
        f"`{record['command']}`; {record['machine']}. `spktrain experiment=rmd17` against `spktrain experiment=ndem_rmd17`, "
        f"otherwise the same options: PaiNN with {one['width']} features and 3 interactions, {SIZES['n_train']} training and "
        f"{SIZES['n_valid']} validation frames of the first official training list, batches of {BATCH}, {one['steps']:,} steps "
        f"({one['epochs']} epochs), cosine schedule from 0.001, weight average 0.995, best validation weights, "
        f"{record['n_test']:,} frames of the official test list. ± is the standard deviation over seeds; the difference is "
        "paired by seed, with its standard error. The cost of a step is its CPU time relative to stock, batch and neighbor "
        "list included, with quartiles.",
        "",
        "| configuration | seeds | cost of a step | force MAE, kcal/mol/Å | difference | force MAE, meV/Å | "
        "energy MAE, kcal/mol | difference | energy MAE, meV |",
        "|" + "---|" * 9,
    ]
    base = {key: _by_seed(by_name["stock"], key) for key in ("forces_mae_kcal", "energy_mae_kcal")}
    for name, found in by_name.items():
        cells = [name, str(len(found)), ratios[name]]
        for key, known in base.items():
            values = _by_seed(found, key)
            cells += [
                mean_and_spread(list(values.values())),
                "" if name == "stock" else paired_difference(values, known),
            ]
            in_ev = [1e3 * run["test"][key.removesuffix("_kcal")] for run in found]
            cells.append(mean_and_spread(in_ev, 2))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", verdict(by_name)]) + "\n"


def verdict(by_name: dict[str, list[dict[str, Any]]]) -> str:
    """In words, who has the smaller errors, and with how many seeds."""
    sentences = []
    for key, what in (("forces_mae_kcal", "force"), ("energy_mae_kcal", "energy")):
        stock, ours = (_by_seed(by_name[name], key) for name in ("stock", "ndem"))
        seeds = [seed for seed in ours if seed in stock]
        wins = sum(ours[seed] < stock[seed] for seed in seeds)
        sentences.append(f"NDeM has the smaller {what} error with {wins} of {len(seeds)} seeds.")
    return " ".join(sentences)


def _by_seed(runs: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    return {run["seed"]: run["test"][key] for run in runs}


def first_record(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common."""
    import schnetpack
    import torch

    return {
        "command": "python benchmarks/accuracy/bench_rmd17_schnetpack.py --data-dir DIR "
        f"--molecule {args.molecule} --epochs {args.epochs} --width {args.width} --seeds {args.seeds}",
        "machine": f"{platform.machine()}, torch {torch.__version__}, schnetpack {schnetpack.__version__}, one thread",
        "molecule": args.molecule,
        "epochs": args.epochs,
        "width": args.width,
        "n_test": len(load(args.molecule, args.data_dir)[2]),
        "common_options": list(COMMON),
        "step_times": measure_step_times(args),
    }


def main() -> None:
    """Run what is missing, write each record when it is there, and then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", default="ethanol")
    parser.add_argument("--data-dir", default=None, help="folder with the rMD17 npz files; default: download them")
    parser.add_argument("--epochs", type=int, default=32, help=f"of {SIZES['n_train'] // BATCH} steps")
    parser.add_argument("--width", type=int, default=64, help="features of PaiNN")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/rmd17_schnetpack"), help="spktrain's own files")
    parser.add_argument("--out", type=Path, default=None, help="folder of the records")
    args = parser.parse_args()
    from ndem_zoo.checkpoint import save_json, write_text

    out = args.out or RESULTS / f"rmd17_{args.molecule}_schnetpack"
    args.work_dir.mkdir(parents=True, exist_ok=True)
    prepare(args.molecule, args.data_dir, args.work_dir)
    if not (out / "record.json").exists():
        save_json(out / "record.json", first_record(args))
    record = json.loads((out / "record.json").read_text())
    if (record["epochs"], record["width"]) != (args.epochs, args.width):
        parser.error(
            f"{out} holds runs with --epochs {record['epochs']} --width {record['width']}; choose another --out"
        )
    for seed in range(args.seeds):
        for name in EXPERIMENTS:
            file = out / f"{name}_{seed}.json"
            if not file.exists():
                run = run_one(name, seed, args)
                save_json(file, run)
                print(file.stem, f"{run['test']['forces_mae_kcal']:.4f} kcal/mol/Å, {run['wall_s']:.0f} s", flush=True)
    runs = [json.loads(file.read_text()) for file in sorted(out.glob("*_*.json"))]
    write_text(out.with_suffix(".md"), table(record, runs))
    print(table(record, runs))


if __name__ == "__main__":
    main()
