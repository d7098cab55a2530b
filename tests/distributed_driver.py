"""A process that trains together with others, for tests/test_distributed.py, which starts two of them and is not one itself.

Each of `CASES` is a training that one process can do as well. What this process saw goes to ``<root>/seen/<rank>.json``.
At the end one process is asked to stop, and then killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from ndem_zoo import NDeMTorchMDNet
from ndem_zoo.datasets import read_sample
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.store import open_store
from ndem_zoo.errors import TrainingError
from ndem_zoo.training import Run

TINY = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}
COMMON = {"preset": "md17_fast", "backbone_options": TINY, "precision": "64-true", "device": "cpu", "progress": False}
COMMON |= {"lr": 1e-2, "warmup_steps": 2, "validate_every": 2, "schedule": "plateau", "plateau_patience": 0}

#: Batches of 6, 6 and 1 structures of 9 atoms each; everything that has a state.
EVEN = {"batch_size": 6, "objective": "supervised", "ema_decay": 0.9, "clip_norm": 5.0, "weight_decay": 0.01}

#: Options, data, and whether it is a pre-training.
CASES: dict[str, tuple[dict, str, bool]] = {
    "supervised": (EVEN, "ethanol", False),
    "ndem": ({"batch_size": 6, "objective_options": {"loss_on": "masked", "sigma": (0.01, 0.1)}}, "ethanol", False),
    # The weight of the auxiliary term, and with it its head, is gone in the last step.
    "mixed": (
        {
            "batch_size": None,
            "max_atoms": 40,
            "bucket": True,
            "accumulate": 2,
            "weight_schedule": "decay",
            "plan": "eager",
        },
        "mixed",
        False,
    ),
    "dens": ({"batch_size": 5, "objective": "dens", "objective_options": {"probability": 0.6}}, "mixed", False),
    "pretrain": ({"batch_size": 6, "objective": "noisy_nodes", "eval_batch_size": 2}, "mixed", True),
}
STEPS, CUT = 8, 4


def data(name: str, root: Path) -> tuple[MolecularDataset, MolecularDataset]:
    """Training and validation data: frames of ethanol, or pieces of 3 to 9 atoms of it in a memory-mapped store."""
    frames = read_sample("ethanol")
    if name == "ethanol":
        return frames[:13], frames[1000:1007]
    whole = open_store(root / "store")
    return whole.select(np.arange(20)), whole.select(np.arange(20, 25))


def pieces() -> MolecularDataset:
    """What the store holds."""
    frames, rng = read_sample("ethanol"), np.random.default_rng(0)
    counts = rng.integers(3, 10, 25)
    rows = np.concatenate([9 * i + np.arange(n) for i, n in enumerate(counts)])
    targets = {"energy": rng.normal(size=25), "forces": rng.normal(size=(len(rows), 3))}
    ptr = np.concatenate([[0], np.cumsum(counts)])
    return MolecularDataset(frames.z[rows], frames.pos[rows], ptr, targets=targets, fixed=rng.random(len(rows)) < 0.2)


def train(name: str, root: Path, devices: int = 1, steps: int = STEPS, **options) -> NDeMTorchMDNet:
    """One of `CASES`."""
    settings, source, is_pretraining = CASES[name]
    model = NDeMTorchMDNet(**COMMON, **settings)
    fit = model.pretrain if is_pretraining else model.fit
    return fit(*data(source, root), max_steps=steps, devices=devices, **options)


def at_step(step: int, number: int) -> None:
    """From now on, this process gets a signal in that step."""
    one_step = Run.one_step

    def signaled(self: Run, shares) -> None:
        if self.state.step == step:
            os.kill(os.getpid(), number)
        one_step(self, shares)

    Run.one_step = signaled


def written(root: Path) -> list[str]:
    """A list that will get everything that this process writes, makes, renames or deletes below a folder."""
    found: list[str] = []
    kinds = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}

    def watch(event: str, arguments: tuple) -> None:
        is_write = event in kinds or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if is_write and str(arguments[0]).startswith(str(root)):
            found.append(f"{event} {arguments[0]}")

    sys.addaudithook(watch)
    return found


def main(root: Path) -> None:
    rank = int(os.environ["RANK"])
    (root / "runs").mkdir(exist_ok=True)
    writes, rows = written(root / "runs"), []
    seen: dict = {"history": {}, "rank": rank}
    for name in CASES:
        model = train(name, root, 2, checkpoint_dir=root / "runs" / name, callback=rows.append)
        seen["history"][name] = list(model.history_)
        model.save(root / "runs" / f"{name}-model")
    seen["callbacks"] = len(rows)
    train("supervised", root, 2, CUT, checkpoint_dir=root / "runs" / "two-to-one")
    model = train("supervised", root, 2, checkpoint_dir=root / "one-to-two", resume=True)
    seen["resumed"] = list(model.history_)
    one_step = Run.one_step
    if rank == 1:
        at_step(3, signal.SIGTERM)
    model = train("supervised", root, 2, checkpoint_dir=root / "runs" / "asked")
    seen["asked"] = [model.interrupted_, model.history_[-1]["step"]]
    seen["writes"] = list(writes)
    report = root / "seen" / f"{rank}.json"
    report.write_text(json.dumps(seen))
    Run.one_step = one_step
    if rank == 1:
        at_step(5, signal.SIGKILL)
    try:
        train("supervised", root, 2, checkpoint_dir=root / "runs" / "killed", checkpoint_every=3)
    except TrainingError as error:
        report.write_text(json.dumps(seen | {"lost": str(error)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
