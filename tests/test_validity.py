"""What is outside of the training data is noticed, by elements and distances, and said once."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from ndem_zoo import Ensemble, MolecularDataset, NDeMCalculator, NDeMTorchMDNet
from ndem_zoo.errors import DataError, DataWarning, RangeWarning
from ndem_zoo.graph import all_pairs
from ndem_zoo.provenance import describe_data, limits_of, nearest_distances, wider
from ndem_zoo.validity import KINDS, TrainingRange, training_range

TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4, "cutoff": 4.0}
OPTIONS = {
    "preset": "md17_fast",
    "objective": "supervised",
    "backbone_options": TINY,
    "device": "cpu",
    "progress": False,
}
OPTIONS |= {"reference_energies": {"H": -13.6, "C": -1030.0, "O": -2042.0}}


def water(length: float, angle: float = 104.5) -> Atoms:
    """Equal bonds of a length in Å."""
    half = np.deg2rad(angle / 2)
    ends = [[length * np.sin(half) * sign, length * np.cos(half), 0.0] for sign in (1, -1)]
    return Atoms("OH2", [[0.0, 0.0, 0.0], *ends])


def of(*structures: Atoms) -> TrainingRange:
    return TrainingRange(limits_of(MolecularDataset.from_atoms(list(structures))))


def kinds(known: TrainingRange, *structures: Atoms) -> list[tuple[str, ...]]:
    return known.outside(MolecularDataset.from_atoms(list(structures)))


# ---------------------------------------------------------------------------------------------------------------- limits


def test_ranges_of_known_distances():
    limits = limits_of(MolecularDataset.from_atoms([water(0.96), water(1.06), water(0.97), Atoms("He")]))
    assert limits["seen"]["H-O"] == [[0.95, 1.10]], "bins of 0.05 Å, a gap of less than 0.3 Å is chance"
    hydrogens = [2 * length * np.sin(np.deg2rad(52.25)) for length in (0.96, 1.06)]
    assert limits["seen"]["H-H"][0][0] == pytest.approx(hydrogens[0], abs=0.05)
    assert limits["nearest"]["O"] == [pytest.approx(1.06), pytest.approx(1.06), None]
    assert limits["nearest"]["H"][:2] == [pytest.approx(1.06), pytest.approx(hydrogens[1])]
    assert limits["nearest"]["He"] == [None, None, None]
    chain = Atoms("CCC", [[0, 0, 0], [1.41, 0, 0], [4.22, 0, 0]])
    assert limits_of(MolecularDataset.from_atoms([chain]))["seen"]["C-C"] == [[1.4, 1.45], [2.8, 2.85]]


def test_ranges_of_crystals_include_images():
    salt = bulk("NaCl", "rocksalt", a=5.64)
    limits = limits_of(MolecularDataset.from_atoms([salt]))
    assert limits["seen"] == {"Na-Cl": [[2.8, 2.85]]}
    assert limits["nearest"]["Na"] == [pytest.approx(2.82)] * 3


def test_nearest_distances_are_those_of_sorting_each_atom():
    rng = np.random.default_rng(0)
    pos = rng.normal(size=(7, 3))
    src, dst = all_pairs([7])
    distance = np.linalg.norm(pos[src] - pos[dst], axis=1)
    order = rng.permutation(len(src))
    expected = [sorted(np.linalg.norm(np.delete(pos, i, 0) - pos[i], axis=1))[:3] for i in range(7)]
    np.testing.assert_allclose(nearest_distances(dst[order], distance[order], 7), expected)
    assert np.isinf(nearest_distances(dst[:0], distance[:0], 2)).all()


def test_two_trainings_together():
    first, second = (limits_of(MolecularDataset.from_atoms([water(length)])) for length in (0.91, 1.61))
    both = wider(first, second)
    assert both["seen"]["H-O"] == [[0.9, 0.95], [1.6, 1.65]]
    assert both["nearest"]["O"] == [pytest.approx(1.61), pytest.approx(1.61), None]
    assert wider({k: v for k, v in first.items() if k not in ("seen", "nearest")}, second)["seen"] == second["seen"]
    one, other = (MolecularDataset.from_atoms([water(length)]) for length in (0.91, 1.61))
    assert describe_data(other, None, describe_data(one, None))["limits"]["seen"] == both["seen"]


# --------------------------------------------------------------------------------------------------------------- outside


def test_what_is_outside():
    known = of(water(0.93), water(1.03))
    stretched = water(0.98)
    stretched.positions[1] *= 1.6 / 0.98
    torn = water(0.98)
    torn.positions[1] *= 3.2 / 0.98
    ends = [water(0.98), water(0.86), water(0.75), stretched, torn, Atoms("OF", [[0, 0, 0], [0, 0, 1.4]])]
    assert kinds(known, *ends) == [
        (),
        (),  # within the margin of 0.1 Å
        ("short",),
        ("unseen", "apart", "size"),
        ("unseen", "apart", "size"),
        ("element", "apart"),
    ]


def test_a_bond_that_is_torn_where_other_pairs_are_as_far_apart():
    """O-H at 2 Å is a distance that the other hydrogens have: that the atom is alone tells."""
    methanol = Atoms(
        "COH4",
        [[0, 0, 0], [1.43, 0, 0], [1.75, 0.9, 0], [-0.36, 1.03, 0], [-0.36, -0.51, 0.89], [-0.36, -0.51, -0.89]],
    )
    known = of(methanol)
    torn = methanol.copy()
    torn.positions[2] = torn.positions[1] + 2.0 * np.array([0.335, 0.942, 0.0])
    (found,) = kinds(known, torn)
    assert "apart" in found
    assert kinds(known, methanol) == [()]


def test_crystals():
    known = of(bulk("NaCl", "rocksalt", a=5.64))
    salt = [bulk("NaCl", "rocksalt", a=a) for a in (5.6, 5.3, 6.2)]
    assert kinds(known, *salt) == [(), ("short",), ("unseen", "apart")]


def test_old_records_know_the_shortest_distances_only():
    limits = limits_of(MolecularDataset.from_atoms([water(0.95)]))
    old = TrainingRange({name: value for name, value in limits.items() if name not in ("seen", "nearest")})
    assert kinds(old, water(0.95), water(0.7), water(1.5)) == [(), ("short",), ("size",)]


def test_damaged_records():
    with pytest.raises(DataError, match="record of the limits"):
        TrainingRange({"elements": {"Xx": 1}, "longest": None, "shortest": {}})
    with pytest.raises(DataError, match="record of the limits"):
        TrainingRange({"elements": {"H": 1}})


def test_genuine_frames_are_inside_and_distorted_ones_outside(ethanol):
    known = of(*(ethanol.atoms(i) for i in range(0, 1000, 10)))
    assert np.mean([bool(found) for found in known.outside(ethanol[1000:1200])]) < 0.05
    rng = np.random.default_rng(0)
    moved = ethanol[1000:1100].replace_positions(ethanol[1000:1100].pos + rng.normal(scale=0.2, size=(900, 3)))
    assert np.mean([bool(found) for found in known.outside(moved)]) > 0.9


# -------------------------------------------------------------------------------------------------------------- calculator


@pytest.fixture(scope="module")
def model(ethanol):
    return NDeMTorchMDNet(**OPTIONS).fit(ethanol.select(range(0, 1000, 10)), max_steps=2)


def test_the_calculator_warns_once_for_each_kind(model, ethanol, tmp_path):
    atoms = ethanol.atoms(1200)
    model.save(tmp_path / "model")
    atoms.calc = NDeMCalculator(tmp_path / "model")
    hydrogen, oxygen = 3, int(np.flatnonzero(atoms.numbers == 8)[0])
    hydrogen = int(np.argsort(np.where(atoms.numbers == 1, atoms.get_distances(oxygen, range(9)), 99))[0])
    away = atoms.positions[hydrogen] - atoms.positions[oxygen]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RangeWarning)
        atoms.get_forces()
    assert atoms.calc.outside == dict.fromkeys(KINDS, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RangeWarning)
        for step in range(5):
            atoms.positions[hydrogen] = atoms.positions[oxygen] + away * (1.4 + 0.01 * step)
            atoms.get_forces()
    said = [str(w.message) for w in caught if issubclass(w.category, RangeWarning)]
    assert (
        len(said) == len({text.split(",")[1] for text in said}) == sum(n > 0 for n in atoms.calc.outside.values()) >= 2
    )
    assert any(") has one of its 3 neighbors " in text for text in said)
    assert any("Å apart, a distance that no such pair has in the training data" in text for text in said)
    assert atoms.calc.outside["unseen"] == atoms.calc.outside["apart"] == 5
    assert atoms.calc.outside["short"] == 0


def test_atoms_that_are_too_near(model, ethanol):
    atoms = ethanol.atoms(1200)
    atoms.calc = NDeMCalculator(model)
    atoms.positions[1] = atoms.positions[0] + 0.6 * (atoms.positions[1] - atoms.positions[0])
    with pytest.warns(RangeWarning, match=r"nearer than any such pair in the training data.*calculator\.outside"):
        atoms.get_potential_energy()


def test_a_molecule_that_falls_apart(model, ethanol):
    atoms = ethanol.atoms(1200)
    atoms.calc = NDeMCalculator(model)
    atoms.positions[8] += [9.0, 0.0, 0.0]
    with pytest.warns(RangeWarning, match="farther than any atoms of a molecule in the training data"):
        atoms.get_potential_energy()
    assert {kind for kind, n in atoms.calc.outside.items() if n} == {"apart", "size"}


def test_periodic_structures_are_looked_at_when_edges_are_made(ethanol):
    cells = {"cell": np.tile(8.0 * np.eye(3), (4, 1, 1)), "pbc": np.ones((4, 3), dtype=bool)}
    frames = MolecularDataset(**ethanol[:4].columns() | cells)
    model = NDeMTorchMDNet(**OPTIONS).fit(frames, max_steps=1)
    atoms = frames.atoms(0)
    atoms.calc = NDeMCalculator(model)
    atoms.get_potential_energy()
    assert not any(atoms.calc.outside.values())
    atoms.positions[1] = atoms.positions[0] + 0.5 * (atoms.positions[1] - atoms.positions[0])
    with pytest.warns(RangeWarning, match="nearer than any such pair"):
        atoms.get_potential_energy()


def test_unknown_elements_are_warned_about_once(ethanol):
    model = NDeMTorchMDNet(**OPTIONS, unknown_elements="warn").fit(ethanol[:20], max_steps=1)
    atoms = ethanol.atoms(30)
    atoms.calc = NDeMCalculator(model)
    atoms.numbers[3] = 9
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        for step in range(4):
            atoms.positions[0, 0] += 0.01 * step + 0.001
            atoms.get_potential_energy()
    assert len([w for w in caught if "atom 3 is F" in str(w.message)]) == 1
    assert atoms.calc.outside["element"] == 4


def test_models_that_do_not_know_their_data_say_nothing(model, ethanol):
    unknown = copy.deepcopy(model)
    unknown.training_data_.pop("limits")
    assert training_range(unknown) is None
    assert training_range(Ensemble([model, unknown])) is None
    atoms = ethanol.atoms(0)
    atoms.positions *= 1.5
    atoms.calc = NDeMCalculator(unknown)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RangeWarning)
        atoms.get_potential_energy()


def test_what_the_members_of_an_ensemble_saw_counts_together(ethanol):
    halves = [ethanol[:10], ethanol[10:20]]
    members = [NDeMTorchMDNet(**OPTIONS).fit(half, max_steps=1) for half in halves]
    known = training_range(Ensemble(members))
    assert known.longest == max(limits_of(half)["longest"] for half in halves)
