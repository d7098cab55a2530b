"""A process that trains, for tests that kill or interrupt it: run by test_training.py, not by pytest.

It makes children by fork, so that torch is imported once. Children train the same thing, each into one of the folders
``straight`` (undisturbed), ``killed`` (SIGKILL again and again, then left alone) and ``interrupted`` (Ctrl-C, then
resumed). What happened goes to standard output as JSON. Flushing files to the disk is made slow, so that a good part of
the time is spent on writing checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import lightning_fabric  # noqa: F401 (the first training imports these, which takes seconds: once, not in every child)
import torch._dynamo  # noqa: F401

from ndem_zoo import NDeMTorchMDNet
from ndem_zoo.datasets import read_sample

STEPS = 24
OPTIONS = {
    "backbone_options": {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4},
    "batch_size": 3,
    "lr": 0.05,
    "warmup_steps": 2,
    "plateau_patience": 1,
    "validate_every": 3,
    "clip_norm": 5.0,
    "ema_decay": 0.9,
    "device": "cpu",
    "progress": False,
}


def slow_fsync(handle: int) -> None:
    """Wait, and leave the rest out: what a killed process has written, others see without it."""
    time.sleep(0.01)


def child(folder: Path, **options) -> int:
    """Number of a process that trains into a folder, and says in ``folder.json`` how that ended."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        frames = read_sample("ethanol")
        model = NDeMTorchMDNet(**OPTIONS)
        model.fit(frames[:10], frames[1000:1007], checkpoint_dir=folder, max_steps=STEPS, **options)
        model.save(folder.with_name(folder.name + "-model"))
        folder.with_suffix(".json").write_text(json.dumps({"interrupted": model.interrupted_}))
        status = 0
    finally:
        os._exit(status)


def code(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".step-*.tmp")]


def wait_for(condition, number: int, seconds: float = 120.0) -> None:
    """Until the condition holds, or the child has ended."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        if os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.001)


def newest(folder: Path) -> str:
    return max((path.name for path in folder.glob("step-*")), default="")


def kill_again_and_again(folder: Path, times: int) -> list[dict]:
    """Kill a training `times` times, by turns while a checkpoint is written and at a random moment; then let it end."""
    draw = random.Random(0)
    record = []
    for turn in range(times):
        before = newest(folder)
        number = child(folder, checkpoint_every=2, resume=True)
        if turn % 2 == 0:
            wait_for(lambda before=before: newest(folder) > before and leftovers(folder), number)
        else:
            wait_for(lambda before=before: newest(folder) > before, number)
            time.sleep(draw.uniform(0.0, 0.15))
        os.kill(number, signal.SIGKILL)
        record.append({"code": code(number), "newest": newest(folder), "half_written": leftovers(folder)})
    record.append({"code": code(child(folder, checkpoint_every=2, resume=True)), "half_written": leftovers(folder)})
    return record


def interrupt(folder: Path) -> list[dict]:
    """Send Ctrl-C to a training that has validated twice; then resume it."""
    number = child(folder, checkpoint_every=100)
    history = folder / "history.csv"
    wait_for(lambda: history.exists() and len(history.read_text().splitlines()) >= 3, number)
    os.kill(number, signal.SIGINT)
    record = [{"code": code(number), "newest": newest(folder), **json.loads(folder.with_suffix(".json").read_text())}]
    number = child(folder, checkpoint_every=100, resume=True)
    return [*record, {"code": code(number), **json.loads(folder.with_suffix(".json").read_text())}]


def main(root: Path) -> None:
    os.fsync = slow_fsync
    straight = code(child(root / "straight"))
    killed = kill_again_and_again(root / "killed", times=4)
    print(json.dumps({"straight": straight, "killed": killed, "interrupted": interrupt(root / "interrupted")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
