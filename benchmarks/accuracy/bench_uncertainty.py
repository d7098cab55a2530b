"""What the spread of an ensemble is worth as an error bar: MD17, few frames, small networks that differ in their seed.

Members see the same training frames. Errors on test frames are compared with the standard deviations that the ensemble gives,
before and after `Ensemble.calibrate` has found its factors on the validation frames: size (root mean square of error over
deviation), shape (share of errors within intervals that should hold a given share), order (rank correlation of error and
deviation), likelihood. Then frames are distorted, a bond stretched or all atoms moved: does the spread grow, and does the range
of the training data (`TrainingRange`) notice? There are no labels for these.

    python benchmarks/accuracy/bench_uncertainty.py --data-dir ../shared/data/md17

writes ``results/uncertainty.json`` and ``results/uncertainty.md``.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from ase.data import covalent_radii  # noqa: E402

from benchmarks.accuracy.ablation import SETTINGS  # noqa: E402
from ndem_zoo import Ensemble, MolecularDataset, NDeMTorchMDNet, load_md17  # noqa: E402
from ndem_zoo.checkpoint import save_json, write_text  # noqa: E402
from ndem_zoo.uncertainty import calibration  # noqa: E402
from ndem_zoo.validity import training_range  # noqa: E402

RESULTS = Path(__file__).parent / "results"

#: Factors on the length of a bond, and standard deviations in Å of displacements of all atoms.
STRETCHES, SIGMAS = (1.1, 1.2, 1.3, 1.5, 2.0), (0.02, 0.05, 0.1, 0.2)

#: Frames that are distorted.
DISTORTED = 100

UNITS = {"energy": "eV", "forces": "eV/Å"}


def trained(molecule: str, train: MolecularDataset, valid: MolecularDataset, args: argparse.Namespace) -> Ensemble:
    """Members that differ in their seed; those that wait in the folder ``--work`` are not trained again."""
    kept = None if args.work is None else args.work / f"{molecule}-{args.members}-{args.n_train}-{args.steps}"
    if kept is not None and kept.is_dir():
        return Ensemble.load(kept)
    options = SETTINGS | {"objective": "supervised", "device": "cpu", "validate_every": 200}
    members = [
        NDeMTorchMDNet(**options, seed=seed).fit(train, valid, max_steps=args.steps) for seed in range(args.members)
    ]
    ensemble = Ensemble(members)
    if kept is not None:
        ensemble.save(kept)
    return ensemble


def compared(ensemble: Ensemble, data: MolecularDataset) -> dict[str, Any]:
    """Errors against deviations; see `uncertainty.calibration`."""
    found = ensemble.predict(data)
    return {name: calibration(found[name] - data.targets[name], found[f"{name}_std"]) for name in UNITS}


# ------------------------------------------------------------------------------------------------------------- distortions


def bonds_of(data: MolecularDataset) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Elements and bonds of the first frame; hydrogens are the second of their pair."""
    frame = data.structure(0)
    distance = np.linalg.norm(frame.pos[:, None] - frame.pos, axis=-1)
    radius = covalent_radii[frame.z]
    near = np.argwhere(np.triu(distance < 1.25 * (radius[:, None] + radius), k=1))
    return frame.z, [tuple(sorted(map(int, pair), key=lambda atom: frame.z[atom] == 1)) for pair in near]


def terminal_bond(data: MolecularDataset) -> tuple[int, int]:
    """The heavy atom, and the hydrogen, of the bond that is stretched: of O-H if there is one, else the first to a hydrogen."""
    z, bonds = bonds_of(data)
    to_hydrogen = [pair for pair in bonds if z[pair[1]] == 1]
    return next((pair for pair in to_hydrogen if z[pair[0]] == 8), to_hydrogen[0])


def backbone_bond(data: MolecularDataset) -> tuple[tuple[int, int], set[int]]:
    """A bond between heavy atoms that is in no ring, and the atoms of its side that moves away."""
    z, bonds = bonds_of(data)
    for a, b in bonds:
        if 1 in (z[a], z[b]):
            continue
        side, grown = {b}, True
        while grown:
            more = {q for p, q in [*bonds, *((q, p) for p, q in bonds)] if p in side and {p, q} != {a, b}} - side
            side, grown = side | more, bool(more)
        if a not in side:
            return (a, b), side
    raise SystemExit("there is no bond between heavy atoms outside of rings")


def stretched(data: MolecularDataset, bond: tuple[int, int], side: set[int], factor: float) -> MolecularDataset:
    """All atoms of a side moved along the bond, so that it becomes longer by a factor."""
    size = int(data.counts[0])
    pos = np.array(data.pos).reshape(-1, size, 3)
    along = (factor - 1) * (pos[:, bond[1]] - pos[:, bond[0]])
    pos[:, sorted(side)] += along[:, None]
    return data.replace_positions(pos.reshape(-1, 3))


def distortions(data: MolecularDataset) -> dict[str, MolecularDataset]:
    """The frames themselves, with bonds stretched, and with all atoms moved."""
    frames, rng = data[:DISTORTED], np.random.default_rng(0)
    hydrogen, (heavy, side) = terminal_bond(frames), backbone_bond(frames)
    found = {"as they are": frames}
    found |= {f"bond to a hydrogen × {f}": stretched(frames, hydrogen, {hydrogen[1]}, f) for f in STRETCHES}
    found |= {f"bond of heavy atoms × {f}": stretched(frames, heavy, side, f) for f in STRETCHES}
    moved = {s: frames.pos + s * rng.standard_normal(frames.pos.shape) for s in SIGMAS}
    return found | {f"all atoms moved by {s} Å": frames.replace_positions(pos) for s, pos in moved.items()}


def judged(ensemble: Ensemble, data: MolecularDataset) -> dict[str, dict[str, Any]]:
    """Of each distortion: share of frames outside of the training data, by what, and the median deviations."""
    known, found = training_range(ensemble), {}
    for name, frames in distortions(data).items():
        outside, predicted = known.outside(frames), ensemble.predict(frames)
        kinds = sorted({kind for some in outside for kind in some})
        found[name] = {
            "outside": float(np.mean([bool(some) for some in outside])),
            "kinds": {kind: float(np.mean([kind in some for some in outside])) for kind in kinds},
            "energy_std_eV": float(np.median(predicted["energy_std"])),
            "largest_forces_std_eV_per_A": float(
                np.median(predicted["forces_std"].reshape(len(frames), -1).max(axis=1))
            ),
        }
    return found


# ------------------------------------------------------------------------------------------------------------------ report


def table(record: dict[str, Any]) -> str:
    """Tables of all molecules."""
    lines = [
        "# Ensemble uncertainty",
        "",
        f"{record['members']} networks of 32 channels and 2 layers, {record['steps']:,} steps, {record['n_train']} training and "
        f"{record['n_valid']} validation frames of MD17 (PBE+vdW-TS); labels alone. {record['machine']}.",
        "The factors are found on the validation frames, everything else is of test frames. A perfect error bar has a root mean",
        "square of error over deviation (*rms z*) of 1, and as many errors within an interval as it should hold.",
    ]
    for molecule, found in record["molecules"].items():
        lines += [
            "",
            f"## {molecule} ({found['n_test']:,} test frames, {found['seconds_training']:.0f} s of training)",
            "",
        ]
        lines += [
            "| | factor | RMSE | rms deviation | rms z | within 50 % | 90 % | 95 % | area | NLL | Spearman |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, unit in UNITS.items():
            for when in ("before", "after"):
                c, factor = found[when][name], found["factors"][name] if when == "after" else 1.0
                inside = " | ".join(f"{100 * c['reliability'][share]:.0f} %" for share in ("0.50", "0.90", "0.95"))
                lines.append(
                    f"| {name}, {when} ({unit}) | {factor:.2f} | {c['rmse']:.4f} | {c['rms_std']:.4f} | {c['rms_z']:.2f} | {inside} | "
                    f"{c['miscalibration_area']:.3f} | {c['nll']:.2f} | {c['spearman']:.2f} |"
                )
        lines += [
            "",
            f"Outside of the range of the training data are {100 * found['test_outside']:.1f} % of all test frames "
            f"({', '.join(f'{k} {100 * v:.1f} %' for k, v in found['test_kinds'].items()) or 'none'}).",
            "",
            f"| {DISTORTED} test frames | outside | by | energy deviation, eV | largest force deviation, eV/Å |",
            "|---|---:|---|---:|---:|",
        ]
        for name, d in found["distorted"].items():
            kinds = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in d["kinds"].items())
            lines.append(
                f"| {name} | {100 * d['outside']:.0f} % | {kinds or '–'} | {d['energy_std_eV']:.3f} | {d['largest_forces_std_eV_per_A']:.3f} |"
            )
    lines += [
        "",
        "Area: between the reliability curve and the diagonal (0 to 0.5). NLL: negative log likelihood of a normal distribution, in",
        "nats, of numbers in eV and eV/Å. Deviations of distorted frames are medians over frames, calibrated; `by` says what is",
        "outside: `short` (a distance shorter than any of its pair of elements), `unseen` (one that its pair never had within 3.5 Å),",
        "`apart` (an atom farther from its nearest neighbors than any of its element), `size` (longer than any molecule). Made by:",
        "",
        f"    {record['command']}",
        "",
    ]
    return "\n".join(lines)


def run(molecule: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train, compare, calibrate, compare again, distort."""
    sizes = {"n_train": args.n_train, "n_valid": args.n_valid, "n_test": args.n_test}
    _, (train, valid, test), _ = load_md17(molecule, data_dir=args.data_dir, **sizes)
    ensemble = trained(molecule, train, valid, args)
    before = compared(ensemble, test)
    after = compared(ensemble.calibrate(valid), test)
    outside = training_range(ensemble).outside(test)
    kinds = sorted({kind for some in outside for kind in some})
    return {
        "n_test": len(test),
        "before": before,
        "after": after,
        "factors": ensemble.calibration_["factors"],
        "test_outside": float(np.mean([bool(some) for some in outside])),
        "test_kinds": {kind: float(np.mean([kind in some for some in outside])) for kind in kinds},
        "distorted": judged(ensemble, test),
        "seconds_training": sum(member.history_[-1]["seconds"] for member in ensemble.members_),
    }


def main() -> None:
    """Run all molecules, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=None, help="folder with the MD17 npz files")
    parser.add_argument("--molecules", nargs="+", default=["ethanol", "aspirin"])
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--n-train", type=int, default=100)
    parser.add_argument("--n-valid", type=int, default=50)
    parser.add_argument("--n-test", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--work", type=Path, default=None, help="folder for trained ensembles, to use them again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {name: getattr(args, name) for name in ("members", "n_train", "n_valid", "steps")}
    record["machine"] = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    record["command"] = (
        f"python benchmarks/accuracy/bench_uncertainty.py --data-dir DIR --molecules {' '.join(args.molecules)} --members {args.members} "
        f"--n-train {args.n_train} --n-valid {args.n_valid} --n-test {args.n_test} --steps {args.steps}"
    )
    record["molecules"] = {}
    for molecule in args.molecules:
        record["molecules"][molecule] = run(molecule, args)
        save_json(args.out / "uncertainty.json", record)
        write_text(args.out / "uncertainty.md", table(record))
    print(table(record))


if __name__ == "__main__":
    main()
