"""What reading OC20 costs: frames per second from each format and from a store, and the memory of 200,000 frames.

    python benchmarks/data/bench_oc20.py --data-dir DIR

``DIR`` holds genuine frames in OC20's formats: ``s2ef_train/`` (text) and ``fmt/`` (``.lmdb``, ``.aselmdb``). Written is
``results/oc20.json`` beside this file. All runs use one core. Rates are medians over interleaved rounds; the memory is
that of a fresh process which opens a synthetic store, splits it at random, and reads batches in random order. Resident
memory is given in two parts: *anonymous*, which only this process can give back, and *file*, pages of the store that
happen to be in memory and that the system takes away when it needs room.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"

#: Structures in a batch, and mean number of atoms of a synthetic frame: OC20's have 73 to 82.
BATCH, ATOMS = 32, 80

_MEMORY = """
import json, sys, time
import numpy as np, torch
torch.set_num_threads(1)
from ndem_zoo import open_store
from ndem_zoo.graph import make_batch
from ndem_zoo.sampling import Collator, Order
from ndem_zoo.datasets.checks import check_structures, check_targets

def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return {{name: int(lines[key].split()[0]) / 1024 for name, key in (("anonymous", "RssAnon"), ("file", "RssFile"))}}

record = {{"libraries_MiB": memory()}}
begin = time.perf_counter()
store = open_store(sys.argv[1])
record["open_s"], record["open_MiB"] = time.perf_counter() - begin, memory()
begin = time.perf_counter()
train, valid, test = store.split(0.9, 0.05, seed=1)
again = train.select(np.random.default_rng(0).permutation(len(train))[: len(train) // 2])
record["split_s"], record["split_MiB"] = time.perf_counter() - begin, memory()
begin = time.perf_counter()
check_structures(train); train.split_hash
record["check_and_hash_s"], record["check_and_hash_MiB"] = time.perf_counter() - begin, memory()
order = Order(train.counts, {batch}, 0).after(0)
collate = Collator(train, 6.0)
begin, peak = time.perf_counter(), memory()
for step in range({steps}):
    batch = collate(next(order))
    if step % 50 == 0:
        peak = {{name: max(peak[name], value) for name, value in memory().items()}}
record["batches"], record["frames_read"] = {steps}, {steps} * {batch}
record["batches_MiB"], record["frames_per_s"] = peak, {steps} * {batch} / (time.perf_counter() - begin)
assert not {{"pos", "z", "ids"}} & set(vars(train))
print(json.dumps(record))
"""


def rates(sources: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Frames per second of each source: medians and extremes over rounds, in which all take turns."""
    found: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(rounds):
        for name, read in sources.items():
            begin = time.perf_counter()
            n = read()
            found[name].append(n / (time.perf_counter() - begin))
    return {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in found.items()}


def reading(data: Path, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Frames per second from the genuine files, and from the store that they are converted into."""
    from ndem_zoo.datasets.lmdb_files import LmdbRecords
    from ndem_zoo.datasets.oc20 import convert_oc20, read_oc20
    from ndem_zoo.sampling import Collator

    fmt = data / "fmt"
    store = convert_oc20(data / "s2ef_train", folder / "converted")
    rng = np.random.default_rng(0)
    batches = np.split(rng.permutation(len(store)), range(BATCH, len(store), BATCH))[:40]
    n = sum(map(len, batches))

    def from_store(cutoff: float) -> Callable[[], int]:
        collate = Collator(store, cutoff)
        return lambda: sum(collate(batch).n_systems for batch in batches)

    def from_records(file: str) -> Callable[[], int]:
        records = LmdbRecords(fmt / file)
        return lambda: sum("pos" in record or "positions" in record for record in records.records())

    def convert() -> int:
        shutil.rmtree(folder / "again", ignore_errors=True)
        return len(convert_oc20(data / "s2ef_train", folder / "again"))

    def columns() -> int:
        for batch in batches:
            part = store.select(batch)
            _ = [part.z, part.pos, part.cell, part.fixed, *(part.targets[name] for name in part.targets)]
        return n

    sources = {
        "store: columns of random batches": columns,
        "store: random batches with edges up to 6 Å": from_store(6.0),
        "pickled LMDB, PyG 2, fields": from_records("s2ef_pyg_new.lmdb"),
        "pickled LMDB, PyG 1, fields": from_records("s2ef_pyg1.lmdb"),
        "aselmdb, fields": from_records("s2ef.aselmdb"),
        "text (xz), checked": lambda: len(read_oc20(data / "s2ef_mini100")),
        "pickled LMDB, checked": lambda: len(read_oc20(fmt / "s2ef_pyg_new.lmdb")),
        "conversion of text (xz) into a store": convert,
    }
    return rates(sources, rounds)


def synthetic_store(folder: Path, frames: int) -> float:
    """Write a store of random slabs; MiB of its files."""
    from ndem_zoo.checkpoint import load_record, save_record
    from ndem_zoo.datasets import MolecularDataset, StoreWriter

    rng = np.random.default_rng(0)
    with StoreWriter(folder, name="synthetic", check=False) as writer:
        for start in range(0, frames, 5000):
            size = min(5000, frames - start)
            counts = rng.integers(ATOMS // 2, 3 * ATOMS // 2, size)
            ptr = np.concatenate([[0], np.cumsum(counts)])
            part = MolecularDataset(
                rng.integers(1, 84, ptr[-1]).astype(np.uint8),
                rng.uniform(0, 20, (ptr[-1], 3)),
                ptr,
                targets={"energy": rng.normal(size=size), "forces": rng.normal(size=(ptr[-1], 3))},
                cell=np.tile(20 * np.eye(3), (size, 1, 1)),
                pbc=np.ones((size, 3), dtype=bool),
                fixed=rng.random(ptr[-1]) < 0.4,
                ids=np.char.add("random", np.arange(start, start + size).astype(str)),
                extras={"tags": rng.integers(0, 3, ptr[-1]).astype(np.int8), "sid": np.arange(start, start + size)},
            )
            part.checked = True
            writer.append(part)
            writer.commit(str(start))
        writer.finish()
    # Choice: as if the frames had been checked, which is what a conversion does.
    save_record(folder / "store.json", load_record(folder / "store.json") | {"checked": True})
    return sum(path.stat().st_size for path in folder.iterdir()) / 1024**2


def memory(folder: Path, frames: int, batches: int) -> dict[str, object]:
    """Resident memory and times of a fresh process on a synthetic store."""
    size = synthetic_store(folder, frames)
    script = _MEMORY.format(batch=BATCH, steps=batches)
    command = [sys.executable, "-c", script, str(folder)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"frames": frames, "mean_atoms": ATOMS, "store_MiB": size} | json.loads(result.stdout)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="Folder with s2ef_train, s2ef_mini100 and fmt.")
    parser.add_argument("--scratch", type=Path, help="Folder for the stores (1 GB); default: a temporary one.")
    parser.add_argument("--frames", type=int, default=200_000, help="Of the synthetic store.")
    parser.add_argument("--batches", type=int, default=2000, help="That are read from it.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "oc20.json")
    args = parser.parse_args()
    import torch

    from ndem_zoo.checkpoint import save_json

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        record = {
            "command": f"python benchmarks/data/bench_oc20.py --frames {args.frames} --batches {args.batches}",
            "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one core",
            "frames_per_s": reading(args.data_dir, folder, args.rounds),
            "memory": memory(folder / "synthetic", args.frames, args.batches),
        }
    save_json(args.out, record)
    print(json.dumps(record, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
