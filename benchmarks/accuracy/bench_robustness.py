"""What a force field is good for beyond its test error: displaced structures, dynamics, vibrations. GFN2-xTB as reference.

Trains cells of the ablation on the embedded frames, whose labels are GFN2-xTB's, so that the reference can be asked anywhere.
Then: errors on test frames and on displaced ones, energy drift (NVE), how long Langevin dynamics keeps the molecule whole and
how wrong the forces are where it leads, and vibrational frequencies at the reference's minimum. All copies of the molecule run
as one batch. Every model leaves a JSON file, saved after each part; parts that are there with the same options are not made
again, and trained models wait in the folder ``--work``:

    python benchmarks/accuracy/bench_robustness.py --work runs/robustness --md-ps 100

writes ``results/robustness_<molecule>/*.json`` and ``results/robustness_<molecule>.md``; ``reading.md`` of that folder, if there
is one, goes into the head of the table.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from ase import Atoms, units  # noqa: E402
from ase.calculators.calculator import Calculator, all_changes  # noqa: E402
from ase.md.velocitydistribution import Stationary, ZeroRotation  # noqa: E402
from ase.optimize import BFGS  # noqa: E402

from benchmarks.accuracy.ablation import CELLS, SETTINGS, model_of  # noqa: E402
from ndem_zoo import NDeMModel, load_sample  # noqa: E402
from ndem_zoo.checkpoint import save_json, write_text  # noqa: E402
from ndem_zoo.dynamics import EnergyRecord  # noqa: E402
from ndem_zoo.errors import DataError, UnitsWarning  # noqa: E402
from ndem_zoo.forcefields import make_force_field  # noqa: E402
from ndem_zoo.graph import make_batch  # noqa: E402
from ndem_zoo.physics import KCAL_PER_MOL  # noqa: E402
from ndem_zoo.topology import perceive  # noqa: E402

RESULTS = Path(__file__).parent / "results"

#: Labels alone, the paper's method, and the three best of the ablation with 100 frames.
MODELS = ("supervised", "ndem", "delta_valence", "delta_valence_once", "delta_mmff94")

#: Standard deviations in Å of the displacements of all atoms.
SIGMAS = (0.02, 0.05, 0.1, 0.2)

#: fs.
TIMESTEP = 0.5

#: A molecule counts as broken when a bond is longer or shorter by so many Å than at the minimum (a criterion as in X. Fu et al.,
#: arXiv:2210.07237). Choice: 0.5; in the 10 ps of the sample's ethanol, which GFN2-xTB made, the largest difference is 0.17.
BROKEN = 0.5

#: Steps between the structures of the dynamics on which forces are compared with the reference's (0.5 ps).
VISITED_EVERY = 1000

#: Energies (S,) in eV and forces (S, n, 3) in eV/Å of copies (S, n, 3) of one molecule.
Surface = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


# -------------------------------------------------------------------------------------------------------------- surfaces


def surface_of(model: NDeMModel, z: np.ndarray, dtype: torch.dtype = torch.float64) -> Surface:
    """A trained model for copies of the molecule `z`; edges are all pairs of atoms, made once for each number of copies."""
    potential = copy.deepcopy(model.potential_).requires_grad_(False).to("cpu", dtype).eval()
    potential.backbone.use_plan("auto", torch.device("cpu"))
    batches: dict[int, Any] = {}

    def surface(pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        copies = len(pos)
        if copies not in batches:
            counts = np.full(copies, len(z))
            batch = make_batch(np.tile(z, copies), pos.reshape(-1, 3), counts, potential.backbone.cutoff, dtype=dtype)
            if np.isfinite(batch.cutoff):
                raise DataError(f"{len(z)} atoms are too many: edges would have to follow the motion")
            batches[copies] = batch
        batch = batches[copies].replace(pos=torch.as_tensor(pos.reshape(-1, 3)).to(dtype))
        found = potential(batch)
        return found.energy.double().numpy(), found.forces.double().numpy().reshape(pos.shape)

    return surface


def reference_surface(z: np.ndarray) -> Surface:
    """The same for GFN2-xTB, which runs in a process of its own."""
    force_field = make_force_field("gfn2-xtb")

    def surface(pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = np.full(len(pos), len(z))
        found = force_field(make_batch(np.tile(z, len(pos)), pos.reshape(-1, 3), counts, 0.0, dtype=torch.float64))
        return found.energy.numpy(), found.forces.numpy().reshape(pos.shape)

    return surface


class SurfaceCalculator(Calculator):
    """A surface for ASE."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def __init__(self, surface: Surface) -> None:
        super().__init__()
        self.surface = surface

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """Energy and forces of one molecule."""
        super().calculate(atoms, properties, system_changes)
        energy, forces = self.surface(self.atoms.positions[None])
        self.results = {"energy": float(energy[0]), "forces": forces[0]}


# ------------------------------------------------------------------------------------------------------------- vibrations


def relaxed(surface: Surface, atoms: Atoms) -> Atoms:
    """The minimum next to `atoms`, to 0.0005 eV/Å."""
    atoms = atoms.copy()
    atoms.calc = SurfaceCalculator(surface)
    if not BFGS(atoms, logfile=None).run(fmax=5e-4, steps=1000):
        raise DataError("the reference's minimum was not reached in 1000 steps")
    return atoms


def frequencies(surface: Surface, atoms: Atoms, step: float = 0.01) -> np.ndarray:
    """Harmonic wave numbers (3n - 6,) in 1/cm, ascending, imaginary ones negative; central differences of forces.

    Overall translation and rotation are projected out, also where the forces are not zero.
    """
    n, masses = len(atoms), np.repeat(atoms.get_masses(), 3)
    moves = step * np.eye(3 * n).reshape(-1, n, 3)
    ahead, behind = (surface(atoms.positions + sign * moves)[1].reshape(3 * n, 3 * n) for sign in (1, -1))
    hessian = (behind - ahead) / (2 * step)  # eV/Å²
    weighted = 0.5 * (hessian + hessian.T) / np.sqrt(np.outer(masses, masses))
    inner = _internal_space(atoms)
    squares = np.linalg.eigvalsh(inner.T @ weighted @ inner)  # eV/(Å² u)
    quantum = 1e10 * units._hbar / np.sqrt(units._e * units._amu)  # eV for each square root of that
    return np.sign(squares) * np.sqrt(np.abs(squares)) * quantum / units.invcm


def _internal_space(atoms: Atoms) -> np.ndarray:
    """Orthonormal mass-weighted directions (3n, 3n - 6; 3n - 5 for a line) without translation and rotation."""
    weights, centered = np.sqrt(atoms.get_masses())[:, None], atoms.positions - atoms.get_center_of_mass()
    axes = np.eye(3)
    overall = [weights * axis for axis in axes] + [weights * np.cross(axis, centered) for axis in axes]
    left, sizes, _ = np.linalg.svd(np.array(overall).reshape(6, -1).T, full_matrices=True)
    return left[:, int((sizes > 1e-6 * sizes[0]).sum()) :]


# --------------------------------------------------------------------------------------------------------------- dynamics


class Copies:
    """Copies of a molecule that move side by side: the splitting BAOAB, which is velocity Verlet where `friction` is 0.

    Parameters
    ----------
    surface
        What they move on.
    atoms
        Elements and masses.
    pos : (S, n, 3)
        Starts in Å.
    temperature
        K, of the first velocities, without overall motion and rotation, and of the thermostat.
    friction
        1/fs.
    seed
        Of the first velocities and the noise; copy k has the seeds (seed, k), whatever happens to others.

    Attributes
    ----------
    number : (A,)
        Which copies are left.
    pos, velocity, forces : (A, n, 3)
        Of these, in ASE's units.
    energy : (A,)
        Potential energy in eV.
    """

    def __init__(
        self, surface: Surface, atoms: Atoms, pos: np.ndarray, temperature: float, friction: float, seed: int
    ) -> None:
        self.surface, self.number = surface, np.arange(len(pos))
        self.rngs = [np.random.default_rng((seed, k)) for k in range(len(pos))]
        self.masses = atoms.get_masses()[:, None]
        self.pos = np.array(pos, dtype=np.float64)
        self.velocity = np.stack([_velocities(atoms, x, temperature, r) for x, r in zip(pos, self.rngs, strict=True)])
        self.energy, self.forces = surface(self.pos)
        self.step_length = TIMESTEP * units.fs
        self.keeps = np.exp(-friction * TIMESTEP)
        self.width = np.sqrt((1 - self.keeps**2) * units.kB * temperature / self.masses)

    def step(self) -> None:
        """Move on by one step."""
        half = 0.5 * self.step_length
        self.velocity += half * self.forces / self.masses
        self.pos += half * self.velocity
        if self.keeps < 1:
            noise = np.stack([self.rngs[k].standard_normal(self.pos.shape[1:]) for k in self.number])
            self.velocity = self.keeps * self.velocity + self.width * noise
        self.pos += half * self.velocity
        self.energy, self.forces = self.surface(self.pos)
        self.velocity += half * self.forces / self.masses

    def keep(self, which: np.ndarray) -> None:
        """Go on with some of the copies (A,) bool."""
        for name in ("number", "pos", "velocity", "forces", "energy"):
            setattr(self, name, getattr(self, name)[which])

    @property
    def kinetic(self) -> np.ndarray:
        """Kinetic energy (A,) in eV."""
        return 0.5 * (self.masses * self.velocity**2).sum((1, 2))


def _velocities(atoms: Atoms, pos: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    atoms = Atoms(atoms.numbers, pos)
    # Eq.: Maxwell and Boltzmann's distribution, <p²> = m k T for each component
    widths = np.sqrt(atoms.get_masses() * units.kB * temperature)[:, None]
    atoms.set_momenta(widths * rng.standard_normal(pos.shape))
    # Pitfall: by default ASE scales the velocities up again, and the internal motion becomes too hot.
    Stationary(atoms, preserve_temperature=False)
    ZeroRotation(atoms, preserve_temperature=False)
    return atoms.get_velocities()


def energy_records(copies: Copies, steps: int) -> list[EnergyRecord]:
    """Run without thermostat, and return what became of the energy of each copy."""
    potential, kinetic = [copies.energy], [copies.kinetic]
    for _ in range(steps):
        copies.step()
        potential.append(copies.energy)
        kinetic.append(copies.kinetic)
    times, n = 1e-3 * TIMESTEP * np.arange(steps + 1), copies.pos.shape[1]
    columns = zip(np.stack(potential, 1), np.stack(kinetic, 1), strict=True)
    return [EnergyRecord(times, v, k, n, 3 * n - 6, "nve") for v, k in columns]


def survive(copies: Copies, bonds: np.ndarray, lengths: np.ndarray, steps: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Run until a bond of the table (B, 2) differs from its length (B,) by more than `BROKEN`.

    Returns
    -------
    reached : (S,)
        Steps that each copy was whole.
    visited
        Structures (A, n, 3) of whole copies, each `VISITED_EVERY` steps.
    """
    reached, visited = np.full(len(copies.number), steps), []
    for step in range(1, steps + 1):
        copies.step()
        now = np.linalg.norm(copies.pos[:, bonds[:, 0]] - copies.pos[:, bonds[:, 1]], axis=-1)
        # Written so that a length that is not a number counts as broken.
        whole = (np.abs(now - lengths) <= BROKEN).all(1)
        if not whole.all():
            reached[copies.number[~whole]] = step - 1
            copies.keep(whole)
            if not len(copies.number):
                break
        if step % VISITED_EVERY == 0:
            visited.append(copies.pos.copy())
    return reached, visited


# ------------------------------------------------------------------------------------------------------- parts of a record


@dataclass(frozen=True)
class Reference:
    """What GFN2-xTB says, made once for all models.

    Attributes
    ----------
    surface
        GFN2-xTB itself.
    minimum
        Relaxed from the training frame of lowest energy.
    bonds, lengths : (B, 2), (B,)
        Bonds, and their lengths at the minimum in Å.
    wave_numbers : (3n - 6,)
        1/cm.
    """

    surface: Surface
    minimum: Atoms
    bonds: np.ndarray
    lengths: np.ndarray
    wave_numbers: np.ndarray


def make_reference(train: Any, test: Any) -> Reference:
    """Relax, and find bonds and vibrations; raises DataError if the labels are not those of this reference."""
    surface = reference_surface(train.atoms(0).numbers)
    quiet = train.atoms(int(np.argmin(train.targets["energy"])))
    _, forces = surface(test.pos[: test.ptr[5]].reshape(5, -1, 3))
    wrong = float(np.abs(forces.reshape(-1, 3) - test.targets["forces"][: test.ptr[5]]).max())
    if wrong > 1e-3:
        raise DataError(f"labels and reference differ by {wrong:.4f} eV/Å; the frames must be labeled by GFN2-xTB")
    minimum = relaxed(surface, quiet)
    mol = perceive(train).mols[0]
    bonds = np.array([(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()])
    lengths = np.linalg.norm(minimum.positions[bonds[:, 0]] - minimum.positions[bonds[:, 1]], axis=1)
    return Reference(surface, minimum, bonds, lengths, frequencies(surface, minimum))


def displaced(structures: Any, sigma: float, reference: Surface) -> Any:
    """The structures with all atoms moved, and the reference's labels."""
    rng = np.random.default_rng(round(1e4 * sigma))
    pos = structures.pos + sigma * rng.standard_normal(structures.pos.shape)
    energy, forces = reference(pos.reshape(len(structures), -1, 3))
    labels = {"energy": energy, "forces": forces.reshape(-1, 3)}
    return structures.replace_positions(pos).replace_targets(labels)


def part_errors(model: NDeMModel, test: Any, reference: Reference, args: argparse.Namespace) -> dict[str, Any]:
    """Errors on test frames and displaced ones."""
    sets = {"test": test}
    sets |= {f"displaced_{sigma}": displaced(test[: args.n_displaced], sigma, reference.surface) for sigma in SIGMAS}
    found = {}
    for name, structures in sets.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnitsWarning)  # forces of strongly displaced structures are large indeed
            errors = model.evaluate(structures)
        size = float(np.abs(structures.targets["forces"]).mean())
        found[name] = errors | {"mean_force_kcal": size / KCAL_PER_MOL}
    return found


def part_frequencies(model: NDeMModel, test: Any, reference: Reference, args: argparse.Namespace) -> dict[str, Any]:
    """Vibrations at the reference's minimum."""
    found = frequencies(surface_of(model, reference.minimum.numbers), reference.minimum)
    errors = np.abs(found - reference.wave_numbers)
    return {
        "mean_error": float(errors.mean()), "max_error": float(errors.max()), "n_imaginary": int((found < 0).sum()),
        "wave_numbers": found.tolist(), "reference": reference.wave_numbers.tolist(),
    }  # fmt: skip


def _starts(test: Any, number: int) -> np.ndarray:
    """Test frames (S, n, 3), evenly spaced over the list."""
    which = np.linspace(0, len(test) - 1, number).astype(int)
    return np.stack([test.atoms(int(k)).positions for k in which])


def part_nve(model: NDeMModel, test: Any, reference: Reference, args: argparse.Namespace) -> dict[str, Any]:
    """Energy drift at 300 K, in float64."""
    surface = surface_of(model, reference.minimum.numbers)
    copies = Copies(surface, reference.minimum, _starts(test, args.starts), 300.0, 0.0, seed=1)
    return {"runs": [r.summary() for r in energy_records(copies, round(1e3 * args.nve_ps / TIMESTEP))]}


def part_md(model: NDeMModel, test: Any, reference: Reference, args: argparse.Namespace) -> dict[str, Any]:
    """Langevin dynamics at the temperature of the data, in float32 as the calculator does."""
    surface = surface_of(model, reference.minimum.numbers, torch.float32)
    copies = Copies(surface, reference.minimum, _starts(test, args.starts), 500.0, 0.01, seed=2)
    steps, begin = round(1e3 * args.md_ps / TIMESTEP), time.process_time()
    reached, visited = survive(copies, reference.bonds, reference.lengths, steps)
    found = {"picoseconds": (1e-3 * TIMESTEP * reached).tolist(), "survivors": int((reached == steps).sum())}
    if visited:
        pos = np.concatenate(visited)
        # Of each structure: the median is that of ordinary ones, where a few that are falling apart rule the mean.
        errors = np.abs(surface(pos)[1] - reference.surface(pos)[1]).mean((1, 2)) / KCAL_PER_MOL
        found |= {
            "n_visited": len(pos),
            "visited_forces_mae_kcal": float(errors.mean()),
            "visited_forces_median_kcal": float(np.median(errors)),
        }
    return found | {"cpu_s": time.process_time() - begin}


#: What is asked of a model, cheap parts first, and the options that a part depends on.
PARTS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "errors": (part_errors, ("n_displaced",)),
    "frequencies": (part_frequencies, ()),
    "nve": (part_nve, ("starts", "nve_ps")),
    "md": (part_md, ("starts", "md_ps")),
}


# ------------------------------------------------------------------------------------------------------- runs and records


def load(molecule: str, n_train: int) -> tuple[Any, Any, Any]:
    """Training, validation and test frames; the last two do not depend on `n_train`."""
    _, (train, valid, test), _ = load_sample(molecule)
    if n_train > len(train):
        raise SystemExit(f"--n-train {n_train}: {molecule} has {len(train)} training frames")
    return train[:n_train], valid, test


def trained(run: dict[str, Any], data: tuple[Any, Any, Any], path: Path) -> tuple[NDeMModel, dict[str, Any]]:
    """The model of a run, from its folder or trained now, and how it was made."""
    train, valid, _ = data
    if (path / "config.json").is_file():
        model = NDeMModel.load(path, device="cpu")
    else:
        model = model_of(run["cell"], run["seed"])
        model.set_params(validate_every=max(1, round(200 * SETTINGS["batch_size"] / len(train))))
        model.fit(train, valid, max_steps=run["steps"])
        model.save(path)
    return model, {"keywords": CELLS[run["cell"]].keywords, "torch": torch.__version__, "machine": platform.machine()}


def record_path(out: Path, run: dict[str, Any]) -> Path:
    """Where the record of a model is."""
    return out / f"{run['cell']}_n{run['n_train']}_s{run['seed']}_{run['steps']}.json"


def missing_parts(record: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Parts that are not there with these options."""
    wanted = {name: {option: getattr(args, option) for option in options} for name, (_, options) in PARTS.items()}
    return [name for name in args.parts if record.get(name, {}).get("options") != wanted[name]]


def _number(values: list[float], digits: int) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def _rows(text: list[str], rows: list[list[str]]) -> list[str]:
    """A table of markdown with its head."""
    return [
        "",
        "| " + " | ".join(text) + " |",
        "|" + "---|" * len(text),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def error_rows(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Force errors on test frames and displaced ones, energy errors, and how large the forces are."""
    places = ["test", *(f"displaced_{sigma}" for sigma in SIGMAS)]
    rows, sizes = [], [""] * len(places)
    for cell, runs in groups.items():
        found = [run["errors"] for run in runs if "errors" in run]
        if found:
            forces, energies = (
                [_number([f[place][f"{what}_mae_kcal"] for f in found], 3) for place in places]
                for what in ("forces", "energy")
            )
            rows.append([f"`{cell}`", CELLS[cell].about, str(len(found)), *forces, *energies])
            sizes = [_number([found[0][place]["mean_force_kcal"]], 1) for place in places]
    rows.append(["", "mean size of a force component", "", *sizes, *[""] * len(places)])
    moved = [f"{sigma} Å" for sigma in SIGMAS]
    return _rows(["cell", "", "seeds", "force MAE, test", *moved, "energy MAE, test", *moved], rows)


def motion_rows(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Drift, survivors, force error on the way, and vibrations."""
    rows = []
    for cell, runs in groups.items():
        drift = [abs(r["drift_meV_per_atom_per_ps"]) for run in runs for r in run.get("nve", {}).get("runs", [])]
        spread = [r["fluctuation_meV_per_atom"] for run in runs for r in run.get("nve", {}).get("runs", [])]
        md = [run["md"] for run in runs if "md" in run]
        lived = [t for m in md for t in m["picoseconds"]]
        seen = [m for m in md if "n_visited" in m]
        visited = [_number([m[f"visited_forces_{of}_kcal"] for m in seen], 3) for of in ("mae", "median") if seen]
        waves = [run["frequencies"] for run in runs if "frequencies" in run]
        rows.append([
            f"`{cell}`",
            f"{statistics.mean(drift):.4f} (largest {max(drift):.4f})" if drift else "",
            f"{statistics.mean(spread):.3f}" if spread else "",
            f"{sum(m['survivors'] for m in md)} of {len(lived)}" if md else "",
            f"{statistics.mean(lived):.1f} (first {min(lived):.1f})" if md else "",
            f"{visited[0]} (median {visited[1]})" if visited else "",
            _number([w["mean_error"] for w in waves], 1) if waves else "",
            _number([w["max_error"] for w in waves], 1) if waves else "",
            str(sum(w["n_imaginary"] for w in waves)) if waves else "",
        ])  # fmt: skip
    head = ["cell", "NVE drift", "fluctuation", "whole at the end", "ps reached", "force MAE on the way"]
    return _rows([*head, "wave numbers, mean error", "largest", "imaginary"], rows)


def _one(records: list[dict[str, Any]], part: str, option: str) -> str:
    """The value of an option that the records share, or all that occur."""
    return " or ".join(f"{v:g}" for v in sorted({r[part]["options"][option] for r in records if part in r}))


def table(molecule: str, records: list[dict[str, Any]], reading: str = "") -> str:
    """All records of a molecule as markdown, grouped by number of frames and steps."""
    lines = [
        f"# {molecule.capitalize()} (GFN2-xTB): robustness",
        "",
        f"`python benchmarks/accuracy/bench_robustness.py --molecule {molecule} --work DIR --md-ps {_one(records, 'md', 'md_ps')}`; "
        "TorchMDNet with 32 channels and 2 layers, settings of the ablation, frames and labels of the embedded sample (GFN2-xTB, "
        "500 K, 10 ps; test frames come from the same trajectory as the training frames). Means over seeds, ± standard deviation "
        "where there are several.",
    ]
    if reading:
        lines += ["", reading.strip()]
    for n_train, steps in sorted({(r["n_train"], r["steps"]) for r in records}):
        chosen = [r for r in records if (r["n_train"], r["steps"]) == (n_train, steps)]
        groups = {cell: [r for r in chosen if r["cell"] == cell] for cell in CELLS}
        groups = {cell: runs for cell, runs in groups.items() if runs}
        lines += [
            "",
            f"## {n_train} training frames, {steps:,} steps",
            "",
            f"Errors in kcal/mol/Å (forces, per component) and kcal/mol (energy): all test frames, and "
            f"{_one(chosen, 'errors', 'n_displaced')} of them with all atoms displaced by a normal distribution of the width named, "
            "with new labels.",
            *error_rows(groups),
            "",
            f"NVE: {_one(chosen, 'nve', 'starts')} starts, {_one(chosen, 'nve', 'nve_ps')} ps at 300 K, {TIMESTEP} fs, float64; mean "
            "size of the slope of the total energy in meV/atom/ps, and root mean square about that line in meV/atom. Langevin: "
            f"{_one(chosen, 'md', 'starts')} starts, up to {_one(chosen, 'md', 'md_ps')} ps at 500 K, {TIMESTEP} fs, friction 0.01/fs, "
            f"float32; broken when a bond differs by {BROKEN} Å from its length at the minimum; on the way, every "
            f"{1e-3 * TIMESTEP * VISITED_EVERY:g} ps, forces are compared with GFN2-xTB's (kcal/mol/Å; mean and "
            "median over structures). Wave numbers in 1/cm at GFN2-xTB's minimum, sorted, against GFN2-xTB's.",
            *motion_rows(groups),
        ]
    return "\n".join(lines) + "\n"


def write_table(out: Path, molecule: str) -> None:
    """The table beside the folder of records, made from all that are there."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*_n*.json"))]
    reading = out / "reading.md"
    if records:
        text = table(molecule, records, reading.read_text(encoding="utf-8") if reading.is_file() else "")
        write_text(out.with_suffix(".md"), text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", default="ethanol", choices=["ethanol", "aspirin"])
    parser.add_argument("--cells", nargs="+", default=list(MODELS), choices=list(CELLS), metavar="CELL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--n-train", type=int, default=100)
    parser.add_argument("--steps", type=int, default=6000, help="of training (%(default)s)")
    parser.add_argument("--n-displaced", type=int, default=200, help="test frames to displace (%(default)s)")
    parser.add_argument("--starts", type=int, default=10, help="copies in the dynamics (%(default)s)")
    parser.add_argument("--nve-ps", type=float, default=5.0, help="length of the NVE runs (%(default)g)")
    parser.add_argument("--md-ps", type=float, default=100.0, help="length of the Langevin runs (%(default)g)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--work", type=Path, default=Path("runs/robustness"), help="folder for the trained models")
    parser.add_argument("--out", type=Path, default=None, help="folder for the records")
    parser.add_argument("--table", action="store_true", help="only make the table anew")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Make what is missing, one part of one model after the other."""
    args = parse(arguments)
    out = args.out or RESULTS / f"robustness_{args.molecule}"
    out.mkdir(parents=True, exist_ok=True)
    tasks = [] if args.table else list(itertools.product(args.seeds, args.cells))
    if tasks:
        torch.set_num_threads(1)
        data = load(args.molecule, args.n_train)
        reference = make_reference(data[0], data[2])
    for part, (seed, cell) in itertools.product(PARTS, tasks):
        run = {"molecule": args.molecule, "cell": cell, "n_train": args.n_train, "seed": seed, "steps": args.steps}
        path = record_path(out, run)
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else run
        if part not in missing_parts(record, args):
            continue
        make, options = PARTS[part]
        model, origin = trained(run, data, args.work / args.molecule / path.stem)
        found = {"options": {name: getattr(args, name) for name in options}}
        record |= origin | {part: found | make(model, data[2], reference, args)}
        save_json(path, record)
        write_table(out, args.molecule)
        print(f"{path.stem}: {part} done", flush=True)
    write_table(out, args.molecule)


if __name__ == "__main__":
    main()
