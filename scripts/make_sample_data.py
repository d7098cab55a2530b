"""Make the embedded sample data anew: GFN2-xTB molecular dynamics of ethanol or aspirin, in MD17's file layout.

    pip install 'ndem_zoo[xtb]'
    python scripts/make_sample_data.py ethanol --out md17like_ethanol_gfn2.npz
    python scripts/make_sample_data.py aspirin --frames 300 --every 10 --out md17like_aspirin_gfn2.npz

Other frames come out than those in `ndem_zoo/datasets/sample` (another start, another seed), from the same ensemble; the
energies and forces of the committed frames are reproduced by `--check` to the last digits that tblite is stable in.
On one core, ethanol with the defaults takes about a minute, aspirin about two to ten.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.constraints import FixCom
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary

from ndem_zoo.optional import require

#: Minima of GFN2-xTB: formula with the atoms in MD17's order, and positions in Å.
MINIMA = {
    "ethanol": (
        "C2OH6",
        """ 0.533  0.421  0.618   -0.172 -0.607 -0.262   -0.748 -0.034 -1.413   -1.340  0.676 -1.139
            0.545 -1.342 -0.633   -0.939 -1.135  0.325    1.028 -0.076  1.447    1.276  0.961  0.037
           -0.182  1.137  1.019""",
    ),
    "aspirin": (
        "C7O3C2OH8",
        """ 2.230 -0.487 -0.178    0.893  1.878  0.364    2.939  0.633  0.208    2.270  1.819  0.470
           -3.410  0.150  0.097    0.845 -0.440 -0.312    0.177  0.755 -0.024   -0.941 -1.607 -1.395
           -1.572 -0.804  1.328    0.741 -2.775 -0.519    0.103 -1.632 -0.791   -1.983 -0.019  0.520
           -1.194  0.868 -0.129    0.215 -3.528 -0.832    2.739 -1.414 -0.392    0.355  2.788  0.580
            4.013  0.584  0.305    2.821  2.699  0.767   -3.624  1.194 -0.112   -3.545 -0.423 -0.819
           -4.072 -0.240  0.864""",
    ),
}

KCAL = units.kcal / units.mol


def gfn2() -> Calculator:
    """A GFN2-xTB calculator.

    Pitfall: some builds of torch bring an older libgomp than tblite needs; tblite must be imported first, so nothing of
    the package that imports torch stands at the top of this file.
    """
    return require("tblite.ase", extra="xtb").TBLite(method="GFN2-xTB", verbosity=0)


def simulate(
    molecule: str,
    frames: int = 2000,
    every: float = 5.0,
    *,
    temperature: float = 500.0,
    timestep: float = 0.5,
    friction: float = 0.01,
    equilibrate: float = 1000.0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Run Langevin dynamics and collect frames.

    Parameters
    ----------
    molecule
        ``"ethanol"`` or ``"aspirin"``.
    frames
        Number of frames.
    every
        Time between frames in fs.
    temperature, timestep, friction, equilibrate
        In K, fs, 1/fs and fs.
    seed
        Of the velocities and the noise.

    Returns
    -------
    arrays
        MD17's ``E, F, R, z`` and descriptions; Å, kcal/mol, kcal/mol/Å.
    """
    symbols, positions = MINIMA[molecule]
    atoms = Atoms(symbols, positions=np.array(positions.split(), dtype=float).reshape(-1, 3))
    atoms.set_constraint(FixCom())
    atoms.calc = gfn2()
    rng = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    Stationary(atoms)
    dynamics = Langevin(
        atoms,
        timestep * units.fs,
        temperature_K=temperature,
        friction=friction / units.fs,
        rng=rng,
        fixcm=False,  # the constraint does it, with the right distribution
    )
    dynamics.run(round(equilibrate / timestep))
    stride = max(1, round(every / timestep))
    energy, forces, pos = np.empty((frames, 1)), np.empty((frames, len(atoms), 3)), np.empty((frames, len(atoms), 3))
    for i in range(frames):
        dynamics.run(stride)
        energy[i], forces[i], pos[i] = (
            atoms.get_potential_energy() / KCAL,
            atoms.get_forces(apply_constraint=False) / KCAL,
            atoms.positions,
        )
    arrays = {"E": energy, "F": forces, "R": pos, "z": atoms.numbers.astype(np.uint8)}
    texts = {
        "name": f"{molecule}_gfn2",
        "theory": "GFN2-xTB (tblite)",
        "type": "d",
        "r_unit": "Ang",
        "e_unit": "kcal/mol",
        "md5": own_md5(arrays),
    }
    return arrays | {key: np.array(text) for key, text in texts.items()}


def own_md5(arrays: dict[str, np.ndarray]) -> str:
    """The checksum that sGDML's files carry of themselves."""
    digest = hashlib.md5(usedforsecurity=False)
    for key in ("z", "R", "E", "F"):
        digest.update(hashlib.md5(np.ascontiguousarray(arrays[key]).tobytes(), usedforsecurity=False).digest())
    return digest.hexdigest()


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file under a temporary name, then rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # temporary files are for the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check(molecule: str, frames: int = 5) -> tuple[float, float]:
    """Largest differences in energy (eV) and force components (eV/Å) between tblite and committed frames."""
    calculator = gfn2()
    from ndem_zoo.datasets import read_sample

    dataset = read_sample(molecule)
    energy, force = 0.0, 0.0
    for i in np.linspace(0, len(dataset) - 1, frames).astype(int):
        atoms = dataset.atoms(int(i))
        label = atoms.calc.results
        atoms.calc = calculator
        energy = max(energy, abs(atoms.get_potential_energy() - label["energy"]))
        force = max(force, np.abs(atoms.get_forces() - label["forces"]).max())
    return energy, force


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("molecule", choices=sorted(MINIMA))
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--every", type=float, default=5.0, help="time between frames in fs")
    parser.add_argument("--temperature", type=float, default=500.0, help="in K")
    parser.add_argument("--equilibrate", type=float, default=1000.0, help="time before the first frame in fs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the npz file to write")
    parser.add_argument("--check", action="store_true", help="only compare tblite with the committed frames")
    options = parser.parse_args(arguments)
    if options.check:
        energy, force = check(options.molecule)
        print(f"{options.molecule}: energies differ by at most {energy:.2e} eV, forces by {force:.2e} eV/Å")
        return 0
    if options.out is None:
        parser.error("--out is needed")
    arrays = simulate(
        options.molecule,
        options.frames,
        options.every,
        temperature=options.temperature,
        equilibrate=options.equilibrate,
        seed=options.seed,
    )
    write(options.out, arrays)
    print(f"wrote {options.frames} frames to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
