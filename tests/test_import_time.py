"""What must be quick imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "dgl", "deepchem", "sklearn", "schnetpack", "lightning_fabric", "matplotlib", "rdkit", "scipy")

_SCRIPT = """
import sys
sys.argv = {arguments!r}
try:
    {statement}
except SystemExit as end:
    assert end.code in (0, None), end.code
print("heavy:", *(name for name in {heavy!r} if name in sys.modules))
"""


def heavy_modules(statement: str, *arguments: str) -> list[str]:
    """Heavy modules that are loaded after a statement, in a new process."""
    script = _SCRIPT.format(arguments=["ndem-zoo", *arguments], statement=statement, heavy=HEAVY)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("heavy:")]
    return line.split()[1:]


def test_the_package_imports_nothing_heavy():
    assert heavy_modules("import ndem_zoo; dir(ndem_zoo); ndem_zoo.__version__") == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    pytest.importorskip("typer")
    assert heavy_modules("from ndem_zoo.cli import main; main()", *arguments) == []


def test_this_test_would_notice():
    assert "torch" in heavy_modules("import ndem_zoo; ndem_zoo.MolecularDataset; import torch")


def test_every_public_name_is_there():
    import ndem_zoo

    for name in ndem_zoo.__all__:
        assert getattr(ndem_zoo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'NDeMTorchMdNet'"):
        _ = ndem_zoo.NDeMTorchMdNet
