"""Extended XYZ: genuine files, compressed files, ambiguous and missing labels, atomic writing."""

from __future__ import annotations

import gzip
import lzma
import os

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.constraints import FixAtoms

from ndem_zoo.datasets import MolecularDataset, load_extxyz, read_extxyz, write_extxyz
from ndem_zoo.errors import DataError, FileFormatError


def test_round_trip(ethanol, tmp_path):
    path = tmp_path / "a.extxyz"
    write_extxyz(path, ethanol[:20])
    back = read_extxyz(path)
    np.testing.assert_allclose(back.pos, ethanol[:20].pos, atol=5.1e-9)  # ASE writes 8 decimals
    np.testing.assert_allclose(back.targets["forces"], ethanol[:20].targets["forces"], atol=5.1e-9)
    np.testing.assert_allclose(back.targets["energy"], ethanol[:20].targets["energy"], rtol=1e-12)
    assert back.name == "a.extxyz"
    text = path.read_text()
    assert text.count("REF_energy=") == 20
    assert text.count(" energy=") == 20
    assert "REF_forces:R:3" in text
    assert ":forces:R:3" in text
    assert ase.io.read(path, index=3).get_potential_energy() == pytest.approx(ethanol.targets["energy"][3])


def test_periodic_structures_and_fixed_atoms(tmp_path):
    crystal = bulk("NaCl", "rocksalt", a=5.64)
    crystal.pbc = [True, True, False]
    crystal.set_constraint(FixAtoms([1]))
    write_extxyz(tmp_path / "a.xyz", [crystal, molecule("H2O")])
    back = read_extxyz(tmp_path / "a.xyz")
    assert back.pbc.tolist() == [[True, True, False], [False] * 3]
    np.testing.assert_allclose(back.cell[0], crystal.cell.array)
    assert back.fixed.tolist() == [False, True, False, False, False]
    assert back.targets == {}


def test_predictions_beside_labels(ethanol, tmp_path):
    path, data = tmp_path / "a.extxyz", ethanol[:3]
    predictions = {"energy": np.array([1.0, 2.0, 3.0]), "forces": np.arange(81.0).reshape(3, 9, 3)}
    write_extxyz(path, data, predictions)
    atoms = ase.io.read(path, index=1)
    assert atoms.get_potential_energy() == 2.0
    np.testing.assert_array_equal(atoms.get_forces(), predictions["forces"][1])
    assert atoms.info["REF_energy"] == data.targets["energy"][1]
    with pytest.raises(DataError, match=r"a\.extxyz: structure 0: 'energy' and 'REF_energy' are different labels"):
        read_extxyz(path)
    labels = read_extxyz(path, energy_key="REF_energy", forces_key="REF_forces")
    np.testing.assert_allclose(labels.targets["forces"], data.targets["forces"], atol=5.1e-9)
    predicted = read_extxyz(path, energy_key="energy", forces_key="forces")
    assert predicted.targets["energy"].tolist() == [1.0, 2.0, 3.0]


def test_predictions_for_structures_of_different_size(tmp_path):
    frames = [molecule("H2O"), molecule("CH4")]
    write_extxyz(tmp_path / "a.xyz", frames, {"energy": [1.0, 2.0], "forces": [np.ones((3, 3)), np.ones((5, 3))]})
    assert read_extxyz(tmp_path / "a.xyz").targets["forces"].shape == (8, 3)
    with pytest.raises(DataError, match="has 1 entries; there are 2"):
        write_extxyz(tmp_path / "b.xyz", frames, {"energy": [1.0]})
    with pytest.raises(DataError, match="structure 1: predicted forces have shape"):
        write_extxyz(tmp_path / "b.xyz", frames, {"forces": [np.ones((3, 3)), np.ones((3, 3))]})
    assert not (tmp_path / "b.xyz").exists()


def test_a_failed_write_leaves_the_old_file(ethanol, tmp_path, monkeypatch):
    path = tmp_path / "a.xyz"
    write_extxyz(path, ethanol[:1])
    before = path.read_bytes()

    def broken(stream, *_, **__):
        stream.write("half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(ase.io, "write", broken)
    with pytest.raises(OSError, match="disk full"):
        write_extxyz(path, ethanol[:5])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.xyz"]


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_files(ethanol, tmp_path, suffix, opener):
    plain = tmp_path / "a.xyz"
    write_extxyz(plain, ethanol[:7])
    packed = tmp_path / f"a.xyz{suffix}"
    with opener(packed, "wb") as stream:
        stream.write(plain.read_bytes())
    np.testing.assert_array_equal(read_extxyz(packed).pos, read_extxyz(plain).pos)
    packed.write_bytes(packed.read_bytes()[:-60])
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_extxyz(packed)


def test_load_splits(ethanol, tmp_path):
    write_extxyz(tmp_path / "a.xyz", ethanol[:50])
    tasks, (train, valid, test), transformers = load_extxyz(tmp_path / "a.xyz", seed=2)
    assert (tasks, transformers) == (["energy", "forces"], [])
    assert [len(part) for part in (train, valid, test)] == [40, 5, 5]
    assert train.ids[:5].tolist() == [str(i) for i in np.random.default_rng(2).permutation(50)[:5]]
    assert [len(part) for part in load_extxyz(tmp_path / "a.xyz", 10, 5, n_test=3)[1]] == [10, 5, 3]


def test_damaged_files(ethanol, tmp_path):
    path = tmp_path / "a.xyz"
    write_extxyz(path, ethanol[:4])
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[: 2 * 11 + 5]))
    with pytest.raises(FileFormatError, match=r"a\.xyz: structure"):
        read_extxyz(path)
    path.write_text("\n".join([*lines[:14], "C  not a number", *lines[15:]]))
    with pytest.raises(FileFormatError, match=r"a\.xyz: structure 1 cannot be read"):
        read_extxyz(path)
    path.write_text("")
    with pytest.raises(FileFormatError, match="holds no structures"):
        read_extxyz(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_extxyz(tmp_path / "none.xyz")


def test_missing_forces_need_a_decision(ethanol, tmp_path):
    frames = [ethanol.atoms(i) for i in range(4)]
    del frames[2].calc.results["forces"]
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    with pytest.raises(DataError, match=r"a\.xyz: structure 2 has no forces, but 3 of 4"):
        read_extxyz(tmp_path / "a.xyz")
    assert read_extxyz(tmp_path / "a.xyz", incomplete="drop_structures").ids.tolist() == ["0", "1", "3"]
    energies = read_extxyz(tmp_path / "a.xyz", incomplete="drop_target")
    assert energies.tasks == ["energy"]
    assert len(energies) == 4


# -------------------------------------------------------------------------------------------------------- genuine files


def test_botnet_files(shared_data):
    folder = shared_data / "botnet"
    train = read_extxyz(folder / "dataset_3BPA" / "train_300K.xyz.gz")
    assert len(train) == 500
    assert set(train.counts) == {27}
    assert train.targets["energy"][0] == -17660.461737861464
    np.testing.assert_array_equal(train.targets["forces"][0], [0.17092934, 0.13274200, 0.79555789])
    assert not train.is_periodic  # a cell, but pbc="F F F"
    dihedral = read_extxyz(folder / "dataset_acac" / "test_dihedral.xyz.gz")
    assert dihedral.tasks == ["energy"]
    assert len(dihedral) == 45
    isolated = read_extxyz(folder / "dataset_3BPA" / "iso_atoms.xyz.gz")
    assert dict(zip(isolated.z.tolist(), isolated.targets["energy"], strict=True))[1] == -13.587222780835477


def test_oc20_file(shared_data):
    dataset = read_extxyz(shared_data / "oc20" / "s2ef_mini100" / "0.extxyz.xz")
    assert len(dataset) == 100
    assert dataset.pbc.all()
    assert dataset.targets["energy"][0] == -57.74908337
    first = dataset.atoms(0)
    assert first.get_chemical_symbols()[0] == "Au"
    assert 0 < dataset.fixed[: dataset.ptr[1]].sum() < 33
    np.testing.assert_allclose(first.get_forces(apply_constraint=False)[0], [-0.03768235, -0.12397960, -0.05936932])


def test_datasets_are_what_atoms_say(ethanol, tmp_path):
    """The same structures read by ASE alone."""
    write_extxyz(tmp_path / "a.xyz", ethanol[5:8])
    direct = MolecularDataset.from_atoms(ase.io.read(tmp_path / "a.xyz", index=":"))
    ours = read_extxyz(tmp_path / "a.xyz")
    np.testing.assert_array_equal(direct.targets["forces"], ours.targets["forces"])


def test_only_structures_are_written(tmp_path):
    for z in (0, -5, 119):
        with pytest.raises(DataError, match=f"structure 1: atom 0 has atomic number {z}"):
            write_extxyz(tmp_path / "a.xyz", MolecularDataset([1, z], np.zeros((2, 3)), [0, 1, 2]))
    assert not list(tmp_path.iterdir())
