"""What error bars are worth: errors of predictions against the standard deviations that came with them.

If errors were normally distributed with exactly the predicted deviations, 68 % of them would be within one of these, and
so on for every share: `calibration` says by how much this fails, and how well large deviations go with large errors. The
factor that sets the size right (`recalibration_factor`) is what `Ensemble.calibrate` uses. Plain arrays, in any unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ndem_zoo.errors import DataError

#: Expected shares at which the reliability curve is given.
SHARES = tuple(round(0.05 * step, 2) for step in range(1, 20))


def recalibration_factor(error: np.ndarray, std: np.ndarray) -> tuple[float, int]:
    """What standard deviations must be multiplied with to be as large as the errors.

    Parameters
    ----------
    error : any shape
        Predicted less true values.
    std : the same shape
        Predicted standard deviations. Where they are 0 (all members say the same), no factor helps, and the numbers do
        not count.

    Returns
    -------
    factor : float
        Root mean square of the errors over that of the deviations. Choice: not the root mean square of their quotient, which
        would maximize a normal likelihood: the deviation of M members is itself an estimate, that quotient follows Student's
        distribution with M - 1 degrees of freedom, and its mean square has no limit for M = 2 and 3.
    n : int
        So many numbers counted.

    Raises
    ------
    DataError
        If shapes differ, something is not finite or negative, or no deviation is above 0.
    """
    error, std = _checked(error, std)
    known = std > 0
    if not known.any():
        raise DataError(f"all {std.size} standard deviations are 0: members that always agree have no spread to scale")
    factor = float(np.sqrt(np.mean(np.square(error[known])) / np.mean(np.square(std[known]))))
    if factor == 0:
        raise DataError("all errors are 0: labels that the model made itself say nothing about its errors")
    return factor, int(known.sum())


def calibration(error: np.ndarray, std: np.ndarray) -> dict[str, Any]:
    """How well predicted standard deviations describe errors.

    Parameters
    ----------
    error : any shape
        Predicted less true values.
    std : the same shape
        Predicted standard deviations; where they are 0, numbers do not count.

    Returns
    -------
    found : dict
        ``n``; ``rmse`` and ``rms_std`` (equal if the size is right); ``rms_z`` (root mean square of error over deviation; 1
        if the size is right); ``nll`` (mean negative log likelihood of a normal distribution, in nats; depends on the
        unit); ``spearman`` (rank correlation of the size of the error with the deviation); ``miscalibration_area`` (between
        the reliability curve and the diagonal; 0 is perfect, 0.5 the most); ``reliability`` (share of errors within the central
        interval that should hold each of `SHARES`).
    """
    from scipy.special import ndtr
    from scipy.stats import spearmanr

    error, std = _checked(error, std)
    known = std > 0
    error, std = error[known], std[known]
    if len(error) < 2:
        raise DataError(f"{len(error)} numbers with a standard deviation above 0; needed are two or more")
    z = np.abs(error / std)
    # Share of a normal distribution that lies nearer to the middle than each error: uniform if all is right.
    inside = np.sort(2 * ndtr(z) - 1)
    return {
        "n": len(error),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "rms_std": float(np.sqrt(np.mean(std**2))),
        "rms_z": float(np.sqrt(np.mean(z**2))),
        "nll": float(np.mean(np.log(std) + 0.5 * z**2) + 0.5 * np.log(2 * np.pi)),
        "spearman": float(spearmanr(np.abs(error), std).statistic),
        "miscalibration_area": _area(inside),
        "reliability": {f"{share:.2f}": float(np.mean(inside <= share)) for share in SHARES},
    }


def _area(inside: np.ndarray) -> float:
    """Between the diagonal and the share of numbers (n,), ascending, that are below each value from 0 to 1."""
    grid = np.linspace(0.0, 1.0, 1001)
    found = np.searchsorted(inside, grid, side="right") / len(inside)
    gap = np.abs(found - grid)
    return float(np.sum(0.5 * (gap[1:] + gap[:-1])) * (grid[1] - grid[0]))


def _checked(error: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as rows of float64."""
    error, std = np.asarray(error, dtype=np.float64), np.asarray(std, dtype=np.float64)
    if error.shape != std.shape:
        raise DataError(f"errors have shape {error.shape}, standard deviations {std.shape}; they must be equal")
    error, std = error.ravel(), std.ravel()
    bad = np.flatnonzero(~(np.isfinite(error) & np.isfinite(std) & (std >= 0)))
    if len(bad):
        raise DataError(
            f"number {bad[0]}: error {error[bad[0]]} with standard deviation {std[bad[0]]}; allowed are finite numbers, "
            "deviations of 0 or more"
        )
    return error, std
