"""What QM9 costs in time and memory: reading it once, and opening it from the cache, at the size of the full dataset.

    python benchmarks/data/bench_qm9.py --data-dir DIR [--layout npz|xyz] [--out FILE]

`DIR` holds ``qm9_20k.npz`` (or another file in the flat layout) and the list of uncharacterized molecules. Its molecules
are repeated under other numbers until there are 133,885, of which the list drops 3,054; all is measured in fresh processes
with one thread, in a temporary folder. Prints JSON: seconds, and resident memory in MiB, libraries included (``peak``) and
without pages of mapped files (``anonymous``).
"""

from __future__ import annotations

import argparse
import bz2
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
N_MOLECULES = 133_885
COLUMNS = "A B C mu alpha homo lumo gap r2 zpve U0 U H G Cv".split()

_MEMORY = """
import time
start = time.perf_counter()
def memory(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))
import torch
torch.set_num_threads(1)
from ndem_zoo.datasets import load_qm9
from ndem_zoo.sampling import Collator, Order
result = {"libraries_s": time.perf_counter() - start, "libraries_MiB": memory("VmRSS")}
start = time.perf_counter()
"""

_LOAD = """
_, (train, valid, test), _ = load_qm9(target, data_dir=source, uncharacterized=uncharacterized, cache_dir=cache, download=False)
result["load_s"] = time.perf_counter() - start
order, collate = Order(train.counts, 128, seed=0), Collator(train, 5.0)
batches = order.after(0)
batch = collate(next(batches))
result |= {"first_batch_s": time.perf_counter() - start, "sizes": [len(train), len(valid), len(test)]}
result |= {"peak_MiB": memory("VmHWM"), "anonymous_MiB": memory("RssAnon")}
"""

_EPOCH = """
start = time.perf_counter()
for _ in range(order.length(0) - 1):
    batch = collate(next(batches))
result |= {"epoch_s": time.perf_counter() - start, "epoch_peak_MiB": memory("VmHWM")}
result |= {"epoch_resident_MiB": memory("VmRSS"), "epoch_anonymous_MiB": memory("RssAnon")}
"""


def repeated(path: Path) -> dict[str, np.ndarray]:
    """The molecules of a flat file, again and again under the numbers 1 to 133,885."""
    with np.load(path) as raw:
        columns = {name: raw[name] for name in ("N", "Z", "R", *COLUMNS)}
    n = len(columns["N"])
    chosen = np.arange(N_MOLECULES) % n
    ends = np.cumsum(columns["N"])
    counts = columns["N"][chosen]
    atoms = np.repeat((ends - columns["N"])[chosen] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    molecules = {name: columns[name][chosen] for name in ("N", *COLUMNS)}
    return {"id": np.arange(1, N_MOLECULES + 1), "Z": columns["Z"][atoms], "R": columns["R"][atoms], **molecules}


def write_npz(path: Path, columns: dict[str, np.ndarray]) -> None:
    np.savez(path, **columns)


def write_archive(path: Path, columns: dict[str, np.ndarray]) -> None:
    """The official layout; fast compression, since it is the reading that counts."""
    symbols = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
    ends = np.cumsum(columns["N"])
    with bz2.open(path, "wb", compresslevel=1) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for i, end in enumerate(ends):
            n = int(columns["N"][i])
            values = "\t".join(f"{columns[name][i]:.9g}" for name in COLUMNS)
            lines = [str(n), f"gdb {i + 1}\t{values}\t"]
            for z, (x, y, w) in zip(columns["Z"][end - n : end], columns["R"][end - n : end], strict=True):
                lines.append(f"{symbols[int(z)]}\t{x: .10f}\t{y: .10f}\t{w: .10f}\t 0.1")
            lines += ["\t".join(["1000.1234"] * (3 * n - 6)), "C#CC#C\tC#CC#C\t", "InChI=1S/x\tInChI=1S/x"]
            data = ("\n".join(lines) + "\n").encode()
            member = tarfile.TarInfo(f"dsgdb9nsd_{i + 1:06d}.xyz")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def run(script: str, **values: str) -> dict[str, float]:
    """Run a script in a fresh process; its `result`."""
    header = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    text = header + _MEMORY + script + "\nimport json; print(json.dumps(result))"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env=environment, check=False, cwd=REPOSITORY
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    rounded = json.loads(done.stdout.splitlines()[-1])
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in rounded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--file", default="qm9_20k.npz", help="in DIR, in the flat layout")
    parser.add_argument("--layout", choices=["npz", "xyz"], default="npz", help="of the file that is read")
    parser.add_argument("--target", default="gap")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = ("uncharacterized.txt", "uncharacterized_indices.txt")
    uncharacterized = next(options.data_dir / name for name in names if (options.data_dir / name).is_file())
    with tempfile.TemporaryDirectory() as folder:
        file, write = {"npz": ("qm9.npz", write_npz), "xyz": ("dsgdb9nsd.xyz.tar.bz2", write_archive)}[options.layout]
        source = Path(folder) / file
        write(source, repeated(options.data_dir / options.file))
        values = {
            "target": options.target,
            "source": str(source),
            "uncharacterized": str(uncharacterized.resolve()),
            "cache": folder,
        }
        result = {
            "layout": options.layout,
            "file_MiB": round(source.stat().st_size / 2**20, 1),
            "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}",
            "first_time": run(_LOAD, **values),
            "from_cache": run(_LOAD + _EPOCH, **values),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
