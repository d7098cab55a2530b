"""The table of the fine-tuning benchmark: differences are paired by seed, and go the right way."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are no part of the installed package

from benchmarks.accuracy import bench_finetune as bench


def run(name: str, start: str, seed: int, force: float) -> dict:
    test = {"forces_mae_kcal": force, "energy_mae_kcal": 2 * force}
    return {"n_train": 100, "objective": name, "start": start, "seed": seed, "test": test}


def test_differences_are_paired():
    runs = [run("supervised", "scratch", 0, 1.0), run("supervised", "scratch", 1, 3.0)]
    runs += [run("supervised", "pretrained", 0, 0.5), run("supervised", "pretrained", 1, 2.7)]
    runs += [run("ndem", "pretrained", 1, 1.8)]  # without a scratch run; one seed in common with supervised
    made = {"data": "D", "n_structures": 7, "steps": 9, "batch_size": 2, "valid_loss": [[3, 0.9], [6, 0.7], [9, 0.8]]}
    record = {
        "molecule": "ethanol",
        "n_train": [100],
        "n_test": 5,
        "steps": 4,
        "batch_size": 8,
        "channels": 2,
        "layers": 1,
    }
    record |= {"pretraining": made, "machine": "M", "command": "C"}
    text = bench.table(record, runs)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[0] == ["supervised", "scratch", "2", "2.0000 ± 1.4142", "", "", "4.0000 ± 2.8284"]
    # (-0.5 - 0.3) / (1 + 3); mean -0.4, standard error 0.1414 / sqrt(2)
    assert rows[1][:5] == ["supervised", "pretrained", "2", "1.6000 ± 1.5556", "-20.0 % (-0.4000 ± 0.1000)"]
    assert rows[2] == ["ndem", "pretrained", "1", "1.8000", "", "-33.3 % (-0.9000)", "3.6000"]
    assert "0.700 at best" in text


def test_a_short_training_warms_up_for_a_tenth_of_it():
    args = argparse.Namespace(channels=8, layers=1, batch_size=2, device="cpu")
    assert bench.settings(args, 600)["warmup_steps"] == 60
    assert bench.settings(args, 10_000)["warmup_steps"] == 500
