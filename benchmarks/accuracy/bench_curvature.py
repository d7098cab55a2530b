"""What share of true force changes does each curvature explain? Genuine DFT frames, GFN2-xTB under noise, OC20 slabs.

Fitted ones see 100 training frames of MD17 only. The share is 1 - sum |dF - predicted|² / sum |dF|² over all free atoms.

    python benchmarks/accuracy/bench_curvature.py --data-dir ../shared/data

writes ``results/curvature.json`` and the table made from it (``.md``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.bench_md17_objectives import load  # noqa: E402
from ndem_zoo import curvature as c  # noqa: E402
from ndem_zoo.checkpoint import save_json, write_text  # noqa: E402
from ndem_zoo.datasets.base import MolecularDataset  # noqa: E402
from ndem_zoo.forcefields import make_force_field  # noqa: E402
from ndem_zoo.physics import BOLTZMANN, KCAL_PER_MOL  # noqa: E402

RESULTS = Path(__file__).parent / "results"
TEMPERATURE = 500.0
MOLECULES = ("ethanol", "malonaldehyde", "uracil", "aspirin")
SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2)
LAGS = (1, 4, 10, 20, 60)


def curvatures(train: MolecularDataset) -> dict[str, c.Curvature]:
    """All that training frames give, and the rules that need none."""
    forces = train.targets["forces"]
    mean = float(np.square(forces).mean() / (BOLTZMANN * TEMPERATURE))
    fields = ("pairs", "mmff94", "valence", "mmff94+valence")
    return {
        "isotropic": c.isotropic(mean),
        "element": c.boltzmann(train.z, forces, TEMPERATURE),
        "lindh": c.Springs(),
        "springs": c.fitted_springs(train, TEMPERATURE),
        **{name: c.ForceFieldDifference(make_force_field(name).fit(train)) for name in fields},
    }


def frames(file: Path, rows: np.ndarray) -> MolecularDataset:
    """Frames of a file in MD17's layout."""
    with np.load(file) as raw:
        z, pos, forces = raw["z"], raw["R"][rows], raw["F"][rows] * KCAL_PER_MOL
    dataset = MolecularDataset(np.tile(z, len(rows)), pos.reshape(-1, 3), len(z) * np.arange(len(rows) + 1))
    return dataset.replace_targets({"energy": np.zeros(len(rows)), "forces": forces.reshape(-1, 3)})


def trajectory(data: Path, models: dict[str, c.Curvature]) -> dict[str, dict[str, float]]:
    """DFT forces of ethanol between frames of a trajectory, 0.5 fs a frame."""
    rows = np.arange(0, 1900, 19)
    file = data / "md17_trajectory" / "ethanol_first2000.npz"
    before, found = frames(file, rows), {}
    for lag in LAGS:
        after = frames(file, rows + lag)
        moved = float(np.sqrt(np.square(after.pos - before.pos).mean()))
        found[f"{lag} ({moved:.3f} Å)"] = {n: c.explained_between(m, before, after) for n, m in models.items()}
    return found


def slabs(data: Path) -> dict[str, Any]:
    """DFT forces of OC20's relaxations, between frames of one system that are near each other."""
    from ndem_zoo import load_oc20

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, (frames_, _, _), _ = load_oc20("s2ef", "all", data / "oc20" / "s2ef_train")
    sid, pairs = frames_.extras["sid"], []
    for system in np.unique(sid):
        rows = np.flatnonzero(sid == system)
        for i, j in itertools.pairwise(rows):
            one, two = (slice(frames_.ptr[k], frames_.ptr[k + 1]) for k in (i, j))
            step = frames_.pos[two] - frames_.pos[one]
            moved = np.sqrt(np.square(step[~frames_.fixed[one]]).mean())
            if 1e-3 < moved < 0.1 and np.abs(step).max() < 1.0:
                pairs.append((i, j))
    before, after = (frames_.select([pair[k] for pair in pairs]) for k in (0, 1))
    found = {"pairs of frames": len(pairs), "systems": len({int(sid[i]) for i, _ in pairs})}
    others = np.setdiff1d(np.arange(len(frames_)), np.unique(pairs))  # frames that moved much, or not at all
    others = others[:: max(1, len(others) // 400)]
    field = make_force_field("pairs").fit(frames_.select(others))
    models = {"isotropic, scaled": c.isotropic(1.0), "lindh": c.Springs(), "lindh, scaled": c.Springs()}
    shares = {"pairs, fitted to others": c.explained_between(c.ForceFieldDifference(field), before, after)}
    for name, model in models.items():
        factor = best_factor(model, before, after) if "scaled" in name else 1.0
        shares[name] = c.explained_between(Scaled(model, factor), before, after)
    return found | {"frames of the fit": len(others), "share": shares}


class Scaled(c.Curvature):
    """A curvature times a number."""

    def __init__(self, model: c.Curvature, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def force_change(self, batch: Any, epsilon: torch.Tensor, moved: Any = None) -> torch.Tensor:
        """The change times the number."""
        return self.factor * self.model.force_change(batch, epsilon, moved)


def best_factor(model: c.Curvature, before: MolecularDataset, after: MolecularDataset) -> float:
    """The number that lets a curvature explain most, from its shares at three numbers: they are a parabola."""
    shares = [c.explained_between(Scaled(model, factor), before, after) for factor in (0.0, 0.5, 1.0)]
    curve = np.polyfit([0.0, 0.5, 1.0], shares, 2)
    return float(-curve[1] / (2 * curve[0]))


def table(record: dict[str, Any]) -> str:
    """The record as markdown."""

    def block(rows: dict[str, dict[str, float]], head: str) -> list[str]:
        names = list(next(iter(rows.values())))
        lines = [f"| {head} | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
        return lines + [f"| {key} | " + " | ".join(f"{row[n]:.3f}" for n in names) + " |" for key, row in rows.items()]

    lines = [
        "# Share of true force changes that a curvature explains",
        "",
        "`python benchmarks/accuracy/bench_curvature.py --data-dir DIR`. Fitted to 100 training frames of MD17 (`isotropic`, `element`, "
        "`springs`: covariance of their forces at 500 K; `pairs`, `valence`: least squares); `lindh` and `mmff94` see no labels. 1 is all, "
        "0 is what \"no change\" gets.",
        "",
        "## Genuine DFT forces: MD17 ethanol, so many frames of 0.5 fs apart (rms displacement)",
        "",
        *block(record["trajectory"], "frames apart"),
    ]  # fmt: skip
    for molecule, rows in record["noise"].items():
        lines += [
            "",
            f"## GFN2-xTB under Gaussian noise on all atoms: {molecule}, 40 frames",
            "",
            *block(rows, "sigma (Å)"),
        ]
    found = record["slabs"]
    lines += [
        "",
        f"## Genuine DFT forces: OC20 relaxations, {found['pairs of frames']} pairs of frames of {found['systems']} systems",
        "",
        "Neighboring frames of a relaxation, less than 0.1 Å (rms) apart; free atoms. `scaled`: by the one number that explains most of these. "
        f"`pairs` was fitted to {found['frames of the fit']} other frames of the same systems.",
        "",
        *block({"share": found["share"]}, ""),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compute everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with md17, md17_trajectory and oc20")
    parser.add_argument("--molecules", nargs="+", default=list(MOLECULES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"noise": {}}
    for molecule in args.molecules:
        train, _, test = load(molecule, str(args.data_dir / "md17"), 100, 40)
        models = curvatures(train)
        if molecule == "ethanol":
            record["trajectory"] = trajectory(args.data_dir, models)
        truth = make_force_field("gfn2-xtb").fit(test)
        shares = {name: c.explained(model, test, truth, SIGMAS) for name, model in models.items()}
        record["noise"][molecule] = {f"{s:g}": {name: share[s] for name, share in shares.items()} for s in SIGMAS}
        print(json.dumps(record["noise"][molecule]), flush=True)
    record["slabs"] = slabs(args.data_dir)
    save_json(RESULTS / "curvature.json", record)
    write_text(RESULTS / "curvature.md", table(record))
    print(table(record))


if __name__ == "__main__":
    main()
