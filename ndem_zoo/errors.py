"""The errors and warnings that the package raises on purpose.

Each is a ValueError, OSError, RuntimeError or UserWarning as well (some a TypeError or IndexError too), so that callers who
do not know this module can catch them; a script can tell bad data (`DataError`) from a wrong option (`ConfigError`) and a damaged file (`FileFormatError`).
"""

from __future__ import annotations


class DataError(ValueError):
    """A structure, a label or a data file that cannot be used; names the structure index and what is allowed."""


class ConfigError(ValueError):
    """An option that does not exist or has a value outside what is allowed."""


class DataTypeError(DataError, TypeError):
    """An object that holds no structures at all; names what does."""


class DataIndexError(DataError, IndexError):
    """The number of a structure that is not there, or something that is no number or mask."""


class FileFormatError(DataError):
    """A file that is damaged, truncated, or not of the format that it claims."""


class StorageError(OSError):
    """A file that could not be written: no space, no quota or a failing disk; names it, and what it replaces is kept."""


class NotFittedError(RuntimeError):
    """The model has no weights yet: `fit` or `load` comes first."""


class TrainingError(RuntimeError):
    """Training cannot go on, for example because a loss is not finite."""


class UnitsWarning(UserWarning):
    """Labels whose size suggests another unit than eV and Å."""


class DataWarning(UserWarning):
    """Data that can be used, but not without the user knowing something about it."""


class RangeWarning(DataWarning):
    """A structure outside of what a model was trained on: nothing is known about the errors there."""
