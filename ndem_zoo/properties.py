"""What can be predicted, by name: unit, how a number for a structure is made of its atoms, and in what papers report it.

Read by the potential (readout), the estimator (references, scale), metrics (units) and loaders. A target that is not
listed here is a sum over atoms without references, in whatever unit its dataset has.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ndem_zoo.physics import KCAL_PER_MOL

Readout = Literal["sum", "dipole", "spatial_extent"]


class Property(NamedTuple):
    """A target with one number per structure.

    Attributes
    ----------
    unit
        In datasets and predictions.
    readout
        ``"sum"`` over atoms; ``"dipole"``, the norm of the dipole moment; ``"spatial_extent"``, <r²>.
    has_references
        Whether most of it is a sum of constants of the elements (total energies): those are then subtracted. Otherwise
        its mean over the training data is.
    report
        Further unit that papers use, or "".
    factor
        One `unit` in units of `report`.
    """

    unit: str = ""
    readout: Readout = "sum"
    has_references: bool = False
    report: str = ""
    factor: float = 1.0


_TOTAL = Property("eV", has_references=True, report="meV", factor=1e3)
_MILLI = Property("eV", report="meV", factor=1e3)

#: The energy of a force field, and the twelve targets of QM9.
PROPERTIES: dict[str, Property] = {
    "energy": Property("eV", has_references=True, report="kcal/mol", factor=1.0 / KCAL_PER_MOL),
    "mu": Property("D", "dipole"),
    "alpha": Property("a0³"),
    "homo": _MILLI,
    "lumo": _MILLI,
    "gap": _MILLI,
    "r2": Property("a0²", "spatial_extent"),
    "zpve": _MILLI,
    "U0": _TOTAL,
    "U": _TOTAL,
    "H": _TOTAL,
    "G": _TOTAL,
    "Cv": Property("cal/mol/K"),
}


def property_of(target: str) -> Property:
    """What is known of a target."""
    return PROPERTIES.get(target, Property())
