"""Curvatures, against the values of the data that are known from elsewhere (kT at 500 K throughout)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import units

from ndem_zoo.curvature import ElementCurvature, boltzmann, isotropic
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.physics import MAX_Z
from ndem_zoo.testing import batch_of, waves
from ndem_zoo.testing.common import example_molecules

KCAL = units.kcal / units.mol


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("md17/md17_ethanol.npz", {1: 419, 6: 1424, 8: 894}),
        ("md17/md17_aspirin.npz", {1: 351, 6: 1185, 8: 746}),
        ("md17/md17_uracil.npz", {1: 393, 6: 1277, 7: 1329, 8: 761}),
        ("md17_trajectory/ethanol_first2000.npz", {1: 219, 6: 1095, 8: 697}),
        ("generated_xtb/md17like_ethanol_gfn2.npz", {1: 323, 6: 968, 8: 772}),
    ],
)
def test_boltzmann_curvature_of_md17(shared_data, file, expected):
    """Independent values in kcal/mol/Å², rounded to integers."""
    with np.load(shared_data / file) as raw:
        z, forces = np.tile(raw["z"], len(raw["F"])), raw["F"].reshape(-1, 3) * KCAL
    constants = boltzmann(z, forces, 500.0).constants.numpy() / KCAL
    assert np.flatnonzero(constants).tolist() == sorted(expected)
    for element, value in expected.items():
        assert constants[element] == pytest.approx(value, abs=0.51), element


def test_boltzmann_curvature_of_thermal_springs():
    """Atoms in springs at temperature T: <x²> = kT / c, so <F²> / kT gives c back."""
    stiffness, temperature, n = {1: 7.0, 8: 31.0}, 350.0, 40_000
    rng = np.random.default_rng(0)
    z = np.repeat([1, 8], n)
    c = np.array([stiffness[e] for e in z])[:, None]
    forces = -c * rng.normal(size=(2 * n, 3)) * np.sqrt(units.kB * temperature / c)
    constants = boltzmann(z, forces, temperature).constants
    for element, value in stiffness.items():
        assert constants[element].item() == pytest.approx(value, rel=4 * np.sqrt(2 / (3 * n)))


def test_boltzmann_curvature_in_proportion_to_one_over_temperature():
    z, forces = np.array([1, 1, 6]), waves((3, 3))
    cold, hot = boltzmann(z, forces, 100.0).constants, boltzmann(z, forces, 400.0).constants
    torch.testing.assert_close(cold, 4 * hot)


def test_force_change():
    batch = batch_of(example_molecules(), 5.0)
    epsilon = torch.from_numpy(waves(batch.pos.shape))
    constants = np.zeros(MAX_Z + 1)
    constants[[1, 6, 7, 8]] = 10.0, 40.0, 35.0, 25.0
    change = ElementCurvature(constants).force_change(batch, epsilon)
    for atom, element in enumerate(batch.z.tolist()):
        torch.testing.assert_close(change[atom], -constants[element] * epsilon[atom])
    torch.testing.assert_close(isotropic(12.5).force_change(batch, epsilon), -12.5 * epsilon)
    assert isotropic(12.5).force_change(batch, epsilon.float()).dtype == torch.float32


def test_constants_are_saved_and_not_trained():
    curvature = isotropic(3.0)
    assert list(curvature.state_dict()) == ["constants"]
    assert not list(curvature.parameters())


@pytest.mark.parametrize("constants", [np.ones(5), np.full(MAX_Z + 1, -1.0), np.full(MAX_Z + 1, np.nan)])
def test_impossible_constants(constants):
    with pytest.raises(ConfigError, match="curvatures must be 101 numbers >= 0"):
        ElementCurvature(constants)


def test_impossible_samples():
    with pytest.raises(ConfigError, match="temperature=0"):
        boltzmann(np.array([1]), np.ones((1, 3)), 0)
    forces = np.ones((3, 3))
    forces[1, 2] = np.inf
    with pytest.raises(DataError, match="atom 1"):
        boltzmann(np.array([1, 1, 6]), forces, 300.0)
