"""QM9: the three layouts against each other and against published numbers, units, splits, what is dropped, bad files."""

from __future__ import annotations

import bz2
import csv
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from ase import units

from ndem_zoo.datasets import load_qm9, read_qm9
from ndem_zoo.datasets.cache import FOLDER
from ndem_zoo.datasets.qm9 import (
    ALIASES,
    QM9,
    QM9_TARGETS,
    ROTATIONAL,
    canonical_target,
    open_qm9,
    read_uncharacterized,
)
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError
from ndem_zoo.properties import PROPERTIES
from ndem_zoo.registry import DATASETS

pytestmark = pytest.mark.filterwarnings("ignore::ndem_zoo.errors.DataWarning")

#: One Hartree in eV from the constants of CODATA 2018.
HARTREE = 27.211386245988

#: Free atoms in Hartree: the table of the data's README.
ATOMS = {
    "U0": {1: -0.500273, 6: -37.846772, 7: -54.583861, 8: -75.064579, 9: -99.718730},
    "U": {1: -0.498857, 6: -37.845355, 7: -54.582445, 8: -75.063163, 9: -99.717314},
    "H": {1: -0.497912, 6: -37.844411, 7: -54.581501, 8: -75.062219, 9: -99.716370},
    "G": {1: -0.510927, 6: -37.861317, 7: -54.598897, 8: -75.079532, 9: -99.733544},
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Caches go to a folder of the test's own, never to the user's."""
    monkeypatch.setenv("NDEM_ZOO_DATA", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def official(shared_data) -> Path:
    return shared_data / "qm9" / "official_format"


@pytest.fixture(scope="module")
def archive(official):
    """1,140 molecules in the official archive's format."""
    return read_qm9(official / "dsgdb9nsd_sample.xyz.tar.bz2")


def excluded(shared_data: Path) -> Path:
    return shared_data / "qm9" / "uncharacterized_indices.txt"


def rows_of(dataset, name: str) -> int:
    """Number of the molecule with this id."""
    return dataset.ids.tolist().index(name)


# ------------------------------------------------------------------------------------------------------- genuine data


def test_methane_by_hand(archive):
    """First file of the archive: ``gdb 1``, U0 -40.47893, gap 0.5048, alpha 13.21, r2 35.3641, A 157.7118, Cv 6.469."""
    assert archive.ids[0] == "1"
    assert archive.z[:5].tolist() == [6, 1, 1, 1, 1]
    np.testing.assert_array_equal(archive.pos[0], [-0.0126981359, 1.0858041578, 0.0080009958])
    expected = {
        "U0": -40.47893 * HARTREE,
        "gap": 0.5048 * HARTREE,
        "zpve": 0.044749 * HARTREE,
        "homo": -0.3877 * HARTREE,
    }
    expected |= {"alpha": 13.21, "r2": 35.3641, "Cv": 6.469, "mu": 0.0}
    for name, value in expected.items():
        assert archive.targets[name][0] == pytest.approx(value, rel=1e-7), name
    assert archive.targets["gap"][0] == pytest.approx(13.7363, abs=1e-4)
    assert archive.extras["A"][0] == 157.7118
    assert archive.extras["smiles"][0] == "C"


def test_numbers_in_mathematicas_notation(archive):
    molecule = archive.select([rows_of(archive, "5005")])
    small = np.abs(molecule.pos)
    assert 7.9254e-6 in small
    assert (small < 10).all()


def test_archive_sdf_and_flat_file_agree(archive, official, shared_data):
    """Equal ids in three layouts from three sources."""
    sdf, flat = read_qm9(official / "gdb9.sdf"), read_qm9(shared_data / "mini" / "qm9.npz")
    whole = read_qm9(shared_data / "qm9" / "qm9_20k.npz")
    for other, tolerance, fewest in ((sdf, 5.1e-5, 8), (flat, 5e-7, 1), (whole, 5e-7, 100)):
        common = sorted(set(archive.ids) & set(other.ids), key=int)
        assert len(common) >= fewest
        for name in common:
            a = archive.select([rows_of(archive, name)])
            b = other.select([rows_of(other, name)])
            np.testing.assert_array_equal(a.z, b.z)
            np.testing.assert_allclose(a.pos, b.pos, rtol=0, atol=tolerance)
            for target in QM9_TARGETS:
                assert a.targets[target][0] == pytest.approx(b.targets[target][0], rel=1e-12, abs=1e-12), (name, target)
            for constant in ROTATIONAL:
                assert a.extras[constant][0] == b.extras[constant][0]


def test_sdf_belongs_to_the_table(official):
    """Against MoleculeNet's table read with the standard library, its atomization energies (kcal/mol) included."""
    dataset = read_qm9(official / "gdb9.sdf")
    with open(official / "gdb9.sdf.csv", newline="") as lines:
        table = list(csv.DictReader(lines))
    assert dataset.ids.tolist() == [row["mol_id"].removeprefix("gdb_") for row in table]
    references = QM9.atom_references
    symbols = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
    for i, row in enumerate(table):
        assert dataset.targets["lumo"][i] == pytest.approx(float(row["lumo"]) * HARTREE, rel=1e-7)
        elements = [symbols[z] for z in dataset.z[dataset.ptr[i] : dataset.ptr[i + 1]]]
        for target, column in {"U0": "u0_atom", "U": "u298_atom", "H": "h298_atom", "G": "g298_atom"}.items():
            atomization = dataset.targets[target][i] - sum(references[target][element] for element in elements)
            # 9e-4 kcal/mol is what the rounding of the references leaves.
            assert atomization * units.mol / units.kcal == pytest.approx(float(row[column]), abs=1.5e-3), (i, target)


def test_statistics_of_the_subset(shared_data):
    """Means of the 20,000 molecules as the README gives them: 2.65952 D, 75.3137 a0³, -410.5587 Hartree."""
    dataset = read_qm9(shared_data / "qm9" / "qm9_20k.npz")
    assert len(dataset) == 20_000
    assert len(dataset.z) == 360_884
    assert dataset.targets["mu"].mean() == pytest.approx(2.65952, abs=5e-6)
    assert dataset.targets["alpha"].mean() == pytest.approx(75.3137, abs=5e-5)
    assert dataset.targets["U0"].mean() / HARTREE == pytest.approx(-410.5587, abs=5e-5)
    np.testing.assert_allclose(dataset.targets["gap"], dataset.targets["lumo"] - dataset.targets["homo"], atol=3e-3)


def test_uncharacterized_molecules_are_dropped(official, shared_data):
    source = official / "dsgdb9nsd_genuine20.xyz.tar.bz2"
    sizes = {"n_train": 0.5, "n_valid": 0.2, "data_dir": source, "download": False}
    lists = set(map(int, excluded(shared_data).read_text().split()))
    _, kept, _ = load_qm9(uncharacterized="keep", **sizes)
    _, parts, _ = load_qm9(uncharacterized=excluded(shared_data), **sizes)
    everything = {int(name) for part in kept for name in part.ids}
    remaining = {int(name) for part in parts for name in part.ids}
    assert 5003 in everything
    assert remaining == everything - lists
    assert everything - remaining == {5003}


def test_the_list_is_found_beside_the_data(shared_data):
    tasks, parts, transformers = load_qm9(
        "gap", n_train=100, n_valid=50, n_test=10, data_dir=shared_data / "qm9" / "qm9_20k.npz", download=False
    )
    assert tasks == ["gap"]
    assert [len(part) for part in parts] == [100, 50, 10]
    assert list(parts[0].targets) == ["gap"]
    assert transformers == []


def test_split_is_that_of_numpy(shared_data):
    source = shared_data / "qm9" / "qm9_20k.npz"
    with np.load(source) as raw:
        ids = np.sort(raw["id"])
    _, (train, valid, test), _ = load_qm9("U0", n_train=1000, n_valid=200, seed=3, data_dir=source, download=False)
    order = np.random.default_rng(3).permutation(20_000)
    assert train.ids.tolist() == [str(i) for i in ids[order[:1000]]]
    assert valid.ids.tolist() == [str(i) for i in ids[order[1000:1200]]]
    assert len(test) == 18_800


# ------------------------------------------------------------------------------------------------------ targets and units


def test_targets_are_those_of_the_package():
    assert set(QM9_TARGETS) == set(PROPERTIES) - {"energy"}
    for name, unit in QM9_TARGETS.items():
        assert PROPERTIES[name].unit == ("eV" if unit == "Hartree" else unit), name
    assert set(ALIASES.values()) <= set(QM9_TARGETS)
    assert not set(ALIASES) & set(QM9_TARGETS)


def test_atom_references_are_in_electronvolts():
    for target, atoms in ATOMS.items():
        for z, value in atoms.items():
            symbol = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}[z]
            assert QM9.atom_references[target][symbol] == pytest.approx(value * HARTREE, rel=1e-7)
    assert QM9.atom_references["Cv"]["C"] == 2.981
    assert set(QM9.atom_references) == {"U0", "U", "H", "G", "Cv"}


@pytest.mark.parametrize(
    ("name", "right"),
    [("U_0", "U0"), ("u0", "U0"), ("energy_U0", "U0"), ("e_homo", "homo"), ("HOMO", "homo"), ("h", "H"), ("C_v", "Cv")],
)
def test_other_names_are_an_error_that_names_the_right_one(name, right):
    with pytest.raises(ConfigError, match=f"'{name}' is called '{right}' here"):
        canonical_target(name)


def test_unknown_targets():
    with pytest.raises(ConfigError, match=r"no target 'gapp'; it has mu, .*Cv; did you mean 'gap'"):
        load_qm9("gapp")
    with pytest.raises(ConfigError, match="names no target"):
        load_qm9([])
    with pytest.raises(ConfigError, match="no target 5"):
        load_qm9([5])


@pytest.mark.parametrize(
    ("target", "tasks"),
    [("gap", ["gap"]), ("lumo,homo", ["lumo", "homo"]), (["U0", "U0", "mu"], ["U0", "mu"]), (None, list(QM9_TARGETS))],
)
def test_which_targets_there_are(folder, target, tasks):
    found, (train, _, _), _ = load(folder, target=target)
    assert found == tasks
    assert list(train.targets) == tasks
    assert train.tasks == tasks


# ------------------------------------------------------------------------------------------------------- synthetic files


def molecule(number: int, n_hydrogens: int = 4, **changes: str) -> str:
    """A molecule of carbon and hydrogens in the official format; values have no meaning but plausible totals."""
    total = ATOMS["U0"][6] + n_hydrogens * ATOMS["U0"][1] - 0.12 * (n_hydrogens + 1)
    properties = [157.5, 158.5, 159.5, 0.5 * number, 13.25, -0.375, 0.125, 0.5, 35.5, 0.0625, *[total] * 4, 6.5]
    atoms = ["C\t 0.\t 0.\t 0.\t-0.5"] + [f"H\t {1 + i}.\t 0.5\t 2.5*^-6\t 0.125" for i in range(n_hydrogens)]
    text = {
        "count": str(n_hydrogens + 1),
        "line": f"gdb {number}\t" + "\t".join(map(str, properties)) + "\t",
        "atoms": "\n".join(atoms),
        "frequencies": "1341.3\t1341.3",
        "smiles": "C\tC\t",
        "inchi": "InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4",
    }
    return "\n".join((text | changes).values()) + "\n"


def write_archive(path: Path, molecules: list[str]) -> Path:
    with tarfile.open(path, "w:bz2") as tar:
        for i, text in enumerate(molecules):
            data = text.encode()
            member = tarfile.TarInfo(f"dsgdb9nsd_{i:06d}.xyz")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve molecules, of which the list drops two."""
    write_archive(tmp_path / "dsgdb9nsd.xyz.tar.bz2", [molecule(i) for i in range(1, 13)])
    (tmp_path / "uncharacterized.txt").write_text(LIST)
    return tmp_path


#: The layout of the official list.
LIST = """



List of molecules among the 133885 GDB9 molecules for which two geometries lead to
different strings. Given are the indices.

==========================================================================
#   Index     GDB17 SMILES    SMILES for B3LYP XYZ                    D_IJ
==========================================================================
       2                 C                       C                6.036217
      11                 C                       C                5.631463
==========================================================================
"""


def load(folder: Path, **options):
    return load_qm9(**{"data_dir": folder, "download": False, "n_train": 6, "n_valid": 2, **options})


def test_the_official_list(folder, tmp_path):
    with pytest.warns(DataWarning, match="lists 2 uncharacterized molecules; the official list has 3,054"):
        assert read_uncharacterized(folder / "uncharacterized.txt").tolist() == [2, 11]
    _, parts, _ = load(folder)
    assert sorted(int(name) for part in parts for name in part.ids) == [1, 3, 4, 5, 6, 7, 8, 9, 10, 12]
    for text in ("", "nothing here\n", "0\n", "133886\n", "7\n7\n"):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(FileFormatError, match="no list of numbers of molecules"):
            read_uncharacterized(tmp_path / "list.txt")


def test_files_that_are_not_the_official_ones_are_named(folder):
    with pytest.warns(DataWarning) as caught:
        load(folder)
    text = "\n".join(str(warning.message) for warning in caught)
    for name in ("dsgdb9nsd.xyz.tar.bz2", "uncharacterized.txt"):
        assert f"is not the official {name} of QM9" in text


def test_without_the_list_nothing_is_kept_silently(folder):
    (folder / "uncharacterized.txt").unlink()
    with pytest.raises(DataError, match=r"which 3,054 molecules .*download=False.*'keep' keeps them"):
        load(folder)
    assert sum(len(part) for part in load(folder, uncharacterized="keep")[1]) == 12
    with pytest.raises(ConfigError, match="allowed are 'drop', 'keep' and the path"):
        load(folder, uncharacterized="dropp")


def test_the_official_sizes_do_not_fit_a_small_file(folder):
    with pytest.raises(DataError, match=r"only 10 structures; the split needs 110,000 .* give n_train= and n_valid="):
        load_qm9(data_dir=folder, download=False)
    sizes = [len(part) for part in load(folder, n_train=0.5, n_valid=0.2)[1]]
    assert sizes == [5, 2, 3]


def test_molecules_are_sorted_by_number(tmp_path):
    write_archive(tmp_path / "a.tar.bz2", [molecule(i, n_hydrogens=1 + i % 3) for i in (7, 2, 11, 3)])
    dataset = read_qm9(tmp_path / "a.tar.bz2")
    assert dataset.ids.tolist() == ["2", "3", "7", "11"]
    assert dataset.targets["mu"].tolist() == [1.0, 1.5, 3.5, 5.5]
    assert dataset.counts.tolist() == [4, 2, 3, 4]


def test_no_file_and_no_network(tmp_path):
    with pytest.raises(
        DataError, match=r"dsgdb9nsd.xyz.tar.bz2 of QM9 is not in .*download=False; get .* from https://"
    ):
        load_qm9(data_dir=tmp_path, download=False)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"count": "6"}, "FORMAT"),
        ({"count": "five"}, "FORMAT"),
        ({"line": "gdb 3\t1.0\t2.0"}, "FORMAT"),
        ({"line": molecule(3).splitlines()[1].replace("gdb", "xyz")}, "FORMAT"),
        ({"line": molecule(3).splitlines()[1].replace("13.25", "13,25")}, "FORMAT"),
        ({"atoms": "C 0. 0.\nH 1. 0. 0. 0.\nH 2. 0. 0. 0.\nH 3. 0. 0. 0.\nH 4. 0. 0. 0."}, "FORMAT"),
        (
            {"atoms": molecule(3).splitlines()[2].replace("C", "Si") + "\n" + "\n".join(molecule(3).splitlines()[3:7])},
            "'Si'",
        ),
        ({"line": molecule(3).splitlines()[1].replace("13.25", "nan")}, "alpha of molecule 3 is not finite"),
        ({"line": molecule(3).splitlines()[1].replace("gdb 3", "gdb 2")}, "molecule 2 is there 2 times"),
    ],
)
def test_broken_molecules_are_named(tmp_path, changes, problem):
    write_archive(tmp_path / "a.tar.bz2", [molecule(1), molecule(2), molecule(3, **changes)])
    error, match = (DataError, problem)
    if problem == "FORMAT":
        error, match = FileFormatError, "dsgdb9nsd_000002.xyz is not in QM9's format"
    with pytest.raises(error, match=match):
        read_qm9(tmp_path / "a.tar.bz2")


def test_damaged_archives(folder, tmp_path):
    data = (folder / "dsgdb9nsd.xyz.tar.bz2").read_bytes()
    for name, content in {
        "cut": data[: len(data) // 2],
        "flipped": data[:200] + bytes([data[200] ^ 255]) + data[201:],
        "text": b"this is no archive",
        "notar": bz2.compress(b"nor is this" * 100),
    }.items():
        path = tmp_path / f"{name}.tar.bz2"
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=f"{name}.tar.bz2 is damaged, truncated or no tar.bz2 file"):
            read_qm9(path)
    write_archive(tmp_path / "empty.tar.bz2", [])
    with pytest.raises(FileFormatError, match="holds no molecules"):
        read_qm9(tmp_path / "empty.tar.bz2")
    with pytest.raises(FileFormatError, match="is no file of QM9"):
        read_qm9(tmp_path / "uncharacterized.txt")


def test_a_long_archive_that_is_cut_is_not_taken_for_a_short_one(tmp_path):
    """A cut anywhere is noticed, also where molecules before it are whole."""
    texts = [
        molecule(i, frequencies="\t".join(str(x) for x in np.random.default_rng(i).random(3000))) for i in range(1, 60)
    ]
    data = write_archive(tmp_path / "a.tar.bz2", texts).read_bytes()
    assert len(read_qm9(tmp_path / "a.tar.bz2")) == 59
    for fraction in (0.1, 0.5, 0.8, 0.999):
        (tmp_path / "a.tar.bz2").write_bytes(data[: int(fraction * len(data))])
        with pytest.raises(FileFormatError, match="truncated"):
            read_qm9(tmp_path / "a.tar.bz2")


def write_flat(path: Path, n: int = 4, **changes) -> Path:
    """Molecules C and H in the flat layout."""
    total = ATOMS["U0"][6] + ATOMS["U0"][1] - 0.25
    columns = {name: np.linspace(0.1, 0.2, n) for name in (*ROTATIONAL, *QM9_TARGETS)}
    columns |= {name: np.full(n, total) for name in ("U0", "U", "H", "G")}
    columns |= {"id": np.arange(1, n + 1), "N": np.full(n, 2), "Z": np.array([6, 1] * n, dtype=np.uint8)}
    columns["R"] = np.arange(6 * n, dtype=np.float32).reshape(-1, 3)
    np.savez(path, **(columns | changes))
    return path


def test_the_flat_layout(tmp_path):
    dataset = read_qm9(write_flat(tmp_path / "a.npz"))
    assert dataset.pos.dtype == np.float64
    assert dataset.pos[1].tolist() == [3.0, 4.0, 5.0]
    assert dataset.targets["homo"][3] == pytest.approx(0.2 * HARTREE, rel=1e-7)
    assert dataset.targets["mu"][3] == 0.2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"N": np.array([2, 2, 2, 1])}, "N adds up to 7 atoms, but Z has 8"),
        ({"Z": np.array([6, 1, 6, 1, 6, 14, 6, 1])}, "atom 5 has atomic number 14"),
        ({"Z": np.array([6, 1, 6, 1, 6, 257, 6, 1])}, "atom 5 has atomic number 257"),
        ({"Z": np.array(6)}, r"Z has shape \(\)"),
        ({"id": np.arange(1.0, 5.0)}, "id has shape .* float64; needed are integers"),
        ({"R": np.zeros((8, 3), dtype=bool)}, "R cannot be an array"),
        ({"R": np.zeros((7, 3))}, r"R has shape \(7, 3\)"),
        ({"mu": np.zeros(3)}, r"mu has shape \(3,\)"),
        ({"R": np.full((8, 3), np.inf)}, "position of molecule 1 is not finite"),
        ({"U0": np.full(4, -38.6 * HARTREE)}, "U0 of molecule 1 is -1050.36.*Needed are total energies in Hartree"),
        ({"U0": np.array([-38.6, -38.6, -0.4, -38.6])}, "U0 of molecule 3 is -0.4.*no energies of atomization"),
        ({"G": np.full(4, 0.1)}, "G of molecule 1"),
    ],
)
def test_flat_files_that_do_not_fit(tmp_path, changes, problem):
    with pytest.raises(DataError, match=problem):
        read_qm9(write_flat(tmp_path / "a.npz", **changes))


def test_sd_files_that_do_not_fit_their_table(official, tmp_path):
    sdf, table = (official / "gdb9.sdf").read_text(), (official / "gdb9.sdf.csv").read_text()
    rows = table.splitlines()

    def attempt(text: str, lines: list[str], match: str) -> None:
        (tmp_path / "gdb9.sdf").write_text(text)
        (tmp_path / "gdb9.sdf.csv").write_text("\n".join(lines) + "\n")
        with pytest.raises(DataError, match=match):
            read_qm9(tmp_path / "gdb9.sdf")

    swapped = [*rows[:3], rows[4], rows[3], *rows[5:]]
    attempt(sdf, swapped, "molecule 2 is 'gdb_3' in .* and 'gdb_4' in .*; they must agree")
    attempt(sdf, rows[:-1], "molecule 20 is 'gdb_21' in .* and nothing in")
    attempt(sdf, [*rows, rows[-1].replace("gdb_21", "gdb_22")], "has 21 molecules, .* has 22")
    attempt(sdf, [line.replace("homo,", "HOMO,") for line in rows], "is not MoleculeNet's table")
    attempt(sdf.replace("V2000", "V3000", 1), rows, "entry 0 is in V3000 format")
    attempt(sdf[: len(sdf) // 2], rows, "entry .* is cut off")
    attempt(sdf.replace("gdb_5\n", "mol_5\n"), [line.replace("gdb_5,", "mol_5,") for line in rows], "name 'mol_5'")
    (tmp_path / "gdb9.sdf.csv").unlink()
    with pytest.raises(DataError, match=r"has no gdb9\.sdf\.csv beside it"):
        read_qm9(tmp_path / "gdb9.sdf")


# --------------------------------------------------------------------------------------------------------------- cache


def mapped_file(array: np.ndarray) -> str | None:
    """The file that the memory of an array is mapped from."""
    address = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as lines:
        for line in lines:
            words = line.split(maxsplit=5)
            start, stop = (int(x, 16) for x in words[0].split("-"))
            if start <= address < stop:
                return words[5].strip() if len(words) > 5 else None
    return None


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads Linux's table of mapped memory")
def test_columns_are_memory_mapped(folder, tmp_path):
    _, (train, _, _), _ = load(folder, target="gap")
    whole, chosen = train.origin()
    assert len(chosen) == 6
    for name, column in {"pos": whole.pos, "z": whole.z, "gap": whole.targets["gap"]}.items():
        file = mapped_file(column)
        assert file is not None, name
        assert file.startswith(str(tmp_path / "cache" / FOLDER / "qm9-")), name
    assert mapped_file(np.zeros(10)) in (None, "[heap]")


def test_files_are_read_once(folder, monkeypatch):
    import ndem_zoo.datasets.qm9 as module

    first = load(folder, target="mu")[1][0]
    monkeypatch.setattr(module, "_read_xyz", None)  # would fail
    again = load(folder, target="mu")[1][0]
    assert first.split_hash == again.split_hash
    np.testing.assert_array_equal(first.pos, again.pos)
    assert again.card is QM9
    assert again.name == "QM9"


def test_another_file_or_list_is_read_anew(folder):
    assert len(load(folder)[1][2]) == 2
    (folder / "uncharacterized.txt").write_text("2\n3\n11\n")
    assert len(load(folder)[1][2]) == 1
    write_archive(folder / "dsgdb9nsd.xyz.tar.bz2", [molecule(i) for i in range(1, 16)])
    assert len(load(folder)[1][2]) == 4


def test_a_damaged_cache_is_made_anew(folder, tmp_path):
    load(folder)
    (file,) = (tmp_path / "cache" / FOLDER).glob("qm9-*/pos.npy")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.warns(DataWarning, match="pos.npy has .* made anew"):
        assert len(load(folder)[1][0]) == 6


def test_a_cache_that_cannot_be_written_is_no_obstacle(folder, tmp_path, monkeypatch):
    import ndem_zoo.datasets.cache as module

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "StoreWriter", refused)
    with pytest.warns(DataWarning, match=r"cannot be written \(Permission denied\), so QM9 is read into memory"):
        _, (train, _, _), _ = load(folder)
    assert len(train) == 6
    assert train.card is QM9


def test_cache_dir(folder, tmp_path):
    drop = folder / "uncharacterized.txt"
    whole = open_qm9(folder / "dsgdb9nsd.xyz.tar.bz2", drop, cache_dir=tmp_path / "other")
    assert len(whole) == 10
    assert list((tmp_path / "other" / FOLDER).glob("qm9-*/store.json"))
    assert not (tmp_path / "cache").exists()


# ----------------------------------------------------------------------------------------------------------- elsewhere


def test_sources_of_the_command_line(folder):
    from ndem_zoo.runs import Reading, open_splits

    assert DATASETS["qm9"] == "ndem_zoo.datasets.qm9:load_qm9"
    splits = open_splits("qm9:gap", None, Reading(data_dir=str(folder)), seed=1, n_train=6, n_valid=2)
    assert splits.train.tasks == ["gap"]
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [6, 2, 2]
    with pytest.raises(ConfigError, match="'U_0' is called 'U0' here"):
        open_splits("qm9:U_0", None, Reading(data_dir=str(folder)), seed=1)


def test_card():
    assert QM9.theory == "B3LYP/6-31G(2df,p)"
    for name in ("dsgdb9nsd.xyz.tar.bz2", "uncharacterized.txt"):
        remote = QM9.files[name]
        assert remote.checksum.startswith("md5:")
        assert remote.size > 0
        assert all(url.startswith("https://") for url in remote.urls)


def test_targets_can_be_chosen_later(folder):
    _, (train, _, _), _ = load(folder)
    chosen = train.with_targets(["G", "mu"])
    assert list(chosen.targets) == ["G", "mu"]
    assert list(train.targets) == list(QM9_TARGETS)
    np.testing.assert_array_equal(chosen.targets["mu"], train.targets["mu"])
    assert chosen.split_hash == train.split_hash
    assert list(chosen.origin()[0].targets) == ["G", "mu"]
    with pytest.raises(DataError, match="no target 'energy'; there are mu"):
        train.with_targets(["energy"])
