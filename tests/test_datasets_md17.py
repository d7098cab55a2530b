"""MD17 and rMD17: units, splits, names, damaged files; on genuine frames where they are at hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from ase import units

from ndem_zoo.datasets import MolecularDataset, load_md17, read_md17
from ndem_zoo.datasets.md17 import (
    MD17,
    MD17_MOLECULES,
    RMD17,
    RMD17_MOLECULES,
    RMD17_SPLITS,
    TooManyFramesWarning,
    canonical_name,
)
from ndem_zoo.datasets.sample import sample_file
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError

#: One kcal/mol in eV from the exact constants of the SI of 2019.
KCAL = 4184 / (6.02214076e23 * 1.602176634e-19)


def genuine(shared_data: Path, molecule: str, revised: bool = False) -> MolecularDataset:
    folder = "rmd17/npz_data/rmd17" if revised else "md17/md17"
    return read_md17(shared_data / f"{folder}_{molecule}.npz", revised)


# ------------------------------------------------------------------------------------------------------- genuine data


def test_units_against_a_value_by_hand(shared_data):
    dataset = genuine(shared_data, "ethanol")
    # First frame of the file: E = -97195.70096464569 kcal/mol, F[0] = (66.31349548, -17.85442987, -30.58494221).
    assert dataset.targets["energy"][0] == pytest.approx(-97195.70096464569 * KCAL, rel=1e-7)
    assert dataset.targets["energy"][0] == pytest.approx(-4214.8045, abs=1e-3)
    np.testing.assert_allclose(dataset.targets["forces"][0], [2.8756252, -0.7742413, -1.3262886], atol=1e-6)
    np.testing.assert_allclose(dataset.pos[0], [-0.04253747, -0.50756283, 0.02767847], atol=1e-8)
    assert dataset.z[:9].tolist() == [6, 6, 8, 1, 1, 1, 1, 1, 1]
    assert dataset.ids[:3].tolist() == ["39", "48", "154"]


@pytest.mark.parametrize(
    ("molecule", "revised"),
    [("aspirin", False), ("ethanol", False), ("malonaldehyde", False), ("uracil", False)]
    + [("aspirin", True), ("ethanol", True)],
)
def test_forces_are_minus_the_derivative_of_the_energy(shared_data, molecule, revised):
    """Neighboring frames of the trajectory: E2 - E1 against -(F1 + F2)/2 . (R2 - R1); catches units, sign and order."""
    dataset = genuine(shared_data, molecule, revised)
    order = np.argsort(dataset.ids.astype(int))
    number = dataset.ids.astype(int)[order]
    first = np.flatnonzero(np.diff(number) == 1)
    a, b = order[first], order[first + 1]
    assert len(a) >= 30
    n = dataset.counts[0]
    pos, forces = dataset.pos.reshape(-1, n, 3), dataset.targets["forces"].reshape(-1, n, 3)
    work = -0.5 * ((forces[a] + forces[b]) * (pos[b] - pos[a])).sum(axis=(1, 2))
    change = dataset.targets["energy"][b] - dataset.targets["energy"][a]
    slope = (work * change).sum() / np.square(work).sum()
    residual = change - slope * work
    assert residual.std() < 0.03 * KCAL  # noise of the labels; measured: at most 0.022 kcal/mol
    # 56 to 242 pairs give 0.9986 to 1.0004; malonaldehyde has 30 pairs with small changes, and 1.009.
    assert slope == pytest.approx(1.0, abs=0.003 + 4 * residual.std() / np.sqrt(np.square(work).sum()))
    assert change.std() > 0.5 * KCAL


def test_old_and_revised_labels_belong_to_the_same_frames(shared_data):
    old, new = genuine(shared_data, "aspirin"), genuine(shared_data, "aspirin", True)
    row = {number: i for i, number in enumerate(old.ids)}
    same = old.select([row[number] for number in new.ids])
    np.testing.assert_array_equal(same.pos, new.pos)
    difference = same.targets["forces"] - new.targets["forces"]
    assert 0 < np.sqrt(np.square(difference).mean()) < 0.15 * np.sqrt(np.square(new.targets["forces"]).mean())


def test_loading_a_subset_warns_and_splits_as_torchmd_net(shared_data):
    with pytest.warns(DataWarning, match=r"not the official file of MD17 ethanol: it has 5,841 frames.*555,092"):
        tasks, (train, valid, test), transformers = load_md17("ethanol", data_dir=shared_data, download=False)
    assert (tasks, transformers) == (["energy", "forces"], [])
    assert [len(part) for part in (train, valid, test)] == [950, 50, 4841]
    whole = genuine(shared_data, "ethanol")
    assert train.ids[:3].tolist() == whole.ids[[2779, 4836, 4402]].tolist()
    assert len(set(train.ids) | set(valid.ids) | set(test.ids)) == 5841
    assert train.card is MD17
    with pytest.warns(DataWarning):
        again = load_md17("md17_ethanol", data_dir=shared_data / "md17", download=False, n_test=1000)[1]
    assert again[0].split_hash == train.split_hash
    assert len(again[2]) == 1000


def test_official_split_of_rmd17(shared_data):
    with pytest.warns(DataWarning, match="its checksum differs from md5:17fd"):
        _, (train, valid, test), _ = load_md17("aspirin", True, data_dir=shared_data, download=False, split=1)
    whole = genuine(shared_data, "aspirin", True)
    # In these files, the training list 01 is rows 0 to 999.
    assert sorted([*train.ids, *valid.ids]) == sorted(whole.ids[:1000])
    assert [len(part) for part in (train, valid, test)] == [950, 50, 1000]
    assert not set(test.ids) & (set(train.ids) | set(valid.ids))
    rows = np.loadtxt(shared_data / "rmd17" / "splits" / "index_test_01.csv", dtype=int)
    assert test.ids.tolist() == whole.ids[rows].tolist()
    with pytest.warns(DataWarning):
        few = load_md17("aspirin", True, 100, 10, data_dir=shared_data, download=False, split=1, n_test=20)[1]
    assert [len(part) for part in few] == [100, 10, 20]
    assert set(few[2].ids) < set(test.ids)
    with pytest.warns(DataWarning), pytest.raises(DataError, match=r"only 1,000 structures; the split needs"):
        load_md17("aspirin", True, 990, 50, data_dir=shared_data, download=False, split=1)


def test_too_many_frames_of_rmd17(shared_data):
    advice = "DO NOT train a model on more than 1000"
    with pytest.warns(TooManyFramesWarning, match=advice), pytest.warns(DataWarning, match="checksum"):
        load_md17("ethanol", True, 1001, 50, data_dir=shared_data / "rmd17", download=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        warnings.simplefilter("error", TooManyFramesWarning)
        load_md17("ethanol", True, 1000, 50, data_dir=shared_data / "rmd17" / "npz_data", download=False)


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("aspirin", ("aspirin", False)),
        (" Salicylic Acid ", ("salicylic", False)),
        ("salicylic-acid", ("salicylic", False)),
        ("benzene2017", ("benzene", False)),
        ("md17_benzene2017", ("benzene", False)),
        ("ethanol_dft", ("ethanol", False)),
        ("md17_uracil.npz", ("uracil", False)),
        ("revised aspirin", ("aspirin", True)),
        ("rmd17_azobenzene", ("azobenzene", True)),
        ("malondialdehyde", ("malonaldehyde", False)),
    ],
)
def test_names(given, expected):
    assert canonical_name(given) == expected


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"MD17 has no molecule 'ethanal'.*uracil; did you mean 'ethanol'"):
        load_md17("ethanal", download=False)
    with pytest.raises(ConfigError, match="pass revised=True"):
        load_md17("paracetamol", download=False)
    with pytest.raises(ConfigError, match="rMD17 has no molecule 'water'"):
        load_md17("water", revised=True, download=False)


@pytest.mark.parametrize(
    ("revised", "split", "message"), [(False, 1, "official splits"), (True, 6, "1, 2, 3"), (True, 0, "1, 2")]
)
def test_impossible_official_splits(revised, split, message):
    with pytest.raises(ConfigError, match=message):
        load_md17("ethanol", revised, split=split, download=False)


def test_cards_are_complete():
    assert len(MD17_MOLECULES) == 8
    assert len(RMD17_MOLECULES) == 10
    assert set(MD17_MOLECULES) < set(RMD17_MOLECULES)
    assert "md17_benzene2017.npz" in MD17.files
    assert "md17_salicylic.npz" in MD17.files
    assert len(RMD17.files) == 10 + 10 + 1
    for card in (MD17, RMD17):
        assert all((card.name, card.description, card.theory, card.licence, card.citation, card.homepage))
        assert card.units == {"positions": "Å", "energy": "kcal/mol", "forces": "kcal/mol/Å"}
        assert all(file.urls for file in card.files.values())
    for file in RMD17.files.values():
        assert len(file.md5) == 32
        assert int(file.md5, 16) >= 0
    digests = [md5 for _, md5, _ in RMD17_MOLECULES.values()] + [md5 for _, md5 in RMD17_SPLITS.values()]
    assert len(set(digests)) == 20
    # rMD17's arrays have 100,000 frames of float64: 2 x 2 x 3n + 3 numbers of 8 bytes per frame, and z.
    for name, n in (("aspirin", 21), ("azobenzene", 24), ("benzene", 12), ("ethanol", 9), ("uracil", 12)):
        assert RMD17_MOLECULES[name][2] == pytest.approx(100_000 * 8 * (9 * n + 3), rel=1e-3)


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture
def raw() -> dict[str, np.ndarray]:
    """The first 40 frames of the embedded sample, as they stand in the file."""
    with np.load(sample_file("ethanol"), allow_pickle=False) as archive:
        return {"z": archive["z"], **{key: archive[key][:40] for key in "REF"}}


def write(folder: Path, arrays: dict[str, np.ndarray], name: str = "md17_ethanol.npz") -> Path:
    np.savez(folder / name, **arrays)
    return folder


def test_sample_in_md17s_layout(raw, tmp_path, ethanol):
    with pytest.warns(DataWarning, match="not the official file"):
        _, (train, _, _), _ = load_md17("ethanol", False, 30, 5, data_dir=write(tmp_path, raw), download=False)
    np.testing.assert_allclose(
        train.targets["energy"], ethanol.targets["energy"][train.ids.astype(int)], rtol=0, atol=1e-10
    )
    assert train.targets["energy"][0] == raw["E"][int(train.ids[0]), 0] * (units.kcal / units.mol)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("R", None, FileFormatError, "has no R; it has"),
        ("F", None, FileFormatError, "has no F"),
        ("F", lambda a: a["F"][:39], DataError, r"F has shape \(39, 9, 3\)"),
        ("E", lambda a: a["E"][:39], DataError, r"E has shape \(39, 1\)"),
        ("z", lambda a: a["z"][:8], DataError, "8 atoms need"),
        ("z", lambda a: a["z"].astype(float), DataError, "integers"),
        ("z", lambda a: np.where(a["z"] == 8, 257 + 7, a["z"].astype(int)), DataError, "atomic number 264; allowed"),
        ("z", lambda a: a["z"][:0], DataError, "z is empty"),
        ("R", lambda a: a["R"] + 0j, DataError, "dtype is complex128"),
        (
            "R",
            lambda a: np.where(np.arange(40)[:, None, None] == 7, np.nan, a["R"]),
            DataError,
            "R of structure 7 is not finite",
        ),
        (
            "E",
            lambda a: np.where(np.arange(40)[:, None] >= 38, np.inf, a["E"]),
            DataError,
            "E of structure 38 .* 2 of 40",
        ),
        ("F", lambda a: np.where(np.arange(40)[:, None, None] == 0, np.nan, a["F"]), DataError, "F of structure 0"),
    ],
)
def test_broken_arrays(raw, tmp_path, key, value, error, message):
    arrays = {k: v for k, v in raw.items() if k != key}
    if value is not None:
        arrays[key] = value(raw)
    with pytest.raises(error, match=message):
        load_md17("ethanol", data_dir=write(tmp_path, arrays), download=False)


def test_truncated_file(raw, tmp_path):
    path = write(tmp_path, raw) / "md17_ethanol.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FileFormatError, match="truncated"):
        load_md17("ethanol", data_dir=tmp_path, download=False)


def test_too_few_frames(raw, tmp_path):
    with pytest.warns(DataWarning), pytest.raises(DataError, match="only 40 structures; the split needs 950"):
        load_md17("ethanol", data_dir=write(tmp_path, raw), download=False)


def test_no_file_and_no_download(tmp_path):
    with pytest.raises(DataError, match=r"md17_ethanol\.npz of MD17 is not in .*download=False; get md17_ethanol"):
        load_md17("ethanol", data_dir=tmp_path, download=False)


def test_old_file_names_are_found(raw, tmp_path):
    write(tmp_path, raw, "benzene2017_dft.npz")
    with pytest.warns(DataWarning):
        assert len(load_md17("benzene", False, 30, 5, data_dir=tmp_path, download=False)[1][2]) == 5


def test_contents_that_do_not_match_their_own_checksum(raw, tmp_path):
    with np.load(sample_file("ethanol"), allow_pickle=False) as archive:
        whole = {key: archive[key] for key in archive.files}
    np.savez(tmp_path / "a.npz", **whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_md17(tmp_path / "a.npz")
    whole["F"] = whole["F"].copy()
    whole["F"][3, 0, 0] += 1e-9
    np.savez(tmp_path / "a.npz", **whole)
    with pytest.warns(DataWarning, match="do not match the checksum that it carries"):
        read_md17(tmp_path / "a.npz")


def rmd17(raw: dict[str, np.ndarray], folder: Path) -> Path:
    names = {"z": "nuclear_charges", "R": "coords", "E": "energies", "F": "forces"}
    arrays = {names[key]: value.reshape(-1) if key == "E" else value for key, value in raw.items()}
    (folder / "rmd17" / "npz_data").mkdir(parents=True)
    (folder / "rmd17" / "splits").mkdir()
    np.savez(folder / "rmd17" / "npz_data" / "rmd17_ethanol.npz", **arrays)
    return folder / "rmd17" / "splits"


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 1, 40], DataError, "names row 40, but .* has 40 frames: the list belongs to another file"),
        ([0, 1, 1], FileFormatError, "3 rows, 2 of them different"),
        (["a", "b"], FileFormatError, "not a list of row numbers"),
    ],
)
def test_broken_split_files(raw, tmp_path, rows, error, message):
    splits = rmd17(raw, tmp_path)
    (splits / "index_train_03.csv").write_text("\n".join(map(str, rows)))
    (splits / "index_test_03.csv").write_text("5\n6\n")
    with pytest.warns(DataWarning), pytest.raises(error, match=message):
        load_md17("ethanol", True, 2, 1, data_dir=tmp_path, download=False, split=3)


def test_split_files_in_the_official_layout(raw, tmp_path):
    splits = rmd17(raw, tmp_path)
    (splits / "index_train_03.csv").write_text("7\n3\n9\n")
    (splits / "index_test_03.csv").write_text("5\n6\n")
    with pytest.warns(DataWarning):
        _, (train, valid, test), _ = load_md17("ethanol", True, 2, 1, data_dir=tmp_path, download=False, split=3)
    assert sorted([*train.ids, *valid.ids]) == ["3", "7", "9"]
    assert test.ids.tolist() == ["5", "6"]
    with pytest.warns(DataWarning), pytest.raises(DataError, match=r"index_train_04\.csv of rMD17 is not in"):
        load_md17("ethanol", True, 2, 1, data_dir=tmp_path, download=False, split=4)
