"""The child process of `xtb.GFN2xTB`: reads structures from standard input, writes energies and gradients to standard output.

Imports tblite and numpy only. Arrays travel in numpy's own format, with the number of bytes before; nothing is pickled.
"""

from __future__ import annotations

import io
import struct
import sys
from typing import BinaryIO

import numpy as np


def write_arrays(stream: BinaryIO, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays and send them off."""
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    stream.write(struct.pack("<q", packed.tell()) + packed.getvalue())
    stream.flush()


def read_arrays(stream: BinaryIO) -> dict[str, np.ndarray] | None:
    """Read what `write_arrays` wrote; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    with np.load(io.BytesIO(stream.read(*struct.unpack("<q", head))), allow_pickle=False) as packed:
        return dict(packed)


def calculate(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Energy (Hartree) and gradient (Hartree/bohr) of one structure in bohr."""
    from tblite.interface import Calculator

    cell = {"lattice": given["cell"], "periodic": np.ones(3, dtype=bool)} if given["cell"].any() else {}
    calculator = Calculator("GFN2-xTB", given["z"].astype(np.int64), given["pos"], **cell)
    calculator.set("verbosity", 0)
    result = calculator.singlepoint()
    return {"energy": np.array(result.get("energy")), "gradient": np.array(result.get("gradient"))}


def main() -> None:
    """Answer until the input ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # whatever a library prints must not mix with the answers
    while (given := read_arrays(sys.stdin.buffer)) is not None:
        try:
            found = calculate(given)
        except Exception as error:  # every error is an answer; the parent raises it
            found = {"error": np.frombuffer(f"{type(error).__name__}: {error}".encode(), dtype=np.uint8)}
        write_arrays(answers, found)


if __name__ == "__main__":
    main()
