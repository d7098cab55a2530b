"""Tables of the accuracy benchmarks: statistics with known answers, and committed tables that follow from their records."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import bench_md17_objectives, bench_rmd17_schnetpack
from benchmarks.accuracy.paired import mean_and_spread, paired_difference
from ndem_zoo.physics import KCAL_PER_MOL

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "accuracy" / "results"
SCHNETPACK = sorted(RESULTS.glob("rmd17_*_schnetpack"))


def test_statistics_of_pairs():
    assert mean_and_spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    # +0.1 and +0.3 on 1 and 3: 10 %; mean 0.2, standard deviation 0.1414, its error 0.1
    assert paired_difference({0: 1.1, 1: 3.3, 7: 99.0}, {0: 1.0, 1: 3.0, 5: 0.0}) == "+10.0 % (+0.2000 ± 0.1000)"
    assert paired_difference({0: 1.0}, {1: 1.0}) == ""


def run(name: str, seed: int, forces: float, energy: float) -> dict:
    test = {"forces_mae": forces * KCAL_PER_MOL, "energy_mae": energy * KCAL_PER_MOL}
    test |= {"forces_mae_kcal": forces, "energy_mae_kcal": energy}
    return {"configuration": name, "seed": seed, "width": 64, "steps": 3040, "epochs": 32, "test": test}


def test_table_says_who_is_better():
    record = {
        "command": "python x", "machine": "m", "molecule": "ethanol", "n_test": 1000,
        "step_times": {"ratio": 1.8, "quartiles": [1.7, 1.8, 1.9]},
    }  # fmt: skip
    runs = [run("stock", 0, 1.0, 0.5), run("stock", 1, 1.2, 0.3), run("ndem", 0, 0.9, 0.6), run("ndem", 1, 1.3, 0.4)]
    text = bench_rmd17_schnetpack.table(record, runs)
    (row,) = [line for line in text.splitlines() if line.startswith("| ndem |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["2", "1.80 (1.70 to 1.90)", "1.1000 ± 0.2828", "+0.0 % (+0.0000 ± 0.1000)"]
    assert cells[5] == f"{1.1e3 * KCAL_PER_MOL:.2f} ± {282.84 * KCAL_PER_MOL:.2f}"
    assert "smaller force error with 1 of 2 seeds. NDeM has the smaller energy error with 0 of 2 seeds" in text
    assert bench_rmd17_schnetpack.table(record, runs[:2]) == "", "half a comparison is none"


def test_metrics_of_a_run_are_read(tmp_path):
    file = tmp_path / "csv" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text(
        "epoch,lr-AdamW,step,test_loss,train_loss,val_forces_mae\n0,,94,,,2.5\n0,0.1,95,,3.5,\n1,,95,0.5,,\n"
    )
    rows = list(bench_rmd17_schnetpack.read_metrics(tmp_path))
    assert rows == [
        {"epoch": 0, "step": 94, "val_forces_mae": 2.5},
        {"epoch": 0, "step": 95},
        {"epoch": 1, "step": 95, "test_loss": 0.5},
    ]


@pytest.mark.schnetpack
def test_both_configurations_read_the_same_frames(shared_data, tmp_path):
    """The database and the split: official training and test frames, in SchNetPack's units."""
    pytest.importorskip("schnetpack")
    from ndem_zoo.schnetpack import read_ase_db

    bench_rmd17_schnetpack.prepare("ethanol", str(shared_data / "rmd17"), tmp_path)
    frames, raw = read_ase_db(tmp_path / "ethanol.db"), np.load(shared_data / "rmd17/npz_data/rmd17_ethanol.npz")
    split = np.load(tmp_path / "split.npz")
    assert [len(split[f"{part}_idx"]) for part in ("train", "val", "test")] == [950, 50, 1000]
    for part, file in (("test", "index_test_01"), ("train", "index_train_01")):
        official = np.loadtxt(shared_data / "rmd17" / "splits" / f"{file}.csv").astype(int)
        energies = np.sort(frames.targets["energy"][split[f"{part}_idx"]] / KCAL_PER_MOL)
        assert np.isin(np.round(energies, 6), np.round(raw["energies"][official], 6)).all()
    options = [
        bench_rmd17_schnetpack.overrides(Namespace(work_dir=tmp_path, epochs=3, width=16, molecule="ethanol"), seed)
        for seed in (0, 1)
    ]
    assert set(options[0]) ^ set(options[1]) == {"+seed=0", "+seed=1"}


@pytest.mark.parametrize("folder", SCHNETPACK, ids=lambda folder: folder.name)
def test_committed_runs_and_table_agree(folder):
    """Errors by our metrics are those that SchNetPack logged; the table is made of these records."""
    record = json.loads((folder / "record.json").read_text())
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*_*.json"))]
    for found in runs:
        for name in ("energy_mae", "forces_mae", "forces_rmse"):
            logged = found["test_schnetpack"][f"test_{name}"]
            assert found["test"][f"{name}_kcal"] == pytest.approx(logged, rel=1e-4)
        assert found["steps"] == runs[0]["steps"]
    pairs = {(found["configuration"], found["seed"]) for found in runs}
    assert {seed for name, seed in pairs if name == "stock"} == {seed for name, seed in pairs if name == "ndem"}
    assert bench_rmd17_schnetpack.table(record, runs) == folder.with_suffix(".md").read_text(encoding="utf-8")


def test_committed_table_of_objectives_follows_from_its_record():
    file = RESULTS / "md17_ethanol_objectives.json"
    text = bench_md17_objectives.table(json.loads(file.read_text()))
    assert text == file.with_suffix(".md").read_text(encoding="utf-8")
