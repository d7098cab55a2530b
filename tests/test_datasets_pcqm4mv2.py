"""PCQM4Mv2 and the reading of SD files: synthetic files in OGB's layout, files that do not fit, resumed reading."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ndem_zoo.datasets import load_pcqm4mv2, read_pcqm4mv2
from ndem_zoo.datasets.pcqm4mv2 import PCQM4MV2, heavy_atoms
from ndem_zoo.datasets.sdf import iter_sdf
from ndem_zoo.errors import ConfigError, DataError, FileFormatError

pytestmark = pytest.mark.filterwarnings("ignore::ndem_zoo.errors.DataWarning")

SMILES = ["O", "CO", "CCO", "C[Si](C)Cl", "c1ccccc1Br", "[nH]1cccc1"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Caches go to a folder of the test's own, never to the user's."""
    monkeypatch.setenv("NDEM_ZOO_DATA", str(tmp_path / "cache"))


def entry(smiles: str, number: int) -> str:
    """Heavy atoms of a SMILES and one hydrogen in a row along x, written by hand."""
    symbols = [symbol for symbol, count in heavy_atoms(smiles).items() for _ in range(count)] + ["H"]
    rows = [f"{1.5 * i:10.4f}{number / 8:10.4f}{-0.25:10.4f} {s:<3} 0  0  0  0" for i, s in enumerate(symbols)]
    bonds = [f"{i:3d}{i + 1:3d}  1  0" for i in range(1, len(symbols))]
    counts = f"{len(symbols):3d}{len(bonds):3d}  0  0  0  0  0  0  0  0999 V2000"
    return "\n".join(["", "     RDKit          3D", "", counts, *rows, *bonds, "M  END", "$$$$"]) + "\n"


def write(folder: Path, n: int = 12, text: str | None = None) -> Path:
    """OGB's archive of `n` molecules."""
    text = "".join(entry(SMILES[i % len(SMILES)], i) for i in range(n)) if text is None else text
    data = text.encode()
    path = folder / "pcqm4m-v2-train.sdf.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("pcqm4m-v2-train.sdf")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return path


def write_table(folder: Path, n: int = 15, name: str = "data.csv.gz", shift: int = 0) -> Path:
    """OGB's table: more molecules than the archive has, without gaps for the last."""
    rows = [f"{i},{SMILES[(i + shift) % len(SMILES)]},{4.0 + i if i < 12 else ''}" for i in range(n)]
    text = "\n".join(["idx,smiles,homolumogap", *rows]) + "\n"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def load(folder: Path, target: str | None = None, **options):
    return load_pcqm4mv2(target, **{"data_dir": folder, "download": False, "n_valid": 2, **options})


def whole(path: Path, table: Path | None = None, piece: int = 5) -> list:
    return list(read_pcqm4mv2(path, table, piece))


def test_geometries_for_pretraining(tmp_path):
    write(tmp_path)
    tasks, (train, valid, test), transformers = load(tmp_path)
    assert (tasks, transformers) == ([], [])
    assert [len(train), len(valid), len(test)] == [10, 2, 0]
    assert train.targets == {}
    order = np.random.default_rng(1).permutation(12)
    assert train.ids.tolist() == [str(i) for i in order[:10]]
    for row, number in enumerate(order[:10]):
        atoms = train.atoms(row)
        assert Counter(atoms.get_chemical_symbols()) == heavy_atoms(SMILES[number % 6]) + Counter("H")
        np.testing.assert_allclose(atoms.positions[:, 0], 1.5 * np.arange(len(atoms)))
        np.testing.assert_allclose(atoms.positions[:, 1], number / 8, atol=1e-4)
        np.testing.assert_allclose(atoms.positions[:, 2], -0.25)


@pytest.mark.parametrize("name", ["data.csv.gz", "data.csv", "pcqm4m-v2/raw/data.csv.gz"])
def test_gaps_are_in_electronvolts_already(tmp_path, name):
    write(tmp_path)
    write_table(tmp_path, name=name)
    tasks, (train, valid, test), _ = load(tmp_path, "gap", n_train=6, n_test=3)
    assert tasks == ["gap"]
    assert [len(train), len(valid), len(test)] == [6, 2, 3]
    for part in (train, valid, test):
        np.testing.assert_array_equal(part.targets["gap"], 4.0 + part.ids.astype(int))
    assert train.card is PCQM4MV2


def test_sizes(tmp_path):
    write(tmp_path)
    assert [len(part) for part in load(tmp_path, n_train=0.5, n_valid=0.25, n_test=0.25)[1]] == [6, 3, 3]
    assert [len(part) for part in load(tmp_path, n_valid=0.25, n_test=1)[1]] == [8, 3, 1]
    with pytest.raises(DataError, match="12 molecules; n_valid=10000 and n_test=0 leave none"):
        load(tmp_path, n_valid=10_000)
    with pytest.raises(DataError, match="only 12 structures"):
        load(tmp_path, n_train=11)
    with pytest.raises(ConfigError, match="no target 'homo'; allowed are 'gap', and None"):
        load(tmp_path, "homo")


def test_pieces_make_no_difference(tmp_path):
    path, table = write(tmp_path), write_table(tmp_path)
    pieces = whole(path, table, piece=5)
    assert [len(piece) for piece in pieces] == [5, 5, 2]
    (one,) = whole(path, table, piece=100)
    for name in ("pos", "z", "ids"):
        np.testing.assert_array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), getattr(one, name))
    np.testing.assert_array_equal(np.concatenate([p.targets["gap"] for p in pieces]), one.targets["gap"])


def test_an_unpacked_file(tmp_path):
    path = write(tmp_path)
    with tarfile.open(path) as tar:
        (tmp_path / "pcqm4m-v2-train.sdf").write_bytes(tar.extractfile("pcqm4m-v2-train.sdf").read())
    (packed,), (plain,) = whole(path, piece=50), whole(tmp_path / "pcqm4m-v2-train.sdf", piece=50)
    np.testing.assert_array_equal(packed.pos, plain.pos)
    path.unlink()
    assert len(load(tmp_path)[1][0]) == 10


def test_reading_is_resumed(tmp_path, monkeypatch):
    import ndem_zoo.datasets.pcqm4mv2 as module

    write(tmp_path)
    genuine = module.read_pcqm4mv2
    seen = []

    def interrupted(source, table=None):
        for number, piece in enumerate(genuine(source, table, 5)):
            if number == 2 and not seen:
                seen.append(number)
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(module, "read_pcqm4mv2", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    ids = np.concatenate([part.ids for part in load(tmp_path)[1]])
    assert sorted(ids.astype(int)) == list(range(12))


def test_the_table_must_belong_to_the_archive(tmp_path):
    path = write(tmp_path)
    shifted = write_table(tmp_path, shift=1)
    with pytest.raises(DataError, match=r"molecule 0 has the heavy atoms O1 in .* but 'CO' in .* has C1O1: the files"):
        whole(path, shifted)
    short = write_table(tmp_path, n=8)
    with pytest.raises(DataError, match=r"has 8 molecules, .* has more"):
        whole(path, short)
    (tmp_path / "data.csv").write_text("idx,smiles,homolumogap\n1,O,4.0\n")
    with pytest.raises(FileFormatError, match="row 0 has idx 1; rows must be in order, from 0"):
        whole(path, tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("number,smiles\n1,O\n")
    with pytest.raises(FileFormatError, match="is not OGB's table"):
        whole(path, tmp_path / "data.csv")


def test_missing_gaps_do_not_become_labels(tmp_path):
    write(tmp_path, n=13)  # the table has no gap for the last
    write_table(tmp_path)
    with pytest.raises(DataError, match=r"structure 12: gap is nan"):
        load(tmp_path, "gap")


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"pcqm4m-v2-train.sdf.tar.gz of PCQM4Mv2 is not in .*download=False"):
        load(tmp_path)
    write(tmp_path)
    with pytest.raises(DataError, match=r"gaps of PCQM4Mv2 are not beside .* put data.csv.gz there"):
        load(tmp_path, "gap")


def test_damaged_archives(tmp_path):
    path = write(tmp_path, n=400)
    data = path.read_bytes()
    for content in (data[: len(data) // 2], b"no archive", gzip.compress(b"no archive" * 200)):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"is damaged, truncated or no tar\.gz file"):
            whole(path, piece=1000)
    write(tmp_path, text="")
    with pytest.raises(FileFormatError, match="holds no molecules"):
        whole(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (entry("CO", 0).replace("C  ", "Q  "), "molecule 1 has the element 'Q'"),
        (entry("CO", 0).replace("  3  2", "  0  0"), "molecule 1 has no atoms"),
        (entry("CO", 0).replace("  3  2", "  x  2"), "entry 1 has the counts '  x  2"),
        (entry("CO", 0).replace("  3  2", " 30  2"), "entry 1 has 6 lines of atoms; its counts say 30"),
        (entry("CO", 0).replace("1.5000", "1.5O00"), "entry 1 has a line of atoms that cannot be read"),
        (entry("CO", 0).replace("V2000", "V3000"), "entry 1 is in V3000 format"),
        (entry("CO", 0).replace("$$$$", ""), "entry 1 is cut off"),
        ("\n\n$$$$\n", "entry 1 has 2 lines; needed are"),
    ],
)
def test_broken_entries_are_named(tmp_path, text, problem):
    with pytest.raises(FileFormatError, match=problem):
        whole(write(tmp_path, text=entry("O", 0) + text))


def test_sd_columns_without_blanks_between_them():
    """Numbers of ten characters touch each other; names may hold anything."""
    atom = "-1234.5678-1234.5678    0.0000 Cl  0  0"
    text = (
        f"a name, with $$$$ in it\n\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n{atom}\nM  END\n> <gap>\n1.0\n\n$$$$\n"
    )
    (found,) = iter_sdf(text.splitlines(keepends=True), "a.sdf")
    assert found.title == "a name, with $$$$ in it"
    assert found.symbols == ["Cl"]
    assert found.pos == [-1234.5678, -1234.5678, 0.0]


def test_genuine_entries_against_rdkit(shared_data):
    chem = pytest.importorskip("rdkit.Chem")
    path = shared_data / "qm9" / "official_format" / "gdb9.sdf"
    with path.open() as lines:
        entries = list(iter_sdf(lines, str(path)))
    mols = list(chem.SDMolSupplier(str(path), removeHs=False, sanitize=False))
    assert len(entries) == len(mols) == 21
    for one, mol in zip(entries, mols, strict=True):
        assert one.title == mol.GetProp("_Name")
        assert one.symbols == [atom.GetSymbol() for atom in mol.GetAtoms()]
        np.testing.assert_array_equal(np.reshape(one.pos, (-1, 3)), mol.GetConformer().GetPositions())


@pytest.mark.rdkit
@pytest.mark.parametrize(
    "smiles",
    [
        *SMILES,
        "[13CH4]",
        "C[N+](=O)[O-]",
        "[se]1cccc1",
        "CC(=O)Oc1ccccc1C(=O)O",
        "[H][H]",
        "F/C=C/[C@@H](Cl)Br",
        "B1CC1S",
    ]
    + ["c1cc2cc[nH]c2nc1", "[Na+].[Cl-]", "C1%10CCCC1CC%10", "P(=S)(I)(F)F", "[2H]C([Hg])[Sc]"],
)
def test_heavy_atoms_of_smiles(smiles):
    chem = pytest.importorskip("rdkit.Chem")
    mol = chem.MolFromSmiles(smiles, sanitize=False)
    assert heavy_atoms(smiles) == Counter(a.GetSymbol() for a in mol.GetAtoms() if a.GetAtomicNum() > 1)


def test_card():
    remote = PCQM4MV2.files["pcqm4m-v2-train.sdf.tar.gz"]
    assert remote.checksum == "md5:fd72bce606e7ddf36c2a832badeec6ab"
    assert remote.size == 1_559_712_928
