"""The benchmark of EquiformerV2 without its clock and its rival: marks of the table, frames, what a child returns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are no part of the installed package

from benchmarks.equiformer import bench_equiformer as bench


def record(ratio: float, share: float, milliseconds: float) -> dict:
    times = {"ours": {"ms": 100.0}, "fairchem": {"ms": 100.0 * ratio}}
    quartiles = [ratio - 0.1, ratio + 0.1]
    step = {"ratio": {"median": ratio, "quartiles": quartiles}, "times": times, "agreement": {"energy": 2e-7}}
    return {
        "rounds": 9,
        "machine": {"cpu": "of a test"},
        "steps": {"tiny/shipped": step},
        "memory": {"tiny": {"ours": {"peak_MB": 100.0 * share}, "fairchem": {"peak_MB": 100.0}}},
        "graph": {"ms": milliseconds, "ms_quartiles": [milliseconds - 1, milliseconds + 1], "atoms": [79, 81]},
    }


def test_targets_are_marked_by_the_unfavorable_quartile():
    page = bench.render(record(2.2, 0.5, 4.0))
    assert "| tiny | shipped | 100 | 220 | 2.20 (2.10 to 2.30) | 2.0 ✓ |" in page
    assert "| tiny | 50 | 100 | 0.50 | 0.6 ✓ |" in page
    assert "4.0 ms a frame (3.0 to 5.0); target 6.0 ✓" in page
    page = bench.render(record(2.05, 0.7, 5.5))
    assert page.count("✗") == 3


def test_missing_data_end_with_a_message(tmp_path):
    with pytest.raises(SystemExit, match=r"s2ef_mini100.*--data-dir"):
        bench.frames(tmp_path)


def test_a_frame_has_twenty_neighbors_each(shared_data):
    batch = bench.batch_of_frame(bench.frames(shared_data / "oc20")[0])
    assert abs(len(batch.z) - bench.ATOMS) < 10
    assert batch.dst.bincount().tolist() == [20] * len(batch.z)
