"""Which part of NDeM helps? Controls, rivals and curvatures on MD17, one cell of the table at a time.

A cell is a named setting of the estimator (`CELLS`: A0 to A13 of the plan in ``docs/theory/curvature.md``, rivals, priors). A
run is a cell, a number of training frames, a seed and a budget: equal steps, or equal wall time, which is the time that
supervised training needs for these steps, by costs of a step that were measured side by side. Frames, weights, order of the
batches and noise of a seed are the same for all cells. Runs are processes of one thread, one JSON each; finished ones are
kept, so that the script can be interrupted and called again, and anyone can repeat a cell:

    python benchmarks/accuracy/ablation.py --data-dir ../shared/data/md17 --cells supervised delta_valence --n-train 100

writes ``results/ablation/<molecule>/*.json``, and ``results/ablation_<molecule>.md`` and ``.png`` from all that are there.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.accuracy.bench_md17_objectives import load  # noqa: E402
from benchmarks.accuracy.paired import ALLOCATOR, mean_and_spread, paired_difference  # noqa: E402
from ndem_zoo import registry  # noqa: E402
from ndem_zoo.objectives.base import NoiseOptions, Objective, mean_of_rows  # noqa: E402

RESULTS = Path(__file__).parent / "results"

#: What all cells share: small, so that a CPU does it, and trained until the training frames are interpolated.
SETTINGS: dict[str, Any] = {
    "preset": "md17_fast",
    "scale": "force_rms",
    "batch_size": 5,
    "lr": 1e-3,
    "warmup_steps": 300,
    "schedule": "cosine",
    "clip_norm": 10.0,
    "ema_decay": 0.999,
    "backbone_options": {"hidden_channels": 32, "num_layers": 2, "num_heads": 4},
    "progress": False,
}

#: Steps between validations, whatever the number of frames: 30 in a run of 6,000 steps.
VALIDATE_EVERY = 200

#: Sigma and mask of every objective with a head of its own, as in ``bench_md17_objectives.py``.
NOISE = {"sigma": 0.05, "ratio": 0.25}

#: Sigma of the main head on displaced structures: all atoms move.
ALL = {"sigma": 0.02, "ratio": 1.0}


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes
    ----------
    about
        What it is, for the table.
    keywords
        Of the estimator, beyond `SETTINGS`.
    more_steps
        Factor on the number of steps.
    """

    about: str
    keywords: dict[str, Any]
    more_steps: float = 1.0


def _objective(name: str, weight: float = 1.0, **options: Any) -> dict[str, Any]:
    return {"objective": name, "weight": weight, "objective_options": options}


def _moved(curvature: str, weight: float = 0.2, **options: Any) -> dict[str, Any]:
    """Displaced structures for the main head."""
    return _objective("ndem_curvature", weight, **{**ALL, "curvature": curvature, **options})


PLAIN = {"objective": "supervised"}

CELLS: dict[str, Cell] = {
    "supervised": Cell("A0: labels alone", PLAIN),
    "supervised_longer": Cell("A0': labels alone, 1.5 times the steps", PLAIN, 1.5),
    "supervised_decay": Cell("A0'': labels, weight decay 0.01", PLAIN | {"weight_decay": 0.01}),
    "same_labels": Cell("A1: noise, unchanged labels, main head", _moved("none")),
    "noisy_nodes_one": Cell("A2: Noisy Nodes, one pass (Zaidi)", _objective("noisy_nodes", 0.1, separate_branch=False, sigma=0.005, ratio=1.0)),
    "noisy_nodes": Cell("A3: Noisy Nodes, second pass (Frad's fine-tuning)", _objective("noisy_nodes", **NOISE)),
    "clean_force": Cell("A4: own head, clean force from the noisy structure", _objective("ndem_curvature", head="independent", curvature="none", **NOISE)),
    "two_heads": Cell("A5: A3 and A4 with two heads", _objective("two_heads", **NOISE)),
    "ndem": Cell("A6: NDeM, gradient stopped", _objective("ndem", grad_main="stop", **NOISE)),
    "ndem_flow": Cell("A7: NDeM, gradient flows", _objective("ndem", grad_main="flow", **NOISE)),
    "ndem_label": Cell("A8: NDeM, label for f(X)", _objective("ndem", grad_main="label", **NOISE)),
    "shuffled": Cell("A9: NDeM with noise that was not applied as target", _objective("shuffled", grad_main="stop", **NOISE)),
    "dens": Cell("A10: DeNS, its MD17 recipe", {**_objective("dens", 5.0, probability=0.25, **NOISE), "weight_schedule": "decay"}),
    "ndem_springs": Cell("A11: NDeM, own head, fitted springs", _objective("ndem_curvature", head="independent", curvature="springs", **NOISE)),
    "delta_mmff94": Cell("A12: difference to MMFF94", PLAIN | {"prior": "mmff94"}),
    "ndem_one_head": Cell("A13: NDeM, main head reused", _objective("ndem", reuse_main_head=True, **NOISE)),
    "frad": Cell("Frad's noise, second pass", _objective("frad")),
    "curvature_springs": Cell("displaced labels by fitted springs, main head", _moved("springs")),
    "curvature_pairs": Cell("displaced labels by the pair potential, main head", _moved("pairs")),
    "curvature_mmff94": Cell("displaced labels by MMFF94, main head", _moved("mmff94")),
    "curvature_valence": Cell("displaced labels by the valence force field, main head", _moved("valence")),
    "curvature_model": Cell("displaced labels by the model's own Hessian, main head", _moved("model")),
    "delta_pairs": Cell("difference to the pair potential", PLAIN | {"prior": "pairs"}),
    "delta_valence": Cell("difference to the valence force field", PLAIN | {"prior": "valence"}),
    "delta_both": Cell("difference to MMFF94 + valence", PLAIN | {"prior": "mmff94+valence"}),
    "delta_mmff94_moved": Cell("difference to MMFF94, displaced labels by valence", _moved("valence") | {"prior": "mmff94"}),
    "curvature_valence_once": Cell(
        "displaced labels by valence, half of the structures, one pass", _moved("valence", 0.5, probability=0.5)
    ),
    "curvature_mmff94_first": Cell(
        "displaced labels by MMFF94's Hessian, half of the structures, one pass",
        _moved("mmff94", 0.5, probability=0.5, first_order=True),
    ),
    "curvature_valence_first": Cell(
        "displaced labels by the valence force field's Hessian, half of the structures, one pass",
        _moved("valence", 0.5, probability=0.5, first_order=True),
    ),
    "delta_valence_once": Cell(
        "difference to valence, half of the structures displaced, one pass",
        _moved("none", 0.5, probability=0.5) | {"prior": "valence"},
    ),
    "delta_mmff94_once": Cell(
        "difference to MMFF94, half of the structures displaced, one pass",
        _moved("none", 0.5, probability=0.5) | {"prior": "mmff94"},
    ),
    "delta_valence_moved": Cell("difference to valence, displaced labels", _moved("none") | {"prior": "valence"}),
}  # fmt: skip


class Shuffled(registry.lookup(registry.OBJECTIVES, "ndem", "objective")):
    """Control A9: the target is noise of the same size, on the same atoms, that nobody applied."""

    def target(self, potential: Any, batch: Any, noise: Any) -> torch.Tensor:
        """What NDeM would have to tell of other displacements."""
        generator = torch.Generator(batch.pos.device).manual_seed(int(1e6 * self.progress))
        normal = torch.randn(noise.epsilon.shape, generator=generator, device=batch.pos.device)
        epsilon = (normal * noise.sigma * noise.mask.unsqueeze(-1)).to(noise.epsilon.dtype)
        return super().target(potential, batch, noise._replace(epsilon=epsilon))


class TwoHeads(Objective):
    """Control A5: one head tells the noise, another the clean force, both from the noisy structure."""

    Options: ClassVar[type] = NoiseOptions
    extra_requirements: ClassVar[frozenset[str]] = frozenset({"forces"})

    def build(self, potential: Any, dataset: Any = None) -> None:
        """Make both heads."""
        self.noise_head, self.force_head = (potential.backbone.vector_head() for _ in range(2))

    def forward(self, potential: Any, batch: Any, rng: torch.Generator) -> dict[str, torch.Tensor]:
        """Supervised terms, ``denoising`` and ``clean_forces``; both sums over x, y, z, as NDeM's."""
        terms, weight = self.supervised.terms(potential(batch), batch, potential.scale), self.current_weight()
        noisy, noise = self.options.displace(batch, rng, potential.backbone.cutoff)
        features = potential.backbone(noisy)
        residuals = {
            "denoising": self.noise_head(features, noisy) - noise.epsilon / noise.sigma,
            "clean_forces": self.force_head(features, noisy) - (batch.targets["forces"] / potential.scale).float(),
        }
        squares = {name: mean_of_rows(r.square().sum(-1, keepdim=True), ~batch.fixed) for name, r in residuals.items()}
        return terms | {name: weight * square for name, square in squares.items()}


def register_controls() -> None:
    """Make the controls known to the estimator of this process."""
    module = "benchmarks.accuracy.ablation"
    registry.OBJECTIVES.update(shuffled=f"{module}:Shuffled", two_heads=f"{module}:TwoHeads")


def model_of(cell: str, seed: int) -> Any:
    """The estimator of a cell."""
    from ndem_zoo import NDeMTorchMDNet

    register_controls()
    keywords = {**SETTINGS, **CELLS[cell].keywords}
    return NDeMTorchMDNet(**keywords, seed=seed, device="cpu")


def run_one(task: dict[str, Any]) -> dict[str, Any]:
    """Train and test one model."""
    torch.set_num_threads(1)
    train, valid, test = load(task["molecule"], task["data_dir"], task["n_train"], task["n_test"])
    model = model_of(task["cell"], task["seed"])
    model.set_params(validate_every=VALIDATE_EVERY)
    begin_wall, begin_cpu = time.perf_counter(), time.process_time()
    model.fit(train, valid, max_steps=task["steps"])
    wall, cpu = time.perf_counter() - begin_wall, time.process_time() - begin_cpu
    history = [{k: row[k] for k in ("step", "train_loss", "valid_forces_mae")} for row in model.history_]
    found = {k: v for k, v in task.items() if k != "data_dir"}
    train_error = model.evaluate(train[:100])["forces_mae_kcal"]
    return found | {
        "keywords": CELLS[task["cell"]].keywords, "wall_s": wall, "cpu_s": cpu, "test": model.evaluate(test),
        "train_forces_mae_kcal": train_error, "history": history,
        "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def measure_costs(
    molecule: str, data_dir: str, cells: list[str], rounds: int = 5, steps: tuple[int, int] = (10, 40)
) -> dict[str, Any]:
    """CPU time of a step of each cell against supervised: interleaved rounds, median of the ratios of a round.

    A step is the difference of a longer and a shorter call over the difference of their steps, so that what a call does once
    (taking a prior off the labels, making batches ready) is no part of it.
    """
    torch.set_num_threads(1)
    train, _, _ = load(molecule, data_dir, 100, 1)
    models = {name: model_of(name, 0).fit(train, max_steps=5) for name in cells}
    times: dict[str, list[float]] = {name: [] for name in cells}
    for _, (name, model) in itertools.product(range(rounds), models.items()):
        took = []
        for count in steps:
            begin = time.process_time()
            model.partial_fit(train, max_steps=count)
            took.append(time.process_time() - begin)
        times[name].append((took[1] - took[0]) / (steps[1] - steps[0]))
    base = times["supervised"]
    return {
        name: {
            "ratio": statistics.median(a / b for a, b in zip(t, base, strict=True)),
            "ms": 1e3 * statistics.median(t),
        }
        for name, t in times.items()
    }


def steps_of(cell: str, budget: str, steps: int, costs: dict[str, Any]) -> int:
    """Steps of a cell within a budget; costs less than 5 % above supervised count as equal, and those below, too."""
    if budget == "steps":
        return round(CELLS[cell].more_steps * steps)
    ratio = costs[cell]["ratio"]
    # Nothing here is cheaper than labels alone: what is below 1 is an error of measurement.
    return steps if ratio < 1.05 else round(steps / ratio)


def path_of(run: dict[str, Any]) -> Path:
    """Where the record of a run is."""
    name = f"{run['cell']}_n{run['n_train']}_s{run['seed']}_{run['budget']}_{run['base_steps']}.json"
    return RESULTS / "ablation" / run["molecule"] / name


def read_runs(molecule: str) -> list[dict[str, Any]]:
    """All finished runs of a molecule."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / "ablation" / molecule).glob("*_n*.json"))]


def table(molecule: str, runs: list[dict[str, Any]]) -> str:
    """Mean, spread and paired difference to supervised, by number of frames and budget."""
    lines = [
        f"# MD17 {molecule}: ablation",
        "",
        f"`python benchmarks/accuracy/ablation.py --molecule {molecule} --data-dir DIR`; TorchMDNet with 32 channels and 2 layers, "
        "batch 5, cosine schedule, weight average 0.999, E:F = 1:30; 1,000 test frames, the same for all. Force MAE per "
        "component in kcal/mol/Å, energy MAE in kcal/mol; ± is the standard deviation over seeds, the difference is paired by "
        "seed, with its standard error. Equal time: the CPU time that supervised training needs for the number of steps "
        "named; `cost` is that of a step against supervised, by which the steps were cut (the fit of a prior and taking it off the labels, seconds once, are in "
        "no cost). `train` is the force MAE on training frames.",
    ]
    groups = sorted({(r["n_train"], r["budget"], r["base_steps"]) for r in runs}, key=lambda g: (g[1], g[0], g[2]))
    for group in groups:
        chosen = [r for r in runs if (r["n_train"], r["budget"], r["base_steps"]) == group]
        lines += ["", f"## {group[0]} training frames, equal {group[1]} ({group[2]:,} supervised steps)", ""]
        lines += [
            "| cell | | seeds | cost | force MAE | difference to supervised | energy MAE | train |",
            "|" + "---|" * 8,
        ]
        base = {r["seed"]: r["test"]["forces_mae_kcal"] for r in chosen if r["cell"] == "supervised"}
        for name, cell in CELLS.items():
            found = [r for r in chosen if r["cell"] == name]
            if not found:
                continue
            force = {r["seed"]: r["test"]["forces_mae_kcal"] for r in found}
            energy = [r["test"]["energy_mae_kcal"] for r in found]
            cost = statistics.mean(r["base_steps"] / r["steps"] for r in found)
            lines.append(
                f"| `{name}` | {cell.about} | {len(found)} | {cost:.2f} | {mean_and_spread(list(force.values()))} | "
                f"{'' if name == 'supervised' else paired_difference(force, base)} | {mean_and_spread(energy, 3)} | "
                f"{statistics.mean(r['train_forces_mae_kcal'] for r in found):.3f} |"
            )
    return "\n".join(lines) + "\n"


def plot(molecule: str, runs: list[dict[str, Any]], path: Path) -> None:
    """Force error against the number of training frames: a line for each cell that has two sizes or more, if there are any.

    Of the budgets of equal time, the one with most runs.
    """
    budgets = [r["base_steps"] for r in runs if r["budget"] == "time"]
    if not budgets:
        return
    usual = statistics.mode(budgets)
    timed = [r for r in runs if r["budget"] == "time" and r["base_steps"] == usual]
    sizes_of = {name: {r["n_train"] for r in timed if r["cell"] == name} for name in CELLS}
    if not any(len(sizes) > 1 for sizes in sizes_of.values()):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for name in CELLS:
        sizes = sorted({r["n_train"] for r in timed if r["cell"] == name})
        if len(sizes) < 2:
            continue
        values = [
            [r["test"]["forces_mae_kcal"] for r in timed if r["cell"] == name and r["n_train"] == n] for n in sizes
        ]
        mean = [statistics.mean(v) for v in values]
        error = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        axes.errorbar(sizes, mean, error, marker="o", capsize=2, label=name)
    axes.set(xscale="log", yscale="log", xlabel="training frames", ylabel="force MAE (kcal/mol/Å)")
    axes.set_title(f"MD17 {molecule}, time of {usual:,} supervised steps")
    axes.legend(fontsize="small", bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, and write the tables after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", default="ethanol")
    parser.add_argument("--data-dir", default=None, help="folder with the MD17 npz files; default: download them")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), metavar="CELL")
    parser.add_argument("--n-train", type=int, nargs="+", default=[100])
    parser.add_argument("--n-test", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6000, help="of supervised training")
    parser.add_argument("--budget", choices=["steps", "time"], nargs="+", default=["time"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=None, help="begin no run after so many seconds")
    parser.add_argument("--table", action="store_true", help="only make the table and the plot anew")
    args = parser.parse_args()
    from ndem_zoo.checkpoint import save_json, write_text

    os.environ |= ALLOCATOR
    context = multiprocessing.get_context("spawn")
    folder = RESULTS / "ablation" / args.molecule
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "costs.json"
    costs = json.loads(known.read_text()) if known.exists() else {}

    def report() -> None:
        runs = read_runs(args.molecule)
        if runs:
            write_text(RESULTS / f"ablation_{args.molecule}.md", table(args.molecule, runs))
            plot(args.molecule, runs, RESULTS / f"ablation_{args.molecule}.png")

    missing = [name for name in args.cells if name not in costs and "time" in args.budget]
    if missing and not args.table:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            names = list(dict.fromkeys(["supervised", *missing]))
            costs |= pool.submit(measure_costs, args.molecule, args.data_dir, names).result()
        save_json(known, costs)
    tasks = []
    for seed, n_train, budget, cell in itertools.product(args.seeds, args.n_train, args.budget, args.cells):
        if args.table or (budget == "time" and CELLS[cell].more_steps != 1):
            continue
        task = {
            "molecule": args.molecule, "data_dir": args.data_dir, "n_test": args.n_test, "cell": cell, "n_train": n_train,
            "seed": seed, "budget": budget, "base_steps": args.steps, "steps": steps_of(cell, budget, args.steps, costs),
        }  # fmt: skip
        if not path_of(task).exists():
            tasks.append(task)
    begin = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running: set[concurrent.futures.Future] = set()
        while tasks or running:
            while tasks and len(running) < args.jobs:
                if args.deadline is not None and time.monotonic() - begin > args.deadline:
                    tasks.clear()
                    break
                running.add(pool.submit(run_one, tasks.pop(0)))
            if not running:
                break
            finished, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                run = future.result()
                save_json(path_of(run), run)
                report()
                error = run["test"]["forces_mae_kcal"]
                print(
                    f"{path_of(run).stem}: {error:.4f} kcal/mol/Å, {run['steps']} steps, {run['cpu_s']:.0f} s",
                    flush=True,
                )
    report()


if __name__ == "__main__":
    main()
