"""Damaged files: every kind that the package reads, cut off and with flipped bits, read in processes that may crash.

A case ends well when the values are those of the intact file (the damage hit something that is not used), or when an
error of ours names the file. Other values are a loss where a checksum protects them; where the format of others has
none, they are counted apart as undetectable. Foreign errors, crashes and hanging are losses everywhere.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import resource
import shutil
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.children import fingerprint, run
from benchmarks.reliability.specimens import KINDS, Kind, training
from ndem_zoo import errors
from ndem_zoo.checkpoint import checkpoints

#: Memory beyond what a process has already that a damaged file may make it ask for.
_MEMORY = 4 << 30

#: Seconds for all cases of a kind together.
_PATIENCE = 300.0

_OWN = tuple(value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception))

Case = tuple[str, str, int]


def damage(quick: bool, folder: Path, seed: int) -> dict[str, Any]:
    """All kinds of files; 200 cases each, with `quick` 16."""
    table, lost = {}, []
    for name, kind in KINDS.items():
        reason = why_not(kind, quick)
        if reason:
            table[name] = {"skipped": reason}
            continue
        place = folder / f"kind-{len(table)}"
        counts, losses = outcomes(name, kind, place, 16 if quick else 200, seed)
        table[name] = counts | {"protection": kind.protection}
        lost += losses
        shutil.rmtree(place)
    newest = newest_intact(folder, 2 if quick else 12, seed)
    table["resuming beside a damaged newest checkpoint"] = newest
    ran = [row for row in table.values() if "cases" in row]
    total = {name: sum(row[name] for row in ran) for name in ran[0] if name != "protection"}
    counts = {
        "cases": total["cases"],
        "recovered": total["same"],
        "clear_errors": total["clear"],
        "undetectable": total["undetectable"],
        "losses": total["lost"],
    }
    return counts | {"kinds": table, "lost": lost, "report": report(table)}


def why_not(kind: Kind, quick: bool) -> str:
    """Why a kind is left out; empty if it is not."""
    if kind.needs and importlib.util.find_spec(kind.needs) is None:
        return f"{kind.needs} is not installed"
    return f"left out: {kind.needs} takes long to import" if quick and kind.needs == "schnetpack" else ""


def outcomes(name: str, kind: Kind, place: Path, n: int, seed: int) -> tuple[dict[str, int], list[Any]]:
    """Counts of what became of the cases of a kind, and the lost ones."""
    whole = place / "whole"
    whole.mkdir(parents=True)
    made = run(lambda say: (kind.make(whole), say(True)))
    if made.status:
        raise RuntimeError(f"the specimen of {name} cannot be made: {made.said}")
    cases = drawn(whole, kind, n, np.random.default_rng([seed, zlib.crc32(name.encode())]))
    found: list[tuple[str, str]] = []
    while len(found) < len(cases):
        end = run(functools.partial(read_cases, kind, whole, place, cases[len(found) :]), seconds=_PATIENCE)
        said = [tuple(outcome) for outcome in end.said]
        if end.status == 1:
            raise RuntimeError(f"the intact specimen of {name} cannot be read: {end.said[-1]}")
        found += said
        if len(found) < len(cases):
            found.append(("lost", "hung" if end.hung else f"crashed with signal {-end.status}"))
    kinds = collections.Counter(outcome for outcome, _ in found)
    counts = {"cases": len(cases)} | {key: kinds[key] for key in ("same", "clear", "undetectable", "lost")}
    return counts, [[name, *case, why] for case, (outcome, why) in zip(cases, found, strict=True) if outcome == "lost"]


def drawn(whole: Path, kind: Kind, n: int, rng: np.random.Generator) -> list[Case]:
    """By turns over the files: the file, ``"cut"`` or ``"flip"``, and the length that is left or the bit."""
    files = sorted(
        {str(file.relative_to(whole)) for pattern in kind.files for file in whole.glob(pattern) if file.is_file()}
    )
    cases = []
    for number in range(n):
        file = files[number % len(files)]
        size = (whole / file).stat().st_size
        if size:
            how = ("cut", "flip")[number // len(files) % 2]
            cases.append((file, how, int(rng.integers(size if how == "cut" else 8 * size))))
    return cases


def read_cases(kind: Kind, whole: Path, place: Path, cases: list[Case], say: Callable[[Any], None]) -> None:
    """In a child: say what becomes of each case."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")
    expected = fingerprint(kind.load(fresh(whole, place)))
    for file, how, position in cases:
        work = fresh(whole, place)
        hurt(work / file, how, position)
        say(judged(kind, work, file, expected))


def fresh(whole: Path, place: Path) -> Path:
    """A new copy of the specimen."""
    work = place / "work"
    shutil.rmtree(work, ignore_errors=True)
    return shutil.copytree(whole, work)


def hurt(path: Path, how: str, position: int) -> None:
    """Cut a file off, or flip a bit of it."""
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[position:]
    else:
        content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def judged(kind: Kind, work: Path, file: str, expected: str) -> tuple[str, str]:
    """What became of a case, and why."""
    try:
        found = fingerprint(kind.load(work))
    except _OWN + (FileNotFoundError,) as error:
        is_named = Path(file).name in str(error) or Path(file).stem in str(error) or work.name in str(error)
        return ("clear", "") if is_named else ("lost", f"{type(error).__name__} names no file: {error}"[:300])
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in last if "ndem_zoo" in frame.filename][-1:] or last[-1:]
        place = f"{Path(own[0].filename).name}:{own[0].lineno}"
        return "lost", f"{type(error).__name__} at {place}: {error}"[:300]
    if found == expected:
        return "same", ""
    return ("lost", "other values") if kind.protection else ("undetectable", "")


def newest_intact(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """Resume runs whose newest checkpoint is damaged: with a warning, from the one before, to the same weights."""
    place = folder / "newest"
    straight = run(lambda say: say(fingerprint(training(place / "straight", steps=6).potential_.state_dict()))).said[-1]
    run(lambda say: training(place / "whole", steps=4))
    rng, counts = (
        np.random.default_rng([seed, 1]),
        collections.Counter(cases=n, same=0, clear=0, undetectable=0, lost=0),
    )
    for number in range(n):
        work = fresh(place / "whole", place)
        newest = checkpoints(work)[0]
        file = newest / ("trainer.safetensors", "trainer.json")[number % 2]
        how, bits = ("cut", "flip")[number // 2 % 2], 8 * file.stat().st_size
        hurt(file, how, int(rng.integers(bits if how == "flip" else bits // 8)))
        said = run(functools.partial(resumed, work)).said[-1]
        warned = any(newest.name in message for message in said.get("warnings", []))
        counts["same" if said.get("weights") == straight and warned else "lost"] += 1
    return dict(counts) | {"protection": "SHA-256"}


def resumed(work: Path, say: Callable[[Any], None]) -> None:
    """In a child: resume, and say the weights and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = training(work, steps=6, resume=True)
    say({"weights": fingerprint(model.potential_.state_dict()), "warnings": [str(w.message) for w in caught]})


def report(table: dict[str, Any]) -> list[str]:
    """A table of all kinds."""
    lines = [
        "Truncations at random lengths and single flipped bits at random places, half each. *Same*: the values of the intact",
        "file. *Undetectable*: other values, in a format that has no checksum.",
        "",
        "| kind | protected by | cases | same | clear errors | undetectable | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        if "cases" not in row:
            lines.append(f"| {name} | | {row['skipped']} | | | | |")
            continue
        counts = " | ".join(str(row[key]) for key in ("cases", "same", "clear", "undetectable", "lost"))
        lines.append(f"| {name} | {row['protection'] or 'nothing'} | {counts} |")
    return lines
