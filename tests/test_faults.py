"""Killed processes, full disks, damaged files, long runs: the harnesses of benchmarks/reliability, in a reduced form.

They run in a process of their own, as anyone would run them; here is looked at what they counted, and whether they would
notice if something went wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reliability import runner
from ndem_zoo.errors import DataError

ROOT = Path(__file__).resolve().parents[1]

NAMES = ("kill", "full_disk", "damage", "long_dynamics", "long_training")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What ``python -m benchmarks.reliability --quick`` reports."""
    out = tmp_path_factory.mktemp("reliability")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.reliability", *NAMES, "--quick", "--out", str(out)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert (out / "report.json").is_file(), done.stderr[-3000:]
    found = json.loads((out / "report.json").read_text())["harnesses"]
    lost = {
        name: {key: row.get(key) for key in ("lost", "error", "parts")} for name, row in found.items() if row["losses"]
    }
    assert done.returncode == (1 if lost else 0), done.stderr[-3000:]
    assert not lost, json.dumps(lost, indent=1)[:5000]
    assert "losses" in (out / "report.md").read_text()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_case_ends_well(report, name):
    row = report[name]
    assert row["losses"] == 0
    undetectable = row.get("undetectable", 0)
    assert row["cases"] == row["recovered"] + row["clear_errors"] + undetectable > 10


@pytest.mark.slow
def test_processes_were_killed_while_they_wrote(report):
    parts = report["kill"]["parts"]
    assert len(parts) == 5
    for part in parts.values():
        assert part["cases"] >= 2
    assert sum(part["died_while_writing"] for part in parts.values()) >= 5
    assert parts["at file operations of a training"]["operations"] > 40


@pytest.mark.slow
def test_full_disks_are_errors_that_name_the_place(report):
    writers = report["full_disk"]["writers"]
    assert len(writers) >= 9
    for name, kinds in writers.items():
        outcomes = [outcome for found in kinds.values() for outcome in found]
        expected = "recovered" if name.startswith("cache") else "clear_errors"
        assert outcomes.count(expected) >= 1, name


@pytest.mark.slow
def test_files_of_ours_never_give_other_values(report):
    """All kinds were read; only formats without checksums gave other values, and none of them is ours."""
    kinds = {name: row for name, row in report["damage"]["kinds"].items() if "cases" in row}
    assert len(kinds) >= 20
    for name in ("model", "checkpoint", "store", "record (split, metrics)"):
        assert kinds[name]["clear"] >= 10, name
        assert kinds[name]["undetectable"] == 0
    assert all(row["protection"] == "" for row in kinds.values() if row["undetectable"])
    newest = kinds["resuming beside a damaged newest checkpoint"]
    assert newest["same"] == newest["cases"] >= 2


def last(content: bytes, old: bytes, new: bytes) -> bytes:
    """The last occurrence replaced."""
    head, found, tail = content.rpartition(old)
    assert found
    return head + new + tail


def packed_in_another_way(content: bytes) -> bytes:
    """An archive whose last part claims a method that nobody knows, in both of its headers."""
    changed = bytearray(content)
    for mark, place in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        changed[content.rindex(mark) + place] = 77
    return bytes(changed)


#: Damage that once went unnoticed, or ended in an error of somebody else's: kind, file, what is done to it.
FOUND = {
    "checksum behind the last molecule": ("PCQM4Mv2 tar.gz, csv.gz", "pcqm4m-v2-train.sdf.tar.gz", lambda c: c[:-8] + bytes(8)),
    "end behind the last molecule": ("QM9 tar.bz2", "dsgdb9nsd.xyz.tar.bz2", lambda c: c[:-2]),
    "name of an array": ("predictions.npz", "predictions.npz", lambda c: last(c, b"target.energy", b"tarfet.energy")),
    "packed in another way": ("MD17 npz", "md17_ethanol.npz", packed_in_another_way),
    "empty log": ("OC20 extxyz.xz, txt.xz", "0.txt.xz", lambda c: b""),
    "energy that is text": ("extxyz", "frames.extxyz", lambda c: c.replace(b"REF_energy=-", b"REF_energy=?", 1)),
    "too many cells": ("history.csv of a run", "history.csv", lambda c: last(c, b".", b",")),
    "more columns than names": ("QM9 sdf, csv", "gdb9.sdf.csv", lambda c: c.replace(b"mol_id,", b"molLid.", 1)),
    "name that is none": ("OC20 reference json", "oc20_ref.json", lambda c: c.replace(b"random7", b"raodom7", 1)),
    "name of the checksum": ("record (split, metrics)", "split.json", lambda c: c.replace(b"checksum", b"checksul", 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_damage_that_was_found(tmp_path, name):
    from benchmarks.reliability.specimens import KINDS

    kind, file, hurt = FOUND[name]
    KINDS[kind].make(tmp_path)
    KINDS[kind].load(tmp_path)
    path = tmp_path / file
    path.write_bytes(hurt(path.read_bytes()))
    with pytest.raises(DataError, match=Path(file).stem):
        KINDS[kind].load(tmp_path)


# ------------------------------------------------------------------------------------------------ would they notice?


def test_a_leak_is_noticed():
    from benchmarks.reliability.long_runs import ALLOWED, judged

    rng, n = np.random.default_rng(0), 1_000_000
    calls = np.arange(0, n, 1000)
    noise = rng.normal(scale=50_000, size=len(calls))
    record = {"n": n, "explained": 0.0, "cpu_seconds": 1.0}
    for bytes_each, flat in ((0.0, True), (8.0, False)):
        memory = 4e8 + bytes_each * calls + noise + 3e6 * (calls < 50_000)  # what is freed after the beginning
        found = judged(record | {"samples": np.stack([calls, memory], axis=1).tolist()}, ALLOWED)
        assert found["is_flat"] is flat
        assert abs(found["slope_bytes"] - bytes_each) < 5 * found["slope_error_bytes"] < 0.5


def test_an_error_in_a_harness_is_a_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "HARNESSES", {"broken": "benchmarks.reliability.runner:no_such_function"})
    with pytest.raises(SystemExit) as ended:
        runner.main(["--out", str(tmp_path), "--quick"])
    assert ended.value.code == 1
    row = json.loads((tmp_path / "report.json").read_text())["harnesses"]["broken"]
    assert row["losses"] == 1
    assert "no_such_function" in row["error"]
    with pytest.raises(SystemExit, match="2"):
        runner.main(["nonsense", "--out", str(tmp_path)])


def test_other_harnesses_keep_their_results(tmp_path, monkeypatch):
    counts = dict.fromkeys(runner.COUNTS, 0)
    monkeypatch.setattr(runner, "HARNESSES", {"a": "x:y", "b": "x:y"})
    monkeypatch.setattr(
        runner, "run_one", lambda name, quick, seed: counts | {"cases": seed, "cpu_seconds": 0.0, "seconds": 0.0, "quick": quick, "machine": runner.describe()}
    )  # fmt: skip
    for arguments in (["--seed", "1"], ["b", "--seed", "2"]):
        with pytest.raises(SystemExit) as ended:
            runner.main([*arguments, "--out", str(tmp_path)])
        assert ended.value.code == 0
    found = json.loads((tmp_path / "report.json").read_text())["harnesses"]
    assert {name: row["cases"] for name, row in found.items()} == {"a": 1, "b": 2}
