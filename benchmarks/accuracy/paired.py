"""Statistics of runs that are paired by seed, and the environment that accuracy benchmarks give their processes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

#: glibc otherwise returns the large temporaries of every step to the system and faults them in again (-20 % time).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; NaN for one seed."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def standard_error(values: Sequence[float]) -> float:
    """Of the mean over seeds; NaN for one seed."""
    return spread(values) / len(values) ** 0.5


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Such as ``0.8512 ± 0.0200``; the mean alone for one seed."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {spread(values):.{digits}f}" if len(values) > 1 else mean


def paired_difference(values: Mapping[int, float], base: Mapping[int, float], digits: int = 4) -> str:
    """Mean difference over the seeds that both have, relative and absolute with its standard error; empty without any.

    Parameters
    ----------
    values, base
        Error of each seed.
    """
    seeds = [seed for seed in values if seed in base]
    if not seeds:
        return ""
    pairs = [values[seed] - base[seed] for seed in seeds]
    relative = 100 * sum(pairs) / sum(base[seed] for seed in seeds)
    error = f" ± {standard_error(pairs):.{digits}f}" if len(pairs) > 1 else ""
    return f"{relative:+.1f} % ({statistics.mean(pairs):+.{digits}f}{error})"
