"""Does pre-training help, and does NDeM help beside it? MD17 from scratch and from pre-trained weights (the paper's Table 6).

Pre-trains once, without labels, on equilibrium structures (coordinate denoising of all atoms, the part of Frad that needs no
bonds), or takes somebody's checkpoint (``--init-from``); then trains on MD17 with each objective, from these weights and from
scratch. A seed means the weights that are not taken over, the order of the batches and the noise; one seed's runs differ in
nothing else. Every run leaves a JSON file, and those that are there are not made again.

    python benchmarks/accuracy/bench_finetune.py --data-dir ../shared/data/md17 --unlabeled qm9:gap \\
        --unlabeled-dir ../shared/data/qm9/qm9_20k.npz

writes ``results/finetune_<molecule>/*.json`` and the table made of them, ``results/finetune_<molecule>.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.bench_md17_objectives import RESULTS, load
from benchmarks.accuracy.paired import mean_and_spread, paired_difference
from ndem_zoo import NDeMModel, NDeMTorchMDNet
from ndem_zoo.checkpoint import load_json, save_json, write_text
from ndem_zoo.runs import Reading, open_whole

#: name -> (objective, its options, weight of its term). The standard fine-tuning is Frad's (methods of Feng et al., ICML 2023):
#: labels on the clean structure, a small noise in a branch of its own; without its dihedral noise, which needs bonds.
OBJECTIVES: dict[str, tuple[str, dict[str, Any], float]] = {
    "supervised": ("supervised", {}, 1.0),
    "noisy_nodes": ("noisy_nodes", {"sigma": 0.005, "ratio": 1.0}, 0.1),
    "ndem": ("ndem", {"sigma": 0.05, "ratio": 0.25}, 1.0),
}
#: Zaidi et al. and Frad on equilibrium structures: all atoms, 0.04 Å.
PRETRAINING: dict[str, Any] = {"objective": "noisy_nodes", "objective_options": {"sigma": 0.04, "ratio": 1.0}}
STARTS = ("scratch", "pretrained")


def settings(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Keywords that all models share; the warm-up is the preset's, or a tenth of a short training."""
    backbone = {"hidden_channels": args.channels, "num_layers": args.layers}
    shared = {"preset": "md17_fast", "batch_size": args.batch_size, "backbone_options": backbone}
    return shared | {"device": args.device, "progress": False, "warmup_steps": min(500, steps // 10)}


def pretrained(args: argparse.Namespace, folder: Path) -> tuple[Any, dict[str, Any]]:
    """What to begin with, and how it came about; pre-trained now, unless it lies in `folder` already."""
    if args.init_from is not None:
        return args.init_from, {"init_from": args.init_from.name}
    path = folder / "pretrained"
    if (path / "config.json").is_file():
        return NDeMModel.load(path, device=args.device), load_json(folder / "pretraining.json")
    structures = open_whole(args.unlabeled, Reading(args.unlabeled_dir, download=False))
    n_valid = min(500, len(structures) // 10)
    model = NDeMTorchMDNet(
        **settings(args, args.pretrain_steps) | {"batch_size": args.pretrain_batch_size}, **PRETRAINING, seed=0
    )
    begin = time.perf_counter()
    train, valid = structures[n_valid:], structures[:n_valid]
    model.pretrain(train, valid, max_steps=args.pretrain_steps, checkpoint_dir=folder / "steps", resume=True)
    record = {
        "data": structures.name, "n_structures": len(train), "steps": args.pretrain_steps,
        "batch_size": args.pretrain_batch_size, "seconds": time.perf_counter() - begin,
        "valid_loss": [[row["step"], row["valid_loss"]] for row in model.history_],
    }  # fmt: skip
    model.save(path)
    save_json(folder / "pretraining.json", record)
    return model, record


def run_one(args: argparse.Namespace, start: Any, n_train: int, name: str, begin: str, seed: int) -> dict[str, Any]:
    """Train and test one model."""
    train, valid, test = load(args.molecule, args.data_dir, n_train, args.n_test)
    objective, options, weight = OBJECTIVES[name]
    keywords = settings(args, args.steps) | {
        "objective": objective,
        "objective_options": options,
        "weight": weight,
        "seed": seed,
    }
    if args.init_from is not None:  # the network is that of the file, also from scratch
        imported = NDeMTorchMDNet.from_checkpoint(args.init_from, partial=args.init_partial)
        keywords["backbone_options"] = imported.backbone_options
    model = NDeMTorchMDNet(**keywords)
    clock = time.perf_counter()
    source = {"init_from": start, "init_partial": args.init_partial} if begin == "pretrained" else {}
    model.fit(train, valid, max_steps=args.steps, **source)
    return {
        "molecule": args.molecule, "n_train": n_train, "n_test": len(test), "steps": args.steps, "objective": name,
        "start": begin, "seed": seed, "seconds": time.perf_counter() - clock, "settings": keywords,
        "init_report": None if model.init_report_ is None else str(model.init_report_).replace(str(args.init_from), "FILE"),
        "test": model.evaluate(test),
        "history": [[row["step"], row["valid_forces_mae"]] for row in model.history_],
    }  # fmt: skip


def table(record: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Mean, spread and paired differences as markdown."""
    made = record["pretraining"]
    how = (
        f"weights of the file {made['init_from']}"
        if "init_from" in made
        else f"pre-trained by denoising (noisy_nodes, sigma 0.04 Å, all atoms) for {made['steps']:,} steps of {made['batch_size']} "
        f"on {made['n_structures']:,} structures of {made['data']} without labels, once: validation loss "
        f"{made['valid_loss'][0][1]:.3f} after {made['valid_loss'][0][0]:,} steps, {min(v for _, v in made['valid_loss']):.3f} at best"
    )
    lines = [
        f"# MD17 {record['molecule']}: from scratch and from pre-trained weights",
        "",
        f"`{record['command']}`; {record['machine']}. TorchMDNet with {record['channels']} channels and {record['layers']} layers, "
        f"batch {record['batch_size']}, preset md17_fast, {record['steps']:,} steps, {record['n_test']:,} test frames. The start is "
        f"{how}. Errors in kcal/mol/Å (forces, per component) and kcal/mol (energy); ± is the standard deviation over seeds; "
        "differences are paired by seed, with their standard error; negative is better.",
    ]
    for n_train in record["n_train"]:
        lines += ["", f"## {n_train} training frames", ""]
        lines += [
            "| objective | start | seeds | force MAE | pre-trained against scratch | against supervised | energy MAE |"
        ]
        lines += ["|" + "---|" * 7]
        for name, start in itertools.product(OBJECTIVES, STARTS):
            found = _errors(runs, n_train, name, start)
            if not found:
                continue
            scratch = _errors(runs, n_train, name, "scratch") if start == "pretrained" else {}
            plain = _errors(runs, n_train, "supervised", start) if name != "supervised" else {}
            energy = _errors(runs, n_train, name, start, "energy_mae_kcal")
            cells = (
                mean_and_spread(list(found.values())),
                paired_difference(found, scratch),
                paired_difference(found, plain),
                mean_and_spread(list(energy.values())),
            )
            lines.append(f"| {name} | {start} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _errors(
    runs: list[dict[str, Any]], n_train: int, name: str, start: str, metric: str = "forces_mae_kcal"
) -> dict[int, float]:
    """Errors by seed."""
    chosen = (n_train, name, start)
    return {r["seed"]: r["test"][metric] for r in runs if (r["n_train"], r["objective"], r["start"]) == chosen}


def main() -> None:
    """Pre-train, run what is missing, write a file after every run and the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", default="ethanol")
    parser.add_argument("--data-dir", default=None, help="folder with the MD17 npz files; default: download them")
    parser.add_argument(
        "--unlabeled", default="qm9:gap", help="structures to pre-train on: what ndem-zoo train --data takes"
    )
    parser.add_argument("--unlabeled-dir", default=None, help="folder with their files, or the file")
    parser.add_argument(
        "--init-from", type=Path, default=None, help="a checkpoint to begin with, instead of pre-training"
    )
    parser.add_argument("--init-partial", action="store_true", help="take what fits from it")
    parser.add_argument("--n-train", type=int, nargs="+", default=[950, 100])
    parser.add_argument("--n-test", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pretrain-steps", type=int, default=20_000)
    parser.add_argument("--pretrain-batch-size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/finetune"), help="for the pre-trained weights")
    parser.add_argument("--out", type=Path, default=None, help="folder for the records")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or RESULTS / f"finetune_{args.molecule}"
    start, made = pretrained(args, args.run_dir)
    record = {
        name: getattr(args, name)
        for name in ("molecule", "n_train", "n_test", "steps", "batch_size", "channels", "layers")
    }
    record |= {
        "pretraining": made,
        "machine": f"{platform.machine()}, torch {torch.__version__}, {args.threads} thread(s)",
    }
    record["command"] = (
        f"python benchmarks/accuracy/bench_finetune.py --molecule {args.molecule} --data-dir DIR --unlabeled {args.unlabeled} "
        f"--unlabeled-dir DIR --n-train {' '.join(map(str, args.n_train))} --seeds {args.seeds} --steps {args.steps} "
        f"--batch-size {args.batch_size} --pretrain-steps {args.pretrain_steps} --channels {args.channels} --layers {args.layers}"
    )
    runs = []
    for seed, n_train, name, begin in itertools.product(range(args.seeds), args.n_train, OBJECTIVES, STARTS):
        path = out / f"{name}_{begin}_{n_train}_seed{seed}.json"
        if path.is_file():
            runs.append(json.loads(path.read_text(encoding="utf-8")))
            if runs[-1]["steps"] != args.steps:
                raise SystemExit(f"{path} was made with --steps {runs[-1]['steps']}: give another --out")
        else:
            runs.append(run_one(args, start, n_train, name, begin, seed))
            save_json(path, runs[-1])
            print(
                f"{path.stem}: {runs[-1]['test']['forces_mae_kcal']:.4f} kcal/mol/Å, {runs[-1]['seconds']:.0f} s",
                flush=True,
            )
        write_text(out.with_suffix(".md"), table(record, runs))
    print(table(record, runs))


if __name__ == "__main__":
    main()
