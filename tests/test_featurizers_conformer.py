"""ConformerGraph: geometries against RDKit's own and known ones, atom order, stereo, terms, and what becomes of failures."""

from __future__ import annotations

import itertools
import pickle
import re
import warnings

import numpy as np
import pytest

from ndem_zoo.errors import ConfigError, DataError, DataWarning
from ndem_zoo.featurizers import ConformerGraph, RadiusGraph, find_terms
from ndem_zoo.featurizers.conformer import MAX_SEED, read_molecule
from ndem_zoo.featurizers.terms import pad_terms

Chem = pytest.importorskip("rdkit.Chem")
pytestmark = pytest.mark.rdkit

KCAL = 0.0433641042  # eV

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"

#: Rotatable bonds with hydrogens and among heavy atoms: counted by hand.
ROTORS = {
    ASPIRIN: (5, 3),
    "CCO": (2, 0),
    "O=CCC=O": (2, 2),
    "OC(=O)c1ccccc1O": (3, 1),
    "Cc1ccccc1": (1, 0),
    "c1ccc2ccccc2c1": (0, 0),
    "O=c1cc[nH]c(=O)[nH]1": (0, 0),
    "CC#N": (0, 0),
    "CC#CC": (0, 0),
    "C=CC=C": (1, 1),
    "c1ccccc1-c1ccccc1": (1, 1),
}

#: Frad's pattern.
PATTERN = "[!$(*#*)&!D1]-&!@[!$(*#*)&!D1]"


def positions(graph) -> np.ndarray:
    return graph.ndata["R"].numpy()


def elements(graph) -> list[int]:
    return graph.ndata["Z"].tolist()


def quiet(featurizer: ConformerGraph, molecules):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return featurizer.featurize(molecules)


# ---------------------------------------------------------------------------------------------------------- geometries


@pytest.mark.dgl
def test_water_has_the_geometry_of_mmff94():
    """MMFF94's water: 0.969 Å and 103.98 degrees, from the parameters of the force field."""
    pos = positions(ConformerGraph()("O"))
    a, b = pos[1] - pos[0], pos[2] - pos[0]
    assert np.linalg.norm(a) == pytest.approx(0.969, abs=1e-3)
    angle = np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    assert angle == pytest.approx(103.98, abs=0.05)


@pytest.mark.dgl
def test_the_geometry_is_a_minimum_of_rdkits_force_field():
    """Forces of MMFF94 at the graph's positions, from a force field that is set up anew, are zero."""
    from rdkit.Chem import rdForceFieldHelpers as fields

    graph = ConformerGraph(n_conformers=3)(ASPIRIN)
    mol = Chem.AddHs(Chem.MolFromSmiles(ASPIRIN))
    assert elements(graph) == [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    conformer = Chem.Conformer(mol.GetNumAtoms())
    for i, x in enumerate(positions(graph)):
        conformer.SetAtomPosition(i, x.tolist())
    mol.AddConformer(conformer)
    field = fields.MMFFGetMoleculeForceField(mol, fields.MMFFGetMoleculeProperties(mol))
    assert np.abs(field.CalcGrad()).max() < 1e-2
    raw = ConformerGraph(force_field=None)(ASPIRIN)
    for i, x in enumerate(positions(raw)):
        mol.GetConformer().SetAtomPosition(i, x.tolist())
    field = fields.MMFFGetMoleculeForceField(mol, fields.MMFFGetMoleculeProperties(mol))
    assert np.abs(field.CalcGrad()).max() > 1.0


def test_energies_are_those_of_the_force_field():
    from rdkit.Chem import rdForceFieldHelpers as fields

    conformers = ConformerGraph(n_conformers=6).conformers("CCCCO")
    properties = fields.MMFFGetMoleculeProperties(conformers.mol)
    energies = []
    for conformer in conformers.mol.GetConformers():
        field = fields.MMFFGetMoleculeForceField(conformers.mol, properties, confId=conformer.GetId())
        energies.append(field.CalcEnergy() * KCAL)
        np.testing.assert_array_equal(conformer.GetPositions(), conformers.pos[len(energies) - 1])
    np.testing.assert_allclose(conformers.energies, energies, rtol=1e-7)
    assert (np.diff(conformers.energies) >= 0).all()
    assert conformers.energies[-1] - conformers.energies[0] > 0.01  # anti and gauche
    assert conformers.force_field == "MMFF94"


@pytest.mark.dgl
def test_the_lowest_of_many_is_not_above_the_first():
    gains = []
    for seed in range(3):
        one = ConformerGraph(n_conformers=1, seed=seed).conformers("OCCCCO").energies[0]
        many = ConformerGraph(n_conformers=10, seed=seed).conformers("OCCCCO")
        gains.append(one - many.energies[0])
        np.testing.assert_array_equal(positions(ConformerGraph(n_conformers=10, seed=seed)("OCCCCO")), many.pos[0])
    assert min(gains) > -1e-6  # the first of many is the same as the only one
    assert max(gains) > 0.01


@pytest.mark.parametrize("seed", [0, 1, 12345, MAX_SEED])
def test_conformers_of_one_molecule_differ(seed):
    """RDKit makes the same conformer again and again with some seeds."""
    conformers = ConformerGraph(n_conformers=10, seed=seed, force_field=None).conformers("OCCCCO")
    distances = np.linalg.norm(conformers.pos[:, 0] - conformers.pos[:, 5], axis=1)  # O to O
    assert len(set(distances.round(3))) >= 9


@pytest.mark.dgl
def test_seeds():
    alone = positions(ConformerGraph(seed=5)("CCCCO"))
    in_company = positions(ConformerGraph(seed=5).featurize(["CC", "c1ccccc1", "CCCCO"])[2])
    np.testing.assert_array_equal(alone, in_company)
    assert any(np.abs(positions(ConformerGraph(seed=s)("CCCCO")) - alone).max() > 0.1 for s in (6, 7))


@pytest.mark.dgl
def test_edges_are_those_of_radius_graph():
    graph = ConformerGraph(cutoff=2.0)(ASPIRIN)
    expected = RadiusGraph(2.0)((graph.ndata["Z"].numpy(), positions(graph)))
    assert [x.tolist() for x in graph.edges()] == [x.tolist() for x in expected.edges()]
    assert "energy" not in graph.ndata


# ---------------------------------------------------------------------------------------------------- order and stereo


@pytest.mark.dgl
@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("OCCF", [8, 6, 6, 9, 1, 1, 1, 1, 1]),
        ("FCCO", [9, 6, 6, 8, 1, 1, 1, 1, 1]),
        ("[H]OC", [1, 8, 6, 1, 1, 1]),
        ("O([H])[H]", [8, 1, 1]),
        ("[CH3:7][OH:2]", [6, 8, 1, 1, 1, 1]),
    ],
)
def test_atoms_stay_in_order(smiles, expected):
    graph = ConformerGraph()(smiles)
    assert elements(graph) == expected


@pytest.mark.dgl
def test_molecules_stay_in_order_and_as_they_are():
    mol = Chem.RenumberAtoms(Chem.AddHs(Chem.MolFromSmiles("CO")), [3, 1, 0, 5, 2, 4])
    before = mol.ToBinary()
    graph = ConformerGraph()(mol)
    assert elements(graph) == [1, 8, 6, 1, 1, 1]
    assert mol.ToBinary() == before
    pos = positions(graph)
    for i, j in ((1, 2), (0, 2), (3, 1), (2, 4), (2, 5)):  # what is bonded in the input is near in the graph
        assert np.linalg.norm(pos[i] - pos[j]) < 1.5, (i, j)
    assert elements(ConformerGraph()(Chem.MolFromSmiles("OC"))) == [8, 6, 1, 1, 1, 1]


@pytest.mark.dgl
@pytest.mark.parametrize(
    "smiles", ["C[C@H](O)F", "C[C@@H](O)F", "F/C=C/Cl", "F/C=C\\Cl", "C[C@H]1C[C@@H]1F", "N[C@@H](C)C(=O)O"]
)
def test_stereo_is_kept(smiles):
    """Read back from the coordinates alone, bonds by distance."""
    graph = ConformerGraph(n_conformers=4, keep="all").featurize(smiles)
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    expected = Chem.MolToSmiles(Chem.MolFromSmiles(smiles))
    for one in graph:
        conformer = Chem.Conformer(mol.GetNumAtoms())
        for i, x in enumerate(positions(one)):
            conformer.SetAtomPosition(i, x.tolist())
        flat = Chem.AddHs(Chem.MolFromSmiles(smiles.replace("@", "").replace("/", "").replace("\\", "")))
        flat.AddConformer(conformer)
        Chem.AssignStereochemistryFrom3D(flat)
        assert Chem.MolToSmiles(Chem.RemoveHs(flat)) == expected


def test_a_geometry_with_the_wrong_stereo_is_no_result(monkeypatch):
    import ndem_zoo.featurizers.conformer as module

    genuine = module._embed

    def mirrored(mol, n, seed):
        notes = genuine(mol, n, seed)
        for k, conformer in enumerate(mol.GetConformers()):
            for i, x in enumerate(conformer.GetPositions() if k % 2 == 0 else []):
                conformer.SetAtomPosition(i, (-x).tolist())
        return notes

    monkeypatch.setattr(module, "_embed", mirrored)
    with pytest.raises(DataError, match="no geometry has the stereo that the input states"):
        ConformerGraph().conformers("C[C@H](O)F")
    some = ConformerGraph(n_conformers=4).conformers("C[C@H](O)F")
    assert len(some.pos) == len(some.energies) == some.mol.GetNumConformers() == 2
    assert some.notes == ("2 conformers had lost the stereo that the input states",)
    assert len(ConformerGraph(n_conformers=4).conformers("CCO").pos) == 4


@pytest.mark.dgl
def test_conformers_that_a_molecule_brings_along_are_not_used():
    own = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    own.AddConformer(Chem.Conformer(9))  # all atoms at the origin
    np.testing.assert_array_equal(positions(ConformerGraph()(own)), positions(ConformerGraph()("CCO")))
    assert own.GetNumConformers() == 1


@pytest.mark.parametrize("smiles", ["F/C=C/Cl", "C[C@H](O)F", "C[C@H](C)F", "CC", "FC=C"])
def test_stereo_that_is_stated_or_absent_is_no_note(smiles):
    assert ConformerGraph().conformers(smiles).notes == ()


@pytest.mark.dgl
def test_open_stereo_is_reported():
    featurizer = ConformerGraph()
    with pytest.warns(DataWarning, match="1 molecules were not made as usual, the first is molecule 1"):
        assert len(featurizer.featurize(["CCO", "CC(O)F"])) == 2
    (note,) = featurizer.report_.notes
    assert note.reason == "1 stereo centers or double bonds are not specified; one isomer was taken"


# -------------------------------------------------------------------------------------------------------------- failures

#: Inputs that are no use, and why.
BAD = [
    ("C1CC", "it is no SMILES"),
    ("C(C", "it is no SMILES"),
    ("not smiles", "it is no SMILES"),
    ("", "the SMILES is empty"),
    ("  ", "the SMILES is empty"),
    ("C(C)(C)(C)(C)C", "valence"),
    ("c1cccc1", "kekulize"),
    ("*C", "atom 0 is a dummy"),
    ("[NH4+]", r"total charge is \+1; allow=\('charge',\)"),
    ("CC(=O)[O-]", "total charge is -1"),
    ("C[CH2]", r"1 unpaired electrons; allow=\('radical',\)"),
    ("[Na+].[Cl-]", r"2 fragments; allow=\('fragments',\)"),
    (None, "got None, which RDKit's readers leave"),
    (7, "got int; a molecule is a SMILES or an RDKit Mol"),
]


@pytest.mark.parametrize(("molecule", "problem"), BAD)
def test_failures_say_why(molecule, problem):
    with pytest.raises(DataError, match=problem):
        ConformerGraph().conformers(molecule)


@pytest.mark.dgl
def test_one_error_lists_all_failures(capfd):
    with pytest.raises(DataError) as info:
        ConformerGraph().featurize(["CCO", *(molecule for molecule, _ in BAD), "CC"])
    lines = str(info.value).splitlines()
    assert lines[0] == f"{len(BAD)} of {len(BAD) + 2} molecules failed; on_failure='drop' leaves them out:"
    assert len(lines) == 1 + len(BAD)
    for number, (line, (_, problem)) in enumerate(zip(lines[1:], BAD, strict=True), 1):
        assert line.startswith(f"  molecule {number} (")
        assert re.search(problem, line)
    assert capfd.readouterr().err == ""  # RDKit's own messages say less


@pytest.mark.dgl
def test_failures_can_be_left_out():
    featurizer = ConformerGraph(on_failure="drop")
    with pytest.warns(DataWarning, match="2 molecules failed and were left out, the first is molecule 1 .*see report_"):
        graphs = featurizer.featurize(["CCO", "C1CC", "CC", ""])
    assert [len(elements(graph)) for graph in graphs] == [9, 8]
    report = featurizer.report_
    assert report.indices.tolist() == [0, 2]
    assert [(f.index, f.input) for f in report.failures] == [(1, "C1CC"), (3, "")]
    assert all(f.reason for f in report.failures)
    assert str(report).startswith("4 molecules, 2 failed, 0 with notes\n  failed molecule 1 ('C1CC'): it is no SMILES")
    assert len(report.outcomes) == 4
    assert report.outcomes[2].force_field == "MMFF94"


@pytest.mark.parametrize("mode", ["drop", "raise"])
def test_there_is_never_an_empty_array(mode):
    featurizer = ConformerGraph(on_failure=mode)
    with pytest.raises(DataError, match="2 of 2 molecules failed"):
        featurizer.featurize(["C1CC", ""])
    with pytest.raises(DataError, match="there are no molecules"):
        featurizer.featurize([])


@pytest.mark.dgl
def test_what_models_cannot_tell_can_be_allowed():
    assert elements(ConformerGraph(allow=("charge",))("[NH4+]")) == [7, 1, 1, 1, 1]
    assert elements(ConformerGraph(allow=("radical",), force_field=None)("[CH3]")) == [6, 1, 1, 1]
    graph = ConformerGraph(allow=["fragments"])("C.C")
    assert elements(graph) == [6, 6] + [1] * 8
    assert 3.0 < np.linalg.norm(positions(graph)[1] - positions(graph)[0]) < 6.0  # in contact, not on top of each other
    assert elements(ConformerGraph()("C[N+](=O)[O-]"))[:4] == [6, 7, 8, 8]  # charged atoms, neutral molecule


@pytest.mark.dgl
def test_a_single_molecule_is_reported_too():
    featurizer = ConformerGraph(on_failure="drop")
    with pytest.warns(DataWarning, match=r"molecule 0 \('FB\(F\)F'\): MMFF94 has no parameters for it; UFF was used"):
        assert elements(featurizer("FB(F)F")) == [9, 5, 9, 9]
    assert len(featurizer.report_.notes) == 1
    with pytest.raises(DataError, match="1 of 1 molecules failed"):
        featurizer("C1CC")


def test_atoms_that_overlap_are_a_failure(monkeypatch):
    import ndem_zoo.featurizers.conformer as module

    def collapsed(mol, *_):
        mol.AddConformer(Chem.Conformer(mol.GetNumAtoms()))
        return []

    monkeypatch.setattr(module, "_embed", collapsed)
    with pytest.raises(DataError, match=r"molecule 0 \('CC'\): atoms .* are 0 Å apart"):
        ConformerGraph(force_field=None).featurize(["CC"])


def test_force_fields_stand_in_for_each_other():
    boron = ConformerGraph().conformers("FB(F)F")
    assert boron.force_field == "UFF"
    assert boron.notes == ("MMFF94 has no parameters for it; UFF was used",)
    platinum = ConformerGraph().conformers("Cl[Pt](Cl)(N)N")
    assert platinum.force_field == ""
    assert "neither MMFF94 nor UFF" in platinum.notes[0]
    assert np.isnan(platinum.energies).all()
    assert ConformerGraph(force_field="UFF").conformers("CCO").force_field == "UFF"
    assert ConformerGraph(force_field="MMFF94s").conformers("CCO").notes == ()
    assert "did not converge in 1 steps" in ConformerGraph(max_iterations=1).conformers(ASPIRIN).notes[0]


def test_impossible_geometries():
    with pytest.raises(DataError, match=r"ETKDGv3 found no geometry \(.* times\); is the stereo possible"):
        ConformerGraph().conformers("C[C@H]1[C@@]23C[C@]12C3")


# ----------------------------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize("smiles", ROTORS)
def test_rotors(smiles):
    mol = Chem.MolFromSmiles(smiles)
    full = Chem.AddHs(mol)
    both = find_terms(full).rotors, find_terms(full, hydrogen_rotors=False).rotors
    assert (len(both[0]), len(both[1])) == ROTORS[smiles]
    pattern = Chem.MolFromSmarts(PATTERN)
    for rotors, molecule in zip(both, (full, mol), strict=True):
        matches = {tuple(sorted(match)) for match in molecule.GetSubstructMatches(pattern)}
        assert {tuple(sorted(row)) for row in rotors[:, 1:3].tolist()} == matches


def test_the_smaller_side_turns():
    """Turning a rotor with RDKit, which moves the side of l, moves at most half of the atoms."""
    from rdkit.Chem import rdMolTransforms as transforms

    conformers = ConformerGraph().conformers(ASPIRIN)
    conformer = conformers.mol.GetConformer()
    for row in find_terms(conformers.mol).rotors.tolist():
        before = conformer.GetPositions()
        transforms.SetDihedralDeg(conformer, *row, transforms.GetDihedralDeg(conformer, *row) + 40)
        moved = np.linalg.norm(conformer.GetPositions() - before, axis=1) > 1e-6
        assert 1 <= moved.sum() <= 21 / 2
        assert moved[row[3]]
        assert not moved[row[:3]].any()


def test_counts_of_terms():
    """Ethane: 7 bonds, 4 choose 2 angles at each carbon, 3 x 3 torsions; benzene's torsions: 12 x (2 x 2)... about 6 bonds."""
    ethane = find_terms(Chem.AddHs(Chem.MolFromSmiles("CC")))
    assert [len(rows) for rows in ethane.columns().values()] == [7, 12, 9, 1]
    benzene = find_terms(Chem.AddHs(Chem.MolFromSmiles("c1ccccc1")))
    assert [len(rows) for rows in benzene.columns().values()] == [12, 18, 24, 0]
    cyclopropane = find_terms(Chem.MolFromSmiles("C1CC1"))  # its atoms are no torsion of four different ones
    assert [len(rows) for rows in cyclopropane.columns().values()] == [3, 3, 0, 0]
    atom = find_terms(Chem.MolFromSmiles("[He]"))
    assert [rows.shape for rows in atom.columns().values()] == [(0, 2), (0, 3), (0, 4), (0, 4)]


def test_terms_are_chains_of_bonds_each_once():
    mol = Chem.AddHs(Chem.MolFromSmiles(ASPIRIN))
    terms = find_terms(mol)
    bonds = {tuple(row) for row in terms.bonds.tolist()}
    assert bonds == {tuple(sorted((b.GetBeginAtomIdx(), b.GetEndAtomIdx()))) for b in mol.GetBonds()}
    for rows in (terms.angles, terms.torsions, terms.rotors):
        for row in rows.tolist():
            assert len(set(row)) == len(row)
            assert all(tuple(sorted(pair)) in bonds for pair in itertools.pairwise(row))
        assert len({min(tuple(row), tuple(row[::-1])) for row in rows.tolist()}) == len(rows)
    assert len(terms.angles) == sum(a.GetDegree() * (a.GetDegree() - 1) // 2 for a in mol.GetAtoms())
    rotors = {min(tuple(row), tuple(row[::-1])) for row in terms.rotors.tolist()}
    assert rotors <= {min(tuple(row), tuple(row[::-1])) for row in terms.torsions.tolist()}


def test_terms_of_a_molecule_need_no_geometry():
    featurizer = ConformerGraph(hydrogen_rotors=False)
    assert len(featurizer.terms(ASPIRIN).rotors) == 3
    assert len(ConformerGraph().terms(ASPIRIN).rotors) == 5
    heavy = ConformerGraph(add_hydrogens=False).terms("CCO")
    assert heavy.bonds.tolist() == [[0, 1], [1, 2]]
    assert heavy.angles.tolist() == [[0, 1, 2]]
    with pytest.raises(DataError, match="no SMILES"):
        featurizer.terms("C1CC")


def test_padding():
    padded = pad_terms([np.array([[0, 1]]), np.zeros((0, 2)), np.array([[2, 3], [4, 5]])], 2)
    assert padded.tolist() == [[[0, 1], [-1, -1]], [[-1, -1], [-1, -1]], [[2, 3], [4, 5]]]
    assert pad_terms([np.zeros((0, 4))], 4).shape == (1, 0, 4)


# ----------------------------------------------------------------------------------------------------------- collections


@pytest.mark.dgl
def test_forms_of_input():
    pandas = pytest.importorskip("pandas")
    featurizer = ConformerGraph()
    smiles = ["CCO", "CC"]
    expected = [elements(graph) for graph in featurizer.featurize(smiles)]
    for molecules in (tuple(smiles), np.array(smiles), pandas.Series(smiles), [Chem.MolFromSmiles(s) for s in smiles]):
        for graphs in (featurizer.featurize(molecules), featurizer(molecules)):
            assert graphs.dtype == object
            assert [elements(graph) for graph in graphs] == expected
    (single,) = featurizer.featurize("CCO")  # not three molecules C, C and O
    assert elements(single) == expected[0]
    assert featurizer.featurize(smiles, log_every_n=10).shape == (2,)


@pytest.mark.dgl
def test_all_conformers():
    featurizer = ConformerGraph(n_conformers=3, keep="all")
    graphs = featurizer.featurize(["CCCO", "CCF"])
    assert len(graphs) == 6
    assert featurizer.report_.indices.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(featurizer("CCCO")) == 3
    assert len(ConformerGraph(n_conformers=3).featurize(["CCCO", "CCF"])) == 2


@pytest.mark.dgl
def test_heavy_atoms_alone():
    graph = ConformerGraph(add_hydrogens=False)("[H]OCC")
    assert elements(graph) == [1, 8, 6, 6]
    np.testing.assert_array_equal(positions(graph), positions(ConformerGraph()("[H]OCC"))[:4])


@pytest.mark.dgl
def test_structures_with_a_geometry_stay_as_they_are():
    from ase.build import molecule

    atoms = molecule("CH3CH2OH")
    for graph in (ConformerGraph()(atoms), ConformerGraph()([atoms])[0]):
        np.testing.assert_array_equal(positions(graph), atoms.positions)


@pytest.mark.dgl
def test_dataset():
    featurizer = ConformerGraph(on_failure="drop")
    with pytest.warns(DataWarning, match="1 molecules failed"):
        dataset = featurizer.to_dataset(
            ["CCO", "C1CC", ASPIRIN], {"gap": [1.0, 2.0, 3.0]}, ids=["a", "b", "c"], name="mine"
        )
    assert dataset.ids.tolist() == ["a", "c"]
    assert dataset.targets["gap"].tolist() == [1.0, 3.0]
    assert dataset.counts.tolist() == [9, 21]
    assert dataset.extras["smiles"].tolist() == ["CCO", ASPIRIN]
    assert dataset.extras["molecule"].tolist() == [0, 2]
    conformers = ConformerGraph().conformers(ASPIRIN)
    np.testing.assert_array_equal(dataset.pos[9:], conformers.pos[0])
    assert dataset.extras["conformer_energy"][1] == conformers.energies[0]
    np.testing.assert_array_equal(positions(dataset[1]), conformers.pos[0])
    last = dataset.select([1])
    for name, rows in featurizer.terms(ASPIRIN).columns().items():
        column = last.extras[name][0]
        assert column[: len(rows)].tolist() == rows.tolist()
        assert (column[len(rows) :] == -1).all()
    ethanol = dataset.extras["rotors"][0]
    assert ethanol[ethanol[:, 0] >= 0].tolist() == featurizer.terms("CCO").rotors.tolist()
    batch = dataset.to_batch(5.0)
    assert batch.extras["rotors"].shape == (2, 5, 4)
    assert "smiles" not in batch.extras


@pytest.mark.dgl
def test_dataset_of_all_conformers():
    dataset = ConformerGraph(n_conformers=2, keep="all").to_dataset(["CCO", "CCF"], {"gap": [1.0, 2.0]})
    assert dataset.ids.tolist() == ["0-0", "0-1", "1-0", "1-1"]
    assert dataset.targets["gap"].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert dataset.extras["rotors"].shape == (4, 2, 4)
    with pytest.raises(DataError, match="gap has 3 rows; there are 2 molecules"):
        ConformerGraph().to_dataset(["CCO", "CCF"], {"gap": [1.0, 2.0, 3.0]})


@pytest.mark.dgl
def test_a_dataset_can_be_trained_on_and_saved(tmp_path):
    from ndem_zoo import NDeMTorchMDNet
    from ndem_zoo.datasets import open_store

    dataset = ConformerGraph().to_dataset(["CCO", "CCF", "CC", "CO"], {"energy": [-1.0, -2.0, -3.0, -4.0]})
    dataset.save(tmp_path / "store")
    stored = open_store(tmp_path / "store")
    np.testing.assert_array_equal(stored.extras["torsions"], dataset.extras["torsions"])
    model = NDeMTorchMDNet(
        preset="md17_fast",
        objective="supervised",
        force_weight=0.0,
        backbone_options={"hidden_channels": 8, "num_layers": 1, "num_heads": 2},
        progress=False,
        device="cpu",
    )
    model.fit(stored, max_steps=2)
    assert np.isfinite(model.predict(dataset)["energy"]).all()


@pytest.mark.dgl
@pytest.mark.deepchem
def test_deepchem_takes_the_graphs():
    deepchem = pytest.importorskip("deepchem")
    from ndem_zoo.datasets import as_dataset

    graphs = ConformerGraph().featurize(["CCO", "CC", "CF"])
    data = deepchem.data.NumpyDataset(X=graphs, y=np.array([[1.0], [2.0], [3.0]]), ids=["a", "b", "c"])
    dataset = as_dataset(data)
    assert dataset.counts.tolist() == [9, 8, 5]
    assert dataset.targets["energy"].tolist() == [1.0, 2.0, 3.0]
    np.testing.assert_array_equal(dataset.pos[:9], positions(graphs[0]))
    from ndem_zoo import NDeMTorchMDNet

    small = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2}
    model = NDeMTorchMDNet(
        preset="md17_fast",
        objective="supervised",
        force_weight=0.0,
        backbone_options=small,
        progress=False,
        device="cpu",
    )
    assert np.isfinite(model.fit(data, max_steps=2).predict(data)["energy"]).all()


# ---------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cutoff": 0.0}, "cutoff"),
        ({"n_conformers": 0}, "n_conformers=0; it must be an integer from 1"),
        ({"n_conformers": 1.5}, "n_conformers=1.5"),
        ({"seed": -1}, "seed=-1; it must be an integer from 0"),
        ({"seed": None}, "seed=None"),
        ({"force_field": "mmff"}, "force_field='mmff'; allowed are 'MMFF94', 'MMFF94s', 'UFF', None"),
        ({"keep": "best"}, "keep='best'; allowed are 'lowest', 'all'"),
        ({"on_failure": "ignore"}, "on_failure='ignore'"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"allow": "charge"}, r"give a tuple, such as allow=\('charge',\)"),
        ({"allow": ("spin",)}, "allow='spin'; allowed are 'charge', 'radical', 'fragments'"),
    ],
)
def test_options_are_checked(options, problem):
    with pytest.raises(ConfigError, match=problem):
        ConformerGraph(**options)


def test_repr_and_pickle():
    featurizer = ConformerGraph(cutoff=4.0, n_conformers=2, seed=3)
    assert repr(featurizer).startswith(
        "ConformerGraph(cutoff=4.0, n_conformers=2, keep='lowest', seed=3, force_field='MMFF94'"
    )
    again = pickle.loads(pickle.dumps(featurizer))
    assert repr(again) == repr(featurizer)


def test_without_rdkit(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rdkit.Chem", None)
    with pytest.raises(ImportError, match=r"pip install 'ndem_zoo\[chem\]'"):
        read_molecule("CCO")
