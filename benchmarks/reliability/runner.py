"""Run the reliability harnesses and report.

    python -m benchmarks.reliability --out benchmarks/reliability/results            # all of them, under 30 minutes
    python -m benchmarks.reliability kill damage --quick --out runs/reliability      # two of them, reduced

A harness is a function ``(quick, folder, seed) -> dict`` in a file of its own, and one line in `HARNESSES`. It works in
`folder`, and counts ``cases``, of them ``recovered`` (the right result in the end), ``clear_errors`` (an error of ours
that names what is wrong) and ``losses`` (anything else); whatever else it returns goes into the report as it is.
``report.json`` and ``report.md`` are written anew after each harness; those that are not run keep what they had.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.speed.machine import describe
from ndem_zoo.checkpoint import load_json, save_json, write_text

#: Harnesses by name, as ``"module:function"``.
HARNESSES = {
    "kill": "benchmarks.reliability.kills:kills",
    "full_disk": "benchmarks.reliability.full_disk:full_disk",
    "damage": "benchmarks.reliability.damage:damage",
    "long_dynamics": "benchmarks.reliability.long_runs:long_dynamics",
    "long_training": "benchmarks.reliability.long_runs:long_training",
    "bad_input": "benchmarks.reliability.bad_input:run",
}

COUNTS = ("cases", "recovered", "clear_errors", "losses")


def run_one(name: str, quick: bool, seed: int) -> dict[str, Any]:
    """What a harness counted, with the time it took and where it ran; an error in it is a loss."""
    module, _, function = HARNESSES[name].partition(":")
    begin, cpu = time.monotonic(), cpu_seconds()
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        try:
            found = getattr(importlib.import_module(module), function)(quick, Path(folder), seed)
        except Exception as error:
            traceback.print_exc()
            found = dict.fromkeys(COUNTS, 0) | {"losses": 1, "error": f"{type(error).__name__}: {error}"}
    took = {"seconds": round(time.monotonic() - begin, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1)}
    return found | took | {"quick": quick, "seed": seed, "machine": describe()}


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def table(record: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        "# Reliability",
        "",
        f"Made by `{record['command']}`; all figures are in `report.json`. A case is recovered when the result in the end",
        "is the right one, and a clear error when the package raises an error of its own that names the file. Anything else",
        "is a loss.",
        "",
        "| harness | cases | recovered | clear errors | losses | CPU seconds | size | revision | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in record["harnesses"].items():
        counts = " | ".join(f"{found[count]:,}" for count in COUNTS)
        size, machine = "reduced" if found["quick"] else "full", found["machine"]
        lines.append(
            f"| `{name}` | {counts} | {found['cpu_seconds']:,.0f} | {size} | {machine['revision']} | {machine['date']} |"
        )
    for name, found in record["harnesses"].items():
        lines += ["", f"## {name}", "", *found.get("report", [])]
        lines += ["", where(found["machine"])]
    return "\n".join(lines) + "\n"


def where(machine: dict[str, Any]) -> str:
    """On what a harness ran, in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    return f"Ran on {machine['cpus']} CPUs ({machine['cpu']}), {machine['memory_GiB']} GiB, {machine['system']}; {versions}."


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for; ends with code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="HARNESS", help=f"of {', '.join(HARNESSES)}; default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder of report.json and report.md")
    parser.add_argument("--quick", action="store_true", help="reduced numbers of cases: seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in HARNESSES]
    if unknown:
        parser.error(f"there is no harness {unknown[0]}; there are {', '.join(HARNESSES)}")
    path = options.out / "report.json"
    record: dict[str, Any] = load_json(path) if path.is_file() else {"harnesses": {}}
    losses = 0
    for name in options.names or HARNESSES:
        print(f"{name} ...", flush=True)
        found = record["harnesses"][name] = run_one(name, options.quick, options.seed)
        losses += found["losses"]
        print("  " + ", ".join(f"{count} {found[count]:,}" for count in COUNTS) + f", {found['seconds']} s", flush=True)
        words = [f"--seed {options.seed}"] * (options.seed != 0) + ["--quick"] * options.quick
        record["command"] = shlex.join(["python", "-m", "benchmarks.reliability"]) + "".join(f" {w}" for w in words)
        record["harnesses"] = {n: record["harnesses"][n] for n in HARNESSES if n in record["harnesses"]}
        save_json(path, record)
        write_text(options.out / "report.md", table(record))
    sys.exit(1 if losses else 0)
