"""Interleaved rounds: A, B, A, B in one process, so that both see the same weather.

The clock is the process's CPU time where there is one thread; the least wall time stands beside it. Ratios are taken
round by round, and summarized by median and quartiles.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UP = 2
#: Seconds that a contestant's turn lasts at least, so that short steps are repeated; and how often at most.
TURN, MOST_REPEATS = 0.1, 20


def interleave(
    works: dict[str, Callable[[Any], Any]],
    inputs: list[Any],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, dict[str, list[float]]]:
    """Seconds per call of every contestant in every round: name -> {"cpu": [...], "wall": [...]}.

    Parameters
    ----------
    works
        What to call with an input set, by contestant; a round goes through them in this order.
    inputs
        Input sets, which rotate from call to call; in a round all contestants get the same ones.
    rounds
        Number of rounds.
    clock
        What is written as "cpu"; another clock for several threads.
    """
    quickest = math.inf
    for work in works.values():
        for i in range(WARM_UP):
            begin = time.perf_counter()
            work(inputs[i % len(inputs)])
        quickest = min(quickest, time.perf_counter() - begin)
    repeats = min(MOST_REPEATS, max(1, math.ceil(TURN / max(quickest, 1e-9))))
    times: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in works}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            chosen = [inputs[(turn * repeats + i) % len(inputs)] for i in range(repeats)]
            for name, work in works.items():
                wall, cpu = time.perf_counter(), clock()
                for values in chosen:
                    work(values)
                times[name]["cpu"].append((clock() - cpu) / repeats)
                times[name]["wall"].append((time.perf_counter() - wall) / repeats)
            gc.collect()  # what has piled up, outside the measured time
    finally:
        if was_enabled:
            gc.enable()
    return times


def summary(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Milliseconds of every contestant: median and quartiles of the clock, least wall time, all rounds."""
    return {
        name: {
            "ms": 1e3 * statistics.median(t["cpu"]),
            "ms_quartiles": [1e3 * q for q in quartiles(t["cpu"])],
            "wall_min_ms": 1e3 * min(t["wall"]),
            "rounds_ms": [1e3 * value for value in t["cpu"]],
        }
        for name, t in times.items()
    }


def ratio(times: dict[str, dict[str, list[float]]], numerator: str, denominator: str) -> dict[str, Any]:
    """Median and quartiles of the per-round ratios numerator / denominator."""
    values = [a / b for a, b in zip(times[numerator]["cpu"], times[denominator]["cpu"], strict=True)]
    return {"median": statistics.median(values), "quartiles": quartiles(values), "rounds": len(values)}


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile; of one value, itself."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log time against log size, by least squares."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(t) for t in seconds]).slope
