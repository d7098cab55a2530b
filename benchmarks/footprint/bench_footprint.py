"""What the package costs before and besides arithmetic: memory of a training, time of an import, time of ``--help``.

    python benchmarks/footprint/bench_footprint.py

writes ``results/footprint.json`` beside this file. Memory is the largest resident size of a fresh process that trains
``md17_paper``'s network on aspirin (21 atoms) with batches of 8, all libraries included; times are medians over fresh
processes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

_TRAIN = """
import resource, sys
import torch
torch.set_num_threads(1)
from ndem_zoo import NDeMTorchMDNet, load_sample
_, (train, valid, _), _ = load_sample("aspirin")
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = NDeMTorchMDNet(preset="md17_paper", objective=sys.argv[1], batch_size=8, device="cpu", progress=False)
model.fit(train, max_steps=20)
print(base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_memory(objective: str) -> dict[str, float]:
    """Largest resident size in MiB before and after 20 steps."""
    result = subprocess.run([sys.executable, "-c", _TRAIN, objective], check=True, capture_output=True, text=True)
    before, peak = map(float, result.stdout.split())
    return {"libraries_MiB": before, "peak_MiB": peak}


def process_time(arguments: list[str], runs: int = 7) -> dict[str, float]:
    """Seconds that a fresh process takes, the interpreter's own start included and apart."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "footprint.json")
    args = parser.parse_args()
    import torch

    from ndem_zoo.checkpoint import save_json

    record = {
        "command": "python benchmarks/footprint/bench_footprint.py",
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
        "training_aspirin_batch_8": {name: peak_memory(name) for name in ("supervised", "ndem")},
        "python_start": process_time(["-c", "pass"]),
        "import_ndem_zoo": process_time(["-c", "import ndem_zoo"]),
        "ndem_zoo_help": process_time(["-m", "ndem_zoo.cli", "--help"]),
    }
    save_json(args.out, record)
    print(record)


if __name__ == "__main__":
    main()
