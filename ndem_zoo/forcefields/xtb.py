"""GFN2-xTB as a force field: the semi-empirical method, in a process of its own.

C. Bannwarth, S. Ehlert, S. Grimme, J. Chem. Theory Comput. 15, 1652 (2019), through tblite (extra ``xtb``). Milliseconds a
structure, on the CPU; for the whole periodic table up to radon, and for crystals.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Self

import numpy as np
import torch
from ase import units
from jaxtyping import Float
from torch import Tensor

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.forcefields import _xtb_worker
from ndem_zoo.forcefields._xtb_worker import read_arrays, write_arrays
from ndem_zoo.forcefields.base import ClassicalPrediction, ForceField
from ndem_zoo.graph import Batch
from ndem_zoo.optional import require

#: Atomic number of the heaviest element that the method has constants for.
_HEAVIEST = 86

_ASKING = threading.Lock()  # threads must not mix their questions in one pipe


class GFN2xTB(ForceField):
    """Energies and forces of GFN2-xTB for neutral closed-shell structures.

    Notes
    -----
    Pitfall: tblite cannot be imported after torch 2.4 ("C extension unimportable"), so a child process without torch
    computes. It starts with the first structure and ends with this process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_worker"] = None

    def fit(self, dataset: MolecularDataset) -> Self:
        """Nothing is fitted; elements are checked."""
        self.check(dataset)
        return self

    def check(self, dataset: MolecularDataset) -> None:
        """Raise DataError for an element that the method does not have, and for slabs and wires."""
        partly = np.zeros(0, int) if dataset.pbc is None else np.flatnonzero(dataset.pbc.any(1) & ~dataset.pbc.all(1))
        if len(partly):
            raise DataError(
                f"structure {partly[0]}: pbc is {dataset.pbc[partly[0]].tolist()}; GFN2-xTB is for molecules and for "
                "structures that are periodic in three directions"
            )
        bad = np.flatnonzero(dataset.z > _HEAVIEST)
        if len(bad):
            number = int(np.searchsorted(dataset.ptr, bad[0], side="right")) - 1
            raise DataError(
                f"structure {number}: atomic number {int(dataset.z[bad[0]])}; GFN2-xTB knows 1 to {_HEAVIEST}"
            )

    def energy(self, batch: Batch) -> Float[Tensor, " S"]:
        """Not differentiable: forces come from the method itself."""
        raise ConfigError("energies of GFN2-xTB cannot be differentiated by torch; call the force field for its forces")

    def forward(self, batch: Batch) -> ClassicalPrediction:
        """Energies and forces, one structure after the other; positions and results pass through the CPU."""
        z, pos = batch.z.cpu().numpy(), batch.pos.detach().double().cpu().numpy()
        cell, counts = batch.cell.double().cpu().numpy(), batch.n_atoms.cpu().numpy()
        start, energies, forces = 0, [], []
        for number, count in enumerate(counts.tolist()):
            atoms = slice(start, start + count)
            energy, gradient = self._calculate(number, z[atoms], pos[atoms], cell[number])
            energies.append(energy * units.Hartree)
            forces.append(-gradient * units.Hartree / units.Bohr)
            start += count
        device = batch.pos.device
        return ClassicalPrediction(
            torch.tensor(energies, dtype=torch.float64, device=device),
            torch.as_tensor(np.concatenate(forces), device=device),
        )

    def _calculate(self, number: int, z: np.ndarray, pos: np.ndarray, cell: np.ndarray) -> tuple[float, np.ndarray]:
        """Energy in Hartree and its gradient in Hartree/bohr."""
        question = {"z": z, "pos": pos / units.Bohr, "cell": cell / units.Bohr}
        with _ASKING:
            worker = self._start()
            try:
                write_arrays(worker.stdin, question)
                found = read_arrays(worker.stdout)
            except BrokenPipeError:
                found = None
            if found is None:
                self.__dict__["_worker"] = None
        if found is None:
            raise ConfigError("the process that runs GFN2-xTB ended; is tblite installed (extra 'xtb')?")
        if "error" in found:
            message = bytes(found["error"]).decode(errors="replace")
            raise DataError(f"structure {number} of the batch: GFN2-xTB failed ({message})")
        return float(found["energy"]), found["gradient"]

    def _start(self) -> subprocess.Popen:
        worker = self.__dict__["_worker"]
        if worker is None or worker.poll() is not None:
            import importlib.util

            if importlib.util.find_spec("tblite") is None:
                require("tblite", extra="xtb")
            # Pitfall: as a module it would be imported with its package, and so with torch.
            command = [sys.executable, _xtb_worker.__file__]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.__dict__["_worker"] = worker
        return worker

    def __getstate__(self) -> dict:
        """Without the process, which copies start for themselves."""
        return {**self.__dict__, "_worker": None}

    def __deepcopy__(self, memo: dict) -> GFN2xTB:
        return GFN2xTB()
