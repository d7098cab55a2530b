"""Long runs: a million calls of the calculator and thousands of epochs, each in a process of its own, without growth.

The memory of the process is sampled all along; a straight line through it after the warm-up says what each call or
epoch leaves behind. Growth is what that line climbs over the whole run; it must stay below 1 MiB, beyond what a history
needs that gets longer because it was asked for.
"""

from __future__ import annotations

import functools
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.children import resident_bytes, run, small_model
from ndem_zoo import NDeMCalculator
from ndem_zoo.datasets import read_sample

#: Largest growth over a whole run in bytes.
ALLOWED = 1 << 20

#: The same for the reduced runs, in which heaps still reach their size.
ALLOWED_IN_FEW = 6 << 20

#: Part of a run that is left out of the fit: buffers and caches reach their size in it.
WARM_UP = 0.1

#: Neighboring samples are alike, so their number says nothing about the error of a slope; means of so many blocks do.
BLOCKS = 20

#: A long run may take longer than anything that hangs.
_PATIENCE = 6 * 3600.0


def long_dynamics(quick: bool, folder: Path, seed: int) -> dict[str, Any]:
    """A million calls of the calculator; with `quick` a thousand."""
    calls = 1_200 if quick else 1_000_000
    return _one("calculator calls", calls, functools.partial(calculator_calls, calls, seed), quick)


def long_training(quick: bool, folder: Path, seed: int) -> dict[str, Any]:
    """2,000 epochs; with `quick` a hundred."""
    epochs = 100 if quick else 2_000
    return _one("epochs", epochs, functools.partial(many_epochs, epochs, seed, folder), quick)


def _one(name: str, cases: int, part: Callable[..., None], quick: bool) -> dict[str, Any]:
    """What a harness gives, of one long run."""
    end = run(part, seconds=_PATIENCE)
    if end.status or not end.said:
        found, is_lost = {"died": end.status, "said": end.said[-1:]}, True
    else:
        found = judged(end.said[-1], ALLOWED_IN_FEW if quick else ALLOWED)
        is_lost = not found["is_flat"]
    counts = {"cases": cases, "recovered": 0 if is_lost else cases, "clear_errors": 0, "losses": int(is_lost)}
    return counts | {"report": report({name: found}), name: found}


def report(details: dict[str, Any]) -> list[str]:
    """A table of both runs."""
    lines = [
        "Resident memory of a process, a straight line through the means of 20 blocks of samples, the first tenth of the run",
        "left out. Growth is what the line climbs over the whole run, beyond the rows that the history is asked to keep;",
        f"allowed is {ALLOWED / 2**20:g} MiB.",
        "",
        "| run | bytes each | standard error | of them history | growth, KiB | MiB after warm-up | at the end | ms CPU each |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in details.items():
        if "slope_bytes" not in found:
            lines.append(f"| {name} | died: {found['died']} | | | | | | |")
            continue
        lines.append(
            f"| {found['n']:,} {name} | {found['slope_bytes']:.3f} | {found['slope_error_bytes']:.3f} | "
            f"{found['explained']:.0f} | {found['growth_beyond_history_bytes'] / 1024:.1f} | "
            f"{found['after_warm_up_MiB']:.2f} | {found['last_MiB']:.2f} | {found['ms_cpu_each']:.2f} |"
        )
    return lines


def calculator_calls(calls: int, seed: int, say: Callable[[Any], None]) -> None:
    """Energy and forces of a molecule that moves a little before every call; says memory against calls."""
    frames = read_sample("ethanol")
    model = small_model(plan="auto").fit(frames[:10], max_steps=4)
    atoms = frames.atoms(0)
    atoms.calc = NDeMCalculator(model)
    start, rng = atoms.get_positions(), np.random.default_rng(seed)
    atoms.get_forces()
    samples, begin = Samples(calls), time.process_time()
    for call in range(calls):
        atoms.set_positions(start + rng.normal(scale=0.01, size=start.shape))
        assert np.isfinite(atoms.get_forces()).all()
        assert np.isfinite(atoms.calc.results["energy"])
        samples.take(call)
    say(
        {
            "unit": "call",
            "n": calls,
            "samples": samples.listed(),
            "cpu_seconds": time.process_time() - begin,
            "explained": 0.0,
        }
    )


def many_epochs(epochs: int, seed: int, folder: Path, say: Callable[[Any], None]) -> None:
    """A training with a row of history after every epoch and a checkpoint after every tenth; says memory against epochs."""
    frames, samples = read_sample("ethanol"), Samples(epochs + 1)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model = small_model(lr=1e-4, seed=seed, early_stopping=epochs + 1)
        begin = time.process_time()
        model.fit(
            frames[:10], frames[10:14], nb_epoch=epochs, checkpoint_dir=Path(place) / "run", checkpoint_every=20,
            callback=lambda row: samples.take(round(row["epoch"])),
        )  # fmt: skip
        seconds = time.process_time() - begin
        written = sum(file.stat().st_size for file in Path(place).rglob("*.json"))
    gc.collect()
    assert len(model.history_) == epochs
    assert model.history_[-1]["epoch"] == epochs
    explained = row_bytes(model.history_[-1])
    say(
        {
            "unit": "epoch", "n": epochs, "samples": samples.listed(), "cpu_seconds": seconds, "explained": explained,
            "rows": len(model.history_), "state_bytes": written,
        }
    )  # fmt: skip


class Samples:
    """Resident memory against a count; a thousand samples, in an array that is there from the beginning."""

    def __init__(self, n: int) -> None:
        self.every = max(1, n // 1000)
        self.values = np.full((-(-n // self.every), 2), -1, dtype=np.int64)

    def take(self, count: int) -> None:
        """Sample, if it is time to."""
        if count % self.every == 0:
            self.values[count // self.every] = count, resident_bytes()

    def listed(self) -> list[list[int]]:
        """Those that were taken."""
        return self.values[self.values[:, 0] >= 0].tolist()


def row_bytes(row: dict[str, float]) -> float:
    """What one row of a history takes in memory; all rows share the names."""
    return float(sys.getsizeof(row) + sum(sys.getsizeof(value) for value in row.values()))


def judged(record: dict[str, Any], allowed: float) -> dict[str, Any]:
    """The record with a straight line through its samples, and whether that is flat."""
    samples = np.array(record.pop("samples"), dtype=np.float64)
    slope, error = fitted(samples[samples[:, 0] >= WARM_UP * record["n"]])
    beyond = slope - record["explained"]
    return record | {
        "samples": len(samples),
        "slope_bytes": slope,
        "slope_error_bytes": error,
        "growth_bytes": slope * record["n"],
        "growth_beyond_history_bytes": beyond * record["n"],
        "is_flat": bool(beyond * record["n"] < allowed),
        "ms_cpu_each": 1e3 * record["cpu_seconds"] / record["n"],
        "first_MiB": samples[0, 1] / 2**20,
        "after_warm_up_MiB": samples[samples[:, 0] >= WARM_UP * record["n"]][0, 1] / 2**20,
        "last_MiB": samples[-1, 1] / 2**20,
        "largest_MiB": samples[:, 1].max() / 2**20,
    }


def fitted(samples: np.ndarray) -> tuple[float, float]:
    """Slope of a straight line through means of blocks of the samples (n, 2), and its standard error."""
    blocks = [block.mean(axis=0) for block in np.array_split(samples, min(BLOCKS, len(samples)))]
    x, y = np.array(blocks).T
    x = x - x.mean()
    slope = float((x * (y - y.mean())).sum() / (x * x).sum())
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt((rest * rest).sum() / max(1, len(x) - 2) / (x * x).sum()))
