"""Killed processes: a training at random moments and at every file operation, and whatever else writes.

After each death nothing half-written may be taken for whole, and the training that is resumed must end in the same bits
as one that was never disturbed. Moments are drawn with flushing made slow, so that many fall into the writing of a
checkpoint; file operations are seen through Python's audit hooks, and the process kills itself at the n-th one; inside of
one write, a limit on the size of files makes the kernel end the process after so many bytes. That a loss of power keeps
what was flushed is the file system's promise, and not tested here.
"""

from __future__ import annotations

import functools
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.children import fingerprint, model_fingerprint, run, small_model
from benchmarks.reliability.specimens import training
from ndem_zoo import NDeMModel, open_store
from ndem_zoo.checkpoint import checkpoints
from ndem_zoo.datasets import StoreWriter, read_sample
from ndem_zoo.training import _read_checkpoint

#: Events of Python's audit hooks that change files, and how many of their arguments are names.
_EVENTS = {"open": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.chmod": 1, "os.truncate": 1}

#: Steps of the training that is killed at random moments, and of the one that is killed at every operation.
_LONG, _SHORT = 24, 6

Write = Callable[[Path], None]


def kills(quick: bool, folder: Path, seed: int) -> dict[str, Any]:
    """All ways to die; with `quick` a few of each."""
    parts = {
        "at random moments": random_moments(folder / "moments", 3 if quick else 30, seed),
        "at file operations of a training": at_operations(folder / "training", TRAINING, 15 if quick else 1),
        "within a write of a training": within_writes(folder / "writes", 2 if quick else 20, seed),
        "while a model is replaced": at_operations(folder / "model", MODEL, 9 if quick else 1),
        "while a store is written": at_operations(folder / "store", STORE, 16 if quick else 1),
    }
    total = {name: sum(part[name] for part in parts.values()) for name in COUNTED}
    return total | {"parts": parts, "report": report(parts)}


COUNTED = ("cases", "recovered", "clear_errors", "losses", "died_while_writing")


def counted(outcomes: list[str], writing: int) -> dict[str, Any]:
    """Counts of outcomes; whatever is neither recovered nor a clear error is a loss."""
    good = {name: outcomes.count(name) for name in ("recovered", "clear_errors")}
    lost = [outcome for outcome in outcomes if outcome not in good]
    return {"cases": len(outcomes), **good, "losses": len(lost), "died_while_writing": writing, "lost": lost}


# --------------------------------------------------------------------------------------------------------- random moments


def random_moments(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """SIGKILL at moments drawn evenly over the time that the training takes; then it is resumed."""
    begin = time.monotonic()
    straight = run(functools.partial(slow_training, folder / "straight", False)).said[-1]
    duration = time.monotonic() - begin
    rng, outcomes, writing = np.random.default_rng([seed, 2]), [], 0
    for number in range(n):
        work = folder / f"run-{number}"
        end = run(functools.partial(slow_training, work, False), kill_after=float(rng.uniform(0.02, 0.98)) * duration)
        writing += bool(list(work.glob(".*.tmp")))
        outcomes.append(
            resumed(work, end.status in (-signal.SIGKILL, 0), functools.partial(slow_training, work, True), straight)
        )
    return counted(outcomes, writing)


def slow_training(work: Path, resume: bool, say: Callable[[Any], None]) -> None:
    """In a child: train, with flushing to the disk that takes its time."""
    os.fsync = lambda handle: time.sleep(0.005)
    say(model_fingerprint(training(work, steps=_LONG, resume=resume)))


def resumed(work: Path, died: bool, again: Callable[[Callable[[Any], None]], None], expected: str) -> str:
    """What becomes of a killed training: whole checkpoints only, and the same end."""
    if not died:
        return "it did not die"
    for path in checkpoints(work):
        _read_checkpoint(path)  # what has a name is whole
    end = run(again)
    if end.status or end.said[-1] != expected:
        return f"ended with {end.status}, {end.said}"[:300]
    return "it left something behind" if list(work.glob(".step-*")) else "recovered"


# ---------------------------------------------------------------------------------------------------------- within writes


def within_writes(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """The kernel ends the process when a file gets longer than a number of bytes that is drawn."""
    straight = run(lambda say: say(model_fingerprint(training(folder / "straight", steps=_SHORT)))).said[-1]
    largest = max(file.stat().st_size for file in (folder / "straight").rglob("*") if file.is_file())
    rng, outcomes, writing = np.random.default_rng([seed, 3]), [], 0
    for number in range(n):
        work, limit = folder / f"run-{number}", int(rng.integers(largest))

        def limited(say: Callable[[Any], None], work: Path = work, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            training(work, steps=_SHORT)

        end = run(limited)
        writing += bool(list(work.glob(".*.tmp")))

        def again(say: Callable[[Any], None], work: Path = work) -> None:
            say(model_fingerprint(training(work, steps=_SHORT, resume=True)))

        outcomes.append(resumed(work, end.status == -signal.SIGXFSZ, again, straight))
    return counted(outcomes, writing)


# ------------------------------------------------------------------------------------------------------ every operation


class Task:
    """Something that writes into a folder: what is there before, what it does, and how one goes on after its death."""

    def prepare(self, folder: Path) -> None:
        """What is there before."""

    def work(self, folder: Path) -> None:
        """What is killed."""

    def recover(self, folder: Path) -> Any:
        """In a child, after the death: what comes out in the end."""

    def allowed(self, folder: Path) -> list[str]:
        """In a child: fingerprints of what may come out."""


class _Training(Task):
    def work(self, folder: Path) -> None:
        training(folder / "run", steps=_SHORT)

    def recover(self, folder: Path) -> Any:
        for path in checkpoints(folder / "run"):
            _read_checkpoint(path)
        return model_fingerprint(training(folder / "run", steps=_SHORT, resume=True))

    def allowed(self, folder: Path) -> list[str]:
        return [model_fingerprint(training(folder / "run", steps=_SHORT))]


class _Model(Task):
    """A model replaces another one: one of them is there, or the error says where the old one is."""

    def _fitted(self, steps: int) -> NDeMModel:
        data = read_sample("ethanol")
        return small_model().fit(data[:10], data[10:14], max_steps=steps)

    def prepare(self, folder: Path) -> None:
        self._fitted(2).save(folder / "model")

    def work(self, folder: Path) -> None:
        self._fitted(4).save(folder / "model")

    def recover(self, folder: Path) -> Any:
        try:
            return model_fingerprint(NDeMModel.load(folder / "model"))
        except FileNotFoundError as error:
            old = [path for path in folder.glob(".model.*.old") if str(path) in str(error)]
            found = [model_fingerprint(NDeMModel.load(path)) for path in old]
            return ["clear", *found]

    def allowed(self, folder: Path) -> list[str]:
        return [model_fingerprint(self._fitted(steps)) for steps in (2, 4)]


class _Store(Task):
    """A store of three parts; who is resumed writes the parts that are missing."""

    def work(self, folder: Path) -> None:
        data = read_sample("ethanol")
        if (folder / "store" / "store.json").is_file():
            return
        with StoreWriter(folder / "store") as writer:
            for number in range(3):
                if str(number) not in writer.sources:
                    writer.append(data[5 * number : 5 * number + 5])
                    writer.commit(str(number))
            writer.finish()

    def recover(self, folder: Path) -> Any:
        self.work(folder)
        return fingerprint(open_store(folder / "store", verify=True))

    def allowed(self, folder: Path) -> list[str]:
        return [self.recover(folder)]


TRAINING, MODEL, STORE = _Training(), _Model(), _Store()


def at_operations(folder: Path, task: Task, every: int) -> dict[str, Any]:
    """Kill a task before each `every`-th file operation that it makes."""
    (folder / "allowed").mkdir(parents=True)
    allowed = run(lambda say: say(task.allowed(folder / "allowed"))).said[-1]
    prepared = folder / "prepared"
    prepared.mkdir()
    run(lambda say: task.prepare(prepared))
    count = run(functools.partial(watched, task, shutil.copytree(prepared, folder / "count"), None)).said[-1]
    outcomes, writing = [], 0
    for number in range(1, count + 1, every):
        work = shutil.copytree(prepared, folder / f"work-{number}")
        end = run(functools.partial(watched, task, work, number))
        writing += bool(list(work.rglob(".*.tmp"))) or (work / "store").exists()
        outcomes.append(outcome(task, work, end.status, allowed))
        shutil.rmtree(work)
    return counted(outcomes, writing) | {"operations": count}


def outcome(task: Task, work: Path, status: int, allowed: list[str]) -> str:
    """What became of one death."""
    if status != -signal.SIGKILL:
        return f"it ended with {status}"
    end = run(lambda say: say(task.recover(work)))
    found = end.said[-1] if end.said else None
    if not end.status and found in allowed:
        return "recovered"
    if not end.status and isinstance(found, list) and found[0] == "clear" and found[1:] == allowed[:1]:
        return "clear_errors"
    return f"ended with {end.status}, {end.said}"[:300]


def watched(task: Task, folder: Path, die_at: int | None, say: Callable[[Any], None]) -> None:
    """In a child: do the task and say how many file operations there were, or die before one of them."""
    count, place, flush = 0, str(folder), os.fsync

    def operation() -> None:
        nonlocal count
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        names = arguments[: _EVENTS.get(event, 0)]
        is_read = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if not is_read and any(
            place in os.fsdecode(name) for name in names if isinstance(name, (str, bytes, os.PathLike))
        ):
            operation()

    def fsync(handle: int) -> None:
        operation()
        flush(handle)

    sys.addaudithook(hook)
    os.fsync = fsync
    task.work(folder)
    say(count)


def report(parts: dict[str, Any]) -> list[str]:
    """A table of all ways to die."""
    lines = [
        "SIGKILL, and within a write the kernel's SIGXFSZ. *While writing*: a temporary file or an unfinished store was left",
        "behind. Recovered: resumed, a training ends in the bits of one that was not killed; a model is the old or the new one;",
        "a store has every row once.",
        "",
        "| killed | cases | while writing | recovered | clear errors | losses |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        columns = ("cases", "died_while_writing", "recovered", "clear_errors", "losses")
        lines.append(f"| {name} | " + " | ".join(str(part[column]) for column in columns) + " |")
    return lines
