"""Does everything work on a GPU, and give what the CPU gives? Agreement, step times and memory, as JSON.

    python -m benchmarks.gpu_check --out benchmarks/results/gpu_check.json

runs from the source tree alone, with no DGL and no DeepChem; ``--device cpu --quick`` is the reduced form that keeps
the script from rotting where there is no GPU. Exits with 1 if an agreement is worse than its tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import fcc111

from ndem_zoo import load_sample
from ndem_zoo.checkpoint import save_json
from ndem_zoo.graph import edges_of, edges_on_device
from ndem_zoo.models.base import options_of
from ndem_zoo.models.equiformer_v2.model import EquiformerV2
from ndem_zoo.models.potential import Potential
from ndem_zoo.models.torchmd_net import TorchMDNet
from ndem_zoo.objectives.base import Objective
from ndem_zoo.registry import BACKBONES, OBJECTIVES, lookup
from ndem_zoo.sampling import collate
from ndem_zoo.training import Run, TrainSettings, seeded

#: Largest difference between CPU and GPU that float32 arithmetic explains, relative to the norm.
TOLERANCE = 1e-5
#: Gradients of a force loss pass through two backward passes.
GRADIENT_TOLERANCE = 1e-4
#: Backbone, its options, and how forces are made. The first three are checked in the reduced form.
NETWORKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ET tiny": ("torchmd_net", TorchMDNet.tiny, "gradient"),
    "EquiformerV2 tiny": ("equiformer_v2", EquiformerV2.tiny, "direct"),
    "EquiformerV2 tiny, gradient forces": ("equiformer_v2", EquiformerV2.tiny, "gradient"),
    "ET of MD17": ("torchmd_net", {}, "gradient"),
    "EquiformerV2 31M": ("equiformer_v2", {"preset": "31M", "alpha_drop": 0.0, "drop_path_rate": 0.0}, "direct"),
}


def build(network: str, objective: str, dataset: Any) -> tuple[Potential, Objective, Any]:
    """A potential with reproducible weights, an objective for it, and the data with what it needs."""
    scale = float(np.sqrt(np.square(dataset.targets["forces"]).mean()))
    name, options, forces = NETWORKS[network]
    backbone = lookup(BACKBONES, name, "backbone")
    cls = lookup(OBJECTIVES, objective, "objective")
    encode = {"encode_vectors": True} if cls.encodes_vectors else {}
    with seeded(0):
        potential = Potential(backbone(**options_of(backbone, {**options, **encode})), forces=forces, scale=scale)
        term = cls(options=cls.probed_with)
        dataset = term.prepare(dataset)
        term.build(potential, dataset)
    return potential.train(), term, dataset


class _FixedRng:
    """Noise drawn on the CPU, so that both devices see the same displacements."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> torch.Generator:
        self._drawn = {name: getattr(torch, name) for name in ("randn", "rand", "randint")}
        generator = torch.Generator().manual_seed(0)

        def on_cpu(draw: Any) -> Any:
            def wrapped(*args: Any, **options: Any) -> torch.Tensor:
                return draw(*args, **options | {"generator": generator, "device": "cpu"}).to(self.device)

            return wrapped

        for name, draw in self._drawn.items():
            setattr(torch, name, on_cpu(draw))
        return generator

    def __exit__(self, *exception: Any) -> None:
        for name, draw in self._drawn.items():
            setattr(torch, name, draw)


def terms_and_gradients(
    potential: Potential, objective: Objective, dataset: Any, n: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Energy, forces, and gradients of the loss for the first n structures, on the CPU in float64."""
    potential, objective = potential.to(device), objective.to(device)
    batch = collate(dataset, np.arange(n), potential.backbone.cutoff).to(device)
    prediction = potential(batch, create_graph=False)
    with _FixedRng(device) as rng:
        loss = sum(objective(potential, batch, rng).values())
    parameters = [p for p in [*potential.parameters(), *objective.parameters()] if p.requires_grad]
    gradients = [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]
    network_energy = prediction.energy - potential(batch, need_forces=False).energy.detach().mean()
    return {
        "energy": network_energy.detach().double().cpu(),
        "forces": prediction.forces.detach().double().cpu(),
        "gradient": torch.cat([g.reshape(-1) for g in gradients]).double().cpu(),
    }


def agreement(dataset: Any, device: torch.device, networks: list[str], n: int) -> list[dict[str, Any]]:
    """Relative differences |gpu - cpu| / |cpu| for each network and objective."""
    rows = []
    for network in networks:
        for name in OBJECTIVES:
            potential, objective, prepared = build(network, name, dataset)
            reference = terms_and_gradients(potential, objective, prepared, n, torch.device("cpu"))
            found = terms_and_gradients(potential, objective, prepared, n, device)
            error = {k: float((found[k] - v).norm() / v.norm()) for k, v in reference.items()}
            ok = max(error["energy"], error["forces"]) <= TOLERANCE and error["gradient"] <= GRADIENT_TOLERANCE
            rows.append({"network": network, "objective": name, "ok": ok, **error})
    return rows


def edges_agree(device: torch.device) -> dict[str, Any]:
    """Whether edges made on the device are those of the neighbor lists, for slabs within 12 Å, and how long both take."""
    slab = fcc111("Cu", (4, 4, 5), vacuum=8.0, periodic=True)
    pos, cell = torch.from_numpy(slab.positions).repeat(4, 1), torch.from_numpy(slab.cell.array).expand(4, 3, 3)
    counts = torch.full((4,), len(slab))
    src, dst, shift = edges_on_device(pos.to(device), counts.to(device), 12.0, cell.to(device))
    expected = edges_of(pos.numpy(), counts.numpy(), 12.0, cell.numpy(), np.ones((4, 3), dtype=bool))
    begin = time.perf_counter()
    count = len(edges_on_device(pos.to(device), counts.to(device), 12.0, cell.to(device))[0])
    middle = time.perf_counter()
    edges_of(pos.numpy(), counts.numpy(), 12.0, cell.numpy(), np.ones((4, 3), dtype=bool))
    end = time.perf_counter()
    lengths = (pos.to(device)[src] + shift - pos.to(device)[dst]).norm(dim=1).sort().values.cpu().numpy()
    truth = np.sort(np.linalg.norm(pos.numpy()[expected[0]] + expected[2] - pos.numpy()[expected[1]], axis=1))
    ok = count == len(truth) and bool(np.allclose(lengths, truth, atol=1e-9))
    return {"ok": ok, "edges": count, "device_ms": 1e3 * (middle - begin), "lists_ms": 1e3 * (end - middle)}


def step_times(
    dataset: Any, device: torch.device, networks: list[str], batch_sizes: list[int], steps: int
) -> list[dict[str, Any]]:
    """Median time of a training step, data path included, and peak memory.

    One step is made with waiting forbidden, unless the network chooses its edges by their lengths.
    """
    rows = []
    for network, name, precision in itertools.product(networks, OBJECTIVES, ("32-true", "bf16-mixed")):
        for n in batch_sizes:
            potential, objective, prepared = build(network, name, dataset)
            settings = TrainSettings(
                batch_size=n, max_steps=steps, clip_norm=10.0, ema_decay=0.999, lr=1e-4, precision=precision
            )
            may_wait = NETWORKS[network][0] == "equiformer_v2"
            run = Run(potential.train(), objective, prepared, None, settings, device)
            indices = np.arange(n)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = []
            for i in range(steps + 3):
                begin = time.perf_counter()
                if device.type == "cuda" and i == 2 and not may_wait:
                    torch.cuda.set_sync_debug_mode("error")
                run.one_step(run.shares(indices))
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
            ms = 1e3 * float(np.median(times[3:]))
            row = {"network": network, "objective": name, "precision": precision, "batch_size": n}
            rows.append(row | {"ms": ms, "peak_MiB": peak})
    return rows


def main() -> int:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny network and few steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_check.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    _, (dataset, _, _), _ = load_sample("aspirin")
    networks = list(NETWORKS)[:3] if args.quick else list(NETWORKS)
    timed = networks[:2] if args.quick else networks[3:]
    record = {
        "command": "python -m benchmarks.gpu_check",
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "agreement": agreement(dataset, device, networks, 2 if args.quick else 8),
        "edges": edges_agree(device),
        "step_times": step_times(dataset, device, timed, [4] if args.quick else [8, 64, 128], 1 if args.quick else 30),
    }
    save_json(args.out, record)
    for row in [*record["agreement"], record["edges"], *record["step_times"]]:
        print(row)
    failed = [row for row in [*record["agreement"], record["edges"]] if not row["ok"]]
    if failed:
        print(
            f"{len(failed)} of {len(record['agreement']) + 1} agreements are worse than their tolerance",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
