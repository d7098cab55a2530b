"""What only a fresh process can tell: its peak memory, and the time from its start to the end of the first step.

Run by `bench_speed` as ``python fresh.py memory '{...}'``; the last line printed is JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

STEPS = 5


def status_bytes(field: str) -> int:
    """A field of /proc/self/status: ``VmRSS`` (now) or ``VmHWM`` (the most so far)."""
    # Pitfall: ru_maxrss of a child starts from its parent's size; these belong to the process alone.
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(f"/proc/self/status has no {field}")


def memory(contestant: str, molecule: str, batch_size: int, objective: str, plan: str | None) -> dict[str, Any]:
    """Most memory of a few training steps beyond the imported libraries: weights, optimizer and inputs included."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.speed import contestants, structures

    # Everything that is imported late is imported now: the step of a tiny input brings it in.
    is_ours = contestant == "ours"
    make = contestants.Ours if is_ours else contestants.TorchMDNetRival
    options = {"plan": plan} if is_ours else {}
    make(objective, **options).step(structures.molecule_sets("ethanol", 1, n_sets=1)[0])
    sets = structures.molecule_sets(molecule, batch_size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the small step left is not there for the measured ones
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # begin to look for the maximum anew
    before = status_bytes("VmRSS")
    entrant = make(objective, **options)
    times = []
    for i in range(STEPS):
        begin = time.process_time()
        entrant.step(sets[i % len(sets)])
        times.append(time.process_time() - begin)
    return {
        "peak_MB": (status_bytes("VmHWM") - before) / 1e6,
        "libraries_MB": before / 1e6,
        "ms": 1e3 * statistics.median(times[2:]),
    }


def first_step(started: float, plan: str | None) -> dict[str, Any]:
    """Seconds from the start of the process (on the monotonic clock) to the end of the first step of a `fit`."""
    import torch

    torch.set_num_threads(1)
    from ndem_zoo import NDeMTorchMDNet, load_sample

    imported = time.monotonic()
    _, (train, _, _), _ = load_sample("aspirin")
    chosen = {} if plan is None else {"plan": plan}
    model = NDeMTorchMDNet(preset="md17_paper", batch_size=8, device="cpu", progress=False, **chosen)
    model.fit(train, max_steps=1)
    return {"import_s": imported - started, "first_step_s": time.monotonic() - started}


def run(kind: str, environment: dict[str, str], **options: Any) -> dict[str, Any]:
    """One measurement in a process of its own.

    Raises
    ------
    RuntimeError
        If the process fails; with the end of what it wrote.
    """
    if kind == "first_step":
        options["started"] = time.monotonic()
    command = [sys.executable, str(Path(__file__)), kind, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind} {options} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    result = {"memory": memory, "first_step": first_step}[sys.argv[1]](**json.loads(sys.argv[2]))
    sys.stdout.flush()
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # nothing is left to write, and freeing gigabytes takes seconds
