"""OC20: genuine files in all their formats, energies of both kinds, splits, conversion that is interrupted, submission."""

from __future__ import annotations

import io
import json
import lzma
import pickle
import tarfile
import warnings

import numpy as np
import pytest
from ase.io import read
from oc20_files import ase_record, pyg_fields, text_frames, write_lmdb, write_pyg_lmdb, write_text

from ndem_zoo.datasets import oc20
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.oc20 import convert_oc20, find_sources, linear_reference, load_oc20, read_oc20, read_reference
from ndem_zoo.datasets.oc20_formats import frames_of_text
from ndem_zoo.datasets.oc20_submission import write_submission
from ndem_zoo.datasets.store import StoredDataset, StoreWriter, open_store
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError

pytest.importorskip("lmdb")


def whole(loaded) -> MolecularDataset:
    """The first part of what a loader returns; the others must be empty."""
    tasks, (train, valid, test), transformers = loaded
    assert tasks == train.tasks
    assert (len(valid), len(test), transformers) == (0, 0, [])
    return train


def assert_same(a: MolecularDataset, b: MolecularDataset, tolerance: float = 0.0) -> None:
    for name in ("z", "ptr", "pbc", "fixed", "ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("pos", "cell"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=tolerance, err_msg=name)
    for name in a.targets:
        np.testing.assert_allclose(a.targets[name], b.targets[name], rtol=tolerance, atol=tolerance, err_msg=name)
    for name in ("tags", "sid", "fid"):
        np.testing.assert_array_equal(a.extras[name], b.extras[name], err_msg=name)


@pytest.fixture(scope="module")
def mini(shared_data) -> MolecularDataset:
    return whole(load_oc20("s2ef", "all", shared_data / "oc20" / "s2ef_mini100"))


# ------------------------------------------------------------------------------------------------------- genuine files


def test_golden_values(mini):
    assert (len(mini), len(mini.z), len(np.unique(mini.extras["sid"]))) == (100, 8231, 18)
    assert mini.ids[0] == "1000100_0"
    assert mini.counts[0] == 33
    assert mini.atoms(0).get_chemical_formula() == "Au8Na24O"
    assert mini.targets["energy"][0] == pytest.approx(2.60605148, abs=1e-8)
    energy = mini.targets["energy"]
    found = [energy.mean(), energy.std(), energy.min(), energy.max()]
    np.testing.assert_allclose(found, [-0.026, 3.106, -6.13, 9.36], atol=6e-3)
    free = np.abs(mini.targets["forces"][~mini.fixed])
    np.testing.assert_allclose([free.mean(), free.max()], [0.056, 6.80], atol=6e-3)
    assert mini.checked


def test_text_equals_ase(shared_data, mini):
    raw = lzma.decompress((shared_data / "oc20" / "s2ef_mini100" / "0.extxyz.xz").read_bytes()).decode()
    log = lzma.decompress((shared_data / "oc20" / "s2ef_mini100" / "0.txt.xz").read_bytes()).decode().split()
    for k in (0, 1, 42, 99):
        atoms = read(io.StringIO(raw), index=k, format="extxyz")
        rows = slice(mini.ptr[k], mini.ptr[k + 1])
        np.testing.assert_array_equal(mini.z[rows], atoms.numbers)
        np.testing.assert_array_equal(mini.pos[rows], atoms.positions)
        np.testing.assert_array_equal(mini.cell[k], atoms.cell.array)
        np.testing.assert_array_equal(mini.pbc[k], atoms.pbc)
        np.testing.assert_array_equal(mini.targets["forces"][rows], atoms.get_forces(apply_constraint=False))
        np.testing.assert_array_equal(np.flatnonzero(mini.fixed[rows]), atoms.constraints[0].index)
        np.testing.assert_array_equal(mini.extras["tags"][rows], atoms.get_tags())
        reference = float(log[k].split(",")[2])
        assert mini.targets["energy"][k] == pytest.approx(atoms.get_potential_energy() - reference, abs=1e-9)


def test_forces_of_fixed_atoms_are_kept(mini):
    assert mini.fixed.any()
    assert np.abs(mini.targets["forces"][mini.fixed]).max() > 0.1
    assert set(mini.extras["tags"][mini.fixed]) == {0}


@pytest.mark.parametrize(
    ("file", "n"), [("s2ef_pyg_new.lmdb", 20), ("s2ef_pyg_old.lmdb", 20), ("s2ef_pyg1.lmdb", 5), ("s2ef.aselmdb", 20)]
)
def test_all_formats_hold_the_same_frames(shared_data, mini, file, n):
    found = whole(load_oc20("s2ef", "all", shared_data / "oc20" / "fmt" / file))
    assert len(found) == n
    rows = [mini.ids.tolist().index(identity) for identity in found.ids]  # the file of PyG 1 skips some
    assert_same(found, mini[rows], 0.0 if file.endswith(".aselmdb") else 3e-6)  # tensors are float32


def test_is2re(shared_data):
    found = whole(load_oc20("is2re", "all", shared_data / "oc20" / "fmt" / "is2re_pyg.lmdb"))
    rows = (shared_data / "oc20" / "systems.csv").read_text().split()
    table = {row.split(",")[0]: row.split(",") for row in rows[1:]}
    assert len(found) == 27
    assert found.tasks == ["energy"]
    assert found.extras["pos_relaxed"].shape == found.pos.shape
    moved = np.abs(found.extras["pos_relaxed"] - found.pos).max(axis=1)
    assert moved.max() > 0.1
    assert moved[found.fixed].max() < 1e-3
    for k, sid in enumerate(found.ids):
        row = table[f"random{sid}"]
        assert found.targets["energy"][k] == pytest.approx(float(row[13]), abs=1e-6)
        assert found.extras["y_init"][k] == pytest.approx(float(row[12]), abs=1e-6)


def test_is2re_totals(shared_data):
    folder = shared_data / "oc20"
    table = json.loads((folder / "oc20_ref_subset.json").read_text())
    options = {"energy": "total", "reference": folder / "oc20_ref_subset.json"}
    found, plain = (read_oc20(folder / "fmt" / "is2re_pyg.lmdb", "is2re", **given) for given in (options, {}))
    reference = np.array([table[f"random{sid}"] for sid in found.ids])
    np.testing.assert_allclose(found.targets["energy"] - plain.targets["energy"], reference, atol=1e-9)
    np.testing.assert_allclose(found.extras["y_init"] - plain.extras["y_init"], reference, atol=1e-9)


def test_a_folder_of_several_formats(shared_data):
    with pytest.raises(DataError, match=r"several formats \(ase, pyg\)"):
        load_oc20("s2ef", "all", shared_data / "oc20" / "fmt")


# ------------------------------------------------------------------------------------------------------ kinds of energy


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('pbc="T T T"', 'pbc="T T"', "pbc has 2 flags"),
        ('Lattice="20 0 0 0 15 0 0 0 30" ', "", "there is no Lattice"),
        ("F 0 ", "F 99999999999999999999 ", "structure 0 cannot be read"),
    ],
)
def test_heads_and_columns_that_cannot_be(old, new, message):
    text, log = text_frames(2)
    assert old in text
    with pytest.raises(FileFormatError, match=message):
        frames_of_text(text.replace(old, new), log, "0.extxyz")


def test_totals_and_adsorption_energies(shared_data, mini):
    folder = shared_data / "oc20"
    total = read_oc20(folder / "s2ef_mini100", energy="total")
    assert total.targets["energy"][0] == -57.74908337
    table = json.loads((folder / "oc20_ref_subset.json").read_text())
    reference = np.array([table[f"random{sid}"] for sid in total.extras["sid"]])
    np.testing.assert_allclose(total.targets["energy"] - reference, mini.targets["energy"], atol=1e-8)
    pickled = read_oc20(folder / "fmt" / "s2ef_pyg_new.lmdb", energy="total", reference=folder / "oc20_ref_subset.json")
    np.testing.assert_allclose(pickled.targets["energy"], total.targets["energy"][:20], atol=1e-5)
    with pytest.raises(DataError, match=r"structure 0 \(system random1000100\) has no reference energy"):
        read_oc20(folder / "fmt" / "s2ef_pyg_new.lmdb", energy="total")


def test_raw_totals_are_noticed(shared_data):
    """A file that claims to hold adsorption energies, but does not."""
    with pytest.warns(DataWarning, match=r"mean energy is -\d+\.\d eV, which looks like raw total energies"):
        read_oc20(shared_data / "oc20" / "s2ef_mini100", stored="adsorption")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_oc20(shared_data / "oc20" / "s2ef_mini100")
        read_oc20(shared_data / "oc20" / "s2ef_mini100", energy="total")


def test_raw_totals_are_noticed_in_a_conversion(tmp_path):
    write_text(tmp_path / "raw", 0)
    with pytest.warns(DataWarning, match=r"0\.extxyz\.xz: the mean energy is -101\.0 eV"):
        convert_oc20(tmp_path / "raw", tmp_path / "store", stored="adsorption")


def test_text_without_a_log_needs_references(tmp_path):
    (tmp_path / "5.extxyz").write_text(text_frames(2)[0])
    with pytest.raises(
        DataError, match=r"5\.extxyz: structure 0 \(system unknown\) has no reference energy.*energy='total'"
    ):
        load_oc20("s2ef", "all", tmp_path)
    found = whole(load_oc20("s2ef", "all", tmp_path, energy="total"))
    assert found.targets["energy"].tolist() == [-100.0, -101.0]
    assert found.ids.tolist() == ["5.extxyz:0", "5.extxyz:1"]
    assert "sid" not in found.extras


def test_reference_energies_from_a_pickle(tmp_path, shared_data):
    table = json.loads((shared_data / "oc20" / "oc20_ref_subset.json").read_text())
    for protocol in (2, 4, 5):
        (tmp_path / "ref.pkl").write_bytes(pickle.dumps(table, protocol=protocol))
        found = read_reference(tmp_path / "ref.pkl")
        assert len(found) == 27
        assert found.get(1000100) == table["random1000100"] == -60.35513485
        assert found.get(1000101) is None
        assert found.get(None) is None


@pytest.mark.parametrize(
    "content", [np.float64(1.0), {"random1": np.float64(1.0)}, print, {"random1": "1"}, [1.0], {"x": 1.0}]
)
def test_reference_energies_that_are_more_than_numbers(tmp_path, content):
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=r"ref\.pkl|reference energy"):
        read_reference(tmp_path / "ref.pkl")


def test_linear_reference(shared_data):
    found = linear_reference(shared_data / "oc20" / "oc20_linref.npz")
    usable = [1, *range(5, 9), 11, *range(13, 18), *range(19, 35), *range(37, 53), 55, *range(72, 84)]
    assert [oc20.chemical_symbols.index(symbol) for symbol in found] == usable
    assert all(0 < abs(value) < 20 for value in found.values())
    with np.load(shared_data / "oc20" / "oc20_linref.npz") as raw:
        assert found["Cu"] == raw["coeff"][29]


# -------------------------------------------------------------------------------------------------------- broken files


def edited(old: str, new: str) -> str:
    text = text_frames(3)[0]
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited("Cu", "Xx"), r"structure 0 cannot"),
        (edited(" T ", " maybe "), r"neither T nor F"),
        (text_frames(3)[0][:-200], r"structure 2 cannot"),
        (edited("\n4\n", "\n5\n"), r"structure 1 cannot"),
        (edited("4\n", "four\n"), r"structure 0 cannot"),
        (edited("pos:R:3", "pos:R:2"), r"pos has 2 columns"),
        (edited("pos:R:3:", ""), r"columns|lack pos"),
        (edited('Lattice="20 0 0 0 15 0 0 0 30"', ""), r"Lattice"),
        (edited("-100.0", "low"), r"structure 0 cannot"),
        ("", r"no structures"),
        (text_frames(1)[0] + "\nsome words\n", r"begins none"),
    ],
)
def test_damaged_text(text, message):
    with pytest.raises(FileFormatError, match=rf"name\.extxyz.*{message}"):
        frames_of_text(text, None, "name.extxyz")


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("random11,frame0,-98.5\n", "has 3 structures, its log has 1 lines"),
        ("random11,frame0,-98.5\nframe1,random11,-98.5\nrandom11,frame2,-98.5\n", "line 2 of the log"),
    ],
)
def test_damaged_logs(log, message):
    with pytest.raises(FileFormatError, match=message):
        frames_of_text(text_frames(3)[0], log, "name")


def test_damaged_compression(tmp_path):
    write_text(tmp_path, 0)
    path = tmp_path / "0.extxyz.xz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FileFormatError, match=r"0\.extxyz\.xz is damaged"):
        read_oc20(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forces": np.zeros((3, 3))}, r"'forces' of shape \(3, 3\)"),
        ({"pos": None}, r"no field 'pos'"),
        ({"atomic_numbers": np.array([1.0, 1.5, 8.0, 8.0])}, r"atom 1 has 1\.5"),
        ({"atomic_numbers": np.array([1, 0, 8, 8])}, r"atom 1 has 0"),
        ({"energy": np.zeros(3)}, r"'energy' that is no number"),
        ({"energy": "low"}, r"'energy' that is no number"),
        ({"sid": "system"}, r"needed is random<number>"),
        ({"fid": 0.5}, r"whole number"),
        ({"cell": np.zeros((2, 3, 3))}, r"'cell' of shape"),
        ({"pos": np.full((4, 3), np.nan)}, r"position of atom 0 is"),
        ({"energy": np.float64("nan")}, r"energy is nan"),
        ({"tags": [[1], [2]]}, r"'tags'"),
        ({"natoms": None, "pos": "far away"}, r"'pos' of type str"),
    ],
)
def test_records_that_are_no_structures(tmp_path, change, message):
    fields = {name: value for name, value in (pyg_fields() | change).items() if value is not None}
    path = write_pyg_lmdb(tmp_path / "data.lmdb", [pyg_fields(), _as_tensors(fields)])
    with pytest.raises(DataError, match=message) as caught:
        read_oc20(path)
    assert "data.lmdb" in str(caught.value)


def _as_tensors(fields):
    import torch

    return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in fields.items()}


def test_records_with_and_without_labels(tmp_path):
    fields = {name: value for name, value in pyg_fields().items() if name != "energy"}
    with pytest.raises(DataError, match="structure 1 has no energy, but others have"):
        read_oc20(write_pyg_lmdb(tmp_path / "data.lmdb", [pyg_fields(), fields]))
    bare = {name: value for name, value in fields.items() if name != "forces"}
    assert read_oc20(write_pyg_lmdb(tmp_path / "test.lmdb", [bare, bare | {"fid": 4}])).tasks == []


@pytest.mark.parametrize(
    "constraint", [{"name": "FixBondLength", "kwargs": {}}, {"name": "FixAtoms", "kwargs": {"indices": [9]}}]
)
def test_constraints_that_are_not_understood(tmp_path, constraint):
    fields = {
        "numbers": np.array([1, 8]),
        "positions": np.eye(3)[:2] * 2,
        "cell": np.eye(3) * 9,
        "constraints": [constraint],
    }
    path = write_lmdb(tmp_path / "data.aselmdb", {b"1": ase_record(fields | {"energy": 1.0})})
    with pytest.raises(FileFormatError, match=r"key '1' has (the constraint|a FixAtoms)"):
        read_oc20(path, energy="total")


# --------------------------------------------------------------------------------------------------- splits and folders


@pytest.fixture
def official(tmp_path):
    """A data folder with the training split in its archive, one validation split unpacked, one as LMDB."""
    write_text(tmp_path / "raw", 0, 4, sid=1)
    write_text(tmp_path / "raw", 2, 2, sid=2, seed=1)
    write_text(tmp_path / "raw", 10, 3, sid=3, seed=2)
    with tarfile.open(tmp_path / "s2ef_train_200K.tar", "w") as archive:
        (tmp_path / "raw" / "README.txt").write_text("read me")
        archive.add(tmp_path / "raw", "s2ef_train_200K/s2ef_train_200K")
    write_text(tmp_path / "s2ef_val_id" / "s2ef_val_id", 0, 5, is_compressed=False, sid=4, seed=3)
    write_pyg_lmdb(tmp_path / "s2ef" / "all" / "val_ood_ads" / "data.0000.lmdb", [pyg_fields(sid=5)])
    return tmp_path


def test_official_splits(official):
    with pytest.warns(DataWarning, match="not the official s2ef_train_200K"):
        tasks, parts, _ = load_oc20("s2ef", "200K", official, valid="val_id", test="val_ood_ads")
    assert tasks == ["energy", "forces"]
    assert [len(part) for part in parts] == [9, 5, 1]
    train, valid, test = parts
    assert train.extras["sid"].tolist() == [1] * 4 + [2] * 2 + [3] * 3  # files in the order of their numbers
    np.testing.assert_allclose(train.targets["energy"], [-1.5, -2.5, -3.5, -4.5, -1.5, -2.5, -1.5, -2.5, -3.5])
    assert set(valid.extras["sid"]) == {4}
    assert set(test.extras["sid"]) == {5}
    assert train.card.licence == "CC BY 4.0"
    assert train.name == "OC20 s2ef 200k"
    assert_same(train, read_oc20(official / "raw"))


def test_conversion_happens_once(official, monkeypatch):
    first = whole(load_oc20("s2ef/val_id", data_dir=official))
    monkeypatch.setattr(oc20, "read_source", None)
    again = whole(load_oc20("s2ef/val_id", data_dir=official))
    assert isinstance(again, StoredDataset)
    assert_same(first, again)
    other = official / "stores" / "oc20_s2ef_val_id_adsorption"
    with pytest.raises(ConfigError, match="converted with energy='adsorption', not 'total'"):
        load_oc20("s2ef/val_id", data_dir=official, energy="total", store=other)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no split 'train'; it has 200k, 2M"):
        load_oc20("s2ef", "train", tmp_path)
    with pytest.raises(ConfigError, match=r"task='s2e'; allowed are 's2ef', 'is2re'"):
        load_oc20("s2e", "all", tmp_path)
    with pytest.raises(DataError, match=r"s2ef_train_2M\.tar of OC20 is not in .*download=False"):
        load_oc20("s2ef", "2M", tmp_path)
    with pytest.raises(DataError, match=r"is2res_train_val_test_lmdbs\.tar\.gz from https.*8\.1 GB.*unpack"):
        load_oc20("is2re", "10k", tmp_path)
    with pytest.raises(DataError, match=r"has no \.extxyz"):
        load_oc20("s2ef", "all", tmp_path)
    with pytest.raises(ConfigError, match="name their folder"):
        load_oc20("s2ef")


def test_large_folders_need_a_store(tmp_path, monkeypatch):
    write_text(tmp_path / "mine", 0)
    monkeypatch.setattr(oc20, "IN_MEMORY", 100)
    with pytest.raises(DataError, match="store="):
        load_oc20("s2ef", "all", tmp_path / "mine")
    found = whole(load_oc20("s2ef", "all", tmp_path / "mine", store=tmp_path / "store"))
    assert_same(found, whole(load_oc20("s2ef", "all", tmp_path / "store")))


def test_random_splits(shared_data):
    folder = shared_data / "oc20" / "s2ef_mini100"
    with pytest.warns(DataWarning, match="one relaxation are in different parts"):
        _, parts, _ = load_oc20("s2ef", "all", folder, n_train=0.8, n_valid=0.1)
    assert [len(part) for part in parts] == [80, 10, 10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, parts, _ = load_oc20("s2ef", "all", folder, n_train=12, n_valid=3, split_by="system")
    systems = [set(part.extras["sid"].tolist()) for part in parts]
    assert [len(system) for system in systems] == [12, 3, 3]
    assert len(set.union(*systems)) == 18
    assert sum(map(len, parts)) == 100


# ---------------------------------------------------------------------------------------------------------- conversion


def test_converted_data_are_the_files(tmp_path, shared_data, mini):
    store = convert_oc20(shared_data / "oc20" / "s2ef_mini100", tmp_path / "store")
    assert_same(store, mini)
    assert store.checked
    assert open_store(tmp_path / "store", verify=True).card.name == "OC20"
    with pytest.raises(FileExistsError, match="finished store"):
        convert_oc20(shared_data / "oc20" / "s2ef_mini100", tmp_path / "store")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("place", ["read_source", "append", "commit", "finish"])
@pytest.mark.parametrize("after", [1, 2])
def test_interrupted_conversion_goes_on(tmp_path, monkeypatch, place, after):
    for number in range(4):
        write_text(tmp_path / "raw", number, 2 + number, sid=number, seed=number)
    convert_oc20(tmp_path / "raw", tmp_path / "whole")
    owner, calls = (oc20 if place == "read_source" else StoreWriter), []
    original = getattr(owner, place)

    def stop(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after or place == "finish":
            raise Interrupted
        return original(*arguments, **options)

    monkeypatch.setattr(owner, place, stop)
    with pytest.raises(Interrupted):
        convert_oc20(tmp_path / "raw", tmp_path / "store")
    monkeypatch.setattr(owner, place, original)
    with pytest.raises(FileFormatError, match="unfinished store"):
        open_store(tmp_path / "store")
    read = []
    monkeypatch.setattr(oc20, "read_source", lambda source, options: read.append(source.name) or _read(source, options))
    convert_oc20(tmp_path / "raw", tmp_path / "store")
    assert len(read) == (0 if place == "finish" else 4 - after)
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "store" / path.name).read_bytes(), path.name


_read = oc20.read_source


def test_a_conversion_is_not_resumed_as_another_one(tmp_path, monkeypatch):
    write_text(tmp_path / "raw", 0)
    monkeypatch.setattr(StoreWriter, "finish", lambda self: None)
    convert_oc20(tmp_path / "raw", tmp_path / "store")
    with pytest.raises(ConfigError, match="begun with settings"):
        convert_oc20(tmp_path / "raw", tmp_path / "store", energy="total")


def test_several_processes_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(oc20, "CHUNK", 3)
    records = [pyg_fields(3 + k % 3, k, fid=k) for k in range(20)]
    write_pyg_lmdb(tmp_path / "raw" / "data.0000.lmdb", records[:11])
    write_pyg_lmdb(tmp_path / "raw" / "data.0001.lmdb", records[11:])
    done = []
    convert_oc20(tmp_path / "raw", tmp_path / "one", report=lambda *numbers: done.append(numbers))
    assert done == [(k + 1, 7, n) for k, n in enumerate([3, 6, 9, 11, 14, 17, 20])]
    convert_oc20(tmp_path / "raw", tmp_path / "two", workers=2)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert open_store(tmp_path / "two").extras["fid"].tolist() == list(range(20))


def test_an_error_in_a_worker_names_its_file(tmp_path):
    write_text(tmp_path, 0)
    write_text(tmp_path, 1)
    (tmp_path / "1.txt.xz").write_bytes(lzma.compress(b"nothing\n"))
    with pytest.raises(FileFormatError, match=r"1\.extxyz\.xz has 3 structures, its log has 1 lines"):
        convert_oc20(tmp_path, tmp_path / "store", workers=2)


def test_truncated_archives(official):
    path = official / "s2ef_train_200K.tar"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises((FileFormatError, DataError)):
        find_sources(path)


# ---------------------------------------------------------------------------------------------------------- submission


def slabs(n: int, seed: int) -> MolecularDataset:
    """Structures whose ids are not in order, the first atom of each fixed."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 6, n)
    ptr = np.concatenate([[0], np.cumsum(counts)])
    fixed = np.zeros(ptr[-1], dtype=bool)
    fixed[ptr[:-1]] = True
    ids = [f"{sid}_{fid}" for sid, fid in zip(rng.permutation(n) + 95, rng.integers(0, 200, n), strict=True)]
    return MolecularDataset(np.full(ptr[-1], 29), rng.normal(size=(ptr[-1], 3)), ptr, fixed=fixed, ids=ids)


@pytest.mark.parametrize("atoms", ["all", "free"])
def test_submission_is_read_back_as_the_server_does(tmp_path, atoms):
    splits = {}
    for k, name in enumerate(("id", "ood_ads", "ood_cat", "ood_both")):
        data = slabs(20 + k, k)
        rng = np.random.default_rng(k)
        flat = rng.normal(size=(len(data.z), 3))
        ragged = np.split(flat, data.ptr[1:-1])
        splits[name] = (data, {"energy": rng.normal(size=len(data)), "forces": ragged if k % 2 else flat})
    write_submission(tmp_path / "submission.npz", splits, atoms=atoms)
    with np.load(tmp_path / "submission.npz", allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    assert set(found) == {f"{split}_{key}" for split in splits for key in ("ids", "energy", "forces", "chunk_idx")}
    for name, (data, predicted) in splits.items():
        ids = found[f"{name}_ids"]
        assert ids.tolist() == sorted(data.ids.tolist())
        forces = np.split(found[f"{name}_forces"], found[f"{name}_chunk_idx"])
        assert found[f"{name}_forces"].dtype == found[f"{name}_energy"].dtype == np.float16
        assert len(forces) == len(ids)
        flat = np.concatenate([np.asarray(part).reshape(-1, 3) for part in predicted["forces"]])
        for identity, energy, mine in zip(ids, found[f"{name}_energy"], forces, strict=True):
            i = data.ids.tolist().index(identity)
            expected = flat[data.ptr[i] : data.ptr[i + 1]].astype(np.float16)
            expected = np.concatenate([0 * expected[:1], expected[1:]]) if atoms == "all" else expected[1:]
            assert energy == np.float16(predicted["energy"][i])
            np.testing.assert_array_equal(mine, expected)


def test_submission_of_relaxed_energies(tmp_path):
    data = MolecularDataset(np.full(3, 29), np.zeros((3, 3)), np.arange(4), ids=["10", "9", "8"])
    splits = dict.fromkeys(("id", "ood_ads", "ood_cat", "ood_both"), (data, {"energy": np.arange(3.0)}))
    write_submission(tmp_path / "is2re.npz", splits)
    with np.load(tmp_path / "is2re.npz", allow_pickle=False) as file:
        assert file["id_ids"].tolist() == ["10", "8", "9"]
        assert file["id_energy"].tolist() == [0.0, 2.0, 1.0]
        assert "id_forces" not in file.files


def test_submissions_that_would_be_refused(tmp_path):
    data = slabs(5, 0)
    good = (data, {"energy": np.zeros(5), "forces": np.zeros((len(data.z), 3))})
    splits = dict.fromkeys(("id", "ood_ads", "ood_cat", "ood_both"), good)
    path = tmp_path / "submission.npz"
    with pytest.raises(ConfigError, match="needed are id, ood_ads, ood_cat, ood_both"):
        write_submission(path, {"id": good})
    with pytest.raises(ConfigError, match="atoms='some'"):
        write_submission(path, splits, atoms="some")
    for predicted, message in (
        ({"energy": np.zeros(4)}, r"'ood_cat': energies have shape \(4,\)"),
        ({"energy": np.array([0, 0, np.nan, 0, 0])}, "energy of row 2 is nan"),
        ({"energy": np.zeros(5), "forces": np.full((len(data.z), 3), 1e5)}, "float16"),
        ({"energy": np.zeros(5), "forces": np.zeros((3, 3))}, "forces are of 3 atoms"),
    ):
        with pytest.raises(DataError, match=message):
            write_submission(path, splits | {"ood_cat": (data, predicted)})
    twice = data.select([0, 0])
    with pytest.raises(DataError, match="2 structures have 1 different ids"):
        write_submission(path, splits | {"id": (twice, {"energy": np.zeros(2)})})
    assert not list(tmp_path.iterdir())
