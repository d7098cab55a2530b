"""The robustness benchmark: vibrations and dynamics against ASE and closed forms, and a short run of the whole."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.vibrations import Vibrations
from scipy import constants

from benchmarks.accuracy import bench_robustness as bench

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "accuracy" / "results"
STIFFNESS, LENGTH = 100.0, 1.1  # eV/Å², Å


def spring(pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two atoms and a spring."""
    vector = pos[:, 1] - pos[:, 0]
    length = np.linalg.norm(vector, axis=1, keepdims=True)
    pull = STIFFNESS * (length - LENGTH) * vector / length
    return 0.5 * STIFFNESS * (length[:, 0] - LENGTH) ** 2, np.stack([pull, -pull], 1)


def no_forces(pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(pos)), np.zeros_like(pos)


def emt(numbers: np.ndarray) -> bench.Surface:
    """ASE's own potential, structure by structure."""

    def surface(pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [Atoms(numbers, x, calculator=EMT()) for x in pos]
        return np.array([a.get_potential_energy() for a in found]), np.stack([a.get_forces() for a in found])

    return surface


def dimer() -> Atoms:
    return Atoms("CO", [[0.3, 0.1, -0.2], [0.3 + LENGTH / 3, 0.1 + 2 * LENGTH / 3, -0.2 - 2 * LENGTH / 3]])


def test_wave_number_of_a_spring():
    mass = np.prod(dimer().get_masses()) / dimer().get_masses().sum() * constants.atomic_mass
    omega = np.sqrt(STIFFNESS * constants.e * 1e20 / mass)
    expected = omega / (2 * np.pi * constants.c * 100)
    assert bench.frequencies(spring, dimer()) == pytest.approx([expected], rel=1e-3)
    inverted = bench.frequencies(lambda pos: (-spring(pos)[0], -spring(pos)[1]), dimer())
    assert inverted == pytest.approx([-expected], rel=1e-3), "imaginary modes are negative"


def test_wave_numbers_are_those_of_ase(tmp_path):
    atoms = molecule("H2O")
    atoms.rotate(50, (1, 2, 3))
    surface = emt(atoms.numbers)
    minimum = bench.relaxed(surface, atoms)
    atoms.calc = EMT()
    BFGS(atoms, logfile=None).run(fmax=1e-4)
    assert minimum.get_all_distances() == pytest.approx(atoms.get_all_distances(), abs=1e-3)
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"), delta=0.01)
    vibrations.run()
    expected = vibrations.get_frequencies().real[-3:]
    assert bench.frequencies(surface, atoms) == pytest.approx(expected, abs=1.0)


def test_copies_without_friction_are_velocity_verlet():
    atoms = molecule("CH3OH")
    pos = atoms.positions + 0.05 * np.random.default_rng(0).standard_normal((2, len(atoms), 3))
    copies = bench.Copies(emt(atoms.numbers), atoms, pos, 300.0, 0.0, seed=3)
    momenta = copies.masses * copies.velocity
    assert np.abs(momenta.sum(1)).max() < 1e-10
    singles = [Atoms(atoms.numbers, x, momenta=p, calculator=EMT()) for x, p in zip(pos, momenta, strict=True)]
    records = bench.energy_records(copies, 20)
    for number, single in enumerate(singles):
        VelocityVerlet(single, bench.TIMESTEP * units.fs).run(20)
        assert copies.pos[number] == pytest.approx(single.positions, abs=1e-10)
        assert records[number].total[-1] == pytest.approx(single.get_total_energy(), abs=1e-9)
        assert records[number].time[-1] == pytest.approx(0.01)


def test_thermostat_has_its_temperature():
    """The kinetic energy of all motion, and the width of the spring's length, by equipartition."""
    copies = bench.Copies(spring, dimer(), np.stack([dimer().positions] * 1500), 500.0, 0.1, seed=0)
    for _ in range(200):
        copies.step()
    heat = units.kB * 500.0
    assert copies.kinetic.mean() == pytest.approx(3 * heat, rel=0.06)
    # <(r - r0)²> = kT/k, and 3 (kT/k / r0)² / 2 from the volume element; the latter is far below 1 %
    length = np.linalg.norm(copies.pos[:, 1] - copies.pos[:, 0], axis=1)
    assert np.mean((length - LENGTH) ** 2) == pytest.approx(heat / STIFFNESS, rel=0.12)


def test_a_molecule_is_broken_when_a_bond_is_too_long_or_no_number():
    start = np.stack([dimer().positions] * 3)
    copies = bench.Copies(no_forces, dimer(), start, 0.0, 0.0, seed=0)
    speed = 0.031  # Å a step
    along = (start[1, 1] - start[1, 0]) / LENGTH
    copies.velocity[1, 1] = speed * along / copies.step_length
    bonds, lengths = np.array([[0, 1]]), np.array([LENGTH])

    def lost(pos):
        energy, forces = no_forces(pos)
        if lost.calls == 4:
            forces[-1] = np.nan
        lost.calls += 1
        return energy, forces

    lost.calls = 0
    copies.surface = lost
    reached, _ = bench.survive(copies, bonds, lengths, 30)
    # Copy 1 passes 0.5 Å at step 17 (16 x 0.031 = 0.496); copy 2 gets forces in step 5 and positions from them in step 6.
    assert reached.tolist() == [30, 16, 5]
    assert copies.number.tolist() == [0]


def test_copies_do_not_depend_on_each_other():
    start = np.stack([dimer().positions] * 3)
    alone = bench.Copies(spring, dimer(), start, 400.0, 0.05, seed=5)
    thinned = bench.Copies(spring, dimer(), start, 400.0, 0.05, seed=5)
    for step in range(20):
        alone.step()
        thinned.step()
        if step == 7:
            thinned.keep(np.array([True, False, True]))
    assert thinned.number.tolist() == [0, 2]
    assert np.array_equal(thinned.pos, alone.pos[[0, 2]])
    assert not np.allclose(alone.pos[0], alone.pos[2])


@pytest.mark.skipif(importlib.util.find_spec("tblite") is None, reason="needs tblite (ndem_zoo[xtb])")
def test_short_run(tmp_path, monkeypatch):
    whole = bench.load("ethanol", 30)
    monkeypatch.setattr(bench, "load", lambda *_: (*whole[:2], whole[2][:20]))
    monkeypatch.setattr(bench, "VISITED_EVERY", 10)
    options = ["--cells", "delta_valence", "--n-train", "30", "--steps", "3", "--n-displaced", "3", "--starts", "2"]
    options += ["--nve-ps", "0.002", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    bench.main([*options, "--md-ps", "0.01"])
    path = tmp_path / "out" / "delta_valence_n30_s0_3.json"
    first = json.loads(path.read_text())
    assert set(bench.PARTS) <= set(first)
    # Ethanol has 21 modes; the highest is the O-H stretch, the five below it are C-H stretches.
    waves = first["frequencies"]["reference"]
    assert len(waves) == 21
    assert 2700 < waves[-6] < waves[-2] < 3200 < 3400 < waves[-1] < 3700
    assert waves[-7] < 1600
    assert first["frequencies"]["mean_error"] < 200, "the valence force field alone is not far off"
    found = first["errors"]
    assert found["displaced_0.2"]["mean_force_kcal"] > 2 * found["displaced_0.02"]["mean_force_kcal"]
    assert found["test"]["forces_mae_kcal"] < 0.5 * found["test"]["mean_force_kcal"]
    assert first["md"]["picoseconds"] == [0.01, 0.01]
    assert first["md"]["n_visited"] == 4
    assert 0 < first["md"]["visited_forces_mae_kcal"] < 10
    assert "`delta_valence`" in (tmp_path / "out.md").read_text()

    bench.main([*options, "--md-ps", "0.01"])
    assert json.loads(path.read_text()) == first, "nothing is made again"
    bench.main([*options, "--md-ps", "0.001"])
    second = json.loads(path.read_text())
    assert second["md"]["picoseconds"] == [0.001, 0.001]
    assert second["nve"] == first["nve"]


def test_committed_table_follows_from_its_records():
    folder = RESULTS / "robustness_ethanol"
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*_n*.json"))]
    assert {r["cell"] for r in records} == set(bench.MODELS)
    reading = (folder / "reading.md").read_text(encoding="utf-8")
    assert bench.table("ethanol", records, reading) == folder.with_suffix(".md").read_text(encoding="utf-8")
