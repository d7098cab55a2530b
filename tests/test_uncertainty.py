"""Measures of error bars against numbers drawn from known distributions, and against what can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ndem_zoo.errors import DataError
from ndem_zoo.uncertainty import calibration, recalibration_factor


def drawn(factor: float, n: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Normally distributed errors, and deviations that are too small by a factor."""
    rng = np.random.default_rng(0)
    std = rng.uniform(0.1, 2.0, n)
    return std * rng.standard_normal(n), std / factor


def test_perfect_error_bars():
    error, std = drawn(1.0)
    found = calibration(error, std)
    assert found["rms_z"] == pytest.approx(1.0, abs=0.02)
    assert found["rms_std"] == pytest.approx(found["rmse"], rel=0.02)
    assert found["miscalibration_area"] < 0.01
    for share, inside in found["reliability"].items():
        assert inside == pytest.approx(float(share), abs=0.01)
    # Entropy of the mixture's members: the mean of log(std) + log(2 pi e) / 2.
    assert found["nll"] == pytest.approx(np.mean(np.log(std)) + 0.5 * math.log(2 * math.pi * math.e), abs=0.02)
    assert found["spearman"] > 0.3


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_error_bars_of_the_wrong_size_are_mended(factor):
    error, std = drawn(factor)
    found, n = recalibration_factor(error, std)
    assert found == pytest.approx(factor, rel=0.02)
    assert n == len(error)
    before, after = calibration(error, std), calibration(error, found * std)
    assert before["rms_z"] == pytest.approx(factor, rel=0.02)
    # Eq.: the share within the interval for p is erf(erfinv(p) / factor); at p = 0.5 the boundary is 0.6745 deviations.
    assert before["reliability"]["0.50"] == pytest.approx(math.erf(0.67449 / factor / math.sqrt(2)), abs=0.01)
    assert before["miscalibration_area"] > 0.1 > after["miscalibration_area"]
    assert after["nll"] < before["nll"]
    assert after["spearman"] == pytest.approx(before["spearman"])


def test_areas_by_hand():
    """All errors far outside: the curve is 0 everywhere; all errors 0: it is 1 everywhere. Both areas are a half."""
    assert calibration(np.full(50, 1e6), np.ones(50))["miscalibration_area"] == pytest.approx(0.5, abs=2e-3)
    assert calibration(np.zeros(50), np.ones(50))["miscalibration_area"] == pytest.approx(0.5, abs=2e-3)


def test_chance_agreement_does_not_blow_up_the_factor():
    """Two members agree by chance now and then: the mean square of error over deviation has no limit then."""
    rng = np.random.default_rng(1)
    members, true = rng.standard_normal((2, 5000)), rng.standard_normal(5000)
    error, std = members.mean(axis=0) - true, members.std(axis=0)
    factor, _ = recalibration_factor(error, std)
    assert factor == pytest.approx(math.sqrt(1.5 / 0.5), rel=0.1)
    assert np.sqrt(np.mean((error / std) ** 2)) > 10 * factor


def test_order_alone():
    error = np.array([0.1, -0.2, 0.3, -0.4, 0.5])
    assert calibration(error, np.arange(1.0, 6.0))["spearman"] == pytest.approx(1.0)
    assert calibration(error, np.arange(5.0, 0.0, -1.0))["spearman"] == pytest.approx(-1.0)


def test_numbers_without_a_deviation_do_not_count():
    error, std = np.array([[1.0, 2.0], [5.0, 1.0]]), np.array([[1.0, 1.0], [0.0, 1.0]])
    assert recalibration_factor(error, std) == (pytest.approx(math.sqrt(2.0)), 3)
    assert calibration(error, std)["n"] == 3


@pytest.mark.parametrize(
    ("error", "std", "message"),
    [
        ([1.0], [0.0], "all 1 standard deviations are 0"),
        ([0.0], [1.0], "all errors are 0"),
        ([1.0, 2.0], [1.0], r"shape \(2,\), standard deviations \(1,\)"),
        ([1.0, np.nan], [1.0, 1.0], "number 1: error nan"),
        ([1.0, 1.0], [1.0, -1.0], "number 1: .* deviation -1"),
    ],
)
def test_what_makes_no_sense(error, std, message):
    with pytest.raises(DataError, match=message):
        recalibration_factor(np.array(error), np.array(std))
