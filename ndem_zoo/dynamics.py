"""Molecular dynamics with ASE, and how well it conserves energy: what ``ndem-zoo md`` and the demo run.

Integrators, thermostats and file formats are ASE's; here is the set-up that all uses share, the record of energies, and
the drift. Any ASE calculator will do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import units

from ndem_zoo.checkpoint import writing
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.featurizers.base import check_structure, geometry_of

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

ENSEMBLES = ("nve", "langevin")


@dataclass(frozen=True)
class EnergyRecord:
    """Energies along a trajectory, one entry for each step and one for the start.

    Attributes
    ----------
    time : (T,)
        ps.
    potential, kinetic : (T,)
        eV.
    n_atoms
        Number of atoms.
    n_dof
        Degrees of freedom that share the kinetic energy.
    ensemble
        ``"nve"`` or ``"langevin"``.
    """

    time: np.ndarray
    potential: np.ndarray
    kinetic: np.ndarray
    n_atoms: int
    n_dof: int
    ensemble: str

    @property
    def total(self) -> np.ndarray:
        """Potential and kinetic energy (T,) in eV."""
        return self.potential + self.kinetic

    @property
    def temperature(self) -> np.ndarray:
        """Kinetic temperature (T,) in K."""
        return self.kinetic / (0.5 * max(self.n_dof, 1) * units.kB)

    def _line(self) -> tuple[float, float]:
        """Slope (eV/ps) and offset (eV) of the total energy, by least squares."""
        if len(self.time) < 2:
            return 0.0, float(self.total.mean())
        slope, offset = np.polyfit(self.time, self.total - self.total[0], 1)
        return float(slope), float(offset + self.total[0])

    @property
    def drift(self) -> float:
        """Slope of the total energy in meV/atom/ps, by a least squares fit; means something for NVE only."""
        return 1e3 * self._line()[0] / self.n_atoms

    @property
    def fluctuation(self) -> float:
        """Root mean square deviation of the total energy from that line, in meV/atom."""
        slope, offset = self._line()
        return 1e3 * float(np.sqrt(np.mean(np.square(self.total - offset - slope * self.time)))) / self.n_atoms

    def summary(self) -> dict[str, Any]:
        """Numbers for a report, with their units in the names."""
        return {
            "ensemble": self.ensemble,
            "n_atoms": self.n_atoms,
            "steps": len(self.time) - 1,
            "duration_ps": float(self.time[-1]),
            "drift_meV_per_atom_per_ps": self.drift,
            "fluctuation_meV_per_atom": self.fluctuation,
            "mean_temperature_K": float(self.temperature.mean()),
        }


def run_md(
    atoms: Atoms,
    calculator: Calculator,
    *,
    steps: int,
    timestep: float = 0.5,
    temperature: float = 300.0,
    ensemble: str = "nve",
    friction: float = 0.01,
    seed: int = 0,
    relax: bool = False,
    out: str | os.PathLike | None = None,
    every: int = 10,
    callback: Callable[[int], None] | None = None,
) -> EnergyRecord:
    """Run molecular dynamics from `atoms`, which stay as they are.

    Parameters
    ----------
    atoms
        Start; velocities that it may have are replaced.
    calculator
        Gives energies and forces.
    steps
        Number of steps.
    timestep
        fs.
    temperature
        K, of the Maxwell-Boltzmann distribution of the first velocities, and of the thermostat. Overall motion, and for
        a free molecule rotation, is taken out of the first velocities.
    ensemble
        ``"nve"`` (velocity Verlet) or ``"langevin"``.
    friction
        Of the Langevin thermostat, in 1/fs.
    seed
        Of velocities and thermostat.
    relax
        Whether to relax the start first (BFGS to 0.01 eV/Å).
    out
        Extended XYZ file for the trajectory, with energies, forces and momenta. It grows under the name ``<out>.part``,
        and gets its own name at the end, also when the run is interrupted.
    every
        Steps between its frames.
    callback
        Called with the number of steps done.

    Returns
    -------
    record : EnergyRecord

    Raises
    ------
    ConfigError
        If an option is out of range.
    DataError
        If the start cannot be used, or the dynamics blows up, that is, reaches structures that cannot be computed; names the
        step.
    """
    _check_options(steps, timestep, temperature, ensemble, friction, every)
    check_structure(geometry_of(atoms))
    atoms = atoms.copy()
    atoms.calc = calculator
    if relax:
        _relax(atoms)
    dynamics = _dynamics(atoms, timestep, temperature, ensemble, friction, seed)
    times, potential, kinetic = [], [], []

    def record() -> None:
        times.append(dynamics.nsteps * timestep * 1e-3)
        potential.append(atoms.get_potential_energy())
        kinetic.append(atoms.get_kinetic_energy())
        if callback is not None:
            callback(dynamics.nsteps)

    dynamics.attach(record, interval=1)
    writer = None if out is None else _Writer(Path(out), atoms)
    if writer is not None:
        dynamics.attach(writer.write, interval=every)
    try:
        dynamics.run(steps)
    except DataError as error:
        raise DataError(f"the dynamics failed after step {max(len(times) - 1, 0)} of {steps}: {error}") from error
    finally:
        if writer is not None:
            writer.close()
    n_dof = _degrees_of_freedom(atoms, ensemble)
    return EnergyRecord(np.array(times), np.array(potential), np.array(kinetic), len(atoms), n_dof, ensemble)


def _check_options(steps: int, timestep: float, temperature: float, ensemble: str, friction: float, every: int) -> None:
    if ensemble not in ENSEMBLES:
        raise ConfigError(f"ensemble={ensemble!r}; allowed are {', '.join(ENSEMBLES)}")
    for name, value in (("steps", steps), ("every", every)):
        if not (value == int(value) and value >= 1):
            raise ConfigError(f"{name}={value!r}; it must be a whole number >= 1")
    for name, value in (("timestep", timestep), ("friction", friction)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name}={value!r}; it must be a positive number")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature!r} K; it must be a number >= 0")


def _relax(atoms: Atoms) -> None:
    """Go to the nearest minimum of the energy."""
    from ase.optimize import BFGS

    BFGS(atoms, logfile=None).run(fmax=0.01, steps=500)


def _dynamics(atoms: Atoms, timestep: float, temperature: float, ensemble: str, friction: float, seed: int) -> Any:
    """ASE's integrator, for atoms with freshly drawn velocities."""
    from ase.md.langevin import Langevin
    from ase.md.velocitydistribution import Stationary, ZeroRotation
    from ase.md.verlet import VelocityVerlet

    rng = np.random.default_rng(seed)
    # Eq.: Maxwell and Boltzmann's distribution, <p²> = m k T for each component
    width = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * width[:, None])
    # Pitfall: by default ASE scales the velocities up again, and the internal motion becomes too hot.
    if not atoms.constraints:
        Stationary(atoms, preserve_temperature=False)
    if _may_rotate(atoms):
        ZeroRotation(atoms, preserve_temperature=False)
    if ensemble == "nve":
        return VelocityVerlet(atoms, timestep * units.fs)
    # Pitfall: fixcm=True, ASE's default, gives small molecules a wrong temperature.
    return Langevin(
        atoms, timestep * units.fs, temperature_K=temperature, friction=friction / units.fs, rng=rng, fixcm=False
    )


def _may_rotate(atoms: Atoms) -> bool:
    """Whether the structure can rotate as a whole (two atoms are left alone: a line has no inverse of inertia)."""
    return not atoms.constraints and not atoms.pbc.any() and len(atoms) > 2


def _degrees_of_freedom(atoms: Atoms, ensemble: str) -> int:
    """Those of the free atoms; less overall translation and rotation, which only a thermostat sets going again."""
    overall = 0
    if ensemble == "nve":
        overall = (0 if atoms.constraints else 3) + (3 if _may_rotate(atoms) else 0)
    return max(1, int(atoms.get_number_of_degrees_of_freedom()) - overall)


class _Writer:
    """Appends frames to ``<path>.part``, and renames it when all are there."""

    def __init__(self, path: Path, atoms: Atoms) -> None:
        self._path, self._atoms = path, atoms
        self._part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._part.open("w", encoding="utf-8")
        self._frames = 0

    def write(self) -> None:
        from ase.io import write

        with writing(self._part):
            write(self._stream, self._atoms, format="extxyz")
            self._stream.flush()
        self._frames += 1

    def close(self) -> None:
        try:
            with writing(self._part):
                self._stream.flush()
                os.fsync(self._stream.fileno())
        finally:
            with contextlib.suppress(OSError):  # on a full disk this fails again
                self._stream.close()
        if self._frames:
            os.replace(self._part, self._path)
        else:
            self._part.unlink()
