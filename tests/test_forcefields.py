"""Force fields: against RDKit, against potentials that are known, against labels of genuine frames left out of the fit."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.forcefields import ForceField, SumOfForceFields, make_force_field, valence
from ndem_zoo.forcefields import linear as linear_module
from ndem_zoo.forcefields.linear import _Sums, ridge
from ndem_zoo.forcefields.pairs import PairPotential
from ndem_zoo.forcefields.valence import ValenceForceField
from ndem_zoo.graph import ALL_PAIRS_UP_TO, Nearest
from ndem_zoo.registry import FORCE_FIELDS

KCAL = units.kcal / units.mol


def frames(name: str, shared_data, numbers) -> MolecularDataset:
    """Genuine MD17 frames in eV and Å."""
    with np.load(shared_data / "md17" / f"md17_{name}.npz") as raw:
        z, pos, energy, forces = raw["z"], raw["R"][numbers], raw["E"].reshape(-1)[numbers], raw["F"][numbers]
    return MolecularDataset(
        np.tile(z, len(pos)),
        pos.reshape(-1, 3),
        np.arange(len(pos) + 1) * len(z),
        targets={"energy": energy * KCAL, "forces": forces.reshape(-1, 3) * KCAL},
        name=name,
    )


def rms(values: np.ndarray) -> float:
    """Root mean square in kcal/mol/Å."""
    return float(np.sqrt(np.square(values).mean())) / KCAL


def labeled(structures: list[Atoms], energy_forces) -> MolecularDataset:
    """Structures with the labels of a function of `Atoms`."""
    labels = [energy_forces(atoms) for atoms in structures]
    dataset = MolecularDataset.from_atoms(structures)
    return dataset.replace_targets(
        {"energy": np.array([e for e, _ in labels]), "forces": np.concatenate([f for _, f in labels])}
    )


@pytest.fixture(scope="module")
def ethanol_frames(ethanol):
    """60 frames of the embedded ethanol for fitting, 40 others."""
    return ethanol.select(np.arange(0, 1200, 20)), ethanol.select(np.arange(1210, 2000, 20))


@pytest.fixture(scope="module")
def fitted(ethanol_frames):
    """Every force field that needs no further package, ready for ethanol."""
    return {
        name: make_force_field(name).fit(ethanol_frames[0]) for name in ("pairs", "valence", "mmff94", "mmff94+pairs")
    }


# -------------------------------------------------------------------------------------------------------- what all must do


@pytest.mark.parametrize("name", ["pairs", "valence", "mmff94", "mmff94+pairs"])
def test_forces_are_the_derivative(fitted, ethanol_frames, name):
    dataset, step = ethanol_frames[1].select([0, 7]), 1e-5
    forces = fitted[name].columns(dataset)["forces"]
    for atom, axis in ((0, 0), (4, 1), (17, 2)):
        energies = []
        for sign in (1, -1):
            pos = dataset.pos.copy()
            pos[atom, axis] += sign * step
            energies.append(fitted[name].columns(dataset.replace_positions(pos))["energy"].sum())
        assert -(energies[0] - energies[1]) / (2 * step) == pytest.approx(forces[atom, axis], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["pairs", "valence", "mmff94"])
def test_turned_shifted_mirrored(fitted, ethanol_frames, name):
    dataset = ethanol_frames[1].select([3])
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    before = fitted[name].columns(dataset)
    after = fitted[name].columns(dataset.replace_positions(dataset.pos @ (-turn) + 1.5))
    np.testing.assert_allclose(after["energy"], before["energy"], atol=1e-10)
    np.testing.assert_allclose(after["forces"], before["forces"] @ (-turn), atol=1e-9)
    assert np.abs(before["forces"]).max() > 0.1


@pytest.mark.parametrize("name", ["pairs", "valence", "mmff94", "mmff94+pairs"])
def test_saved_constants_make_the_same_force_field(fitted, ethanol_frames, name):
    copy = make_force_field(name)
    copy.load_state_dict({key: value.clone() for key, value in fitted[name].state_dict().items()})
    for one, other in zip(
        copy.columns(ethanol_frames[1]).values(), fitted[name].columns(ethanol_frames[1]).values(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    before = [buffer.dtype for buffer in copy.buffers()]
    assert [buffer.dtype for buffer in copy.float().buffers()] == before


def test_less_the_force_field_and_again_with_it(fitted, ethanol_frames):
    rest = fitted["mmff94"].subtract(ethanol_frames[1])
    found = fitted["mmff94"].columns(ethanol_frames[1])
    for name in ("energy", "forces"):
        np.testing.assert_allclose(rest.targets[name] + found[name], ethanol_frames[1].targets[name], atol=1e-10)
    np.testing.assert_array_equal(rest.pos, ethanol_frames[1].pos)


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"no force field 'uff'; there are gfn2-xtb, mmff94, pairs, valence"):
        make_force_field("mmff94+uff")
    assert all(isinstance(make_force_field(name), ForceField) for name in FORCE_FIELDS)


@pytest.mark.parametrize("name", ["valence+mmff94", "mmff94+mmff94", "pairs+gfn2-xtb"])
def test_published_force_fields_come_first(name):
    """What is not fitted does not describe what others left: energies would count twice."""
    with pytest.raises(
        ConfigError, match=r"part 1 of a sum of force fields is (MMFF94|GFN2xTB), which describes whole"
    ):
        make_force_field(name)


@pytest.mark.parametrize("name", ["pairs", "valence"])
def test_fits_need_forces(ethanol_frames, name):
    without = ethanol_frames[0].with_targets(["energy"])
    with pytest.raises(DataError, match="is fitted to forces; the dataset has 60 structures with \\['energy'\\]"):
        make_force_field(name).fit(without)


# ------------------------------------------------------------------------------------------------------------------- MMFF94

MOLECULES = [
    "CC#N", "C#CCO", "c1ccccc1C(=O)Nc1ccncc1", "O=CC=CO", "CS(=O)(=O)NC", "C1CC1N", "FC(F)(Cl)C=C", "O=c1cc[nH]c(=O)[nH]1",
    "CN=C=O", "C=C=C", "[O-][N+](=O)CC", "C1=CC=C2C(=C1)C=CN2", "CSSC", "OP(=O)(O)OC", "NC(=[NH2+])N", "[NH3+]CC([O-])=O",
]  # fmt: skip


@pytest.mark.parametrize("smiles", MOLECULES)
def test_mmff94_is_rdkits(smiles):
    """Energies and forces of RDKit's own implementation, on distorted geometries; kcal/mol."""
    chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import AllChem

    from ndem_zoo.forcefields import mmff94 as module
    from ndem_zoo.forcefields.molecules import keys_of, padded, present

    mol = chem.AddHs(chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(mol, randomSeed=3) == 0
    pos = mol.GetConformer().GetPositions()
    pos = pos + 0.05 * np.random.default_rng(0).standard_normal(pos.shape)
    z = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    dataset = MolecularDataset(z, pos, np.array([0, len(z)]))
    ours = module.MMFF94()
    for name, (atoms, constants) in module._constants(mol).items():
        setattr(ours, f"{name}_atoms", padded([atoms], torch.long))
        setattr(ours, f"{name}_constants", padded([constants], torch.float64))
        setattr(ours, f"{name}_present", present([atoms]))
    ours.keys = torch.as_tensor(keys_of(dataset))
    field = AllChem.MMFFGetMoleculeForceField(mol, AllChem.MMFFGetMoleculeProperties(mol))
    flat = pos.reshape(-1).tolist()
    energy = field.CalcEnergy(flat)  # Pitfall: CalcGrad alone would use distances of the conformer
    found = ours.columns(dataset)
    assert found["energy"][0] / KCAL == pytest.approx(energy, abs=2e-4)
    np.testing.assert_allclose(found["forces"].ravel() / KCAL, -np.array(field.CalcGrad(flat)), atol=1e-3)


def test_mmff94_of_several_molecules_side_by_side(shared_data):
    """Molecules of different size in one batch: each as it is alone."""
    parts = [frames(name, shared_data, np.arange(3)) for name in ("ethanol", "aspirin", "uracil")]
    together = MolecularDataset.concatenate(parts)
    found = make_force_field("mmff94").fit(together).columns(together)
    alone = [make_force_field("mmff94").fit(part).columns(part) for part in parts]
    np.testing.assert_allclose(found["energy"], np.concatenate([a["energy"] for a in alone]), atol=1e-10)
    np.testing.assert_allclose(found["forces"], np.concatenate([a["forces"] for a in alone]), atol=1e-9)


def test_mmff94_explains_genuine_forces(shared_data):
    """Its correlation with the DFT labels of ethanol: 0.955 to 0.977 on samples of 60 frames."""
    dataset = frames("ethanol", shared_data, np.arange(0, 6000, 100)[:58])
    forces = make_force_field("mmff94").fit(dataset).columns(dataset)["forces"]
    assert 0.95 < np.corrcoef(forces.ravel(), dataset.targets["forces"].ravel())[0, 1] < 0.985


# ---------------------------------------------------------------------------------------------------------- pair potentials


def morse(atoms: Atoms) -> tuple[float, np.ndarray]:
    """Energy and forces of Morse pairs, 0.4 eV deep, of atoms in no cell."""
    difference = atoms.positions[:, None] - atoms.positions
    r = np.linalg.norm(difference, axis=-1) + np.eye(len(atoms)) * 1e9
    decay = np.exp(-1.6 * (r - 1.5))
    slope = 0.4 * 2 * 1.6 * (decay - decay**2)  # dE/dr
    forces = -(slope / r)[..., None] * difference
    return 0.5 * 0.4 * (decay**2 - 2 * decay).sum(), forces.sum(axis=1)


def clusters(n: int, seed: int) -> list[Atoms]:
    rng = np.random.default_rng(seed)
    base = np.array([[0, 0, 0], [1.5, 0, 0], [0, 1.5, 0], [0, 0, 1.5], [1.5, 1.5, 0], [1.5, 0, 1.5]])
    return [Atoms("CHCHCH", base + 0.12 * rng.standard_normal(base.shape)) for _ in range(n)]


def test_pair_potential_finds_morse():
    train, test = (labeled(clusters(n, seed), morse) for n, seed in ((60, 1), (20, 2)))
    fitted = PairPotential().fit(train)
    error = fitted.subtract(test).targets["forces"]
    assert np.sqrt(np.square(error).mean()) < 0.06 * np.sqrt(np.square(test.targets["forces"]).mean())
    energy = fitted.subtract(test).targets["energy"]
    assert energy.std() < 0.06 * test.targets["energy"].std()


def test_pair_potential_of_one_element_finds_morse():
    """More coordinates than constants: the derivatives of the fit are taken the other way round."""

    def alike(atoms: Atoms) -> Atoms:
        atoms.numbers[:] = 6
        return atoms

    train, test = (labeled([alike(a) for a in clusters(n, seed)], morse) for n, seed in ((60, 1), (20, 2)))
    fitted = PairPotential().fit(train)
    assert 3 * train.counts[0] > len(fitted.coefficients)
    error = fitted.subtract(test).targets["forces"]
    assert np.sqrt(np.square(error).mean()) < 0.06 * np.sqrt(np.square(test.targets["forces"]).mean())


def test_pair_potential_below_the_shortest_distance_pushes_no_harder(fitted, ethanol_frames):
    """Nothing is known there: the curve goes on straight, where Gaussians alone could pull."""
    pair, field = np.array([[0.0, 0, 0], [0.0, 0, 1.0]]), fitted["pairs"]
    kind = int(field.pair_class[6, 8])
    shortest = float(field.shortest[kind])

    def curve(r: float) -> float:  # without the cutoff's factor, which is not straight
        dataset = MolecularDataset(np.array([6, 8]), pair * r, np.array([0, 2]))
        return field.columns(dataset)["energy"][0] / (0.5 * (np.cos(np.pi * r / 5.0) + 1.0))

    values = [curve(factor * shortest) for factor in (0.7, 0.8, 0.9)]
    assert values[0] - 2 * values[1] + values[2] == pytest.approx(0.0, abs=1e-9 * abs(values[0] - values[1]))
    assert abs(values[0] - values[1]) > 0.001
    beyond = MolecularDataset(np.array([6, 8]), pair * 5.5, np.array([0, 2]))
    assert not field.columns(beyond)["forces"].any()


def test_pair_potential_in_a_crystal():
    """A cell and its supercell: twice the energy, the same forces."""
    rng, structures = np.random.default_rng(0), []
    for _ in range(6):
        atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
        atoms.positions += 0.1 * rng.standard_normal(atoms.positions.shape)
        structures.append(atoms)
    dataset = labeled(structures, lambda atoms: (0.0, rng.standard_normal((len(atoms), 3))))
    fitted = PairPotential().fit(dataset)
    one, two = (
        fitted.columns(MolecularDataset.from_atoms([a])) for a in (structures[0], structures[0].repeat((2, 1, 1)))
    )
    assert two["energy"][0] == pytest.approx(2 * one["energy"][0])
    np.testing.assert_allclose(two["forces"][: len(structures[0])], one["forces"], atol=1e-9)


def test_elements_that_never_meet_take_no_constants_and_feel_nothing():
    """Two kinds of clusters: pairs between them are not numbered, and their atoms pass through each other."""
    carbon = [Atoms("C6", atoms.positions) for atoms in clusters(10, 1)]
    helium = [Atoms("He6", atoms.positions) for atoms in clusters(10, 2)]
    fitted = PairPotential().fit(labeled(carbon + helium, morse))
    assert fitted.n_classes == 2
    mixed = MolecularDataset(np.array([6, 2]), np.array([[0, 0, 0], [0, 0, 1.2]]), np.array([0, 2]))
    assert not fitted.columns(mixed)["forces"].any()
    same = MolecularDataset(np.array([6, 6]), np.array([[0, 0, 0], [0, 0, 1.2]]), np.array([0, 2]))
    assert np.abs(fitted.columns(same)["forces"]).max() > 0.1


def test_pair_potential_refuses_other_elements_and_too_few_neighbors(fitted, ethanol_frames):
    strange = MolecularDataset(np.array([1, 8, 17]), np.eye(3), np.array([0, 2, 3]))
    with pytest.raises(DataError, match=r"structure 1: atomic number 17 .* \[1, 6, 8\]"):
        fitted["pairs"].columns(strange)
    batch = ethanol_frames[0].select([0]).to_batch(5.0, torch.float64)
    with pytest.raises(ConfigError, match=r"needs all neighbors up to 5\.0 Å; the edges are those to the 4 nearest"):
        fitted["pairs"](batch.replace(nearest=Nearest(4)))


# ------------------------------------------------------------------------------------------------------------------ valence


def test_valence_force_field_predicts_frames_left_out(shared_data):
    """What cross-validation says, holds; and on DFT forces of a molecule at 500 K it is far better than MMFF94."""
    train, test = (frames("malonaldehyde", shared_data, n) for n in (np.arange(0, 5000, 50), np.arange(25, 5000, 50)))
    fitted = ValenceForceField().fit(train)
    error = rms(fitted.subtract(test).targets["forces"])
    assert error == pytest.approx(float(fitted.force_error) / KCAL, rel=0.25)
    assert error < 0.1 * rms(test.targets["forces"])
    assert error < 0.3 * rms(make_force_field("mmff94").fit(train).subtract(test).targets["forces"])


@pytest.mark.parametrize(("name", "seed"), [("ethanol", 4), ("malonaldehyde", 0), ("malonaldehyde", 1)])
def test_valence_force_field_does_not_depend_on_the_order_of_the_atoms(shared_data, name, seed):
    """Atoms numbered otherwise, the same molecule: the same fit."""
    train, test = (frames(name, shared_data, numbers) for numbers in (np.arange(0, 2400, 40), np.arange(20, 420, 20)))
    order = np.random.default_rng(seed).permutation(9)

    def renumbered(dataset: MolecularDataset) -> MolecularDataset:
        rows = (dataset.ptr[:-1, None] + order).ravel()
        new = MolecularDataset(dataset.z[rows], dataset.pos[rows], dataset.ptr)
        return new.replace_targets({"energy": dataset.targets["energy"], "forces": dataset.targets["forces"][rows]})

    found = ValenceForceField().fit(renumbered(train)).columns(renumbered(test))
    expected = ValenceForceField().fit(train).columns(test)
    np.testing.assert_allclose(found["energy"], expected["energy"], atol=1e-6)
    rows = (test.ptr[:-1, None] + order).ravel()
    np.testing.assert_allclose(found["forces"], expected["forces"][rows], atol=1e-6)


def test_equal_hydrogens_share_constants(fitted):
    """Methyl's three hydrogens are one kind: exchanging two of them changes nothing but the numbers."""
    kinds = fitted["valence"].bonds_class[0, :, 0].tolist()
    assert sorted(np.bincount(kinds).tolist()) == [1, 1, 1, 2, 3]  # C-C, C-O, O-H, two and three C-H


def test_linear_molecules_have_finite_forces():
    """Torsions and angles of 180 degrees, in which inverse functions have no derivative."""
    acetylene = Atoms("HCCH", [[0, 0, -1.66], [0, 0, -0.6], [0, 0, 0.6], [0, 0, 1.66]])
    rng = np.random.default_rng(0)
    structures = [acetylene] + [acetylene.copy() for _ in range(9)]
    for atoms in structures[1:]:
        atoms.positions += 0.05 * rng.standard_normal((4, 3))
    dataset = labeled(structures, morse)
    for name in ("valence", "mmff94"):
        found = make_force_field(name).fit(dataset).columns(dataset)
        assert np.isfinite(found["forces"]).all(), name
        np.testing.assert_allclose(found["forces"][:4, :2], 0.0, atol=1e-6)


def decanol(n: int) -> MolecularDataset:
    """Shaken copies of a molecule that is too large for all pairs, with forces of no meaning."""
    chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import AllChem

    mol = chem.AddHs(chem.MolFromSmiles("C" * 10 + "O"))
    assert AllChem.EmbedMolecule(mol, randomSeed=1) == 0
    z, pos = [atom.GetAtomicNum() for atom in mol.GetAtoms()], mol.GetConformer().GetPositions()
    rng = np.random.default_rng(0)
    shaken = np.tile(pos, (n, 1)) + 0.02 * rng.standard_normal((n * len(z), 3))
    dataset = MolecularDataset(np.tile(z, n), shaken, len(z) * np.arange(n + 1))
    return dataset.replace_targets({"energy": np.zeros(n), "forces": rng.standard_normal((n * len(z), 3))})


@pytest.mark.parametrize("name", ["valence", "mmff94"])
def test_molecules_beyond_all_pairs(name):
    """Larger ones need a search for neighbors, which no force field with bonds looks at."""
    dataset = decanol(3)
    assert dataset.counts[0] > ALL_PAIRS_UP_TO
    field = make_force_field(name).fit(dataset)
    found, direct = field.columns(dataset), field(dataset.to_batch(5.0, torch.float64))
    np.testing.assert_allclose(found["energy"], direct.energy.numpy(), atol=1e-10)
    np.testing.assert_allclose(found["forces"], direct.forces.numpy(), atol=1e-9)
    assert found["energy"].std() > 1e-3


@pytest.mark.parametrize("name", ["pairs", "valence"])
def test_atoms_alone_have_no_terms(name):
    dataset = labeled([Atoms("H")] * 3, lambda atoms: (0.0, np.zeros((1, 3))))
    found = make_force_field(name).fit(dataset).columns(dataset)
    assert not found["energy"].any()
    assert not found["forces"].any()


def test_constants_of_other_molecules_can_be_loaded(fitted, ethanol_frames):
    """Also into a force field that has been used: nothing of before stays."""
    used = ValenceForceField().fit(labeled([Atoms("HF", [[0, 0, 0], [0, 0, 0.92]])] * 3, morse))
    used.load_state_dict(fitted["valence"].state_dict())
    for name, values in fitted["valence"].columns(ethanol_frames[1]).items():
        np.testing.assert_array_equal(used.columns(ethanol_frames[1])[name], values)


def test_batches_are_made_where_the_constants_are(fitted, ethanol_frames):
    """After a prediction on a GPU the prior is there: labels less its own must be found all the same."""
    for name in ("pairs", "mmff94+pairs"):
        moved = copy.deepcopy(fitted[name]).to("meta")
        _, batch = next(iter(moved.batches(ethanol_frames[1])))
        assert batch.pos.device.type == batch.z.device.type == "meta"


def test_isomers_with_equal_elements_are_refused():
    """Dimethyl ether and ethanol in one order of elements: bonds could not be told from the elements."""
    from ase.build import molecule

    ethanol, ether = molecule("CH3CH2OH"), molecule("CH3OCH3")
    ether = ether[
        [*np.flatnonzero(ether.numbers == 6), *np.flatnonzero(ether.numbers == 8), *np.flatnonzero(ether.numbers == 1)]
    ]
    ethanol = ethanol[
        [
            *np.flatnonzero(ethanol.numbers == 6),
            *np.flatnonzero(ethanol.numbers == 8),
            *np.flatnonzero(ethanol.numbers == 1),
        ]
    ]
    dataset = labeled([ethanol, ether], morse)
    with pytest.raises(DataError, match=r"structures . and . have the same elements in the same order but other bonds"):
        make_force_field("valence").fit(dataset)


def test_other_molecules_are_refused(fitted):
    water = MolecularDataset.from_atoms([Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])])
    for name in ("valence", "mmff94"):
        with pytest.raises(DataError, match=r"structure 0: .* has no molecule with the atomic numbers \[8, 1, 1\]"):
            fitted[name].columns(water)
        with pytest.raises(DataError, match=r"structure 0 of the batch: no molecule .* \[8, 1, 1\]"):
            fitted[name](water.to_batch(5.0, torch.float64))


def test_the_same_atoms_in_another_order_are_refused(fitted, ethanol_frames):
    """Terms are known by the numbers of atoms."""
    atoms = ethanol_frames[1].atoms(0)[::-1]
    with pytest.raises(DataError, match=r"structure 0: .* in this order"):
        fitted["valence"].columns(MolecularDataset.from_atoms([atoms]))


# --------------------------------------------------------------------------------------------------------------------- fits


def test_ridge_is_the_least_squares_solution_and_its_error_that_of_left_out_folds():
    rng = np.random.default_rng(0)
    rows, truth = (
        torch.as_tensor(rng.standard_normal((90, 4))),
        torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64),
    )
    y = rows @ truth + 0.1 * torch.as_tensor(rng.standard_normal(90))
    parts = [slice(i, i + 30) for i in (0, 30, 60)]
    free = torch.zeros(10, dtype=torch.bool)
    folds = [_Sums.of(rows[p].T.reshape(4, 10, 3), y[p].reshape(10, 3), free) for p in parts]
    found, error = ridge(folds)
    np.testing.assert_allclose(found, np.linalg.lstsq(rows.numpy(), y.numpy(), rcond=None)[0], atol=1e-2)
    left_out = []
    for p in parts:
        keep = torch.ones(90, dtype=torch.bool)
        keep[p] = False
        left_out.append((rows[p] @ torch.linalg.lstsq(rows[keep], y[keep]).solution - y[p]).square())
    assert float(error) == pytest.approx(float(torch.cat(left_out).mean().sqrt()), rel=0.02)


@pytest.mark.parametrize("name", ["pairs", "valence"])
def test_derivatives_along_coordinates_and_along_features_agree(fitted, ethanol_frames, name):
    field = fitted[name]
    batch = ethanol_frames[1].select([0, 5]).to_batch(5.0, torch.float64)
    few = field._design(batch)
    pos = batch.pos.clone().requires_grad_()
    features = field.features(batch.replace(pos=pos)).sum(0)
    for column in (0, len(features) // 2, len(features) - 1):
        (gradient,) = torch.autograd.grad(features[column], pos, retain_graph=True)
        torch.testing.assert_close(few[column], -gradient, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["pairs", "valence"])
def test_long_data_are_thinned_but_nothing_is_forgotten(ethanol_frames, monkeypatch, name):
    """A molecule that is there once, between frames that are looked at."""
    monkeypatch.setattr(linear_module, "MAX_STRUCTURES", 10)
    rare = labeled([Atoms("HF", [[0, 0, 0], [0, 0, 0.95]])], lambda atoms: (0.0, np.zeros((2, 3))))
    train = MolecularDataset.concatenate([ethanol_frames[0][:31], rare, ethanol_frames[0][31:]])
    field, looked_at = make_force_field(name), []
    monkeypatch.setattr(field, "prepare", lambda part: (looked_at.append(len(part)), type(field).prepare(field, part)))
    found = field.fit(train).columns(train)
    assert np.isfinite(found["forces"]).all()
    assert 10 <= looked_at[0] <= 12


def test_fixed_atoms_do_not_count(monkeypatch):
    """Forces on fixed atoms may be nonsense."""
    monkeypatch.setattr(linear_module, "RIDGES", (1e-6,))
    dataset = labeled(clusters(30, 5), morse)
    nonsense = dataset.targets["forces"].copy()
    fixed = np.zeros(len(dataset.z), dtype=bool)
    fixed[dataset.ptr[:-1]] = True
    nonsense[fixed] = 1e3
    columns = {
        **dataset.columns(),
        "fixed": fixed,
        "targets": {"energy": dataset.targets["energy"], "forces": nonsense},
    }
    found = PairPotential().fit(MolecularDataset(**columns)).subtract(dataset).targets["forces"]
    assert np.sqrt(np.square(found).mean()) < 0.03 * np.sqrt(np.square(dataset.targets["forces"]).mean())


def test_a_sum_is_fitted_to_what_is_left(ethanol_frames, fitted):
    both = fitted["mmff94+pairs"]
    assert isinstance(both, SumOfForceFields)
    train, test = ethanol_frames
    second = PairPotential().fit(fitted["mmff94"].subtract(train))
    expected = fitted["mmff94"].columns(test)["forces"] + second.columns(test)["forces"]
    np.testing.assert_allclose(both.columns(test)["forces"], expected, atol=1e-9)
    left = [rms(fitted[name].subtract(test).targets["forces"]) for name in ("mmff94", "mmff94+pairs")]
    assert left[1] < 0.8 * left[0]
    assert float(both.force_error) == float(second.force_error)


# --------------------------------------------------------------------------------------------------------------- GFN2-xTB


def test_gfn2_xtb_gives_the_labels_of_generated_frames(shared_data):
    """The data's own level of theory: energies and forces of an independent program run."""
    pytest.importorskip("tblite", reason="needs tblite (extra xtb)")
    with np.load(shared_data / "generated_xtb" / "md17like_ethanol_gfn2.npz") as raw:
        z, pos, energy, forces = raw["z"], raw["R"][:4], raw["E"].reshape(-1)[:4], raw["F"][:4]
    dataset = MolecularDataset(np.tile(z, 4), pos.reshape(-1, 3), np.arange(5) * len(z))
    found = make_force_field("gfn2-xtb").fit(dataset).columns(dataset)
    np.testing.assert_allclose(np.diff(found["energy"]) / KCAL, np.diff(energy), atol=1e-3)
    np.testing.assert_allclose(found["forces"].reshape(forces.shape) / KCAL, forces, atol=1e-2)


def test_gfn2_xtb_says_why_it_failed():
    pytest.importorskip("tblite", reason="needs tblite (extra xtb)")
    field = make_force_field("gfn2-xtb")
    with pytest.raises(DataError, match="structure 0: atomic number 92; GFN2-xTB knows 1 to 86"):
        field.fit(MolecularDataset.from_atoms([Atoms("U")]))
    close = MolecularDataset.from_atoms([Atoms("H2", [[0, 0, 0], [0, 0, 0.0]])])
    with pytest.raises(DataError, match="structure 0 of the batch: GFN2-xTB failed"):
        field.columns(close)


def test_gfn2_xtb_serves_threads_and_outlives_its_process():
    """Threads get the answers to their own questions; a process that is gone is an error once, and then there is a new one."""
    pytest.importorskip("tblite", reason="needs tblite (extra xtb)")
    field = make_force_field("gfn2-xtb")
    molecules = [MolecularDataset.from_atoms([Atoms("H2", [[0, 0, 0], [0, 0, r]])]) for r in np.linspace(0.6, 1.2, 6)]
    alone = [field.columns(dataset)["energy"][0] for dataset in molecules]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda dataset: field.columns(dataset)["energy"][0], 3 * molecules))
    np.testing.assert_allclose(together, 3 * alone, rtol=1e-12)
    worker = field._start()
    worker.kill()
    worker.wait()
    worker.poll = lambda: None  # as if it had gone just after it was looked at
    with pytest.raises(ConfigError, match="the process that runs GFN2-xTB ended"):
        field.columns(molecules[0])
    assert field.columns(molecules[0])["energy"][0] == pytest.approx(alone[0], rel=1e-12)


def test_gfn2_xtb_refuses_slabs():
    slab = Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]], cell=[8, 8, 0], pbc=[True, True, False])
    with pytest.raises(DataError, match=r"structure 0: pbc is \[True, True, False\]; GFN2-xTB is for molecules and"):
        make_force_field("gfn2-xtb").columns(MolecularDataset.from_atoms([slab]))


def test_terms_of_the_valence_force_field_are_what_their_names_say():
    """Angles and torsions by ASE, volumes by the determinant; of one molecule of five atoms."""
    pos = np.random.default_rng(4).normal(size=(5, 3))
    atoms = Atoms("C5", pos)
    zeros = torch.zeros(1, 1, 3, dtype=torch.float64)

    def values(name):
        group = valence.GROUPS[name]
        ends = torch.as_tensor(np.array([[pos[head] - pos[tail]] for tail, head in group.vectors]))[:, None]
        lengths = ends.norm(dim=-1)
        found = group.values(list(ends / lengths.unsqueeze(-1)), list(lengths), zeros[..., : group.n_references])
        assert len(found) == group.n_values
        return [float(value) for value in found]

    def morse(*row):
        return 1 - np.exp(-valence.STIFFNESS * atoms.get_distance(*row))

    def cos(*row):
        return np.cos(np.radians(atoms.get_angle(*row)))

    c, x, y = cos(0, 1, 2), morse(0, 1), morse(1, 2)
    assert values("bonds") == pytest.approx([x, x**2, x**3, x**4])
    assert values("pairs") == pytest.approx([np.exp(-atoms.get_distance(0, 1) / r) for r in valence.RANGES])
    assert values("angles") == pytest.approx([c, c**2, c**3, x * y, x * c, y * c])
    assert values("bends") == pytest.approx([cos(1, 0, 2) * cos(3, 0, 4)])
    units = [(pos[k] - pos[0]) / np.linalg.norm(pos[k] - pos[0]) for k in (1, 2, 3)]
    assert values("planes") == pytest.approx([np.linalg.det(units) ** power for power in (2, 4)])
    first, last, x = cos(0, 1, 2), cos(1, 2, 3), morse(1, 2)
    sines = np.sqrt((1 - first**2) * (1 - last**2))
    t = sines * np.cos(np.radians(atoms.get_dihedral(0, 1, 2, 3)))
    couplings = [t * x, t**2 * x, t * first, t * last, t**2 * first, t**2 * last, first * last, t * first * last]
    assert values("torsions") == pytest.approx([t, t**2, t**3, *couplings])
