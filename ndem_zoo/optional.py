"""The one way to import an optional dependency: when it is needed, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or say which extra of this package brings it.

    Parameters
    ----------
    module
        Name of the module, such as ``"rdkit.Chem"``.
    extra
        Name of the extra in ``setup.py`` that installs it.

    Raises
    ------
    ImportError
        If the module, or something that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}); install it with: pip install 'ndem_zoo[{extra}]'"
        ) from error
