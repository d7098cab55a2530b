"""Ray Data: what the workers say is what `predict` says, of every row; what each worker does is tested without Ray as well."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from tiny_models import tiny_exact_model

import ndem_zoo
from ndem_zoo import Ensemble, NDeMTorchMDNet
from ndem_zoo.bulk_ray import Predictor, _pieces, _read, predict_ray, read_ray
from ndem_zoo.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(ethanol, tmp_path_factory):
    """Two models, and 60 structures of 2 to 9 atoms, some periodic."""
    path = tmp_path_factory.mktemp("ray")
    for seed in range(2):
        tiny_exact_model(seed=seed).fit(ethanol[:8], max_steps=2).save(path / f"model-{seed}")
    frames = []
    for i in range(60):
        atoms = ethanol.atoms(i)[: 2 + (5 * i) % 8]
        atoms = Atoms(atoms.numbers, np.round(atoms.positions, 8))
        if i % 4 == 0:
            atoms.set_cell([9.0, 10.0, 11.0])
            atoms.pbc = True
        frames.append(atoms)
    write(path / "in.extxyz", frames)
    return path, frames


def rows_of(*structures: Atoms) -> dict[str, np.ndarray]:
    """A batch as Ray hands it over."""
    columns: dict[str, np.ndarray] = {name: np.empty(len(structures), dtype=object) for name in ("z", "pos")}
    for row, atoms in enumerate(structures):
        columns["z"][row], columns["pos"][row] = atoms.numbers, atoms.positions
    columns["cell"] = np.array([atoms.cell.array for atoms in structures])
    columns["pbc"] = np.array([atoms.pbc for atoms in structures])
    columns["number"] = 100 + np.arange(len(structures))
    return columns


def test_a_worker_predicts_its_batches(folder):
    path, frames = folder
    model, columns = NDeMTorchMDNet.load(path / "model-0"), rows_of(*frames[:10])
    expected, found = model.predict(frames[:10]), Predictor([path / "model-0"])(columns)
    np.testing.assert_allclose(found["energy"], expected["energy"], atol=1e-9)
    for ours, theirs in zip(found["forces"], expected["forces"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert found["number"] is columns["number"]
    assert set(found["error"]) == {""}
    both = Ensemble([path / "model-0", path / "model-1"])
    deviations = Predictor([path / "model-0", path / "model-1"])(columns)
    np.testing.assert_allclose(deviations["energy_std"], both.predict(frames[:10])["energy_std"], atol=1e-9)
    assert deviations["forces_std"][3].shape == (len(frames[3]), 3)


def test_rows_that_cannot_be_predicted(folder):
    path, frames = folder
    bad = frames[2].copy()
    bad.numbers[0] = 9
    columns = rows_of(frames[0], bad, frames[1], frames[3])
    columns["pos"][3] = columns["pos"][3][:1]
    columns["error"] = np.array(["", "", "was not read", ""], dtype=object)
    found = Predictor([path / "model-0"], "record")(columns)
    np.testing.assert_array_equal(np.isnan(found["energy"]), [False, True, True, True])
    assert found["error"][0] == ""
    assert "atom 0 is F" in found["error"][1]
    assert found["error"][2] == "was not read"
    assert "pos (1, 3)" in found["error"][3]
    assert np.isnan(found["forces"][1]).all()
    assert found["forces"][1].shape == (len(bad), 3)
    with pytest.raises(DataError, match=r"^structure 101: atom 0 is F"):
        Predictor([path / "model-0"])({name: values[:2] for name, values in columns.items()})


def test_files_in_pieces(folder, ethanol, monkeypatch, tmp_path):
    """All structures once, whatever the size of the pieces."""
    path, frames = folder
    ethanol[:25].save(tmp_path / "store")
    monkeypatch.setattr("ndem_zoo.bulk_ray.READ_TOGETHER", 7)
    pieces = list(_pieces([str(path / "in.extxyz"), str(tmp_path / "store")]))
    assert len(pieces) == 9 + 4
    rows = [row for piece in pieces for row in _read(piece)]
    assert [row["number"] for row in rows] == list(range(85))
    assert [row["row"] for row in rows] == [*range(60), *range(25)]
    for row, atoms in zip(rows, [*frames, *(ethanol.atoms(i) for i in range(25))], strict=True):
        np.testing.assert_allclose(row["pos"], atoms.positions, atol=1e-8)
        np.testing.assert_array_equal(row["pbc"], atoms.pbc)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ImportError, match=r"ndem_zoo\[ray\]"):
        read_ray("x.extxyz")
    with pytest.raises(ImportError, match=r"ndem_zoo\[ray\]"):
        predict_ray(None, "model")


@pytest.mark.slow
def test_two_workers_of_ray(folder, tmp_path, monkeypatch):
    """Ray itself: pieces are read and predicted by processes of their own; every structure once."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    pytest.importorskip("ray.data", reason="Ray has no Ray Data (extra ray)")
    path, frames = folder
    root = str(Path(ndem_zoo.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p))
    monkeypatch.setattr("ndem_zoo.bulk_ray.READ_TOGETHER", 9)
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 1024**2, log_to_driver=False)
    try:
        bad = frames[17].copy()
        bad.numbers[0] = 9
        write(tmp_path / "bad.extxyz", [*frames[:17], bad, *frames[18:]])
        source = read_ray([path / "in.extxyz", tmp_path / "bad.extxyz"])
        found = predict_ray(source, path / "model-0", batch_size=8, concurrency=2, num_cpus=0.5, on_error="record")
        rows = sorted(found.take_all(), key=lambda row: row["number"])
        with pytest.raises(ConfigError, match="on_error='skip'"):
            predict_ray(source, path / "model-0", on_error="skip")
        with pytest.raises(ConfigError, match="batch_size=0"):
            predict_ray(source, path / "model-0", batch_size=0)
        stopped = predict_ray(source, path / "model-0", batch_size=8, concurrency=1, num_cpus=0.5)
        with pytest.raises(Exception, match="structure 77: atom 0 is F"):
            stopped.materialize()
    finally:
        ray.shutdown()
    assert [row["number"] for row in rows] == list(range(120))
    assert [row["input"] for row in rows] == ["in.extxyz"] * 60 + ["bad.extxyz"] * 60
    expected = NDeMTorchMDNet.load(path / "model-0").predict(frames)
    for row in rows:
        number = row["number"] % 60
        if row["number"] == 77:
            assert "atom 0 is F" in row["error"]
            assert np.isnan(row["energy"])
            continue
        assert row["error"] == ""
        assert row["energy"] == pytest.approx(expected["energy"][number], abs=1e-6)
        np.testing.assert_allclose(row["forces"], expected["forces"][number], atol=1e-6)
