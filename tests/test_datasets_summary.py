"""Diagnostics: the virial temperature of known ensembles, duplicates, net force, units, and the table."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from scipy.spatial.transform import Rotation

from ndem_zoo.datasets import MolecularDataset, read_md17, virial_temperature
from ndem_zoo.datasets.summary import bond_length_ratio, exact_duplicates, near_duplicates


def changed(dataset: MolecularDataset, **changes) -> MolecularDataset:
    return MolecularDataset(**{**dataset.columns(), **changes})


def test_temperature_of_a_harmonic_ensemble():
    """Boltzmann samples of springs between all atoms: T is known exactly, at any size and place."""
    rng = np.random.default_rng(0)
    temperature, k, frames, n = 300.0, 2.0, 4000, 4
    # E = k/2 sum_{i<j} |x_i - x_j|^2 = k n / 2 sum |x_i - mean|^2: independent normal modes besides the center.
    x = rng.normal(scale=np.sqrt(units.kB * temperature / (k * n)), size=(frames, n, 3))
    x += rng.normal(scale=10.0, size=(frames, 1, 3)) - x.mean(axis=1, keepdims=True)
    forces = -k * n * (x - x.mean(axis=1, keepdims=True))
    dataset = MolecularDataset(
        np.ones(frames * n, int), x.reshape(-1, 3), np.arange(frames + 1) * n, targets={"forces": forces.reshape(-1, 3)}
    )
    # Choosing x - mean with variance kT/(kn) per coordinate, less the mean, leaves 3n - 3 degrees of freedom.
    found, error = virial_temperature(dataset)
    assert error == pytest.approx(temperature * np.sqrt(2 / (3 * n - 3)) / np.sqrt(frames), rel=0.1)
    assert found == pytest.approx(temperature, abs=4 * error)
    assert error < 3


@pytest.mark.parametrize(
    ("file", "revised", "temperature", "error"),
    [
        ("md17/md17_ethanol.npz", False, 525, 29),
        ("md17/md17_aspirin.npz", False, 522, 22),
        ("md17_trajectory/ethanol_first2000.npz", False, 551, 47),
        ("rmd17/npz_data/rmd17_aspirin.npz", True, -373, 23),
    ],
)
def test_temperature_of_genuine_data(shared_data, file, revised, temperature, error):
    found = virial_temperature(read_md17(shared_data / file, revised))
    np.testing.assert_allclose(found, (temperature, error), atol=0.51)


def test_temperature_has_no_meaning_everywhere(ethanol):
    assert virial_temperature(MolecularDataset.from_atoms([molecule("H2O")])) is None
    fixed = changed(ethanol, fixed=np.ones(len(ethanol.z), bool))
    assert virial_temperature(fixed) is None
    single = MolecularDataset(np.ones(3, int), np.zeros((3, 3)), [0, 1, 2, 3], targets={"forces": np.zeros((3, 3))})
    assert virial_temperature(single) is None


def test_duplicates(ethanol):
    rng = np.random.default_rng(1)
    frames = ethanol[::100]  # 20 frames
    n = frames.counts[0]
    pos = frames.pos.reshape(-1, n, 3)
    rotated = pos[3] @ Rotation.random(rng=0).as_matrix() + [1.0, 2.0, 3.0]
    swapped = pos[4][[0, 1, 2, 4, 3, 5, 6, 7, 8]]  # two hydrogens exchanged
    shaken = pos[5] + rng.uniform(-1e-4, 1e-4, size=(n, 3))
    moved = pos[6] + rng.normal(scale=0.02, size=(n, 3))
    extra = np.concatenate([pos[2], rotated, swapped, shaken, moved])
    whole = MolecularDataset(np.tile(frames.z[:n], 25), np.concatenate([frames.pos, extra]), np.arange(26) * n)
    assert exact_duplicates(frames) == near_duplicates(frames) == 0
    assert exact_duplicates(whole) == 1
    assert near_duplicates(whole) == 4
    assert any("repeat an earlier one" in text for text in whole.summary().warnings)


def test_equal_radii_are_not_enough_for_a_duplicate():
    square = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    tetrahedron = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    both = MolecularDataset(np.full(8, 6), np.concatenate([square, tetrahedron]), [0, 4, 8])
    assert near_duplicates(both) == 0
    assert near_duplicates(both.select([0, 1, 0])) == 1


def test_other_elements_are_no_duplicates(ethanol):
    one = MolecularDataset(ethanol.z[:9], ethanol.pos[:9], [0, 9])
    other = MolecularDataset(np.array([6, 6, 7, 1, 1, 1, 1, 1, 1], np.uint8), ethanol.pos[:9], [0, 9])
    both = MolecularDataset.concatenate([one, other])
    assert exact_duplicates(both) == near_duplicates(both) == 0


def test_crystals_are_not_searched_for_near_duplicates():
    summary = MolecularDataset.from_atoms([bulk("Cu"), bulk("Cu"), bulk("Cu", a=3.7)]).summary()
    assert summary.exact_duplicates == 1
    assert summary.near_duplicates is None
    assert "not searched" in str(summary)
    assert summary.n_periodic == 3


def test_net_force_of_genuine_ethanol(shared_data):
    summary = read_md17(shared_data / "md17" / "md17_ethanol.npz").summary()
    assert summary.net_force_rms == pytest.approx(0.077 * units.kcal / units.mol, rel=0.02)  # README of the data
    assert summary.force_rms == pytest.approx(26.3 * units.kcal / units.mol, rel=0.01)
    assert summary.energy.std == pytest.approx(4.09 * units.kcal / units.mol, rel=0.01)


def test_table(ethanol):
    summary = ethanol.summary()
    text = str(summary)
    assert summary.formulas == {"C2H6O": 2000}
    assert summary.elements == {"H": 12000, "C": 4000, "O": 2000}
    assert summary.warnings == ()
    for part in ("2,000", "C2H6O", "kcal/mol/Å", "virial temperature", "506 +- 43 K", "raw file: positions in Å"):
        assert part in text
    assert max(map(len, text.splitlines())) < 160


def test_suspicious_units(ethanol):
    bohr = changed(ethanol, pos=ethanol.pos / units.Bohr)
    assert bond_length_ratio(ethanol) == pytest.approx(1.0, abs=0.15)
    assert any("Bohr" in text for text in bohr.summary().warnings)
    kcal = changed(ethanol, targets={"forces": ethanol.targets["forces"] * 23.06})
    assert any("kcal/mol/Å" in text for text in kcal.summary().warnings)
    nm = changed(ethanol, pos=ethanol.pos / 10)
    assert any("nm" in text for text in nm.summary().warnings)


def test_broken_and_empty_data_have_a_summary(ethanol):
    forces = ethanol.targets["forces"].copy()
    forces[5] = np.nan
    summary = changed(ethanol, targets={"forces": forces}).summary()
    assert summary.not_finite == {"forces": 3}
    assert summary.force_rms is None
    assert "3 values of forces are not finite" in str(summary)
    assert "empty" in str(ethanol[:0].summary())
    pair = MolecularDataset([-(2**63), 1], [[0.0, 0, 0], [1.0, 0, 0]], [0, 2])
    assert f"Z={-(2**63)}" in str(pair.summary())
    assert "no labels" in str(MolecularDataset.from_atoms([Atoms("H")]).summary())
