"""Stores on disk: what comes back, what is mapped and not copied, interruption, damage, selections without columns."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from ndem_zoo.checkpoint import load_record, save_record
from ndem_zoo.datasets import DatasetCard, MolecularDataset, StoreWriter, checks, is_store, open_store
from ndem_zoo.datasets import store as store_module
from ndem_zoo.datasets.store import HEADER, JOURNAL, StoredSelection
from ndem_zoo.errors import ConfigError, DataError, FileFormatError
from ndem_zoo.sampling import Collator
from ndem_zoo.training import _content_hash

CARD = DatasetCard("made up", "random slabs", "none", {"energy": "eV"}, "CC0", ("nobody, nowhere",))


def make(n: int = 12, seed: int = 0, prefix: str = "s") -> MolecularDataset:
    """Periodic structures of 2 to 6 atoms on a jittered grid, with every kind of column."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 7, n)
    ptr = np.concatenate([[0], np.cumsum(counts)])
    place = np.concatenate([np.arange(count) for count in counts])
    pos = np.stack([1.5 * place, 0 * place, 0 * place], axis=1) + rng.uniform(-0.1, 0.1, (ptr[-1], 3))
    return MolecularDataset(
        rng.choice([1, 6, 8, 79], ptr[-1]),
        pos,
        ptr,
        targets={
            "energy": rng.normal(size=n),
            "forces": rng.normal(size=(ptr[-1], 3)),
            "stress": rng.normal(size=(n, 6)),
        },
        cell=np.tile(np.diag([12.0, 10.0, 11.0]), (n, 1, 1)) + 0.1 * np.arange(n)[:, None, None] * np.eye(3),
        pbc=np.tile([True, True, False], (n, 1)),
        fixed=rng.random(ptr[-1]) < 0.3,
        ids=[f"{prefix}{i}" for i in range(n)],
        extras={
            "tags": rng.integers(0, 3, ptr[-1]).astype(np.int8),
            "sid": np.arange(n),
            "formula": [f"é{i}" for i in range(n)],
        },
        card=CARD,
        name="made up",
    )


def assert_same(a: MolecularDataset, b: MolecularDataset) -> None:
    for name in ("z", "pos", "ptr", "cell", "pbc", "fixed", "ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for kind in ("targets", "extras"):
        assert set(getattr(a, kind)) == set(getattr(b, kind))
        for name, values in getattr(a, kind).items():
            np.testing.assert_array_equal(values, getattr(b, kind)[name], err_msg=name)
            assert values.dtype.kind == "U" or values.dtype == getattr(b, kind)[name].dtype
    assert a.per_atom == b.per_atom


def is_mapped(array: np.ndarray) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return isinstance(array, np.memmap)


@pytest.fixture
def store(tmp_path) -> MolecularDataset:
    make().save(tmp_path / "store")
    return open_store(tmp_path / "store")


# -------------------------------------------------------------------------------------------------------- round trip


def test_everything_comes_back(store):
    assert_same(store, make())
    assert (store.name, store.card) == ("made up", CARD)
    assert store.checked
    assert is_store(store.folder)


def test_columns_are_mapped_read_only_and_plain_npy(store):
    for name in ("z", "pos", "ptr", "cell", "pbc", "fixed", "ids"):
        assert is_mapped(getattr(store, name)), name
        assert not getattr(store, name).flags.writeable
    assert all(is_mapped(column) for column in (*store.targets.values(), *store.extras.values()))
    np.testing.assert_array_equal(np.load(store.folder / "targets.forces.npy"), make().targets["forces"])
    assert np.load(store.folder / "ids.npy").tolist() == make().ids.tolist()


def test_neighboring_structures_are_views_of_the_files(store):
    part = store[3:9]
    assert is_mapped(part.pos)
    assert is_mapped(part.targets["forces"])
    assert_same(part, make()[3:9])


def test_one_atom_structures(tmp_path):
    single = MolecularDataset(np.array([1, 2]), np.zeros((2, 3)), np.array([0, 1, 2]), targets={"energy": np.zeros(2)})
    tagged = {"tags": np.array([1, 2]), "number": np.array([5, 6])}
    whole = MolecularDataset(**{**single.columns(), "extras": tagged}, per_atom={"tags": True, "number": False})
    whole.save(tmp_path / "store")
    assert open_store(tmp_path / "store").per_atom == {"tags"}


def test_saved_from_a_selection_and_appended_to_another(tmp_path, store):
    chosen = [7, 2, 2, 11]
    store.select(chosen).save(tmp_path / "few")
    assert_same(open_store(tmp_path / "few", verify=True), make().select(chosen))


def test_graphs_atoms_and_hashes_agree(store):
    ours = make()
    assert store.split_hash == ours.split_hash
    assert _content_hash(store) == _content_hash(ours)
    assert store.atoms(4) == ours.atoms(4)
    np.testing.assert_array_equal(store.atoms(4).get_forces(), ours.atoms(4).get_forces())


# --------------------------------------------------------------------------------------------------------- selections


def test_random_selection_has_no_columns_until_they_are_asked_for(store):
    train, valid, test = store.split(6, 3, seed=5)
    for part in (train, valid, test):
        assert isinstance(part, StoredSelection)
        assert {"pos", "z", "ids"}.isdisjoint(vars(part))
    again = train.select([4, 0, 1])
    assert {"pos", "z", "ids"}.isdisjoint(vars(again))
    parts = make().split(6, 3, seed=5)
    for ours, theirs in zip((train, valid, test, again), (*parts, parts[0].select([4, 0, 1])), strict=True):
        assert _content_hash(ours) == _content_hash(theirs)  # before and after the columns are gathered
        assert_same(ours, theirs)
        assert _content_hash(ours) == _content_hash(theirs)
        assert ours.split_hash == theirs.split_hash
        assert ours.atoms(1) == theirs.atoms(1)


def test_spaced_rows_of_a_selection_without_its_columns(store):
    index = np.random.default_rng(0).permutation(len(store))
    ours, theirs = store.select(index), make().select(index)
    for most in (1, 3, 7, 1000):
        for (name, shape, rows), (name_, shape_, rows_) in zip(
            ours.spaced_rows(most), theirs.spaced_rows(most), strict=True
        ):
            assert (name, shape) == (name_, shape_)
            np.testing.assert_array_equal(rows, rows_)
    assert "pos" not in vars(ours)


@pytest.mark.parametrize("chosen", [slice(None), slice(2, 9), [5, 3, 3, 8], slice(None, None, -1)])
def test_batches_are_those_of_the_dataset_in_memory(store, chosen):
    ours, theirs = store.select(chosen), make().select(chosen)
    batches = [Collator(data, 4.0)(np.array([2, 0, 1])) for data in (ours, theirs)]
    for name in ("z", "pos", "src", "dst", "shift", "system", "cell", "fixed"):
        assert torch.equal(*(getattr(batch, name) for batch in batches)), name
    for kind in ("targets", "extras"):
        first, second = (getattr(batch, kind) for batch in batches)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    if isinstance(ours, StoredSelection):
        assert "pos" not in vars(ours)


def test_training_is_the_same_bit_for_bit(tmp_path):
    from ndem_zoo.datasets import read_sample
    from ndem_zoo.models.torchmd_net import NDeMTorchMDNet

    molecules = read_sample("ethanol").select(range(40))
    molecules.save(tmp_path / "store")
    options = {"backbone_options": {"hidden_channels": 16, "num_layers": 1, "num_rbf": 8, "num_heads": 2}}
    options |= {"batch_size": 8, "max_steps": 4, "progress": False}
    energies = []
    for data in (molecules, open_store(tmp_path / "store")):
        train, valid, _ = data.split(24, 8)
        model = NDeMTorchMDNet(**options).fit(train, valid)
        energies.append(model.predict(valid)["energy"])
    np.testing.assert_array_equal(*energies)


def test_a_selection_is_freed_when_it_is_dropped(store):
    import gc
    import weakref

    gc.disable()
    try:
        part = store.select([5, 1])
        forces = weakref.ref(part.targets["forces"])
        assert forces().shape == (part.ptr[-1], 3)
        del part
        assert forces() is None
    finally:
        gc.enable()


def test_fingerprint_block_by_block(store, monkeypatch):
    from ndem_zoo.runs import fingerprint

    whole = fingerprint(make().select([7, 2, 9, 4]))
    monkeypatch.setattr(checks, "BLOCK_ATOMS", 9)
    chosen = store.select([7, 2, 9, 4])
    assert fingerprint(chosen) == whole != fingerprint(store.select([7, 2, 4, 9]))
    assert "pos" not in vars(chosen)


@pytest.mark.parametrize("at_once", [9, 10**9])
def test_root_mean_square_block_by_block(store, monkeypatch, at_once):
    monkeypatch.setattr(checks, "BLOCK_ATOMS", at_once)
    for data in (store, store.select([7, 2, 9, 4]), make()):
        expected = np.sqrt(np.square(np.array(data.targets["forces"])).mean())
        assert checks.root_mean_square(data, "forces") == pytest.approx(expected, rel=1e-14)


def test_opening_and_splitting_costs_no_object_per_structure(tmp_path):
    n, size = 20_000, 4
    rng = np.random.default_rng(0)
    part = MolecularDataset(
        np.full(n * size, 6),
        rng.normal(size=(n * size, 3)),
        np.arange(n + 1) * size,
        targets={"energy": rng.normal(size=n)},
    )
    with StoreWriter(tmp_path / "store", check=False) as writer:
        writer.append(part)
        writer.commit("part")
        writer.finish()
    tracemalloc.start()
    try:
        store = open_store(tmp_path / "store")
        before = tracemalloc.get_traced_memory()[0]
        train, _, _ = store.split(0.5, 0.1)
        Collator(train, 3.0)(np.arange(10))
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert before < 100_000  # the smallest object per structure would be 320,000 bytes more
    assert after - before < 24 * n  # the permutation and the new ptr
    assert peak < 60 * n  # its positions alone are 96 bytes per structure


# ------------------------------------------------------------------------------------------------ checks only once


def test_a_checked_store_is_not_checked_again(store, monkeypatch):
    def boom(*arguments):
        raise AssertionError("checked again")

    for name in ("_check_overlap", "_check_cells", "_check_positions", "_check_finite"):
        monkeypatch.setattr(checks, name, boom)
    for data in (store, store[2:5], store.select([5, 1])):
        checks.check_structures(data)
        assert "forces" in data.targets
        assert not getattr(data.targets, "_known", None)  # asking costs nothing
        checks.check_targets(data, {"energy", "forces"})


def test_an_unchecked_store_is_checked_when_it_is_used(tmp_path):
    data = make()
    pos = data.pos.copy()
    pos[data.ptr[7]] = pos[data.ptr[7] + 1]
    bad = MolecularDataset(**{**data.columns(), "pos": pos}, ids=data.ids)
    with StoreWriter(tmp_path / "checked") as writer, pytest.raises(DataError, match="structure 7"):
        writer.append(bad)
    with StoreWriter(tmp_path / "unchecked", check=False) as writer:
        writer.append(bad)
        writer.commit("all")
        store = writer.finish()
    assert not store.checked
    with pytest.raises(DataError, match="structure 7"):
        checks.check_structures(store)


def test_labels_that_are_not_finite_do_not_get_in(tmp_path):
    data = make()
    energy = data.targets["energy"].copy()
    energy[3] = np.nan
    bad = MolecularDataset(**{**data.columns(), "targets": {"energy": energy}}, ids=data.ids)
    with StoreWriter(tmp_path / "store") as writer, pytest.raises(DataError, match="structure 3: energy is nan"):
        writer.append(bad)


@pytest.mark.parametrize("where", [0, 5, 11])
def test_checks_block_by_block_name_the_right_structure(monkeypatch, where):
    monkeypatch.setattr(checks, "BLOCK_ATOMS", 9)
    data = make()
    checks.check_structures(data)
    forces, pos = data.targets["forces"].copy(), data.pos.copy()
    forces[data.ptr[where] + 1] = np.inf
    broken = MolecularDataset(**{**data.columns(), "targets": {"forces": forces}})
    with pytest.raises(DataError, match=f"structure {where}: forces of atom 1"):
        checks.check_targets(broken, {"forces"})
    pos[data.ptr[where]] = pos[data.ptr[where] + 1] + np.array([0.0, 10.0 + 0.1 * where, 0.0])  # its image
    with pytest.raises(DataError, match=f"structure {where}: "):
        checks.check_structures(MolecularDataset(**{**data.columns(), "pos": pos}))
    assert next(checks.blocks(data))[0] == 0
    assert sum(len(block) for _, block in checks.blocks(data)) == len(data)


# -------------------------------------------------------------------------------------------------------- interruption


def parts() -> list[MolecularDataset]:
    return [make(n, seed, f"p{seed}-") for seed, n in enumerate((5, 8, 3))]


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resumed_store_is_the_uninterrupted_one_byte_for_byte(tmp_path, done):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, stops in ((whole, [(3, True)]), (broken, [(done, False), (3, True)])):
        for stop, is_last in stops:
            with StoreWriter(folder, name="x", card=CARD, settings={"energy": "adsorption"}) as writer:
                for number, part in enumerate(parts()[:stop]):
                    if f"{number}" in writer.sources:
                        continue
                    writer.append(part)
                    writer.commit(f"{number}")
                if is_last:
                    writer.finish()
                elif stop < 3:
                    writer.append(parts()[stop])  # never committed
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in broken.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (broken / path.name).read_bytes(), path.name
    assert_same(open_store(broken, verify=True), MolecularDataset.concatenate(parts()))


def test_a_killed_process_loses_only_what_was_not_committed(tmp_path):
    script = textwrap.dedent(
        """
        import os, sys
        sys.path.insert(0, sys.argv[2])
        from test_datasets_store import parts
        from ndem_zoo.datasets import StoreWriter
        writer = StoreWriter(sys.argv[1])
        writer.append(parts()[0]); writer.commit("0")
        writer.append(parts()[1])
        for file in writer._files.values():
            file.flush()
        os.kill(os.getpid(), 9)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store"), str(Path(__file__).parent)]
    assert subprocess.run(command, env=os.environ, check=False).returncode == -9
    assert (tmp_path / "store" / "z.npy").stat().st_size > HEADER + len(parts()[0].z)
    with pytest.raises(FileFormatError, match=r"unfinished store \(1 sources are done\).*again"):
        open_store(tmp_path / "store")
    with StoreWriter(tmp_path / "store") as writer:
        assert list(writer.sources) == ["0"]
        for number, part in enumerate(parts()[1:], 1):
            writer.append(part)
            writer.commit(str(number))
        assert_same(writer.finish(), MolecularDataset.concatenate(parts()))


def test_the_journal_of_many_sources_is_written_when_enough_is_new(tmp_path, monkeypatch):
    """Else it would be written in full for each of them; who is killed repeats the last few, who ends loses nothing."""
    monkeypatch.setattr(store_module, "JOURNAL_EVERY", 1)

    def done(folder):
        return [source["name"] for source in json.loads((folder / JOURNAL).read_text())["sources"]]

    with StoreWriter(tmp_path / "store") as writer:
        for number, names in enumerate((["0"], ["0", "1"], ["0", "1"])):  # 5, 8 and 3 structures
            writer.append(parts()[number])
            writer.commit(f"{number}")
            assert done(tmp_path / "store") == names
        shutil.copytree(tmp_path / "store", tmp_path / "killed")  # as a process would leave it that is killed here
        writer.append(parts()[0])  # never committed
    assert done(tmp_path / "store") == ["0", "1", "2"]
    for folder, names in ((tmp_path / "killed", ["0", "1"]), (tmp_path / "store", ["0", "1", "2"])):
        with StoreWriter(folder) as writer:
            assert list(writer.sources) == names
            if names == ["0", "1"]:
                writer.append(parts()[2])
                writer.commit("2")
            assert_same(writer.finish(), MolecularDataset.concatenate(parts()))
        assert_same(open_store(folder, verify=True), MolecularDataset.concatenate(parts()))


def test_an_unfinished_store_whose_column_was_cut_is_an_error_that_says_so(tmp_path):
    with StoreWriter(tmp_path / "store") as writer:
        writer.append(parts()[0])
        writer.commit("0")
    path = tmp_path / "store" / "pos.npy"
    path.write_bytes(path.read_bytes()[:-1])
    before = (tmp_path / "store" / JOURNAL).read_bytes()
    for _ in range(2):  # the lock is let go of
        with pytest.raises(FileFormatError, match=r"pos\.npy has \d+ bytes; the journal says \d+"):
            StoreWriter(tmp_path / "store")
    assert (tmp_path / "store" / JOURNAL).read_bytes() == before


def test_an_append_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "BLOCK_ATOMS", 9)
    data = make()
    long = MolecularDataset(**data.columns(), ids=[*data.ids[:-1], "x" * 30])
    with StoreWriter(tmp_path / "store") as writer:
        with pytest.raises(DataError, match=r"structure 11: ids is 'xxx.*room for 24"):
            writer.append(long)
        writer.append(data)
        writer.commit("a")
        with pytest.raises(DataError, match="structure 11"):
            writer.append(long)
        assert_same(writer.finish(), data)


def test_each_source_once_and_nothing_uncommitted(tmp_path):
    with StoreWriter(tmp_path / "store") as writer:
        writer.append(parts()[0])
        writer.commit("0", digest="sha256:abc")
        with pytest.raises(ConfigError, match="'0' is in the store"):
            writer.commit("0")
        writer.append(parts()[1])
        with pytest.raises(ConfigError, match="not committed"):
            writer.finish()
    record = json.loads((tmp_path / "store" / JOURNAL).read_text())
    assert [(source["name"], source["digest"]) for source in record["sources"]] == [("0", "sha256:abc")]


def test_one_writer_at_a_time_and_the_same_settings(tmp_path):
    first = StoreWriter(tmp_path / "store", settings={"energy": "total"})
    with pytest.raises(ConfigError, match="another process"):
        StoreWriter(tmp_path / "store", settings={"energy": "total"})
    first.close()
    with pytest.raises(ConfigError, match="begun with settings"):
        StoreWriter(tmp_path / "store", settings={"energy": "adsorption"})


def test_nothing_is_overwritten(tmp_path, store):
    with pytest.raises(FileExistsError, match="finished store"):
        StoreWriter(store.folder)
    with pytest.raises(FileExistsError, match="finished store"):
        make().save(store.folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        make().save(tmp_path / "other")


def test_parts_must_have_the_same_columns(tmp_path):
    data = make()
    targets = {name: value for name, value in data.targets.items() if name != "stress"}
    fewer = MolecularDataset(**{**data.columns(), "targets": targets})
    with StoreWriter(tmp_path / "store") as writer:
        writer.append(data)
        with pytest.raises(DataError, match="lacks: targets/stress"):
            writer.append(fewer)
        with pytest.raises(DataError, match="no structures"):
            writer.finish()


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", "", "x" * 65])
def test_column_names_are_file_names(tmp_path, name):
    data = make()
    with StoreWriter(tmp_path / "store") as writer, pytest.raises(DataError, match="a column is called"):
        writer.append(MolecularDataset(**{**data.columns(), "extras": {name: np.zeros(len(data))}}))


def test_names_that_differ_in_case_only(tmp_path):
    data = make()
    extras = {"Cv": np.zeros(len(data)), "cv": np.zeros(len(data))}
    with StoreWriter(tmp_path / "store") as writer, pytest.raises(DataError, match="differ in case"):
        writer.append(MolecularDataset(**{**data.columns(), "extras": extras}))


# -------------------------------------------------------------------------------------------------------------- damage


def test_missing_or_shortened_columns(store):
    path = store.folder / "targets.forces.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(FileFormatError, match=r"targets.forces.npy has \d+ bytes"):
        open_store(store.folder)
    path.unlink()
    with pytest.raises(FileFormatError, match=r"targets\.forces\.npy has 0 bytes"):
        open_store(store.folder)


def test_a_flipped_bit_is_found_in_small_stores_or_when_asked_for(tmp_path, monkeypatch):
    with StoreWriter(tmp_path / "store") as writer:
        for number, part in enumerate(parts()):
            writer.append(part)
            writer.commit(f"file {number}")
        writer.finish()
    open_store(tmp_path / "store", verify=True)
    with (tmp_path / "store" / "pos.npy").open("r+b") as file:
        file.seek(HEADER + 24 * (len(parts()[0].z) + 2))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    open_store(tmp_path / "store", verify=False)
    for verify in (None, True):
        with pytest.raises(FileFormatError, match=r"pos\.npy is damaged.*from file 1"):
            open_store(tmp_path / "store", verify=verify)
    monkeypatch.setattr("ndem_zoo.datasets.store.VERIFIED_UP_TO", 1000)
    open_store(tmp_path / "store")


@pytest.mark.parametrize(
    "change",
    [
        {"structures": 13},
        {"atoms": -1},
        {"structures": "12"},
        {"sources": None},
        {"sources": [{"name": "x"}]},
        {"columns": {}},
        {"columns": {"../../z": {"dtype": "|u1", "tail": [], "per": "atoms"}}},
        {"columns": {"extras/../z": {"dtype": "|u1", "tail": [], "per": "atoms"}}},
        {"columns": {"z": {"dtype": "|O", "tail": [], "per": "atoms"}}},
        {"columns": {"z": {"dtype": "|u1", "tail": [-3], "per": "atoms"}}},
        {"columns": {"z": {"dtype": "|u1", "tail": [], "per": "structures"}}},
        {"card": {"name": "x", "surprise": 1, "citation": []}},
        {"version": 2},
        {"format": "something else"},
    ],
)
def test_damaged_records_are_refused(store, change):
    path = store.folder / "store.json"
    save_record(path, load_record(path) | change)
    with pytest.raises(FileFormatError):
        open_store(store.folder)


def test_a_changed_record_is_refused(store):
    path = store.folder / "store.json"
    path.write_text(path.read_text().replace('"checked": true', '"checked": false'))
    with pytest.raises(FileFormatError, match=r"store\.json is damaged: .*checksum"):
        open_store(store.folder)


def test_a_header_that_is_another_one(store):
    path = store.folder / "z.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"'|u1'", b"'|i1'"))
    with pytest.raises(FileFormatError, match="header"):
        open_store(store.folder)


def test_object_columns_are_never_pickled(tmp_path):
    data = make()
    extras = {"objects": np.array([{"a": 1}] * len(data), dtype=object)}
    with StoreWriter(tmp_path / "store") as writer, pytest.raises(DataError, match="dtype object"):
        writer.append(MolecularDataset(**{**data.columns(), "extras": extras}))
    assert not any(pickle.PROTO in path.read_bytes()[:2] for path in (tmp_path / "store").glob("*.npy"))


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no store"):
        open_store(tmp_path)
    assert not is_store(tmp_path)


def test_a_writer_that_died_in_its_first_journal_left_nothing_in_the_way(tmp_path):
    (tmp_path / "store").mkdir()
    for name in (".journal.json.12ab.tmp", ".store.json.34cd.tmp"):
        (tmp_path / "store" / name).write_text('{"format": "nd')
    make().save(tmp_path / "store")
    assert not list((tmp_path / "store").glob(".*"))
    assert_same(open_store(tmp_path / "store"), make())
