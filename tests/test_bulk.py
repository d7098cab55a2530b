"""Bulk predictions: what `predict` says, of every structure once and in order, whatever the input and whenever it is killed."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from oc20_files import ase_record, pyg_fields, write_lmdb, write_pyg_lmdb
from tiny_models import tiny_exact_model

from ndem_zoo import Ensemble, NDeMTorchMDNet, bulk, open_store
from ndem_zoo.bulk import predict_files, predict_stream, verify_extxyz
from ndem_zoo.checkpoint import load_json
from ndem_zoo.datasets.extxyz import frame_texts, read_frames
from ndem_zoo.datasets.store import JOURNAL, StoreWriter
from ndem_zoo.datasets.streams import DatasetStream, NpzStream, open_streams
from ndem_zoo.errors import ConfigError, DataError, DataWarning, FileFormatError, NotFittedError


@pytest.fixture(scope="module")
def model(ethanol):
    return tiny_exact_model().fit(ethanol[:8], max_steps=2)


@pytest.fixture(scope="module")
def mixed(ethanol):
    """40 structures of 2 to 9 atoms, every third of them periodic; labeled."""
    frames = []
    for i in range(40):
        atoms = ethanol.atoms(i)
        forces = atoms.get_forces()
        n = 2 + (5 * i) % 8
        labels = {"REF_energy": -100.0 - i, "note": f"frame-{i}"}
        atoms = Atoms(atoms.numbers[:n], np.round(atoms.positions[:n], 8), info=labels)
        atoms.arrays["REF_forces"] = np.round(forces[:n], 8)
        if i % 3 == 0:
            atoms.set_cell([9.0, 10.0, 11.0])
            atoms.pbc = True
        frames.append(atoms)
    return frames


@pytest.fixture(scope="module")
def file(mixed, tmp_path_factory):
    path = tmp_path_factory.mktemp("bulk") / "in.extxyz"
    write(path, mixed)
    return path


@pytest.fixture(scope="module")
def expected(model, mixed):
    """By the whole at once, which `test_inference.py` compares with one by one."""
    bare = [Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in mixed]
    found = model.predict(bare)
    return found["energy"], [np.asarray(forces) for forces in found["forces"]]


def same(folder, mixed, expected, numbers=None):
    """Compare a store with these structures, their numbers and predictions."""
    numbers = list(range(len(mixed))) if numbers is None else numbers
    store = open_store(folder, verify=True)
    assert store.ids.tolist() == [str(number) for number in numbers]
    for row, number in enumerate(numbers):
        atoms = mixed[number]
        found = store.structure(row)
        np.testing.assert_array_equal(found.z, atoms.numbers)
        np.testing.assert_array_equal(found.pos, atoms.positions)
        np.testing.assert_array_equal(found.pbc, atoms.pbc)
        assert found.energy == pytest.approx(expected[0][number], abs=1e-9)
        np.testing.assert_allclose(found.forces, expected[1][number], atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------- output


def test_a_store_of_predictions(model, mixed, file, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "BLOCK", 5)
    seen = []
    record = predict_files(model, file, tmp_path / "out", shard=12, report=seen.append)
    assert (record.structures, record.rejected, record.shards, record.resumed_at) == (40, 0, 4, 0)
    assert [r.structures for r in seen] == [12, 24, 36, 40]
    same(tmp_path / "out", mixed, expected)
    notes = [source["note"] for source in open_store(tmp_path / "out").sources]
    assert [note["rows"] for note in notes] == [[["in.extxyz", a, min(a + 12, 40)]] for a in (0, 12, 24, 36)]
    assert not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize("name", ["out", "out.extxyz"])
def test_of_very_many_structures_a_shard_is_a_part_of_what_is_done(model, file, tmp_path, monkeypatch, name):
    """So that the journal grows as the logarithm of their number, wherever an earlier process stopped."""
    monkeypatch.setattr(bulk, "EQUAL_SHARDS", 2)
    monkeypatch.setattr(bulk, "BLOCK", 4)
    seen = []

    def killed(record):
        seen.append(record.structures)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(model, file, tmp_path / name, shard=5, report=killed)
    predict_files(model, file, tmp_path / name, shard=5, report=killed, resume=True)
    assert seen == [5, 10, 15, 22, 33, 40]


def test_extended_xyz_keeps_what_the_structures_had(model, mixed, file, expected, tmp_path):
    out = tmp_path / "out.extxyz"
    out.write_text("replaced")
    assert predict_files(model, file, out, shard=12).structures == 40
    for number, atoms in enumerate(read(out, index=":")):
        assert atoms.info["note"] == f"frame-{number}"
        assert atoms.info["REF_energy"] == -100.0 - number
        np.testing.assert_allclose(atoms.arrays["REF_forces"], mixed[number].arrays["REF_forces"], atol=1e-8)
        assert atoms.get_potential_energy() == pytest.approx(expected[0][number], abs=1e-7)
        np.testing.assert_allclose(atoms.get_forces(), expected[1][number], atol=1e-7)
        np.testing.assert_array_equal(atoms.pbc, mixed[number].pbc)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.extxyz", "out.extxyz.json"]
    verify_extxyz(out)
    damaged = bytearray(out.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    out.write_bytes(damaged)
    with pytest.raises(FileFormatError, match=r"structures 12 to 23|structures 24 to 35"):
        verify_extxyz(out)


def test_deviations_of_an_ensemble(ethanol, mixed, file, tmp_path):
    members = [tiny_exact_model(seed=seed).fit(ethanol[:8], max_steps=2) for seed in range(2)]
    ensemble = Ensemble(members).calibrate(ethanol[100:110])
    direct = ensemble.predict([Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in mixed])
    predict_files(ensemble, file, tmp_path / "out", shard=30)
    predict_files(ensemble, file, tmp_path / "out.xyz", shard=30)
    store, frames = open_store(tmp_path / "out"), read(tmp_path / "out.xyz", index=":", format="extxyz")
    assert store.tasks == ["energy", "forces", "energy_std", "forces_std"]
    for name, values in direct.items():
        np.testing.assert_allclose(store.targets[name], values, rtol=1e-9, atol=1e-9)
    assert frames[7].info["energy_std"] == pytest.approx(direct["energy_std"][7], rel=1e-6)
    rows = slice(store.ptr[7], store.ptr[8])
    np.testing.assert_allclose(frames[7].arrays["forces_std"], direct["forces_std"][rows], rtol=1e-5, atol=1e-6)


def test_structures_one_by_one(model, mixed, expected):
    """No more of them than a block are taken before the first prediction is there."""
    taken = []
    given = (taken.append(i) or atoms for i, atoms in enumerate(mixed))
    found = predict_stream(model, given, block=6)
    first = next(found)
    assert len(taken) == 6
    rows = [first, *found]
    np.testing.assert_allclose([row["energy"] for row in rows], expected[0], atol=1e-9)
    for row, forces in zip(rows, expected[1], strict=True):
        np.testing.assert_allclose(row["forces"], forces, atol=1e-9)
    bad = Atoms("H2", [[0, 0, 0], [0, 0, 0.01]])
    with pytest.raises(DataError, match=r"^structure 8: atoms 0 and 1 are 0\.01 Å apart"):
        list(predict_stream(model, [*mixed[:8], bad], block=3))
    with pytest.raises(DataError, match=r"^structure 1: got str"):
        list(predict_stream(model, [mixed[0], "H2O"]))
    assert list(predict_stream(model, [])) == []


# ------------------------------------------------------------------------------------------------------------------ input


def test_every_kind_of_input(model, ethanol, mixed, file, tmp_path):
    """Compressed, many files, stores, npz (MD17, rMD17), LMDB of both kinds: what the readers of whole files see."""
    import bz2
    import gzip
    import lzma

    for suffix, opener in ((".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)):
        with opener(tmp_path / f"in.extxyz{suffix}", "wb") as stream:
            stream.write(file.read_bytes())
        (stream,) = open_streams(tmp_path / f"in.extxyz{suffix}")
        items = list(stream.items())
        assert len(items) == 40
        later = list(stream.items(items[17].row + 1, items[17].after))
        assert [item.row for item in later] == list(range(18, 40))
        np.testing.assert_array_equal(later[0].structure.pos, mixed[18].positions)
    ethanol[:30].save(tmp_path / "store")
    pos = ethanol.pos[: 30 * 9].reshape(30, 9, 3)
    np.savez(tmp_path / "md17.npz", z=ethanol.z[:9].astype(np.uint8), R=pos, E=np.zeros((30, 1)), F=np.zeros_like(pos))
    np.savez_compressed(tmp_path / "rmd17.npz", nuclear_charges=ethanol.z[:9], coords=pos.astype(np.float32))
    for name, exact in (("store", 0.0), ("md17.npz", 0.0), ("rmd17.npz", 1e-5)):
        (stream,) = open_streams(tmp_path / name)
        for row in (0, 13, 29):
            item = next(iter(stream.items(row)))
            assert item.row == row
            np.testing.assert_allclose(item.structure.pos, pos[row], atol=exact, rtol=0)
            np.testing.assert_array_equal(item.structure.z, ethanol.z[:9])
    record = predict_files(model, [tmp_path / "store", tmp_path / "md17.npz", ethanol[:30]], tmp_path / "o", shard=25)
    assert (record.structures, record.shards) == (90, 4)
    energy = open_store(tmp_path / "o").targets["energy"].reshape(3, 30)
    np.testing.assert_allclose(energy, np.tile(model.predict(ethanol[:30])["energy"], (3, 1)), atol=1e-9)
    rows = [source["note"]["rows"] for source in open_store(tmp_path / "o").sources]
    assert rows[1] == [["store", 25, 30], ["md17.npz", 0, 20]]


@pytest.mark.parametrize("suffix", ["lmdb", "aselmdb"])
def test_records_of_lmdb_files(suffix, tmp_path):
    pytest.importorskip("lmdb")
    fields = [pyg_fields(n=4 + k, seed=k) for k in range(3)]
    frames = [(f["atomic_numbers"].numpy(), f["pos"].numpy()) for f in fields]
    if suffix == "lmdb":
        write_pyg_lmdb(tmp_path / "a.lmdb", fields)
    else:
        cell, pbc = 15.0 * np.eye(3), np.ones(3, dtype=bool)
        records = [
            {"numbers": z.astype(np.int64), "positions": pos, "cell": cell, "pbc": pbc, "energy": 0.0}
            for z, pos in frames
        ]
        values = {str(k + 1).encode(): ase_record(record) for k, record in enumerate(records)}
        write_lmdb(tmp_path / "a.aselmdb", values)
    (stream,) = open_streams(tmp_path)
    items = list(stream.items())
    assert len(items) == len(frames)
    for item, (z, pos) in zip(items, frames, strict=True):
        np.testing.assert_array_equal(item.structure.z, z)
        np.testing.assert_allclose(item.structure.pos, pos, atol=1e-6)
        assert item.structure.pbc.all()


def test_files_of_which_nobody_can_tell_what_they_are(model, ethanol, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        open_streams(tmp_path / "none")
    with pytest.raises(DataError, match=r"no \.extxyz"):
        open_streams(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="unpack it"):
        open_streams(tmp_path / "a.tar")
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(FileFormatError, match="neither z and R nor"):
        NpzStream(tmp_path / "a.npz")
    pos = ethanol.pos[:270].reshape(30, 9, 3)
    np.savez(tmp_path / "b.npz", z=ethanol.z[:8], R=pos)
    with pytest.raises(FileFormatError, match=r"z has shape \(8,\)"):
        NpzStream(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", z=ethanol.z[:9], R=np.array([None]))
    with pytest.raises(FileFormatError, match="pickled objects, which are never loaded"):
        NpzStream(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", z=ethanol.z[:9], R=pos)
    data = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileFormatError, match="damaged"):
        NpzStream(tmp_path / "d.npz")
    (tmp_path / "empty.extxyz").write_text("\n\n")
    with pytest.raises(DataError, match="there are no structures to predict"):
        predict_files(model, tmp_path / "empty.extxyz", tmp_path / "o")


def test_empty_lines_end_nothing(mixed, tmp_path):
    """ASE's reader stops at the first one, and says nothing."""
    text = io.StringIO()
    for atoms in mixed[:5]:
        write(text, atoms, format="extxyz")
        text.write("\n  \n")
    (tmp_path / "a.extxyz").write_text(text.getvalue())
    assert [len(a) for a in read_frames(tmp_path / "a.extxyz")] == [len(a) for a in mixed[:5]]


# ------------------------------------------------------------------------------------------------------------ bad structures


@pytest.fixture
def bad_file(mixed, tmp_path):
    """Bad ones at 3 (overlap), 11 (unknown element), 12 (not finite), 30 (a word for a number)."""
    frames = [atoms.copy() for atoms in mixed]
    frames[3].positions[1] = frames[3].positions[0] + 0.01
    frames[11].numbers[0] = 9
    frames[12].positions[0, 0] = np.nan
    write(tmp_path / "bad.extxyz", frames)
    texts = [text for text, _ in frame_texts(tmp_path / "bad.extxyz")]
    texts[30] = texts[30].replace(b".", b"x")
    (tmp_path / "bad.extxyz").write_bytes(b"".join(texts))
    return tmp_path / "bad.extxyz"


@pytest.mark.parametrize("name", ["out", "out.extxyz"])
def test_bad_structures_are_recorded_and_never_lost(model, mixed, bad_file, expected, tmp_path, name):
    record = predict_files(model, bad_file, tmp_path / name, shard=7, on_error="record")
    assert (record.structures, record.rejected) == (36, 4)
    where = tmp_path / name / "rejected.jsonl" if name == "out" else tmp_path / "out.extxyz.rejected.jsonl"
    rejected = [json.loads(line) for line in where.read_text(encoding="utf-8").splitlines()]
    assert [entry["number"] for entry in rejected] == [entry["row"] for entry in rejected] == [3, 11, 12, 30]
    assert {entry["input"] for entry in rejected} == {"bad.extxyz"}
    reasons = [
        "atoms 0 and 1 are 0.01",
        "atom 0 is F, which",
        "position of atom 0 is [",
        "cannot be read as extended XYZ",
    ]
    assert all(reason in entry["reason"] for reason, entry in zip(reasons, rejected, strict=True))
    numbers = [number for number in range(40) if number not in (3, 11, 12, 30)]
    if name == "out":
        same(tmp_path / name, mixed, expected, numbers)
    else:
        assert [a.info["note"] for a in read(tmp_path / name, index=":")] == [f"frame-{n}" for n in numbers]


def test_the_first_bad_structure_stops(model, mixed, file, bad_file, expected, tmp_path):
    """And after it was mended, nothing is computed again... but the file is another one then, so that is refused."""
    with pytest.raises(DataError, match=r"^structure 3: atoms 0 and 1 are 0\.01"):
        predict_files(model, bad_file, tmp_path / "a", shard=2)
    assert load_json(tmp_path / "a" / JOURNAL)["structures"] == 2
    with pytest.raises(DataError, match=r"^structure 43 \(bad\.extxyz, structure 3\): atoms 0 and 1"):
        predict_files(model, [file, bad_file], tmp_path / "b")
    texts = [text for text, _ in frame_texts(bad_file)]
    bad_file.write_bytes(b"".join(texts[:3] + texts[4:11] + texts[13:]))
    with pytest.raises(ConfigError, match="was begun with inputs"):
        predict_files(model, bad_file, tmp_path / "a", resume=True)
    with pytest.raises(FileFormatError, match=r"^structure 27: .*cannot be read as extended XYZ"):
        predict_files(model, bad_file, tmp_path / "c")


def test_a_file_that_is_cut_off_is_an_error_whatever_is_recorded(model, file, tmp_path):
    text = file.read_bytes()
    (tmp_path / "cut.extxyz").write_bytes(text[: len(text) - 400])
    with pytest.raises(FileFormatError, match=r"structure 39 cannot be read .*the file ends after"):
        predict_files(model, tmp_path / "cut.extxyz", tmp_path / "o", shard=10, on_error="record")
    assert load_json(tmp_path / "o" / JOURNAL)["structures"] == 30


def test_predictions_that_are_not_finite(model, mixed, file, tmp_path, monkeypatch):
    real = NDeMTorchMDNet._columns_of_usable

    def broken(self, structures):
        columns = real(self, structures)
        if len(structures) > 6:
            columns["forces"][structures.ptr[6]] = np.inf
            columns["energy"][2] = np.nan
        return columns

    monkeypatch.setattr(NDeMTorchMDNet, "_columns_of_usable", broken)
    with pytest.raises(DataError, match=r"^structure 2: the model gives .* not finite"):
        predict_files(model, file, tmp_path / "a")
    record = predict_files(model, file, tmp_path / "b", on_error="record")
    assert (record.structures, record.rejected) == (38, 2)
    assert {"2", "6"}.isdisjoint(open_store(tmp_path / "b").ids.tolist())


def test_nothing_left_to_predict(model, tmp_path):
    write(tmp_path / "in.extxyz", [Atoms("F2", [[0, 0, 0], [0, 0, 1.4]])] * 3)
    for name in ("a", "a.xyz"):
        with pytest.raises(DataError, match="all structures were rejected; the reasons are in"):
            predict_files(model, tmp_path / "in.extxyz", tmp_path / name, on_error="record")


def test_warnings_name_the_structure_of_the_whole_input(ethanol, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "BLOCK", 4)
    model = tiny_exact_model(unknown_elements="warn").fit(ethanol[:8], max_steps=1)
    frames = [atoms.copy() for atoms in mixed]
    frames[9].numbers[0] = 9
    frames[20].numbers[0] = 9
    with pytest.warns(DataWarning, match="structure 9: atom 0 is F") as caught:
        predict_files(model, [Atoms(a.numbers, a.positions) for a in frames], tmp_path / "o")
    assert len([w for w in caught if w.category is DataWarning]) == 1


# ---------------------------------------------------------------------------------------------------------------- resuming


class Killed(BaseException):
    """As sudden as SIGKILL: nothing between here and the test may catch it."""


@pytest.mark.parametrize("name", ["out", "out.extxyz"])
def test_interrupted_at_every_write_and_resumed(model, mixed, bad_file, expected, tmp_path, monkeypatch, name):
    """At each place where something is written, flushed or renamed; the output is that of an undisturbed process, byte for byte."""
    monkeypatch.setattr(bulk, "BLOCK", 4)
    options = {"shard": 9, "on_error": "record"}
    straight, out = tmp_path / "straight" / name, tmp_path / "killed" / name
    predict_files(model, bad_file, straight, **options)
    left = itertools.count(1)
    allowed = 0

    def mortal(call):
        def dying(*arguments, **keywords):
            if next(left) > allowed:
                raise Killed
            return call(*arguments, **keywords)

        return dying

    with monkeypatch.context() as patch:
        patch.setattr(bulk._Growing, "write", mortal(bulk._Growing.write))
        patch.setattr(bulk._Growing, "sync", mortal(bulk._Growing.sync))
        patch.setattr(bulk, "save_json", mortal(bulk.save_json))
        patch.setattr(StoreWriter, "append", mortal(StoreWriter.append))
        patch.setattr(StoreWriter, "_write_journal", mortal(StoreWriter._write_journal))
        patch.setattr(os, "replace", mortal(os.replace))
        for _ in range(200):
            allowed += 1
            left = itertools.count(1)
            try:
                predict_files(model, bad_file, out, resume=True, **options)
            except Killed:
                continue
            break
    assert allowed >= 8
    if name == "out":
        assert open_store(out, verify=True).ids.tolist() == open_store(straight).ids.tolist()
        files = [path.name for path in straight.iterdir() if path.suffix == ".npy"]
        assert all((out / file).read_bytes() == (straight / file).read_bytes() for file in files)
        files = ["rejected.jsonl"]
    else:
        verify_extxyz(out)
        assert out.read_bytes() == straight.read_bytes()
        out, straight, files = out.parent, straight.parent, [f"{name}.rejected.jsonl"]
    assert (out / files[0]).read_bytes() == (straight / files[0]).read_bytes()


def test_a_killed_process_is_resumed(model, file, expected, tmp_path):
    """A real SIGKILL, while a shard is being written, by another process with the same model from a folder."""
    model.save(tmp_path / "model")
    out = tmp_path / "out.extxyz"
    script = f"""
import os, signal, sys
from ndem_zoo import NDeMTorchMDNet, bulk
bulk.BLOCK = 4
real, calls = bulk.Worker.predict, []
def predict(self, block):
    calls.append(block)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, block)
bulk.Worker.predict = predict
bulk.predict_files(NDeMTorchMDNet.load({str(tmp_path / "model")!r}), {str(file)!r}, {str(out)!r}, shard=8)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(bulk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(FileExistsError, match=r"unfinished"):
        predict_files(model, file, out, shard=8)
    with open(f"{out}.part", "ab") as part:  # what the disk may hold of a shard that was not finished, however long
        part.write(b"torn " * 100_000)
    computed = []
    record = predict_files(model, file, out, shard=8, resume=True, report=computed.append)
    assert (record.structures, record.resumed_at) == (40, 16)
    assert [r.structures for r in computed] == [24, 32, 40]
    again = predict_files(model, file, out, shard=8, resume=True, report=computed.append)
    assert (again.structures, again.resumed_at, len(computed)) == (40, 40, 3), "there was nothing to do"
    verify_extxyz(out)
    found = [a.get_potential_energy() for a in read(out, index=":")]
    np.testing.assert_allclose(found, expected[0], atol=1e-7)


def test_what_must_not_be_resumed(model, ethanol, mixed, file, tmp_path, monkeypatch):
    other = tiny_exact_model(seed=5).fit(ethanol[:8], max_steps=2)
    predict_files(model, file, tmp_path / "done")
    with pytest.raises(ConfigError, match="was begun with model"):
        predict_files(other, file, tmp_path / "done", resume=True)
    with pytest.raises(FileExistsError, match="is a finished store"):
        predict_files(model, file, tmp_path / "done")
    with pytest.raises(ConfigError, match="was begun with on_error 'stop'"):
        predict_files(model, file, tmp_path / "done", resume=True, on_error="record")
    ethanol[:4].save(tmp_path / "store")
    with pytest.raises(ConfigError, match="was begun with model None"):
        predict_files(model, file, tmp_path / "store", resume=True)
    (tmp_path / "x.extxyz.json").write_text("{}")
    with pytest.raises(FileExistsError, match="not a journal of predictions"):
        predict_files(model, file, tmp_path / "x.extxyz")
    monkeypatch.setattr(bulk._ExtxyzOutput, "finish", lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        predict_files(model, file, tmp_path / "y.extxyz", shard=10)
    part = tmp_path / "y.extxyz.part"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(FileFormatError, match="its journal says"):
        predict_files(model, file, tmp_path / "y.extxyz", shard=10, resume=True)


def test_one_process_writes(model, file, tmp_path):
    (tmp_path / "a.extxyz.part").write_bytes(b"")
    first = bulk._Growing(tmp_path / "a.extxyz.part", 0)
    with pytest.raises(ConfigError, match="another process is writing"):
        predict_files(model, file, tmp_path / "a.extxyz")
    first.close()
    assert predict_files(model, file, tmp_path / "a.extxyz").structures == 40


def test_options(model, file, tmp_path):
    with pytest.raises(ConfigError, match="on_error='skip'; allowed are 'stop', 'record'"):
        predict_files(model, file, tmp_path / "o", on_error="skip")
    with pytest.raises(ConfigError, match="shard=0"):
        predict_files(model, file, tmp_path / "o", shard=0)
    with pytest.raises(ConfigError, match="block=0"):
        next(predict_stream(model, [], block=0))
    with pytest.raises(NotFittedError):
        predict_files(NDeMTorchMDNet(), file, tmp_path / "o")
    (tmp_path / "f.xyz").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        predict_files(model, file, tmp_path / "f.xyz")
    assert not (tmp_path / "o").exists()


def test_memory_is_that_of_a_block(model, ethanol, tmp_path, monkeypatch):
    """Structures that are alive at a time, counted: an input of any length has no more."""
    alive, most = 0, 0
    real = DatasetStream.items

    class Counted:
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def items(self, *arguments):
        for item in real(self, *arguments):
            object.__setattr__(item.structure, "token", Counted())
            yield item

    monkeypatch.setattr(DatasetStream, "items", items)
    monkeypatch.setattr(bulk, "BLOCK", 20)
    predict_files(model, ethanol[:400], tmp_path / "o", shard=50)
    assert alive == 0
    assert 20 <= most <= 2 * 20 + 2


def test_the_command(model, file, expected, tmp_path, capsys):
    pytest.importorskip("typer")
    from ndem_zoo import cli

    model.save(tmp_path / "model")
    words = ["predict", "--model", tmp_path / "model", "--data", file, "--data", file, "--out", tmp_path / "o"]
    assert cli.run([str(word) for word in [*words, "--shard", 30, "--resume"]]) == 0
    output = capsys.readouterr()
    assert "80 structures with energies" in output.out
    assert output.err.splitlines() == ["30 structures", "60 structures", "80 structures"]
    np.testing.assert_allclose(open_store(tmp_path / "o").targets["energy"], np.tile(expected[0], 2), atol=1e-9)
    assert cli.run([str(word) for word in words]) == 2
    assert "finished store" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "o")
    assert cli.run([str(word) for word in [*words, "--on-error", "skip"]]) == 2
