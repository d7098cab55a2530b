"""What must hold of `ndem_zoo.schnetpack` where SchNetPack is not installed, and before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ndem_zoo.schnetpack
from ndem_zoo.models.schnetpack import NDeMPaiNN, SchNetPackBackbone

ROOT = Path(__file__).resolve().parents[1]


def test_hydra_may_import_the_configurations_in_any_application():
    """Hydra imports the package and the plug-in in every application; that must cost nothing and need nothing."""
    script = (
        "import sys, ndem_zoo.schnetpack.configs; print(*{'torch', 'schnetpack', 'numpy', 'ase'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == []
    assert not (ROOT / "hydra_plugins" / "__init__.py").exists(), "hydra_plugins must stay a namespace package"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'AddNdemNoise'"):
        _ = ndem_zoo.schnetpack.AddNdemNoise
    assert "strip_ndem" in dir(ndem_zoo.schnetpack)


def test_missing_schnetpack_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "schnetpack", None)
    with pytest.raises(ImportError, match=r"pip install 'ndem_zoo\[schnetpack\]'"):
        SchNetPackBackbone()
    assert NDeMPaiNN().backbone_name == "schnetpack"
