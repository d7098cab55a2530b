"""The embedded data: GFN2-xTB molecular dynamics of ethanol and aspirin, in MD17's file layout.

For tests, examples and the demo, without a download. Made by ``scripts/make_sample_data.py``; free of third-party data.
Errors on them are not comparable with published MD17 errors: it is another potential.
"""

from __future__ import annotations

from pathlib import Path

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.datasets.files import DatasetCard, RemoteFile
from ndem_zoo.datasets.md17 import read_md17
from ndem_zoo.errors import ConfigError

#: File and default sizes (training, validation) of each sample. Choice: ethanol as in MD17; aspirin has 300 frames.
SAMPLES: dict[str, tuple[str, int, int]] = {
    "ethanol": ("md17like_ethanol_gfn2.npz", 950, 50),
    "aspirin": ("md17like_aspirin_gfn2.npz", 200, 50),
}

SAMPLE = DatasetCard(
    name="ndem_zoo sample",
    description="Langevin dynamics at 500 K, 0.5 fs per step: ethanol every 5 fs (2,000 frames), aspirin every 10 fs (300).",
    theory="GFN2-xTB (tblite)",
    units={"positions": "Å", "energy": "kcal/mol", "forces": "kcal/mol/Å"},
    licence="as this package (MIT)",
    citation=("C. Bannwarth, S. Ehlert and S. Grimme, GFN2-xTB, J. Chem. Theory Comput. 15, 1652 (2019)",),
    files={
        "md17like_ethanol_gfn2.npz": RemoteFile(
            urls=(), sha256="86f69595ba5a60294317e08aa865f5dbf9ca25da28d0ceee82bca5bf210845cc"
        ),
        "md17like_aspirin_gfn2.npz": RemoteFile(
            urls=(), sha256="fbe30305a51fce19c56baef0b9c8709f833623eb6c0f5c9467b02a22d12339e0"
        ),
    },
)


def sample_file(name: str) -> Path:
    """Path of the embedded file of ``"ethanol"`` or ``"aspirin"``."""
    if name not in SAMPLES:
        raise ConfigError(f"there is no sample {name!r}; there are {', '.join(SAMPLES)}")
    return Path(__file__).parent / SAMPLES[name][0]


def load_sample(
    name: str = "ethanol",
    n_train: int | float | None = None,
    n_valid: int | float | None = None,
    seed: int = 1,
    *,
    n_test: int | float | None = None,
) -> tuple[list[str], tuple[MolecularDataset, MolecularDataset, MolecularDataset], list]:
    """Load the embedded ethanol or aspirin frames, split into training, validation and test data.

    Parameters
    ----------
    name
        ``"ethanol"`` (2,000 frames) or ``"aspirin"`` (300).
    n_train, n_valid, n_test, seed
        See `MolecularDataset.split`; default 950/50 for ethanol, 200/50 for aspirin, the rest for testing.

    Returns
    -------
    tasks : list of str
        ``["energy", "forces"]``.
    datasets : (train, valid, test)
        Three `MolecularDataset` in eV and Å.
    transformers : list
        Empty: nothing is normalized.

    Raises
    ------
    ConfigError
        If there is no such sample.

    Examples
    --------
    >>> tasks, (train, valid, test), transformers = load_sample("ethanol")
    >>> len(train), len(valid), len(test)
    (950, 50, 1000)
    """
    whole = read_sample(name)
    _, train, valid = SAMPLES[name]
    sizes = (train if n_train is None else n_train, valid if n_valid is None else n_valid)
    return whole.tasks, whole.split(*sizes, seed, n_test), []


def read_sample(name: str = "ethanol") -> MolecularDataset:
    """All frames of the embedded ethanol or aspirin, in order of time."""
    whole = read_md17(sample_file(name), name=f"sample {name}")
    return MolecularDataset(**whole.columns(), ids=whole.ids, card=SAMPLE, name=whole.name)
