"""What all contract tests share: assertions with numbers, reproducible weights, and structures to test with.

Nothing here needs a test framework, draws from a global random generator, or depends on how torch draws its weights.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import SkipTest

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, make_batch, neighbor_list
from ndem_zoo.registry import lookup

#: Relative agreement in float64 of what symmetry makes equal, of what merely adds up in another order, and in float32.
SYMMETRY, ROUNDING, SINGLE = 1e-8, 1e-11, 1e-5
#: Relative agreement with a stored number: constants such as radial centers are made in float32, by torch's version.
GOLDEN = 1e-6
#: A comparison means nothing if what is compared is smaller than this.
NOT_ZERO = 1e-5

#: A probe takes a case, and raises AssertionError with the numbers, or SkipTest where it does not apply.
Probe = Callable[[Any], None]


def run_probes(probes: Sequence[Probe], case: Any, skip: Sequence[str]) -> None:
    """Run all probes on a case and report every failure at once."""
    known = [probe.__name__ for probe in probes]
    for name in skip:
        if name not in known:
            raise ConfigError(f"skip={name!r} is no probe; there are {', '.join(known)}")
    failures: list[tuple[str, Exception]] = []
    for probe in probes:
        if probe.__name__ in skip:
            continue
        try:
            probe(case)
        except SkipTest:
            continue
        except Exception as error:  # reported below, with all the others
            failures.append((probe.__name__, error))
    if failures:
        lines = [f"{name}: {type(error).__name__}: {error}" for name, error in failures]
        summary = f"{case.name} fails {len(failures)} of {len(probes)} probes:\n" + "\n".join(lines)
        raise AssertionError(summary) from failures[0][1]


def resolve(table: dict[str, str], given: Any, what: str) -> tuple[str, Any]:
    """Name and object of something given by name or by itself."""
    if isinstance(given, str):
        return given, lookup(table, given, what)
    return getattr(given, "__name__", str(given)), given


# --------------------------------------------------------------------------------------------------------- assertions


def require(condition: bool | Tensor, message: str) -> None:
    """Raise AssertionError with `message` unless `condition`, a scalar, holds; unlike ``assert``, also under ``python -O``."""
    if not bool(condition):
        raise AssertionError(message)


def require_close(value: Tensor, expected: Tensor, tolerance: float, what: str, floor: float = NOT_ZERO) -> None:
    """Raise AssertionError unless the largest difference is below `tolerance` times the largest expected value.

    Both tensors may be of any shape, the same for both.

    Fails too if everything expected is smaller than `floor`: zeros agree with zeros whatever the code does.
    """
    require(value.shape == expected.shape, f"{what}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    size = float(expected.detach().abs().max())
    require(size >= floor, f"{what}: the largest expected value is {size:.1e}, so that the comparison means nothing")
    error = float((value.detach().double() - expected.detach().double()).abs().max()) / size
    require(error <= tolerance, f"{what}: relative difference {error:.2e}, allowed {tolerance:.0e}")


def require_same_bits(value: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError unless both tensors, of any shape, are equal to the last bit."""
    same = value.dtype == expected.dtype and value.shape == expected.shape and torch.equal(value, expected)
    require(same, f"{what}: not the same bits")


def require_equal(value: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError unless the same computation gave the same: to the last bit on a CPU, to rounding on a GPU.

    Both tensors may be of any shape, the same for both.

    GPUs add in no fixed order.
    """
    if value.device.type == "cpu":
        return require_same_bits(value, expected, what)
    error = float((value.detach() - expected.detach()).abs().max())
    size = max(float(expected.detach().abs().max()), 1e-3)
    require(error <= ROUNDING * size, f"{what}: differs by {error:.1e}, where values are up to {size:.1e}")


# ---------------------------------------------------------------------------------------- weights and structures to test


def fill_weights(module: nn.Module) -> nn.Module:
    """Give every parameter values that depend on its name and shape alone; returns the module.

    With k the index of an entry and m a checksum of the parameter's name, entries are ``sin(0.7 k² + k + m)``, scaled as
    usual initializations are: to variance 1/columns for matrices, 1 for embeddings, and by 0.1 for vectors, around 1 if
    they are weights (of a norm). So a number computed from them holds for every version of torch.
    """
    for owner, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            full = f"{owner}.{name}" if owner else name
            k = np.arange(parameter.numel(), dtype=np.float64)
            wave = np.sin(0.7 * k * k + k + zlib.crc32(full.encode()) % 1000)
            if parameter.dim() < 2:
                wave = 0.1 * wave + (1.0 if name == "weight" else 0.0)
            else:
                fan_in = 1 if isinstance(child, nn.Embedding) else parameter[0].numel()
                wave = wave * math.sqrt(2.0 / fan_in)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(wave).reshape(parameter.shape))
    return module


def waves(shape: Sequence[int], phase: float = 0.0) -> np.ndarray:
    """Numbers between -1 and 1, in any shape, without pattern, the same everywhere: for displacements and directions."""
    k = np.arange(math.prod(shape), dtype=np.float64)
    return np.sin(0.7 * k * k + k + phase).reshape(tuple(shape))


def distorted(atoms: Atoms, amplitude: float = 0.08) -> Atoms:
    """A copy with every coordinate displaced by up to `amplitude` Å: no symmetry, no exact distances."""
    atoms = atoms.copy()
    atoms.positions += amplitude * waves(atoms.positions.shape, phase=len(atoms))
    return atoms


def example_molecules() -> list[Atoms]:
    """Distorted ethanol, water and acetonitrile: of different size, with H, C, N, O."""
    return [distorted(molecule(name)) for name in ("CH3CH2OH", "H2O", "CH3CN")]


def example_crystal() -> Atoms:
    """Strongly distorted primitive cell of rock salt: two atoms, far smaller than a usual cutoff."""
    return distorted(bulk("NaCl", "rocksalt", a=5.64), 0.4)


def example_cluster() -> Atoms:
    """Twelve water molecules: 36 atoms, too many for all pairs, so their edges come from a neighbor list."""
    water = distorted(molecule("H2O"))
    parts = [water.positions + 3.1 * np.array(cell) for cell in np.ndindex(3, 2, 2)]
    return distorted(Atoms("OHH" * 12, np.concatenate(parts)), 0.1)


def batch_of(
    structures: Sequence[Atoms],
    cutoff: float,
    *,
    radius: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    targets: Mapping[str, np.ndarray] | None = None,
) -> Batch:
    """Structures side by side as a `Batch`.

    Parameters
    ----------
    structures
        What to put in.
    cutoff
        Radius in Å up to which edges must be complete.
    radius
        If given, exactly the edges up to this radius in Å, even where all pairs would be cheaper.
    dtype, device
        Of the batch.
    targets
        Labels.
    """
    z, pos = (np.concatenate([getattr(atoms, name) for atoms in structures]) for name in ("numbers", "positions"))
    counts = np.array([len(atoms) for atoms in structures])
    cell = np.stack([atoms.cell.array for atoms in structures])
    pbc = np.stack([atoms.pbc for atoms in structures])
    batch = make_batch(z, pos, counts, cutoff, cell=cell, pbc=pbc, targets=targets, dtype=dtype)
    return (batch if radius is None else _with_edges_up_to(batch, structures, radius)).to(device)


def _with_edges_up_to(batch: Batch, structures: Sequence[Atoms], radius: float) -> Batch:
    """`batch` with exactly the edges shorter than `radius`."""
    found, start = [], 0
    for atoms in structures:
        src, dst, shift = neighbor_list(atoms.positions, radius, atoms.cell.array, atoms.pbc)
        found.append((src + start, dst + start, shift))
        start += len(atoms)
    src, dst, shift = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True))
    return batch.replace(src=src, dst=dst, shift=shift.to(batch.pos.dtype), cutoff=radius)


def with_labels(batch: Batch) -> Batch:
    """`batch` with made-up energies (eV) and forces (eV/Å), float64."""
    device, n = batch.pos.device, batch.z.shape[0]
    labels = {
        "energy": torch.from_numpy(waves((batch.n_systems,), 1.0)),
        "forces": torch.from_numpy(waves((n, 3), 2.0)),
    }
    return batch.replace(targets={name: value.to(device) for name, value in labels.items()})


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch by name."""
    names = ("z", "pos", "src", "dst", "shift", "system", "cell", "fixed")
    own = {name: getattr(batch, name) for name in names}
    return (
        own
        | {f"targets.{k}": v for k, v in batch.targets.items()}
        | {f"extras.{k}": v for k, v in batch.extras.items()}
    )
