"""Every kind of impossible structure and broken label is found, with the right index."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from scipy.spatial.distance import pdist, squareform

from ndem_zoo.datasets import MolecularDataset, check_structures, check_targets
from ndem_zoo.datasets.checks import close_pairs
from ndem_zoo.errors import DataError, UnitsWarning


def changed(dataset: MolecularDataset, **changes) -> MolecularDataset:
    return MolecularDataset(**{**dataset.columns(), **changes})


def test_good_data_pass(ethanol, aspirin):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dataset in (ethanol, aspirin, ethanol[:0]):
            check_structures(dataset)
            check_targets(dataset, {"energy", "forces"})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_positions_that_are_not_finite(ethanol, value):
    pos = ethanol.pos.copy()
    pos[9 * 17 + 4, 2] = value
    with pytest.raises(DataError, match="structure 17: position of atom 4"):
        check_structures(changed(ethanol, pos=pos))


@pytest.mark.parametrize("number", [0, 101, 255])
def test_elements_that_do_not_exist(ethanol, number):
    z = ethanol.z.copy()
    z[9 * 3] = number
    with pytest.raises(DataError, match=f"structure 3: atom 0 has atomic number {number}; allowed are 1 to 100"):
        check_structures(changed(ethanol, z=z))


def test_structures_without_atoms():
    dataset = MolecularDataset(np.array([1, 1]), np.array([[0.0, 0, 0], [1, 0, 0]]), [0, 2, 2])
    with pytest.raises(DataError, match="structure 1: it has no atoms"):
        check_structures(dataset)


def test_overlapping_atoms(ethanol):
    pos = ethanol.pos.copy()
    pos[9 * 1999 + 8] = pos[9 * 1999 + 2] + [0.0, 0.0, 0.099]
    with pytest.raises(DataError, match=r"structure 1999: atoms 2 and 8 are 0.099 Å apart; allowed is 0.1 Å"):
        check_structures(changed(ethanol, pos=pos))
    pos[9 * 1999 + 8] = pos[9 * 1999 + 2] + [0.0, 0.0, 0.101]
    check_structures(changed(ethanol, pos=pos))


def test_atoms_of_different_structures_may_coincide(ethanol):
    twice = MolecularDataset.concatenate([ethanol[:1], ethanol[:1]])
    check_structures(twice)


def test_overlap_across_the_periodic_boundary():
    good = Atoms("H2", positions=[[0.5, 1, 1], [4.5, 1, 1]], cell=[5, 5, 5], pbc=True)
    bad = Atoms("H2", positions=[[0.02, 1, 1], [4.97, 1, 1]], cell=[5, 5, 5], pbc=True)
    open_boundary = bad.copy()
    open_boundary.pbc = [False, True, True]
    check_structures(MolecularDataset.from_atoms([good, open_boundary]))
    with pytest.raises(DataError, match=r"structure 2: atoms . and . are 0\.05 Å apart"):
        check_structures(MolecularDataset.from_atoms([good, open_boundary, bad]))


def test_singular_cells():
    flat = bulk("Cu")
    flat.cell[2] = flat.cell[0] + flat.cell[1]
    with pytest.raises(DataError, match=r"structure 1: the cell .* is singular"):
        check_structures(MolecularDataset.from_atoms([bulk("Cu"), flat]))
    slab = bulk("Cu")
    slab.cell[2] = 0.0
    slab.pbc = [True, True, False]
    check_structures(MolecularDataset.from_atoms([slab]))  # no cell vector is needed where nothing repeats
    slab.pbc = True
    with pytest.raises(DataError, match="singular"):
        check_structures(MolecularDataset.from_atoms([slab]))


def test_close_pairs_against_all_distances():
    rng = np.random.default_rng(0)
    pos = rng.uniform(0, 4, size=(400, 3))
    pos[:100, 0] = 1.0  # a plane of atoms
    system = np.sort(rng.integers(0, 6, size=400))
    distance = squareform(pdist(pos))
    expected = np.argwhere((distance < 0.4) & (system[:, None] == system) & (np.arange(400)[:, None] < np.arange(400)))
    assert len(expected) > 50
    np.testing.assert_array_equal(close_pairs(pos, system, 0.4), expected)


def test_missing_labels(ethanol):
    bare = MolecularDataset.from_atoms([molecule("H2O")])
    with pytest.raises(DataError, match=r"forces is needed.*the dataset has no labels"):
        check_targets(bare, ["forces"])
    only_energy = changed(ethanol, targets={"energy": ethanol.targets["energy"]})
    check_targets(only_energy, ["energy"])
    with pytest.raises(DataError, match=r"forces is needed.*the dataset has energy"):
        check_targets(only_energy, ["energy", "forces"])


def test_labels_that_are_not_finite(ethanol):
    forces, energy = ethanol.targets["forces"].copy(), ethanol.targets["energy"].copy()
    forces[9 * 5 + 1, 0] = np.nan
    energy[8] = np.inf
    with pytest.raises(DataError, match="structure 5: forces of atom 1 is"):
        check_targets(changed(ethanol, targets={"forces": forces, "energy": energy}), ["forces"])
    with pytest.raises(DataError, match="structure 8: energy is inf"):
        check_targets(changed(ethanol, targets={"forces": forces, "energy": energy}), ["energy"])


def test_units_of_forces(ethanol):
    kcal = changed(ethanol, targets={"forces": ethanol.targets["forces"] * 23.06})
    with pytest.warns(UnitsWarning, match="kcal/mol"):
        check_targets(kcal, ["forces"])
    absurd = changed(ethanol, targets={"forces": ethanol.targets["forces"] * 1000})
    with pytest.raises(DataError, match="allowed is up to 1000"):
        check_targets(absurd, ["forces"])


def test_structures_that_float32_cannot_hold():
    good, far = molecule("CH3CN"), molecule("CH3CN")
    far.positions[2] += 1500.0
    with pytest.raises(DataError, match=r"structure 1: the structure extends over 150\d Å; allowed are 1000 Å"):
        check_structures(MolecularDataset.from_atoms([good, far]))
    far.set_cell([7.0, 8.0, 9.0])
    far.pbc = True
    far.positions[2] += np.array([0.3, 0.0, 0.2])
    check_structures(MolecularDataset.from_atoms([good, far]))  # in another image
    far.positions[2] += 2e6
    with pytest.raises(DataError, match=r"structure 1: position of atom 2 is .* up to 1e\+06 Å"):
        check_structures(MolecularDataset.from_atoms([good, far]))


@pytest.mark.parametrize(
    ("cell", "message"),
    [([9, 9, 0.02], "structure 1: .* faces 0.02 Å apart"), ([9, 9, 2000], "structure 1: .* longer than")],
)
def test_cells_whose_search_would_not_end(cell, message):
    atoms = Atoms("He", cell=cell, pbc=True)
    with pytest.raises(DataError, match=message):
        check_structures(MolecularDataset.from_atoms([molecule("H2O"), atoms]))
