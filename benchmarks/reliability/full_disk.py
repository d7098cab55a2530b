"""Full disks: everything that writes, on a disk that takes only so many bytes, or fails when it is flushed.

Three ways to be full: a limit on the size of files (EFBIG, anywhere), a flush that fails (ENOSPC, anywhere), and a small
file system in memory that is filled up (ENOSPC; where it may be mounted). The writer must raise a `StorageError` that names
the place; what was there before must still be read as it was; nothing half-written may be left under a name; and with room
again, the same writing must succeed. A cache may do without the disk.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.children import fingerprint, model_fingerprint, run, small_model
from benchmarks.reliability.specimens import frames, training
from ndem_zoo import NDeMCalculator, NDeMModel, open_store
from ndem_zoo.checkpoint import load_record, save_record
from ndem_zoo.datasets import StoreWriter, read_extxyz, read_sample
from ndem_zoo.datasets.cache import open_cached
from ndem_zoo.datasets.extxyz import write_extxyz
from ndem_zoo.dynamics import run_md
from ndem_zoo.errors import StorageError
from ndem_zoo.history import HistoryLog, read_history
from ndem_zoo.predictions import Predictions

#: Bytes of the small file system.
_SMALL = 4 << 20


class Writer:
    """Something that writes into a folder.

    Attributes
    ----------
    resumes
        Whether unfinished files may be left behind, from which it goes on.
    does_without
        Whether it may do without the disk.
    """

    resumes = does_without = False

    def write(self, folder: Path, version: int) -> Any:
        """Write; version 0 is what is there before, version 1 what replaces it."""
        raise NotImplementedError

    def read(self, folder: Path) -> str:
        """Fingerprint of what is there."""
        raise NotImplementedError


class _Checkpoint(Writer):
    resumes = True

    def write(self, folder: Path, version: int) -> None:
        training(folder / "run", steps=4 + 2 * version, resume=bool(version))

    def read(self, folder: Path) -> str:
        return model_fingerprint(training(folder / "run", steps=6, resume=True))  # the same end from wherever it begins


class _Model(Writer):
    def write(self, folder: Path, version: int) -> None:
        data = read_sample("ethanol")
        small_model().fit(data[:10], data[10:14], max_steps=2 + version).save(folder / "model")

    def read(self, folder: Path) -> str:
        return model_fingerprint(NDeMModel.load(folder / "model"))


class _Store(Writer):
    resumes = True

    def write(self, folder: Path, version: int) -> None:
        if (folder / "store" / "store.json").is_file():
            return
        with StoreWriter(folder / "store") as writer:
            for number in range(version + 1):
                if str(number) not in writer.sources:
                    writer.append(read_sample("ethanol")[20 * number : 20 * number + 20])
                    writer.commit(str(number))
            if version:
                writer.finish()

    def read(self, folder: Path) -> str:
        self.write(folder, 1)
        return fingerprint(open_store(folder / "store", verify=True))


class _Cache(Writer):
    resumes = does_without = True

    def write(self, folder: Path, version: int) -> str:
        if not version:
            return ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fingerprint(open_cached("mine", {}, lambda: [frames(20)], cache_dir=folder).columns())

    def read(self, folder: Path) -> str:
        return self.write(folder, 1)


class _History(Writer):
    rows = tuple({"epoch": 1.0 * k, "step": k, "loss": 0.1 * k} for k in range(1, 30))

    def write(self, folder: Path, version: int) -> None:
        log = HistoryLog(folder, False, list(self.rows[: 10 + version]))
        if version:
            log.add(self.rows[11])

    def read(self, folder: Path) -> str:
        rows = read_history(folder / "history.csv")
        return fingerprint(rows) if len(rows) != 11 else fingerprint(list(self.rows[:10]))  # the row before is old, too


class _Predictions(Writer):
    def write(self, folder: Path, version: int) -> None:
        data = frames(10)
        predicted = {name: np.array(values) + version for name, values in data.targets.items()}
        Predictions.of("test", data, predicted).save(folder)

    def read(self, folder: Path) -> str:
        return fingerprint(Predictions.load(folder))


class _Record(Writer):
    def write(self, folder: Path, version: int) -> None:
        save_record(folder / "metrics.json", {"version": version, "numbers": list(range(200))})

    def read(self, folder: Path) -> str:
        return fingerprint(load_record(folder / "metrics.json"))


class _Extxyz(Writer):
    def write(self, folder: Path, version: int) -> None:
        write_extxyz(folder / "frames.extxyz", frames(5 + version))

    def read(self, folder: Path) -> str:
        return fingerprint(read_extxyz(folder / "frames.extxyz"))


class _Trajectory(Writer):
    resumes = True  # it grows under another name

    def write(self, folder: Path, version: int) -> None:
        data = read_sample("ethanol")
        calculator = NDeMCalculator(small_model().fit(data[:10], max_steps=2))
        run_md(data.atoms(0), calculator, steps=6 + version, timestep=0.5, every=1, seed=0, out=folder / "md.extxyz")

    def read(self, folder: Path) -> str:
        return fingerprint(read_extxyz(folder / "md.extxyz"))


WRITERS: dict[str, Writer] = {
    "checkpoint": _Checkpoint(),
    "saved model": _Model(),
    "store": _Store(),
    "cache of a dataset": _Cache(),
    "history.csv": _History(),
    "predictions.npz": _Predictions(),
    "metrics.json, split.json": _Record(),
    "extxyz": _Extxyz(),
    "trajectory": _Trajectory(),
}


def full_disk(quick: bool, folder: Path, seed: int) -> dict[str, Any]:
    """All writers on all kinds of full disks."""
    table, skipped = {}, {}
    for name, writer in WRITERS.items():
        rng = np.random.default_rng([seed, len(table)])
        table[name] = one_writer(writer, folder / f"writer-{len(table)}", 1 if quick else 8, rng)
    with small_disk(folder / "small") as (place, reason):
        if reason:
            skipped["small file system"] = reason
        else:
            for number, (name, writer) in enumerate(WRITERS.items()):
                rng = np.random.default_rng([seed, 50 + number])
                table[name]["small file system"] = on_small_disk(writer, place, 1 if quick else 4, rng)
    outcomes = [outcome for row in table.values() for found in row.values() for outcome in found]
    counts = {key: outcomes.count(key) for key in ("recovered", "clear_errors")}
    lost = sorted({outcome for outcome in outcomes if outcome not in counts})
    total = {"cases": len(outcomes), **counts, "losses": len(outcomes) - sum(counts.values())}
    return total | {"writers": table, "lost": lost, "skipped": skipped, "report": report(table, skipped)}


def one_writer(writer: Writer, folder: Path, n: int, rng: np.random.Generator) -> dict[str, list[str]]:
    """Outcomes with limits on sizes, and with flushes that fail."""
    before, sizes, flushes, allowed = prepared(writer, folder)
    found: dict[str, list[str]] = {"size of files": [], "failing flush": []}
    for number in range(n):
        limit = 0 if number == 1 else int(rng.integers(max(sizes)))
        work = shutil.copytree(before, folder / "work")
        found["size of files"].append(case(writer, work, functools.partial(limit_sizes, limit), allowed))
        shutil.rmtree(work)
    for number in sorted({int(k) for k in rng.integers(flushes, size=n)}):
        work = shutil.copytree(before, folder / "work")
        found["failing flush"].append(case(writer, work, functools.partial(fail_flush, number), allowed))
        shutil.rmtree(work)
    return found


def prepared(writer: Writer, folder: Path) -> tuple[Path, list[int], int, list[str]]:
    """The folder with version 0, sizes of the files of version 1, how often it flushes, fingerprints of both."""
    before, after = folder / "before", folder / "after"
    before.mkdir(parents=True)

    def make(say: Callable[[Any], None]) -> None:
        writer.write(before, 0)
        shutil.copytree(before, after)
        shutil.copytree(before, folder / "old")
        flush, count = os.fsync, 0

        def counting(handle: int) -> None:
            nonlocal count
            count += 1
            flush(handle)

        os.fsync = counting
        writer.write(after, 1)
        say([count, [writer.read(folder / "old"), writer.read(after)]])

    end = run(make)
    if end.status:
        raise RuntimeError(f"{type(writer).__name__} cannot write: {end.said}")
    flushes, allowed = end.said[-1]
    return before, [file.stat().st_size for file in after.rglob("*") if file.is_file()], max(1, flushes), allowed


def limit_sizes(limit: int) -> Callable[[], None]:
    """Let no file get longer; returns what takes the limit away."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def fail_flush(number: int) -> Callable[[], None]:
    """Let the flush with this number and all after it fail."""
    flush, count = os.fsync, 0

    def failing(handle: int) -> None:
        nonlocal count
        count += 1
        if count > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    os.fsync = failing

    def mend() -> None:
        os.fsync = flush

    return mend


def case(writer: Writer, work: Path, make_full: Callable[[], Callable[[], None]], allowed: list[str]) -> str:
    """What becomes of one writing on a full disk, in a child."""
    end = run(functools.partial(attempt, writer, work, make_full, allowed))
    return end.said[-1] if not end.status and end.said else f"ended with {end.status}: {end.said}"[:300]


def attempt(
    writer: Writer,
    work: Path,
    make_full: Callable[[], Callable[[], None]],
    allowed: list[str],
    say: Callable[[Any], None],
) -> None:
    """In a child: write, look at what is there, make room, write again."""
    names = {path.name for path in work.rglob("*")}
    error, result = None, None
    make_room = make_full()
    try:
        result = writer.write(work, 1)
    except StorageError as caught:
        error = caught
    finally:
        make_room()
    if error is not None and work.name not in str(error):
        say(f"the error does not name the place: {error}")
    elif error is None and writer.does_without:
        say("recovered" if result == allowed[1] else "other values")
    elif not writer.resumes and error is not None and {path.name for path in work.rglob("*")} != names:
        say(f"it left {sorted({path.name for path in work.rglob('*')} - names)} behind")
    elif error is not None and writer.read(work) != allowed[0]:
        say("what was there before is not there any more")
    else:
        writer.write(work, 1)
        right = writer.read(work) == allowed[1]
        say(("recovered" if error is None else "clear_errors") if right else "other values with room again")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, str]]:
    """A small file system, and why there is none."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SMALL}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        reason = "" if not done.returncode else done.stderr.strip().splitlines()[-1].replace(str(folder), "it")
    except OSError as error:
        reason = f"mount cannot be run ({error.strerror})"
    try:
        yield folder, reason
    finally:
        if not reason:
            subprocess.run(["umount", str(folder)], check=True)


def on_small_disk(writer: Writer, place: Path, n: int, rng: np.random.Generator) -> list[str]:
    """Outcomes where a file system has room for a part of what is written only."""
    outcomes = []
    for number in range(n):
        folder = place / f"{type(writer).__name__}-{number}"
        before, sizes, _, allowed = prepared(writer, folder)
        for name in ("after", "old"):
            shutil.rmtree(folder / name, ignore_errors=True)
        room = int(rng.integers(max(1, sum(sizes))))
        outcomes.append(case(writer, before, functools.partial(fill, place, room), allowed))
        shutil.rmtree(folder)
    return outcomes


def fill(place: Path, room: int) -> Callable[[], None]:
    """Fill a file system up to `room` bytes."""
    path, space = place / "filling", os.statvfs(place)
    with path.open("wb") as stream:
        stream.write(bytes(max(0, space.f_bavail * space.f_frsize - room)))
    return path.unlink


def report(table: dict[str, dict[str, list[str]]], skipped: dict[str, str]) -> list[str]:
    """A table of writers and kinds of full disks."""
    kinds = ["size of files", "failing flush", "small file system"]
    lines = [
        "Cases / of them with an error that names the place / that did without the disk or needed no more than it had; in all,",
        "what was there before stayed, and with room again the same writing succeeded.",
        "",
        "| writer | " + " | ".join(kinds) + " |",
        "|---|---|---|---|",
    ]
    for name, row in table.items():
        cells = [row.get(kind) for kind in kinds]
        shown = ["" if c is None else f"{len(c)} / {c.count('clear_errors')} / {c.count('recovered')}" for c in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines + [f"\n{kind}: not run, {reason}" for kind, reason in skipped.items()]
