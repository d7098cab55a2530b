"""QM9 at a fixed budget of time: a small ET, with and without NDeM, beside SchNetPack's PaiNN in its own recipe.

Everybody gets the same molecules, the same split, one thread and the same wall time, validation included, and is judged
with the weights that were best on the validation molecules. PaiNN is trained as SchNetPack's `experiment=qm9_atomwise`
says: 128 features, 3 interactions, 20 Gaussians, AdamW with 5e-4, batches of 100, squared errors, energies without
atom references and mean (its plateau schedule with a patience of 75 epochs never acts within such a budget); its input
is made from our batches, without a neighbor list of its own. Ours is the preset ``qm9_fast``.

    python benchmarks/accuracy/bench_qm9.py --data-dir ../shared/data/qm9 --minutes 4 --seeds 2

Needs schnetpack (the full stack has it). The figures were made with MALLOC_MMAP_THRESHOLD_=4294967296 and
MALLOC_TRIM_THRESHOLD_=8589934592 in the environment, for everybody. Finished runs are kept, so that the script can be interrupted and called again;
writes ``results/qm9.json`` and the table made from it beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ndem_zoo import MolecularDataset, NDeMTorchMDNet, load_qm9
from ndem_zoo.checkpoint import save_json, write_text
from ndem_zoo.properties import property_of
from ndem_zoo.sampling import Collator, Order
from ndem_zoo.schnetpack import to_schnetpack

RESULTS = Path(__file__).parent / "results"
SIZES = {"n_train": 16_000, "n_valid": 1_000, "n_test": 3_000}
CUTOFF = 5.0


def ours(objective: str) -> Callable:
    """A function that trains our model and says what it predicts."""

    def train(
        parts: list[MolecularDataset], target: str, seconds: float, seed: int
    ) -> tuple[np.ndarray, dict[str, Any]]:
        model = NDeMTorchMDNet(preset="qm9_fast", target=target, objective=objective, seed=seed, progress=False)
        model.fit(parts[0], parts[1], max_time=seconds)
        record = {"steps": int(model.history_[-1]["step"]), "parameters": model.potential_.n_parameters}
        return model.predict(parts[2])[target], record

    return train


def painn(target: str) -> torch.nn.Module:
    """SchNetPack's PaiNN for one property."""
    import schnetpack as spk
    from schnetpack.nn import CosineCutoff, GaussianRBF

    representation = spk.representation.PaiNN(
        n_atom_basis=128, n_interactions=3, radial_basis=GaussianRBF(20, CUTOFF), cutoff_fn=CosineCutoff(CUTOFF)
    )
    # Total energies are sums over atoms, gaps are not.
    mode = "sum" if property_of(target).has_references else "avg"
    return spk.model.NeuralNetworkPotential(
        representation=representation,
        input_modules=[spk.atomistic.PairwiseDistances()],
        output_modules=[spk.atomistic.Atomwise(n_in=128, output_key=target, aggregation_mode=mode)],
    )


def offsets_of(parts: list[MolecularDataset], target: str) -> list[np.ndarray]:
    """What SchNetPack's RemoveOffsets takes away: atom references and the mean per atom, or the mean."""
    if not property_of(target).has_references:
        mean = parts[0].targets[target].mean()
        return [np.full(len(part), mean) for part in parts]
    table = np.zeros(101)
    from ase.data import atomic_numbers

    for symbol, value in parts[0].card.atom_references[target].items():
        table[atomic_numbers[symbol]] = value
    sums = [np.add.reduceat(table[part.z], part.ptr[:-1]) for part in parts]
    per_atom = ((parts[0].targets[target] - sums[0]) / parts[0].counts).mean()
    return [total + per_atom * part.counts for total, part in zip(sums, parts, strict=True)]


def train_painn(
    parts: list[MolecularDataset], target: str, seconds: float, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Train PaiNN as its recipe says until the time is over."""
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = painn(target)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    offsets = offsets_of(parts, target)
    collate = Collator(parts[0], CUTOFF)
    order = Order(parts[0].counts, 100, seed)
    steps, best, state = 0, float("inf"), model.state_dict()
    labels = torch.from_numpy(parts[0].targets[target] - offsets[0]).float()
    for indices in order.after(0):
        model.train()
        loss = (
            (model(to_schnetpack(collate(indices), CUTOFF))[target] - labels[torch.from_numpy(indices)]).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        is_over = time.perf_counter() - begin >= seconds
        if is_over or steps % (len(parts[0]) // 100) == 0:
            error = np.abs(predict_painn(model, parts[1], target) + offsets[1] - parts[1].targets[target]).mean()
            if error < best:
                best, state = error, {name: value.clone() for name, value in model.state_dict().items()}
        if is_over:
            break
    model.load_state_dict(state)
    record = {"steps": steps, "parameters": sum(p.numel() for p in model.parameters())}
    return predict_painn(model, parts[2], target) + offsets[2], record


def predict_painn(model: torch.nn.Module, part: MolecularDataset, target: str) -> np.ndarray:
    """Predictions of PaiNN, without the offsets."""
    model.eval()
    collate = Collator(part, CUTOFF, with_targets=False)
    with torch.no_grad():
        found = [
            model(to_schnetpack(collate(rows), CUTOFF))[target] for rows in np.array_split(np.arange(len(part)), 30)
        ]
    return torch.cat(found).double().numpy()


CONTESTANTS: dict[str, Callable] = {
    "ET, supervised": ours("supervised"),
    "ET, NDeM (here: denoising)": ours("ndem"),
    "PaiNN (SchNetPack)": train_painn,
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table(record: dict[str, Any]) -> str:
    """Mean and spread over seeds as markdown."""
    lines = [
        "# QM9, 16,000 molecules: test error after equal time",
        "",
        f"`{record['command']}`; {record['machine']}. 16,000 / 1,000 / 3,000 molecules for training, validation and testing; "
        f"{record['minutes']:g} minutes of training each, validation included. Mean absolute errors in meV; ± is the standard "
        "deviation over seeds (weights and order; the split is one). The ratio is to PaiNN. These are minutes on a CPU: "
        "published errors take days.",
        "",
        "| target | model | parameters | steps | seeds | test MAE (meV) | ratio |",
        "|" + "---|" * 7,
    ]
    for target in dict.fromkeys(run["target"] for run in record["runs"]):
        found = {
            name: [r for r in record["runs"] if (r["target"], r["model"]) == (target, name)] for name in CONTESTANTS
        }
        rival = [run["mae_meV"] for run in found["PaiNN (SchNetPack)"]]
        for name, runs in found.items():
            if not runs:
                continue
            errors = [run["mae_meV"] for run in runs]
            spread = f" ± {statistics.stdev(errors):.1f}" if len(errors) > 1 else ""
            ratio = f"{statistics.mean(errors) / statistics.mean(rival):.2f}" if rival else ""
            steps = round(statistics.mean(run["steps"] for run in runs))
            lines.append(
                f"| {target} | {name} | {runs[0]['parameters']:,} | {steps:,} | {len(runs)} | "
                f"{statistics.mean(errors):.1f}{spread} | {ratio} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the record after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the QM9 file")
    parser.add_argument("--targets", nargs="+", default=["U0", "gap"])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "qm9.json")
    args = parser.parse_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    if not record:
        record = {
            "command": f"python benchmarks/accuracy/bench_qm9.py --data-dir DIR --minutes {args.minutes:g} "
            f"--seeds {args.seeds}",
            "machine": f"{platform.machine()}, torch {torch.__version__}, one thread",
            "minutes": args.minutes,
            "runs": [],
        }
    done = {(run["target"], run["model"], run["seed"]) for run in record["runs"]}
    for seed, target, name in itertools.product(range(args.seeds), args.targets, CONTESTANTS):
        if (target, name, seed) in done:
            continue
        _, parts, _ = load_qm9(target, data_dir=args.data_dir, download=False, seed=1, **SIZES)
        begin = time.perf_counter()
        with one_thread():
            predicted, details = CONTESTANTS[name](list(parts), target, 60 * args.minutes, seed)
        error = 1e3 * float(np.abs(predicted - parts[2].targets[target]).mean())
        run = {"target": target, "model": name, "seed": seed, "mae_meV": error, "seconds": time.perf_counter() - begin}
        record["runs"].append(run | details)
        save_json(args.out, record)
        print(run | details, flush=True)
    write_text(args.out.with_suffix(".md"), table(record))
    print(table(record))


if __name__ == "__main__":
    main()
