"""Bonds of given geometries, against what the molecules are known to be."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import read as read_ase

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.md17 import read_md17
from ndem_zoo.datasets.qm9 import read_qm9
from ndem_zoo.datasets.store import open_store
from ndem_zoo.errors import DataError
from ndem_zoo.featurizers.conformer import ConformerGraph
from ndem_zoo.featurizers.terms import find_terms, side_of
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet
from ndem_zoo.topology import MD17_TEMPLATES, TERM_WIDTHS, add_hinges, add_terms, perceive, with_internal_coordinates

chem = pytest.importorskip("rdkit.Chem")
pytestmark = pytest.mark.rdkit


def plain(mol) -> str:
    """Canonical SMILES without hydrogens and stereo, for comparison."""
    return chem.MolToSmiles(chem.RemoveHs(mol), isomericSmiles=False)


def canonical(smiles: str) -> str:
    return plain(chem.MolFromSmiles(smiles))


def dataset_of(structures: list[Atoms], **columns) -> MolecularDataset:
    whole = MolecularDataset.from_atoms(structures)
    return MolecularDataset(**{**whole.columns(), **columns})


def rows_of(table: np.ndarray) -> set[tuple[int, ...]]:
    """Terms without padding."""
    return {tuple(row) for row in table.tolist() if row[0] >= 0}


# ---------------------------------------------------------------------------------------------------------- molecules


@pytest.mark.parametrize("name", ["aspirin", "ethanol", "malonaldehyde", "uracil"])
def test_every_frame_of_md17_is_its_molecule(shared_data, name):
    """Genuine frames at 500 K: together, and the loudest of them each on its own."""
    frames = read_md17(shared_data / "md17" / f"md17_{name}.npz")
    found = perceive(frames)
    assert [plain(mol) for mol in found.mols] == [canonical(MD17_TEMPLATES[name])]
    assert found.index.tolist() == [0] * len(frames)
    square = np.add.reduceat(np.square(frames.targets["forces"]).sum(axis=1), frames.ptr[:-1])
    alone = [perceive(frames.select([number])).mols for number in np.argsort(square)[-25:]]
    assert {plain(mols[0]) for mols in alone} == {canonical(MD17_TEMPLATES[name])}
    quietest = frames.pos.reshape(len(frames), -1, 3)[square.argmin()]
    assert np.array_equal(found.mols[0].GetConformer().GetPositions(), quietest)


def test_molecules_of_qm9_are_those_of_their_smiles(shared_data):
    path = shared_data / "qm9" / "official_format" / "dsgdb9nsd_sample.xyz.tar.bz2"
    given = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            lines = archive.extractfile(member).read().decode().strip().split("\n")
            given[lines[1].split()[1]] = {canonical(smiles) for smiles in lines[-2].split()}
    molecules = read_qm9(path)
    found = perceive(molecules)
    assert len(found.mols) == len(molecules), "no molecule occurs twice in QM9"
    pairs = zip(molecules.ids, found.index, strict=True)
    others = [name for name, index in pairs if plain(found.mols[index]) not in given[name]]
    # Of this zwitterion, the same connections have several sets of charges.
    assert others == ["30547"]


def test_bond_orders_come_from_a_template_that_is_given():
    """The same connections of nitrous oxide, written in the two ways that valences allow."""
    data = dataset_of([molecule("N2O"), molecule("N2O")])
    for smiles in ("[N-]=[N+]=O", "N#[N+][O-]"):
        found = perceive(data, templates={"nitrous oxide": smiles})
        assert [plain(mol) for mol in found.mols] == [canonical(smiles)]
    with pytest.raises(DataError, match=r"templates\['it'\]='C\(' is no SMILES"):
        perceive(data, templates={"it": "C("})


def test_isomers_with_equal_elements_are_told_apart():
    ether, alcohol = molecule("CH3OCH3"), molecule("CH3CH2OH")
    numbers = ether.numbers.tolist()
    heavy = [i for i, z in enumerate(numbers) if z == 6] + [numbers.index(8)]
    ether = ether[heavy + [i for i, z in enumerate(numbers) if z == 1]]
    assert ether.numbers.tolist() == alcohol.numbers.tolist()
    found = perceive(dataset_of([alcohol, ether, alcohol, ether]))
    assert {plain(mol) for mol in found.mols} == {"CCO", "COC"}
    assert [plain(found.mols[i]) for i in found.index] == ["CCO", "COC", "CCO", "COC"]


def test_the_quietest_frame_decides():
    """A frame in which a bond is stretched beyond recognition keeps its bonds if another frame shows them."""
    rest = molecule("C2H6")
    stretched = rest.copy()
    carbons = stretched.positions[:2]
    side = np.linalg.norm(stretched.positions - carbons[0], axis=1) < np.linalg.norm(
        stretched.positions - carbons[1], axis=1
    )
    stretched.positions[side] += 0.5 * (carbons[0] - carbons[1]) / np.linalg.norm(carbons[0] - carbons[1])
    forces = np.concatenate([np.full((8, 3), 5.0), np.zeros((8, 3))])
    found = perceive(dataset_of([stretched, rest], targets={"forces": forces}))
    assert [plain(mol) for mol in found.mols] == ["CC"]
    assert found.index.tolist() == [0, 0]
    energies = perceive(dataset_of([stretched, rest], targets={"energy": np.array([3.0, -1.0])}))
    assert energies.index.tolist() == [0, 0]
    assert len(perceive(dataset_of([stretched, rest])).mols) == 2, "without labels the first decides, on two radicals"


def test_a_shared_proton_makes_tautomers(shared_data):
    """Genuine path of the proton from one oxygen of acetylacetone to the other; in the middle it belongs to the nearer."""
    path = shared_data / "botnet" / "dataset_acac" / "test_H_transfer.xyz.gz"
    frames = read_ase(path, index=":")
    found = perceive(dataset_of(frames))
    assert {plain(mol) for mol in found.mols} == {canonical("CC(=O)C=C(C)O")}
    assert len(found.mols) == 2
    oxygens = np.flatnonzero(frames[0].numbers == 8)
    for atoms, index in zip(frames, found.index, strict=True):
        distances = atoms.get_all_distances()[oxygens][:, atoms.numbers == 1]
        nearest = oxygens[np.unravel_index(distances.argmin(), distances.shape)[0]]
        (hydroxyl,) = found.mols[index].GetSubstructMatches(chem.MolFromSmarts("[OX2;!H0,$(O[H])]"))
        assert hydroxyl[0] == nearest


def test_atoms_without_bonds():
    found = perceive(dataset_of([Atoms("N", [[0.0, 0, 0]]), molecule("CH4") + Atoms("H", [[9.0, 0, 0]]), Atoms("Ar")]))
    assert [mol.GetNumBonds() for mol in found.mols] == [0, 4, 0]


@pytest.mark.parametrize(
    ("structures", "message"),
    [
        ([molecule("H2O"), bulk("NaCl", "rocksalt", a=5.64)], r"structure 1: it is periodic.*ndem, noisy_nodes"),
        ([molecule("H2O"), Atoms("OCu", [[0, 0, 0], [2.0, 0, 0]])], r"structure 1: atom 1 is Cu, .*allowed are H, "),
        ([molecule("H2O"), molecule("CH3")], r"structure 1: there is no molecule of charge \+0 with its connections"),
    ],
    ids=["periodic", "metal", "radical"],
)
def test_what_has_no_bonds_is_an_error(structures, message):
    with pytest.raises(DataError, match=message):
        perceive(dataset_of(structures))


def test_charges_are_taken():
    ion = molecule("NH3")
    ion = Atoms("N", ion.positions[:1]) + Atoms(
        "H4", 0.59 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    )
    ion.positions[0] = 0.0
    assert plain(perceive(dataset_of([ion]), charge=1).mols[0]) == "[NH4+]"
    with pytest.raises(DataError, match=r"charge \+0"):
        perceive(dataset_of([ion]))


# --------------------------------------------------------------------------------------------------------------- terms


def test_terms_are_those_that_the_smiles_has():
    """From the geometries alone come the terms that `ConformerGraph` finds in the molecules."""
    known = ConformerGraph().to_dataset(["CCO", "CC(=O)Oc1ccccc1C(=O)O", "CC#N", "O", "O=CCC=O"])
    bare = MolecularDataset(**{**known.columns(), "extras": {}})
    found = add_terms(bare)
    for name, width in TERM_WIDTHS.items():
        assert found.extras[name].dtype == known.extras[name].dtype
        assert found.extras[name].shape[::2] == (5, width)
        for one, other in zip(found.extras[name], known.extras[name], strict=True):
            assert rows_of(one) == rows_of(other)
    assert not bare.extras
    assert np.array_equal(found.ids, bare.ids)
    assert np.shares_memory(with_internal_coordinates(known).extras["bonds"], known.extras["bonds"]), "as they were"


def test_columns_go_along_with_the_structures(ethanol, aspirin):
    frames = add_terms(ethanol[:6])
    assert frames.extras["bonds"].shape == (6, 8, 2)
    assert frames.extras["rotors"].shape == (6, 2, 4)
    assert len(rows_of(frames.extras["angles"][0])) == 13
    assert len(rows_of(frames.extras["torsions"][0])) == 12
    part = with_internal_coordinates(frames)[[4, 1]]
    assert part.extras["hinges"].shape == (2, 8, 3)
    assert part.extras["sides"].shape == (18, 1)
    assert frames.targets["energy"] is not None
    assert frames.name == ethanol.name
    single = with_internal_coordinates(MolecularDataset.from_atoms([Atoms("He")] * 3))  # as many atoms as structures
    assert single.extras["bonds"].shape == (3, 0, 2)
    assert single.per_atom >= {"sides"}
    assert single[:2].extras["sides"].shape == (2, 1)


def test_hinges_move_the_smaller_side():
    """By another way: cut the bond, and see what hangs together."""
    data = with_internal_coordinates(
        ConformerGraph().to_dataset(["CC(=O)Oc1ccccc1C(=O)O", "CCO", "CCCCCCCCCCCCCCCCCCCCCCC"])
    )
    for number in range(3):
        atoms = slice(data.ptr[number], data.ptr[number + 1])
        mol = perceive(data.select([number])).mols[0]
        rotors, hinges = (data.extras[name][number] for name in ("rotors", "hinges"))
        own = [row for row in hinges.tolist() if row[2] >= 0]
        count = len(rows_of(rotors))
        assert [row[:3] for row in rotors[:count].tolist()] == own[:count]
        assert {frozenset(row[1:]) for row in own} == {
            frozenset((b.GetBeginAtomIdx(), b.GetEndAtomIdx())) for b in mol.GetBonds() if not b.IsInRing()
        }
        for h, (i, j, k) in enumerate(own):
            cut = chem.RWMol(mol)
            cut.RemoveBond(j, k)
            (side,) = [set(part) for part in chem.GetMolFrags(cut) if k in part]
            moved = data.extras["sides"][atoms][:, h // 62] >> (h % 62) & 1
            assert set(np.flatnonzero(moved)) == side
            assert 2 * len(side) <= mol.GetNumAtoms()
            assert i not in side
            assert i != j
            assert i < 0 or mol.GetBondBetweenAtoms(i, j)
    assert data.extras["sides"].shape[1] == 2, "tricosane has more hinges than one integer has bits"


def test_sides_and_terms_of_a_ring():
    neighbors = [[1, 2], [0, 2], [0, 1, 3], [2]]
    assert side_of(neighbors, 2, 3) == {3}
    assert side_of(neighbors, 0, 1) == {1, 2, 3}
    assert len(find_terms(chem.MolFromSmiles("C1CC1C")).rotors) == 0
    assert add_hinges(add_terms(MolecularDataset.from_atoms([molecule("C3H6_D3h")]))).extras["hinges"].shape == (
        1,
        6,
        3,
    )


# ----------------------------------------------------------------------------------------------------------- estimator


TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}


@pytest.mark.parametrize("objective", ["frad", "slide"])
def test_estimators_find_the_bonds(ethanol, objective):
    model = NDeMTorchMDNet(objective=objective, backbone_options=TINY, batch_size=4, progress=False, device="cpu")
    model.fit(ethanol[:12], ethanol[20:24], max_steps=2)
    term = {"frad": "train_denoising", "slide": "train_springs"}[objective]
    assert model.history_[-1][term] > 0
    model.partial_fit(ethanol[:12], max_steps=1)


def test_bonds_are_kept_in_a_store(ethanol, tmp_path):
    """What was found is saved with the data, and used as it is."""
    with_internal_coordinates(ethanol[:12]).save(tmp_path / "store")
    stored = open_store(tmp_path / "store")
    assert with_internal_coordinates(stored) is stored
    model = NDeMTorchMDNet(objective="slide", backbone_options=TINY, batch_size=4, progress=False, device="cpu")
    model.fit(stored[:8], max_steps=2)
    assert model.history_[-1]["train_springs"] > 0


@pytest.mark.parametrize("objective", ["frad", "slide"])
def test_without_bonds_there_is_no_training(objective):
    """Before the first step, and with the structure's number."""
    salt = bulk("NaCl", "rocksalt", a=5.64)
    crystals = MolecularDataset(
        np.tile(salt.numbers, 3),
        np.tile(salt.positions, (3, 1)),
        np.arange(0, 7, 2),
        cell=np.tile(salt.cell.array, (3, 1, 1)),
        pbc=np.ones((3, 3), bool),
        targets={"energy": np.zeros(3), "forces": np.zeros((6, 3))},
    )
    model = NDeMTorchMDNet(objective=objective, backbone_options=TINY, progress=False)
    with pytest.raises(DataError, match="training set, structure 0: it is periodic"):
        model.fit(crystals, max_steps=1)
    assert not hasattr(model, "potential_")
