"""What a force field costs in a training step: its difference in every step, against its derivatives computed once.

Times the change of the forces alone, and a supervised training step of the same batch beside it: interleaved rounds of one
process and one thread, CPU time, median of the ratios with quartiles. And what the first order loses: the share of the force
field's own changes that its derivatives explain.

    python benchmarks/accuracy/bench_curvature_cost.py --data-dir ../shared/data/md17

writes ``results/curvature_cost.json`` and the table made from it (``.md``).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.bench_md17_objectives import load  # noqa: E402
from ndem_zoo import NDeMTorchMDNet  # noqa: E402
from ndem_zoo.checkpoint import save_json, write_text  # noqa: E402
from ndem_zoo.curvature import ForceFieldDifference, explained, first_order_change  # noqa: E402
from ndem_zoo.forcefields import make_force_field  # noqa: E402
from ndem_zoo.graph import displace  # noqa: E402

RESULTS = Path(__file__).parent / "results"
FIELDS = ("valence", "mmff94")
SIZES = {"32 x 2": (32, 2, 4), "128 x 6": (128, 6, 8)}
SIGMAS = (0.01, 0.02, 0.05)
BATCH = 8


class FirstOrder:
    """A force field to first order, in the place of a `Curvature`; for structures of one size that come in order."""

    def __init__(self, exact: ForceFieldDifference, dataset: Any) -> None:
        self.slopes, self.at = torch.from_numpy(exact.slopes(dataset)), 0
        self.parameters, self.buffers = exact.parameters, exact.buffers

    def force_change(self, batch: Any, epsilon: torch.Tensor, moved: Any = None) -> torch.Tensor:
        """Change of the forces in eV/Å of the next structures."""
        rows = slice(self.at, self.at + len(batch.z))
        self.at = rows.stop % len(self.slopes)
        return first_order_change(self.slopes[rows], batch, epsilon)


def cpu(call: Any, times: int) -> float:
    """CPU seconds of a call, mean of some."""
    begin = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - begin) / times


def costs(train: Any, field: str, size: str, rounds: int) -> dict[str, list[float]]:
    """Quartiles of the cost of the change, as a share of a supervised step."""
    channels, layers, heads = SIZES[size]
    options = {"hidden_channels": channels, "num_layers": layers, "num_heads": heads}
    model = NDeMTorchMDNet(objective="supervised", backbone_options=options, batch_size=BATCH, progress=False)
    model.fit(train, max_steps=2)
    exact = ForceFieldDifference(make_force_field(field).fit(train))
    part = train[:BATCH]
    batch = part.to_batch(5.0, torch.float32)
    epsilon = 0.02 * torch.randn(batch.pos.shape, generator=torch.Generator().manual_seed(0))
    moved, slopes = displace(batch, epsilon, 5.0), torch.from_numpy(exact.slopes(part))
    ways = {
        "in every step": lambda: exact.force_change(batch, epsilon, moved),
        "computed once": lambda: first_order_change(slopes, batch, epsilon),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        few, many = (cpu(lambda n=n: model.partial_fit(train, max_steps=n), 1) for n in (2, 12))
        step = (many - few) / 10
        for name, way in ways.items():
            found[name].append(cpu(way, 20) / step)
    return {name: statistics.quantiles(values, n=4) for name, values in found.items()}


def table(record: dict[str, Any]) -> str:
    """Costs, and what is lost."""
    lines = [
        "# What a force field costs in a step",
        "",
        f"`python benchmarks/accuracy/bench_curvature_cost.py --data-dir DIR`; {record['machine']}, torch {record['torch']}, one "
        f"thread, batches of {BATCH}, {record['rounds']} interleaved rounds. CPU time of the change of the forces as a share of "
        "that of a supervised training step; median (quartiles). `lost`: one minus the share of the force field's own changes "
        "that its derivatives explain, by sigma in Å.",
        "",
        "| molecule | force field | model | in every step | computed once | lost at "
        + ", ".join(map(str, SIGMAS))
        + " |",
        "|" + "---|" * 6,
    ]
    for row in record["rows"]:
        shares = (f"{100 * m:.1f} % ({100 * a:.1f} to {100 * b:.1f})" for a, m, b in row["cost"].values())
        lost = ", ".join(f"{value:.4f}" for value in row["lost"])
        lines.append(f"| {row['molecule']} | `{row['field']}` | {row['size']} | {' | '.join(shares)} | {lost} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=None, help="folder with the MD17 npz files; default: download them")
    parser.add_argument("--molecules", nargs="+", default=["ethanol", "aspirin"])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for molecule in args.molecules:
        train, _, test = load(molecule, args.data_dir, 100, 64)
        test = test.select(np.arange(64))
        for field in FIELDS:
            force_field = make_force_field(field).fit(train)
            first = FirstOrder(ForceFieldDifference(force_field), test)
            lost = [1 - share for share in explained(first, test, force_field, SIGMAS).values()]
            for size in SIZES:
                cost = costs(train, field, size, args.rounds)
                rows.append({"molecule": molecule, "field": field, "size": size, "cost": cost, "lost": lost})
                print(rows[-1], flush=True)
    record = {"rows": rows, "rounds": args.rounds, "machine": platform.machine(), "torch": torch.__version__}
    save_json(RESULTS / "curvature_cost.json", record)
    write_text(RESULTS / "curvature_cost.md", table(record))
    print(table(record))


if __name__ == "__main__":
    main()
