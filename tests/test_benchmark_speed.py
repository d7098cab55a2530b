"""The speed benchmark without its clock: inputs, turns, baselines, targets and tables."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are no part of the installed package

from benchmarks.speed import bench_speed, contestants, machine, parts, structures, table, timing
from ndem_zoo.models.torchmd_net import TorchMDNet


def nearest_distance(inputs) -> float:
    return float(inputs.batch.vectors().norm(dim=-1).min())


@pytest.mark.parametrize("n", [32, 100])
def test_clusters_are_compact_and_at_the_density(n):
    first, second = structures.cluster_sets(n, n_sets=2)
    assert first.batch.z.shape == (n,)
    assert nearest_distance(first) >= 1.0
    assert not np.allclose(first.pos, second.pos)
    # A ball of that volume: three quarters of the pairs of its radius would be too few if it were stretched.
    radius = (3 * n / (4 * np.pi * structures.DENSITY)) ** (1 / 3)
    spread = np.sqrt(np.square(first.pos - first.pos.mean(axis=0)).sum(axis=1).mean())
    assert spread == pytest.approx(radius * np.sqrt(3 / 5), rel=0.1)


def test_water_boxes_are_periodic_water():
    box = structures.water_sets((4, 4, 4), n_sets=1)[0]
    assert box.batch.z.tolist().count(8) == 64
    assert box.batch.z.tolist().count(1) == 128
    assert len(box.z) / np.linalg.det(box.cell[0]) == pytest.approx(structures.DENSITY)
    assert np.diag(box.cell[0]).min() > 2 * structures.CUTOFF, "torchmd-net wants a box wider than twice the cutoff"
    assert 0.8 < nearest_distance(box) < 1.0
    assert bool((box.batch.shift != 0).any())
    mean = structures.edges_within(box) / len(box.z)
    assert mean == pytest.approx(structures.DENSITY * 4 / 3 * np.pi * structures.CUTOFF**3, rel=0.1)


def test_molecule_sets_differ_and_repeat():
    first, second = structures.molecule_sets("aspirin", 4, n_sets=2)
    again = structures.molecule_sets("aspirin", 4, n_sets=2)[0]
    assert not np.allclose(first.pos, second.pos)
    assert (first.pos == again.pos).all()
    assert np.square(first.batch.targets["forces"].numpy()).mean() == pytest.approx(1, rel=0.3)
    part = first.first(3)
    assert part.batch.n_systems == 3
    assert (part.pos == first.pos[:63]).all()


def test_contestants_take_turns_on_the_same_inputs(monkeypatch):
    monkeypatch.setattr(timing, "TURN", 0.0)
    calls = []
    works = {name: lambda values, name=name: calls.append((name, values)) for name in "AB"}
    times = timing.interleave(works, [10, 20, 30], rounds=4)
    measured = calls[2 * timing.WARM_UP :]
    assert [name for name, _ in measured] == list("ABABABAB")
    assert [values for _, values in measured] == [10, 10, 20, 20, 30, 30, 10, 10]
    assert {len(t["cpu"]) for t in times.values()} == {4}


def test_ratios_are_taken_round_by_round():
    times = {"ours": {"cpu": [1.0, 2.0, 4.0]}, "other": {"cpu": [5.0, 8.0, 24.0]}}
    found = timing.ratio(times, "other", "ours")
    assert (found["median"], found["quartiles"], found["rounds"]) == (5.0, [4.5, 5.5], 3)


def test_exponent():
    assert timing.exponent([10, 100, 1000], [2 * n**1.5 for n in (10, 100, 1000)]) == pytest.approx(1.5)


def test_each_baseline_has_its_own_allocator(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    shipped, tuned = (bench_speed.environment(name, 1) for name in ("shipped", "strict"))
    assert not [name for name in shipped if name.startswith("MALLOC_")]
    assert {name for name in tuned if name.startswith("MALLOC_")} == set(bench_speed.ALLOCATOR)
    assert tuned["OMP_NUM_THREADS"] == "1"
    assert set(bench_speed.IN_BASELINES) == set(parts.PARTS)


def test_strict_is_refused_where_it_would_not_be_float32(monkeypatch):
    monkeypatch.setattr(machine, "has_amx", lambda: True)
    with pytest.raises(machine.StrictRefusedError, match="AMX"):
        machine.enable_strict()
    monkeypatch.setattr(machine, "has_amx", lambda: False)
    monkeypatch.setattr(machine, "product_errors", lambda: {"x W^T": 2e-3})
    monkeypatch.setattr(machine, "sgemm_rates", lambda sizes: {})
    before = machine.global_settings()
    with pytest.raises(machine.StrictRefusedError, match=r"not exact|cannot route"):
        machine.enable_strict()
    assert machine.global_settings() == before


def test_products_are_float32():
    errors = machine.product_errors()
    assert len(errors) == 9
    assert max(errors.values()) < machine.EXACT


def test_a_contestant_must_not_change_the_settings_of_the_other(monkeypatch):
    states = iter([{"threads": 1}, {"threads": 2}, {"threads": 2}])
    monkeypatch.setattr(machine, "global_settings", lambda: next(states))
    with pytest.raises(RuntimeError, match="changed global settings"):
        parts.run_rounds({"A": lambda values: None}, [0], parts.Settings(rounds=1))


def test_disagreement_is_seen():
    """Our potential against its own float64 twin; then with float32 results that are 0.1 % too large."""

    class Wrong(contestants.Ours):
        def _infer(self, batch):
            factor = 1.001 if batch.pos.dtype == torch.float32 else 1.0
            return tuple(factor * value for value in super()._infer(batch))

    inputs = structures.molecule_sets("ethanol", 2, n_sets=1)[0]
    right, wrong = (entrant(plan="eager", options=TorchMDNet.tiny) for entrant in (contestants.Ours, Wrong))
    assert contestants.compare(right, None, inputs)["ok"]
    right.freeze()
    found = contestants.compare(right, None, inputs, gradients=False)
    assert found["ok"]
    assert 0 < found["ours - float64"]["forces"] < contestants.TOLERANCE["forces"]
    assert not contestants.compare(wrong, None, inputs, gradients=False)["ok"]


# ------------------------------------------------------------------------------------------------------------- table


def row(item: str, low: float, **values) -> dict:
    times = {
        name: {"ms": ms, "ms_quartiles": [ms, ms], "wall_min_ms": ms, "rounds_ms": [ms]}
        for name, ms in (("ours", 50.0), ("torchmd-net", 400.0))
    }
    ratio = {"median": 9.0, "quartiles": [low, 9.5], "rounds": 9}
    base = {"item": item, "atoms": 168, "edges": 2448, "required_gflop": 4.4, "agreement": None, "plan": "fused"}
    return base | {"times": times, "ratios": {"torchmd-net": ratio}} | values


def record(**sections) -> dict:
    rates = {"1024x1024x1024": {"mm": 90.0, "onednn": 200.0}}
    calibration = {
        "sgemm_gflops": rates,
        "small_additions_100k_s": 0.2,
        "two_thread_gain": 1.9,
        "load_average": [0.1, 0.1, 0.1],
    }
    common = {"machine": machine.describe(), "calibration": calibration, "settings": {"rounds": 9}}
    return {"command": "c", "quick": False, "sections": {k.replace("__", "/"): common | v for k, v in sections.items()}}


def test_a_target_is_reached_by_the_lower_quartile():
    page = table.render(record(train__shipped={"rows": [row("aspirin b8", 8.1)]}))
    assert "9.00 [8.10, 9.50] ✓" in page
    page = table.render(record(train__shipped={"rows": [row("aspirin b8", 7.9)]}))
    assert "9.00 [7.90, 9.50] ✗" in page


def test_batch_128_as_shipped_is_bracketed_and_strict_is_judged():
    page = table.render(
        record(train__shipped={"rows": [row("aspirin b128", 14.0)]}, train__strict={"rows": [row("aspirin b128", 5.9)]})
    )
    assert "| (9.00 [14.00, 9.50]) |  | 9.00 [5.90, 9.50] ✗ | – / 6 |" in page


def test_the_limit_stands_beside_the_time():
    page = table.render(record(train__strict={"rows": [row("aspirin b8", 6.0)]}))
    assert "| 50.0 (50.0) | torchmd-net 400.0 (400.0) | 22.0 | 44 % |" in page


def test_a_refused_baseline_says_why():
    page = table.render(record(train__strict={"refused": "AMX"}, train__shipped={"rows": [row("aspirin b8", 8.0)]}))
    assert "refused: AMX" in page


def test_growth_is_fitted_over_the_sizes():
    rows = []
    for edges, ms in ((1000, 10.0), (4000, 40.0)):
        rows.append(row(f"cluster of {edges}", 1.0, edges=edges))
        rows[-1]["times"]["ours"]["ms"] = ms
    page = table.render(record(systems__shipped={"rows": rows}))
    assert "one system, inference, cluster: 1,000 to 4,000 pairs | as shipped | ours | 1.00 ✓" in page


def test_other_tables_are_drawn():
    memory = {"item": "aspirin b8", "batch_size": 8, "ours": {"peak_MB": 100.0, "ms": 50.0}}
    memory["torchmd-net"] = {"peak_MB": 900.0, "ms": 400.0}
    whole = {"item": "ndem", "bare_ms": 50.0, "fit_ms": 52.0, "throughput": 0.96, "throughput_quartiles": [0.95, 0.97]}
    first = {"item": "ndem", "first_step_s": 4.0, "import_s": 2.0, "cold_s": 30.0, "runs": []}
    pairs = row("aspirin b8", 9.0, us_per_molecule={"ours": 0.5, "torchmd-net": 70.0})
    page = table.render(
        record(
            memory__shipped={"rows": [memory]},
            fit__shipped={"rows": [whole | {"batch_ms": 0.1, "data_share": 0.002}]},
            pairs__shipped={"rows": [pairs]},
            **{"first-step__shipped": {"rows": [first]}},
        )
    )
    for text in (
        "1/9.0 ✓",
        "0.960 [0.950, 0.970] ✓",
        "0.20 % ✓",
        "0.50 ✓",
        "| 4.00 ✓ |",
        "torch_cluster | not installed",
    ):
        assert text in page
