"""MolecularDataset: columns, selection, splits, items, DeepChem's and scikit-learn's forms, conversion of foreign data."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength

from ndem_zoo.datasets import MolecularDataset, as_dataset, split_indices
from ndem_zoo.errors import ConfigError, DataError, DataWarning
from ndem_zoo.featurizers import RadiusGraph


def labelled(name: str, energy: float, seed: int = 0) -> Atoms:
    atoms = molecule(name)
    forces = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


@pytest.fixture
def mixed() -> MolecularDataset:
    """Five molecules of different sizes."""
    names = ["H2O", "CH4", "CH3CH2OH", "NH3", "C6H6"]
    return MolecularDataset.from_atoms([labelled(name, -float(i), i) for i, name in enumerate(names)], name="mixed")


# ------------------------------------------------------------------------------------------------------------- columns


def test_columns_of_atoms(mixed):
    assert mixed.counts.tolist() == [3, 5, 9, 4, 12]
    assert mixed.ptr.tolist() == [0, 3, 8, 17, 21, 33]
    assert mixed.tasks == ["energy", "forces"]
    assert mixed.targets["energy"].dtype == mixed.targets["forces"].dtype == mixed.pos.dtype == np.float64
    assert mixed.z[:3].tolist() == [8, 1, 1]
    np.testing.assert_array_equal(mixed.pos[3:8], molecule("CH4").positions)
    assert mixed.cell is None
    assert not mixed.is_periodic


def test_arrays_are_read_only_and_the_caller_keeps_his():
    pos = np.zeros((2, 3))
    pos[1, 0] = 1.0
    dataset = MolecularDataset(np.array([1, 1]), pos, np.array([0, 2]))
    assert np.shares_memory(dataset.pos, pos)
    assert pos.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        dataset.pos[0, 0] = 5.0


def test_memory_maps_stay_on_disk(tmp_path):
    np.save(tmp_path / "pos.npy", np.random.default_rng(0).normal(size=(30, 3)))
    pos = np.load(tmp_path / "pos.npy", mmap_mode="r")
    dataset = MolecularDataset(np.ones(30, np.uint8), pos, np.arange(11) * 3)
    assert isinstance(dataset.pos, np.memmap)
    assert isinstance(dataset[2:5].pos, np.memmap)  # neighboring structures are not read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ptr": [0, 1, 2]}, "end with 3"),
        ({"ptr": [0, 2, 1, 3]}, "structure 1: ptr falls"),
        ({"z": [1.0, 1.0, 8.0]}, "integers"),
        ({"pos": np.zeros((2, 3))}, r"pos has shape \(2, 3\)"),
        ({"targets": {"energy": [1.0, 2.0, 3.0]}}, "one row per structure, 2"),
        ({"targets": {"forces": np.zeros((2, 3))}}, "one row per atom, 3"),
        ({"targets": {"forces": np.zeros((3, 2))}}, "needed is"),
        ({"targets": {"anything": np.zeros(7)}}, "per structure"),
        ({"targets": {"energy": ["a", "b"]}}, "energy cannot be an array of float64"),
        ({"pbc": np.ones((2, 3), bool)}, "without cell"),
        ({"cell": np.zeros((3, 3))}, "cell has shape"),
        ({"ids": ["a"]}, "ids has shape"),
    ],
)
def test_columns_that_do_not_fit(changes, message):
    good = {"z": np.array([1, 1, 8]), "pos": np.zeros((3, 3)), "ptr": [0, 1, 3]}
    with pytest.raises(DataError, match=message):
        MolecularDataset(**{**good, **{k: v if k in ("targets", "ptr") else np.asarray(v) for k, v in changes.items()}})


def test_unknown_columns_are_told_by_their_length():
    arguments = {"z": np.ones(5, int), "pos": np.zeros((5, 3)), "ptr": [0, 2, 5]}
    dataset = MolecularDataset(**arguments, extras={"tags": np.arange(5), "label": np.array([7, 8])})
    assert dataset.per_atom == {"tags"}
    assert dataset.extras["tags"].dtype == np.arange(5).dtype
    part = dataset.select([1])
    assert part.extras["tags"].tolist() == [2, 3, 4]
    assert part.extras["label"].tolist() == [8]
    with pytest.raises(DataError, match="ambiguous"):
        MolecularDataset(np.ones(2, int), np.zeros((2, 3)), [0, 1, 2], extras={"tags": np.arange(2)})


def test_energy_column_is_flattened():
    dataset = MolecularDataset(np.ones(2, int), np.zeros((2, 3)), [0, 1, 2], targets={"energy": [[1.0], [2.0]]})
    assert dataset.targets["energy"].tolist() == [1.0, 2.0]


# ----------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    "indices",
    [
        [4, 0, 2],
        [1, 2, 3],
        [-1, -5],
        slice(1, 4),
        slice(None, None, -2),
        np.array([True, False, True, False, True]),
        [],
    ],
)
def test_selection_agrees_with_atoms_one_by_one(mixed, indices):
    wanted = np.arange(5)[np.asarray(indices, dtype=int) if isinstance(indices, list) else indices]
    part = mixed[indices]
    assert part.ids.tolist() == [str(i) for i in wanted]
    assert part.shape == (len(wanted),)
    for k, i in enumerate(wanted):
        one, other = mixed.atoms(int(i)), part.atoms(k)
        assert one == other  # ASE compares elements, positions, cell
        np.testing.assert_array_equal(one.get_forces(), other.get_forces())
        assert one.get_potential_energy() == other.get_potential_energy()


def test_neighboring_structures_are_views(mixed):
    assert np.shares_memory(mixed[1:3].pos, mixed.pos)
    assert not np.shares_memory(mixed[[1, 3]].pos, mixed.pos)


@pytest.mark.parametrize("bad", [[5], [-6], np.array([True, False]), [0.5], [[0, 1]]])
def test_bad_indices(mixed, bad):
    with pytest.raises(IndexError):
        mixed.select(bad)
    with pytest.raises(IndexError):
        mixed.structure(5)


def test_concatenate_restores_parts(mixed):
    whole = MolecularDataset.concatenate([mixed[:2], mixed[2:]])
    for name in ("z", "pos", "ptr", "ids"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(mixed, name))
    np.testing.assert_array_equal(whole.targets["forces"], mixed.targets["forces"])
    unlabelled = MolecularDataset.from_atoms([molecule("H2O")])
    with pytest.raises(DataError, match="dataset 1 has the targets"):
        MolecularDataset.concatenate([mixed, unlabelled])


def test_concatenate_mixes_molecules_and_crystals(mixed):
    crystal = bulk("Cu")
    crystal.set_constraint(FixAtoms([0]))
    crystal.calc = SinglePointCalculator(crystal, energy=0.0, forces=np.zeros((1, 3)))
    whole = MolecularDataset.concatenate([mixed, MolecularDataset.from_atoms([crystal])])
    assert whole.pbc.any(axis=1).tolist() == [False] * 5 + [True]
    assert whole.fixed.tolist() == [False] * 33 + [True]
    assert whole.atoms(5).constraints[0].index.tolist() == [0]


# -------------------------------------------------------------------------------------------------------------- splits


def test_split_is_torchmd_nets():
    # Numbers of numpy's PCG64: they must never change, on no platform.
    train, valid, test = split_indices(5841, 950, 50, seed=1)
    assert train[:6].tolist() == [2779, 4836, 4402, 3514, 3604, 625]
    assert split_indices(5841, 950, 50, seed=0)[0][:3].tolist() == [1725, 4008, 4865]
    np.testing.assert_array_equal(np.sort(np.concatenate([train, valid, test])), np.arange(5841))
    np.testing.assert_array_equal(np.concatenate([train, valid, test]), np.random.default_rng(1).permutation(5841))


def test_split_sizes():
    sizes = [len(part) for part in split_indices(100, 0.5, 0.25)]
    assert sizes == [50, 25, 25]
    assert [len(part) for part in split_indices(100, 50, 0, n_test=10)] == [50, 0, 10]
    assert [len(part) for part in split_indices(3, 0.8, 0.1)] == [2, 0, 1]
    assert [len(part) for part in split_indices(10, 1.0, 0)] == [10, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 8, 3), DataError, "only 10 structures; the split needs 8 for training [+] 3 for validation"),
        ((10, 8, 1, 1, 2), DataError, "2 for test"),
        ((10, 0, 1), DataError, "nothing to train on"),
        ((10, -1, 1), ConfigError, "n_train=-1"),
        ((10, 1.5, 1), ConfigError, "n_train=1.5"),
        ((10, "8", 1), ConfigError, "n_train='8'"),
        ((10, 8, True), ConfigError, "n_valid=True"),
    ],
)
def test_impossible_splits(arguments, error, message):
    with pytest.raises(error, match=message):
        split_indices(*arguments)


def test_split_hash_is_of_the_ids(ethanol):
    train, _, _ = ethanol.split(10, 5, seed=3)
    assert train.split_hash == hashlib.sha256("\n".join(train.ids).encode()).hexdigest()
    assert train.split_hash == ethanol.split(10, 5, seed=3)[0].split_hash
    assert train.split_hash != ethanol.split(10, 5, seed=4)[0].split_hash


# --------------------------------------------------------------------------------------------------------------- items


@pytest.mark.dgl
def test_items_are_graphs(mixed, dgl):
    graph = mixed[np.int64(2)]
    assert graph.num_nodes() == 9
    np.testing.assert_array_equal(graph.ndata["R"].numpy(), molecule("CH3CH2OH").positions)
    np.testing.assert_array_equal(graph.ndata["F"].numpy(), mixed.targets["forces"][8:17])
    assert graph.ndata["energy"].tolist() == [-2.0] * 9
    assert [g.num_nodes() for g in mixed] == [3, 5, 9, 4, 12]
    assert mixed[-1].num_nodes() == 12
    narrow = mixed.with_featurizer(RadiusGraph(cutoff=1.2))
    assert narrow[4].num_edges() == 2 * 6  # only the six C-H bonds of benzene
    assert mixed[4].num_edges() == 12 * 11


def test_atoms_carry_labels(mixed):
    atoms = mixed.atoms(1)
    assert atoms.get_potential_energy() == -1.0
    np.testing.assert_array_equal(atoms.get_forces(), mixed.targets["forces"][3:8])
    assert atoms.info["id"] == "1"
    assert MolecularDataset.from_atoms([molecule("H2O")]).atoms(0).calc is None


def test_to_batch_holds_the_same_numbers(mixed):
    batch = mixed.to_batch(5.0, torch.float64)
    np.testing.assert_array_equal(batch.pos.numpy(), mixed.pos)
    assert batch.n_systems == 5
    assert batch.n_atoms.tolist() == mixed.counts.tolist()
    assert batch.targets["energy"].tolist() == [0.0, -1.0, -2.0, -3.0, -4.0]
    assert batch.targets["energy"].dtype == torch.float64
    assert mixed.to_batch(5.0).pos.dtype == torch.float32


# ------------------------------------------------------------------------------------------ DeepChem and scikit-learn


@pytest.mark.dgl
def test_iterbatches(mixed, dgl):
    batches = list(mixed.iterbatches(2, deterministic=True, pad_batches=True))
    assert [len(X) for X, *_ in batches] == [2, 2, 2]
    X, y, w, ids = batches[-1]
    assert X[0].num_nodes() == 12
    assert X[1].num_nodes() == 12  # the repeated one
    assert w.tolist() == [[1.0], [0.0]]
    assert y.tolist() == [[-4.0], [-4.0]]
    assert ids.tolist() == ["4", "4"]
    shuffled = np.concatenate([ids for *_, ids in mixed.iterbatches(2, epochs=2, seed=0)])
    assert sorted(shuffled[:5]) == sorted(shuffled[5:]) == list("01234")
    assert shuffled.tolist() != sorted(shuffled[:5].tolist()) * 2
    with pytest.raises(ConfigError, match="batch_size"):
        next(mixed.iterbatches(0))


@pytest.mark.dgl
@pytest.mark.deepchem
def test_deepchem_round_trip(mixed, dgl, tmp_path):
    dc = pytest.importorskip("deepchem")
    dataset = mixed.to_deepchem()
    assert isinstance(dataset, dc.data.NumpyDataset)
    assert dataset.y.dtype == np.float64
    disk = dc.data.DiskDataset.from_numpy(dataset.X, dataset.y, dataset.w, dataset.ids, data_dir=str(tmp_path))
    for source in (dataset, disk):
        back = as_dataset(source)
        np.testing.assert_array_equal(back.pos, mixed.pos)
        np.testing.assert_array_equal(back.targets["forces"], mixed.targets["forces"])
        np.testing.assert_array_equal(back.targets["energy"], mixed.targets["energy"])
        assert back.ids.tolist() == mixed.ids.tolist()


@pytest.mark.dgl
def test_deepchem_labels_weights_and_failures(mixed, dgl):
    n = len(mixed)
    shifted = SimpleNamespace(X=mixed.X, y=mixed.y + 100.0, w=np.ones((n, 1)), ids=mixed.ids)
    np.testing.assert_array_equal(as_dataset(shifted).targets["energy"], mixed.targets["energy"] + 100.0)
    unlabelled = SimpleNamespace(X=mixed.X, y=np.zeros((n, 1)), w=np.zeros((n, 1)), ids=mixed.ids)
    np.testing.assert_array_equal(as_dataset(unlabelled).targets["energy"], mixed.targets["energy"])
    weighted = SimpleNamespace(X=mixed.X, y=mixed.y, w=np.arange(n)[:, None], ids=mixed.ids)
    with pytest.warns(DataWarning, match="weights w are not all 1"):
        assert as_dataset(weighted).extras["weight"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    failed = np.array([*mixed.X[:2], None, *mixed.X[3:]], dtype=object)
    failed[2] = np.array([])
    with pytest.raises(DataError, match="structure 2 is an empty array"):
        as_dataset(SimpleNamespace(X=failed, y=mixed.y, w=np.ones((n, 1)), ids=mixed.ids))
    with pytest.raises(DataError, match="one energy per structure"):
        as_dataset(SimpleNamespace(X=mixed.X, y=np.zeros((n, 2)), w=np.ones((n, 2)), ids=mixed.ids))


def test_scikit_learn_indexes_the_dataset(mixed):
    model_selection = pytest.importorskip("sklearn.model_selection")
    base = pytest.importorskip("sklearn.base")

    class MeanSize(base.BaseEstimator):
        def __init__(self, offset=0.0):
            self.offset = offset

        def fit(self, X, y=None):
            assert isinstance(X, MolecularDataset)
            self.mean_ = X.counts.mean()
            return self

        def score(self, X, y=None):
            return -abs(X.counts.mean() - self.mean_ - self.offset)

    splitter = model_selection.KFold(5)
    scores = model_selection.cross_val_score(MeanSize(), mixed, cv=splitter)
    sizes = mixed.counts
    by_hand = [-abs(sizes[i] - np.delete(sizes, i).mean()) for i in range(5)]
    np.testing.assert_allclose(scores, by_hand)
    search = model_selection.GridSearchCV(MeanSize(), {"offset": [0.0, 100.0]}, cv=splitter).fit(mixed)
    assert search.best_params_ == {"offset": 0.0}


def test_y_without_energies():
    dataset = MolecularDataset.from_atoms([molecule("H2O"), molecule("CH4")])
    assert dataset.y.shape == dataset.w.shape == (2, 1)
    assert not dataset.w.any()
    dipoles = MolecularDataset(dataset.z, dataset.pos, dataset.ptr, targets={"dipole": np.ones((2, 3))})
    assert not dipoles.w.any()
    two = MolecularDataset(dataset.z, dataset.pos, dataset.ptr, targets={"mu": [1.0, 2.0], "energy": [3.0, 4.0]})
    assert two.y.tolist() == [[3.0, 1.0], [4.0, 2.0]]


# ---------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.dgl
def test_as_dataset_takes_all_that_it_says(mixed, dgl):
    graphs = [mixed[i] for i in range(5)]
    frames = [mixed.atoms(i) for i in range(5)]
    forms = [graphs, tuple(graphs), mixed.X, dgl.batch(graphs), frames, tuple(frames)]
    for form in forms:
        dataset = as_dataset(form)
        np.testing.assert_array_equal(dataset.pos, mixed.pos)
        np.testing.assert_array_equal(dataset.ptr, mixed.ptr)
        np.testing.assert_array_equal(dataset.targets["forces"], mixed.targets["forces"])
        np.testing.assert_array_equal(dataset.targets["energy"], mixed.targets["energy"])
    assert as_dataset(mixed) is mixed
    assert len(as_dataset(graphs[0])) == len(as_dataset(frames[0])) == 1


@pytest.mark.dgl
def test_periodic_graphs_and_molecules_together(dgl):
    frames = [molecule("H2O"), bulk("Cu", cubic=True), bulk("NaCl", "rocksalt", a=5.6)]
    frames[1].pbc = [True, True, False]
    back = as_dataset([RadiusGraph()(atoms) for atoms in frames])
    assert back.pbc.tolist() == [[False] * 3, [True, True, False], [True] * 3]
    np.testing.assert_array_equal(back.cell[2], frames[2].cell.array)
    np.testing.assert_array_equal(back.cell[1][:2], frames[1].cell.array[:2])
    np.testing.assert_array_equal(back.pos, np.concatenate([atoms.positions for atoms in frames]))


@pytest.mark.dgl
def test_as_dataset_refuses_the_rest(mixed, dgl):
    for bad in (5, "file.xyz", {"R": 1}, None):
        with pytest.raises(TypeError, match="allowed are a MolecularDataset"):
            as_dataset(bad)
    with pytest.raises(TypeError, match="load_extxyz"):
        as_dataset("file.xyz")
    with pytest.raises(TypeError, match="item 1 is Atoms"):
        as_dataset([mixed[0], mixed.atoms(1)])
    with pytest.raises(DataError, match="no structures"):
        as_dataset([])
    lacking = mixed[1]
    del lacking.ndata["F"]
    with pytest.raises(DataError, match=r"structure 1 has no ndata\['F'\]"):
        as_dataset([mixed[0], lacking])
    del lacking.ndata["R"]
    with pytest.raises(DataError, match=r"structure 0 has no ndata\['R'\]"):
        as_dataset([lacking])


# ------------------------------------------------------------------------------------------------------ reading labels


def test_labels_are_found_where_others_leave_them():
    forces = np.arange(9.0).reshape(3, 3)
    for energy_key in ("energy", "REF_energy", "Energy", "dft_energy"):
        atoms = molecule("H2O")
        atoms.info[energy_key] = -7.5
        atoms.arrays["REF_forces"] = forces
        dataset = MolecularDataset.from_atoms([atoms])
        assert dataset.targets["energy"].tolist() == [-7.5]
        np.testing.assert_array_equal(dataset.targets["forces"], forces)


def test_two_different_labels_are_an_error_until_one_is_chosen():
    atoms = labelled("H2O", -1.0)
    atoms.info["REF_energy"] = -2.0
    with pytest.raises(DataError, match="structure 1: 'energy' and 'REF_energy' are different labels"):
        MolecularDataset.from_atoms([labelled("H2O", -1.0), atoms])
    assert MolecularDataset.from_atoms([atoms], energy_key="REF_energy").targets["energy"].tolist() == [-2.0]
    assert MolecularDataset.from_atoms([atoms], energy_key="energy").targets["energy"].tolist() == [-1.0]
    atoms.info["REF_energy"] = -1.0  # the same label twice is fine
    assert MolecularDataset.from_atoms([atoms]).targets["energy"].tolist() == [-1.0]


def test_nothing_is_calculated_and_stale_results_are_not_labels():
    atoms = bulk("Cu")
    atoms.calc = EMT()
    assert MolecularDataset.from_atoms([atoms]).targets == {}
    energy = atoms.get_potential_energy()
    assert MolecularDataset.from_atoms([atoms]).targets["energy"].tolist() == [energy]
    atoms.positions += 0.1
    atoms.set_cell(atoms.cell * 1.1)
    assert "energy" not in MolecularDataset.from_atoms([atoms]).targets


def test_missing_labels_need_a_decision():
    frames = [labelled("H2O", -1.0), molecule("CH4"), labelled("NH3", -3.0)]
    with pytest.raises(DataError, match="structure 1 has no energy, but 2 of 3 structures have"):
        MolecularDataset.from_atoms(frames)
    dropped = MolecularDataset.from_atoms(frames, incomplete="drop_structures")
    assert dropped.ids.tolist() == ["0", "2"]
    assert dropped.targets["energy"].tolist() == [-1.0, -3.0]
    bare = MolecularDataset.from_atoms(frames, incomplete="drop_target")
    assert len(bare) == 3
    assert bare.targets == {}
    with pytest.raises(ConfigError, match="incomplete='skip'"):
        MolecularDataset.from_atoms(frames, incomplete="skip")


def test_constraints():
    atoms = molecule("H2O")
    atoms.set_constraint(FixAtoms([1]))
    assert MolecularDataset.from_atoms([atoms]).fixed.tolist() == [False, True, False]
    atoms.set_constraint(FixBondLength(0, 1))
    with pytest.raises(DataError, match="structure 0: it has a constraint"):
        MolecularDataset.from_atoms([atoms])


def test_errors_of_kinds_are_ours_and_pythons(mixed):
    with pytest.raises(DataError) as caught:
        as_dataset(3)
    assert isinstance(caught.value, TypeError)
    for bad in ([99], [0.5], [[0]], np.ones(99, bool)):
        with pytest.raises(DataError) as caught:
            mixed.select(bad)
        assert isinstance(caught.value, IndexError)
    with pytest.raises(DataError, match=f"index {len(mixed)} is out of range"):
        mixed[len(mixed)]


def test_columns_are_not_cast_from_other_kinds():
    good = {"z": [1, 8], "pos": [[0.0, 0, 0], [1.0, 0, 0]], "ptr": [0, 2]}
    MolecularDataset(**good)
    for changes in ({"pos": np.array(good["pos"]) + 0j}, {"pos": [["0", "0", "0"]] * 2}, {"z": [True, True]},
                    {"fixed": [0.5, 1.0]}, {"z": [[1], [8]]}, {"pos": [[0.0], [1.0, 2.0]]}):  # fmt: skip
        with pytest.raises(DataError):
            MolecularDataset(**(good | changes))
