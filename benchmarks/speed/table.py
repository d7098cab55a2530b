"""The record as Markdown, each figure beside what it has to reach.

A ratio reaches its target if its lower quartile does: half of the rounds below it would be no achievement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.speed import machine, timing

BASELINES = {"shipped": "as shipped", "allocator": "allocator tuned for both", "strict": "strict"}


@dataclass(frozen=True)
class Target:
    """At least so many times as fast as torchmd-net, by baseline; None where nothing is asked."""

    shipped: float | None = None
    strict: float | None = None


#: (part, item) -> what issue and design ask for.
TARGETS: dict[tuple[str, str], Target] = {
    ("train", "aspirin b8"): Target(8.0, 5.5),
    ("train", "aspirin b32"): Target(8.0, 6.0),
    ("train", "aspirin b128"): Target(None, 6.0),
    ("train", "ethanol b8"): Target(6.0),
    ("train", "ethanol b32"): Target(6.0),
    ("ndem", "aspirin b8"): Target(7.0),
    ("infer", "aspirin b1"): Target(5.0),
    ("infer", "aspirin b8"): Target(5.5),
    ("infer", "aspirin b32"): Target(6.0),
    ("systems", "cluster of 512"): Target(8.0),
}
NDEM_COST, EAGER_GAIN, EXPONENT = 1.45, 1.2, 1.1
PAIRS_GAIN, PAIRS_US = 8.0, 2.0
THROUGHPUT, DATA_SHARE = 0.93, 0.05
FIRST_STEP_S = 5.0
MEMORY = {8: 1 / 8, 128: 1 / 30}
#: Interleaved rounds that a figure to be quoted needs.
ROUNDS = 9
#: Mostly page faults of torchmd-net: shown in brackets, never to be quoted.
PAGE_FAULTS = {("train", "aspirin b128")}

_TITLES = {
    "train": "training step",
    "ndem": "NDeM step",
    "infer": "inference",
    "systems": "one system, inference",
    "system-steps": "one system, training step",
}


def render(record: dict[str, Any]) -> str:
    """The whole page."""
    sections = record["sections"]
    blocks = [
        "# Speed, side by side",
        f"`{record['command']}`. "
        + ("**Reduced run (`--quick`): shows that everything works; not to be quoted.** " if record["quick"] else "")
        + _few_rounds(sections)
        + "One thread and process CPU time unless said otherwise. Ratios are torchmd-net's time over ours: median of the "
        "per-round ratios of interleaved rounds, with quartiles; ✓ where the lower quartile reaches the target.",
        _ratios(sections),
        _own(sections),
        _times(sections),
        _growth(sections),
        _memory(sections),
        _pairs(sections),
        _fit(sections),
        _first_step(sections),
        _agreement(sections),
        _machines(sections),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _few_rounds(sections: dict[str, Any]) -> str:
    """A warning where a part has fewer rounds than figures to be quoted need."""
    few = [key for key, s in sections.items() if "calibration" in s and s["settings"]["rounds"] < ROUNDS]
    return f"**Fewer than {ROUNDS} rounds, not to be quoted: {', '.join(few)}.** " if few else ""


def _grid(title: str, header: list[str], rows: list[list[str]], note: str = "") -> str:
    """A table under a heading; empty without rows."""
    if not rows:
        return ""
    lines = [f"## {title}", ""] + ([note, ""] if note else [])
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _found(sections: dict[str, Any], part: str, baseline: str) -> dict[str, dict[str, Any]]:
    """Rows of a part in a baseline, by item."""
    return {row["item"]: row for row in sections.get(f"{part}/{baseline}", {}).get("rows", [])}


def _items(sections: dict[str, Any], part: str) -> list[str]:
    """All items of a part in any baseline, in order."""
    return list(dict.fromkeys(item for baseline in BASELINES for item in _found(sections, part, baseline)))


def spread(ratio: dict[str, Any]) -> str:
    """Median with quartiles."""
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]"


def verdict(value: float, target: float | None, at_most: bool = False) -> str:
    """A mark behind a figure; nothing where nothing is asked."""
    if target is None:
        return ""
    return " ✓" if (value <= target if at_most else value >= target) else " ✗"


def _ratios(sections: dict[str, Any]) -> str:
    """Against torchmd-net, the three baselines side by side."""
    rows = []
    for part, title in _TITLES.items():
        for item in _items(sections, part):
            target = TARGETS.get((part, item), Target())
            cells = []
            for baseline in BASELINES:
                row = _found(sections, part, baseline).get(item)
                ratio = row and row["ratios"].get("torchmd-net")
                if not ratio:
                    cells.append(_why_not(sections, part, baseline, row))
                    continue
                text = spread(ratio) + verdict(ratio["quartiles"][0], getattr(target, baseline, None))
                cells.append(f"({text})" if baseline == "shipped" and (part, item) in PAGE_FAULTS else text)
            asked = " / ".join("–" if t is None else f"{t:g}" for t in (target.shipped, target.strict))
            rows.append([title, item, *cells, asked])
    return _grid(
        "torchmd-net's time over ours",
        ["work", "on", *BASELINES.values(), "target, as shipped / strict"],
        rows,
        "In brackets: mostly page faults of torchmd-net, not to be quoted.",
    )


def _why_not(sections: dict[str, Any], part: str, baseline: str, row: dict[str, Any] | None) -> str:
    """What stands where there is no ratio."""
    refused = sections.get(f"{part}/{baseline}", {}).get("refused")
    if refused:
        return f"refused: {refused}"
    return "torchmd-net not run" if row else ""


def _own(sections: dict[str, Any]) -> str:
    """Against ourselves, and against torchmd-net with its own AdamW."""
    rows = []
    for baseline, name in BASELINES.items():
        for item, row in _found(sections, "ndem", baseline).items():
            if "ours, supervised" in row["ratios"]:
                inverse = row["own_cost"]
                mark = verdict(inverse["quartiles"][1], NDEM_COST, at_most=True)
                rows.append(
                    ["NDeM step / own supervised step", item, name, spread(inverse) + mark, f"at most {NDEM_COST}"]
                )
        for item, row in _found(sections, "train", baseline).items():
            own = row["ratios"].get("torchmd-net, own AdamW")
            if own:
                rows.append(["torchmd-net with its own AdamW / ours", item, name, spread(own), ""])
            eager = row.get("eager_gain")
            if eager:
                mark = verdict(eager["quartiles"][0], EAGER_GAIN)
                rows.append(["torchmd-net / our eager plan", item, name, spread(eager) + mark, f"{EAGER_GAIN}"])
    return _grid("Other ratios", ["ratio", "on", "baseline", "median [quartiles]", "target"], rows)


def _times(sections: dict[str, Any]) -> str:
    """Milliseconds, and the distance to the physical limit."""
    rows = []
    for part, title in _TITLES.items():
        for baseline, name in BASELINES.items():
            section = sections.get(f"{part}/{baseline}", {})
            for row in section.get("rows", []):
                limit = row["required_gflop"] / machine.best_rate(section["calibration"]) * 1e3
                times = [
                    f"{who} {t['ms']:.1f} ({t['wall_min_ms']:.1f})" for who, t in row["times"].items() if who != "ours"
                ]
                ours = row["times"]["ours"]
                rows.append(
                    [
                        title, row["item"], name, f"{row['atoms']:,} / {row['edges']:,}", row["plan"],
                        f"{ours['ms']:.1f} ({ours['wall_min_ms']:.1f})", "; ".join(times),
                        f"{limit:.1f}", f"{100 * limit / ours['ms']:.0f} %",
                    ]
                )  # fmt: skip
    return _grid(
        "Times in ms",
        ["work", "on", "baseline", "atoms / edges", "plan", "ours", "others", "limit", "limit / ours"],
        rows,
        "Median CPU time (least wall time). The limit is what the required matrix products take at the highest measured "
        "sgemm rate: no step can reach it.",
    )


def exponents(sections: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """Exponent of time against directed pairs by (group, contestant, baseline), where there are at least two sizes."""
    result = {}
    groups = [("systems", "cluster"), ("systems", "water box"), ("system-steps", "water box")]
    for part, kind in groups:
        for baseline in BASELINES:
            rows = [r for i, r in _found(sections, part, baseline).items() if i.startswith(kind)]
            for name in ("ours", "torchmd-net"):
                timed = [(r["edges"], r["times"][name]["ms"]) for r in rows if name in r["times"]]
                if len(timed) > 1:
                    label = f"{_TITLES[part]}, {kind}: {timed[0][0]:,} to {timed[-1][0]:,} pairs"
                    result[label, name, baseline] = timing.exponent(*map(list, zip(*timed, strict=True)))
    return result


def _growth(sections: dict[str, Any]) -> str:
    """How time grows with pairs."""
    rows = [
        [group, BASELINES[baseline], name, f"{value:.2f}" + (verdict(value, EXPONENT, True) if name == "ours" else "")]
        for (group, name, baseline), value in exponents(sections).items()
    ]
    note = f"Time is proportional to pairs to the power of this; asked is at most {EXPONENT} for ours."
    return _grid("Growth with size", ["sizes", "baseline", "contestant", "exponent"], rows, note)


def _memory(sections: dict[str, Any]) -> str:
    """Peak memory of fresh processes."""
    rows = []
    for baseline, name in BASELINES.items():
        for row in sections.get(f"memory/{baseline}", {}).get("rows", []):
            ours, rival = row.get("ours"), row.get("torchmd-net")
            target = MEMORY.get(row["batch_size"])
            share = "; ".join(row.get("left_out", []))
            if ours and rival:
                part = ours["peak_MB"] / rival["peak_MB"]
                share = f"1/{1 / part:.1f}{verdict(part, target, True)}"
            cells = [f"{v['peak_MB']:,.0f}" if v else "" for v in (ours, rival)]
            times = [f"{v['ms']:.0f}" if v else "" for v in (ours, rival)]
            rows.append([row["item"], name, *cells, share, f"1/{1 / target:.0f}" if target else "", *times])
    header = ["training step", "baseline", "ours, MB", "torchmd-net, MB", "ours / torchmd-net", "target"]
    note = (
        "Most resident memory of a fresh process beyond the imported libraries; weights, optimizer and inputs included. "
        "The times are those of the same few steps: what a small memory costs."
    )
    return _grid("Peak memory", [*header, "ours, ms", "torchmd-net, ms"], rows, note)


def _pairs(sections: dict[str, Any]) -> str:
    """Neighbor pairs."""
    rows = []
    for item, row in _found(sections, "pairs", "shipped").items():
        for name, us in row["us_per_molecule"].items():
            ratio = row["ratios"].get(name)
            is_target = name == "torch_cluster"
            mark = verdict(us, PAIRS_US, True) if name == "ours" else ""
            gain = spread(ratio) + (verdict(ratio["quartiles"][0], PAIRS_GAIN) if is_target else "") if ratio else ""
            asked = f"below {PAIRS_US:g} µs" if name == "ours" else f"{PAIRS_GAIN:g}" if is_target else ""
            rows.append([item, name, f"{us:.2f}{mark}", gain, asked])
        if "torch_cluster" not in row["us_per_molecule"]:
            rows.append([item, "torch_cluster", "not installed", "", f"{PAIRS_GAIN:g}"])
    note = "Of aspirin within 5 Å. Ours gives all pairs of a small molecule, and the step passes over those beyond it."
    return _grid("Neighbor pairs", ["on", "by", "µs per molecule", "its time / ours", "target"], rows, note)


def _fit(sections: dict[str, Any]) -> str:
    """Whole training against its bare step."""
    rows = []
    for baseline, name in BASELINES.items():
        for item, row in _found(sections, "fit", baseline).items():
            low, high = row["throughput_quartiles"]
            rows.append(
                [
                    item, name, f"{row['bare_ms']:.1f}", f"{row['fit_ms']:.1f}",
                    f"{row['throughput']:.3f} [{low:.3f}, {high:.3f}]{verdict(low, THROUGHPUT)}",
                    f"{row['batch_ms']:.3f}", f"{100 * row['data_share']:.2f} %{verdict(row['data_share'], DATA_SHARE, True)}",
                ]
            )  # fmt: skip
    header = ["training", "baseline", "bare step, ms", "step of `fit`, ms", "throughput", "batch, ms", "share"]
    note = f"Asked: throughput of at least {THROUGHPUT} of the bare step's, at most {100 * DATA_SHARE:.0f} % for the batch."
    return _grid("Whole `fit`", header, rows, note)


def _first_step(sections: dict[str, Any]) -> str:
    """Seconds of a fresh process."""
    rows = []
    for row in sections.get("first-step/shipped", {}).get("rows", []):
        mark = verdict(row["first_step_s"], FIRST_STEP_S, True)
        rows.append([row["item"], f"{row['first_step_s']:.2f}{mark}", f"{row['import_s']:.2f}", f"{row['cold_s']:.2f}"])
    header = ["fit of", "start to first step, s", "of it imports, s", "first process of the series, s"]
    note = f"Wall time of fresh processes, their median after one to warm the caches. Asked: below {FIRST_STEP_S:g} s."
    return _grid("Time to the first step", header, rows, note)


def _agreement(sections: dict[str, Any]) -> str:
    """How far the numbers of the contestants are apart."""
    rows = []
    for key, section in sections.items():
        part, baseline = key.split("/")
        for row in section.get("rows", []):
            for who, errors in (row.get("agreement") or {}).items():
                if who != "ok":
                    text = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
                    rows.append([_TITLES[part], row["item"], BASELINES[baseline], who, text])
    note = "|a - b| / |b|, looked at before anything was timed; float64 is our eager plan."
    return _grid("Agreement", ["work", "on", "baseline", "a - b", "relative difference"], rows, note)


def _machines(sections: dict[str, Any]) -> str:
    """Machine and calibration of every process; the parts that one process measured share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for key, section in sections.items():
        part, baseline = key.split("/")
        rows.setdefault((BASELINES[baseline], *_machine_cells(section)), []).append(part)
    header = ["baseline", "date", "revision", "machine", "versions", "rounds", "sgemm 1024³, GFLOP/s", "highest rate"]
    header += ["100k additions, s", "2 threads / 1", "load"]
    return _grid("Machine", ["parts", *header], [[", ".join(parts), *cells] for cells, parts in rows.items()])


def _machine_cells(section: dict[str, Any]) -> list[str]:
    """One row about a process."""
    m, c = section["machine"], section.get("calibration")
    cells = [
        m["date"], m["revision"] or "", f"{m['cpu']}, {m['cpus']} CPUs, {m['memory_GiB']} GiB",
        ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v), str(section["settings"]["rounds"]),
    ]  # fmt: skip
    if c is None:  # fresh processes: no ratio of theirs depends on the rates
        return [*cells, "", "", "", "", ""]
    square = c["sgemm_gflops"]["1024x1024x1024"]
    rates = " / ".join(f"{name} {rate:.0f}" for name, rate in square.items())
    gains = [f"{c['small_additions_100k_s']:.3f}", f"{c['two_thread_gain']:.2f}", f"{c['load_average'][0]:.2f}"]
    return [*cells, rates, f"{machine.best_rate(c):.0f}", *gains]
