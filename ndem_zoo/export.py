"""A trained model as one file that runs without this package: energy and forces as a graph of torch's operations.

The derivative is part of the graph, numbers of atoms and pairs are free. `NDeMModel.export` calls `export_model`; what
reads the file needs torch alone (docs/how-to/export.md shows a whole reader) or, for ``"metatomic"``, an engine that
speaks it; that form is made in `ndem_zoo.metatomic`.
"""

from __future__ import annotations

import copy
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from ase.data import atomic_numbers
from jaxtyping import Float, Int
from torch import Tensor, nn

from ndem_zoo import checkpoint as files
from ndem_zoo._version import __version__
from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, neighbor_list
from ndem_zoo.models.potential import Potential

if TYPE_CHECKING:
    from ndem_zoo.models.estimator import NDeMModel

#: Files that can be written: a program that torch runs operation by operation, one that is compiled for a processor, and
#: a TorchScript model with metatomic's interface, for LAMMPS, i-PI and ASE.
FORMATS = ("torch_export", "aotinductor", "metatomic")

#: Name of the metadata in a ``.pt2`` file.
METADATA = "ndem_zoo.json"

#: Version of the inputs, outputs and metadata.
VERSION = 1

#: Choice: an exported program may differ by so much from the model that it was made of, in eV and eV/Å, relative to the
#: size of the forces; by the precision that it computes in.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}

#: Choice: a program is tried on so many of the molecules that a prior knows.
_MOLECULES = 3

#: Choice: networks with more layers than this are not told apart.
_LONGEST = 40

_DTYPES = {"32-true": torch.float32, "64-true": torch.float64}


class Inputs(NamedTuple):
    """What an exported program is called with: one structure and its pairs of neighbors.

    Attributes
    ----------
    z : (N,) int64
        Atomic numbers.
    pos : (N, 3) float64
        Positions in Å.
    src, dst : (E,) int64
        Neighbor and center of each pair, in both directions; two pairs at least. Pairs beyond the cutoff change nothing.
    shift : (E, 3) float64
        Image shift of the neighbor in Å: zeros without periodic boundaries.
    """

    z: Int[Tensor, " N"]
    pos: Float[Tensor, "N 3"]
    src: Int[Tensor, " E"]
    dst: Int[Tensor, " E"]
    shift: Float[Tensor, "E 3"]


class AtomicEnergies(nn.Module):
    """A potential as a function of the vectors between neighbors: what all exported forms share.

    Parameters
    ----------
    potential
        With its plain plan, on its device and in the dtype to compute in. It is changed: its backbone leaves out no edges.
    """

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential
        potential.backbone.plan = "eager"
        potential.backbone.skips_far_edges_on = ()  # how many edges stay would be a number that depends on the data

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return next(self.potential.parameters()).dtype

    def forward(self, z: Tensor, vectors: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
        """Energies of the atoms (N,) in eV, float64, without what is added once; and direct forces (N, 3) in eV/Å, or (N, 0).

        `z` (N,), `vectors` (E, 3) in Å from center to neighbor, `src`, `dst` (E,).
        """
        potential, zeros = self.potential, vectors.new_zeros((z.shape[0], 3))
        batch = _batch(potential, z, zeros, src, dst, vectors)  # a backbone reads nothing of them but the vectors
        features = potential.backbone(batch)
        energies = potential.energy_head(features, batch).double() * potential.scale
        energies = energies + potential.reference.index_select(0, z)
        if potential.force_head is None:
            return energies, zeros[:, :0].double()
        return energies, potential.force_head(features, batch).double() * potential.scale


class StructureModel(nn.Module):
    """Energy and forces of one structure from `Inputs`, those of a prior included: what is exported as a ``.pt2`` file.

    A structure that is none of a prior's molecules has the energy NaN.
    """

    def __init__(self, energies: AtomicEnergies) -> None:
        super().__init__()
        self.energies, self.dtype = energies, energies.dtype

    def forward(self, z: Tensor, pos: Tensor, src: Tensor, dst: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        """Energy, a scalar in eV, and forces (N, 3) in eV/Å where the model has any; float64, see `Inputs`."""
        potential, pos = self.energies.potential, pos.detach().requires_grad_()
        moved = pos.to(self.dtype)
        vectors = moved.index_select(0, src) + shift.to(self.dtype) - moved.index_select(0, dst)
        per_atom, direct = self.energies(z, vectors, src, dst)
        energy = per_atom.sum() + potential.shift
        classical = None if potential.prior is None else self._classical(z, pos, src, dst, shift)
        total = energy if classical is None else energy + classical
        if potential.force_mode == "none":
            return (total.detach(),)
        # physics.forces_from_energy marks its argument for the hand-written plans, which a traced tensor cannot bear.
        if potential.force_mode == "gradient":
            return total.detach(), -torch.autograd.grad(total, pos)[0]
        if classical is not None:
            direct = direct - torch.autograd.grad(classical, pos)[0]
        return total.detach(), direct.detach()

    def _classical(self, z: Tensor, pos: Tensor, src: Tensor, dst: Tensor, shift: Tensor) -> Tensor:
        """Energy of the prior in eV."""
        potential = self.energies.potential
        return potential.prior.energy(_batch(potential, z, pos, src, dst, shift)).sum()


def _batch(potential: Potential, z: Tensor, pos: Tensor, src: Tensor, dst: Tensor, shift: Tensor) -> Batch:
    """One structure as a batch that can be traced."""
    return Batch(
        z=z,
        pos=pos,
        src=src,
        dst=dst,
        shift=shift,
        system=torch.zeros_like(z),
        n_systems=1,
        cutoff=potential.backbone.cutoff,
        cell=pos.new_zeros((1, 3, 3)),
        fixed=torch.zeros_like(z, dtype=torch.bool),
        nearest=None,
    )


def export_model(
    model: NDeMModel,
    path: str | os.PathLike,
    format: str = "torch_export",
    *,
    device: str | None = None,
    precision: str | None = None,
) -> Path:
    """Write a fitted model as a file that needs this package no more; see `NDeMModel.export`.

    Parameters
    ----------
    model
        Fitted, and predicting energies.
    path
        File to write: ``.pt2``, or ``.pt`` for metatomic. It appears whole or not at all.
    format
        One of `FORMATS`.
    device
        Where the file will run; default: the model's own `device`.
    precision
        ``"32-true"`` or ``"64-true"``, what it computes in; default: what the model was trained in. Inputs and outputs are
        float64 in either case.

    Returns
    -------
    path : Path
        The file.

    Raises
    ------
    NotFittedError
        If the model has no weights.
    ConfigError
        If the format is unknown or cannot be written with this version of torch; if the model predicts something else than
        energies, has a prior or a backbone that cannot be traced, or any prior and the format is ``"metatomic"``; if what was
        written does not give the model's numbers.
    ImportError
        If metatomic is not installed; names the extra.
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}; allowed are {', '.join(FORMATS)}")
    if format == "aotinductor" and not hasattr(torch._inductor, "aoti_compile_and_package"):
        raise ConfigError(
            f"format='aotinductor' needs torch 2.6 or later, whose compiler writes one file; this is {torch.__version__}: "
            "use format='torch_export'"
        )
    energies = _prepared(model, device, precision)
    if format == "metatomic" and energies.potential.prior is not None:
        raise ConfigError(
            f"format='metatomic': engines ask for energies of atoms, and prior={model.resolved_['prior']!r} has one of the "
            "structure; use 'torch_export' or 'aotinductor', or train without a prior"
        )
    record = metadata_of(model, energies, format)
    if format == "metatomic":
        from ndem_zoo import optional

        optional.require("metatomic.torch", extra="metatomic")
        from ndem_zoo.metatomic import metatomic_model

        content = metatomic_model(energies, record)
    else:
        content = _pt2(energies, record)
    files.write_bytes(path, content)
    return Path(path)


def metadata_of(model: NDeMModel, energies: AtomicEnergies, format: str) -> dict[str, Any]:
    """What a reader has to know about an exported model: units, cutoff in Å, elements, inputs and outputs, versions."""
    potential = energies.potential
    return {
        "version": VERSION,
        "format": format,
        "ndem_zoo": __version__,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "trained_on": model.training_data_.get("name"),
        "split_hash": model.training_data_.get("split_hash"),
        "atomic_numbers": sorted(atomic_numbers[symbol] for symbol in model.reference_),
        "cutoff": potential.backbone.cutoff,
        "molecules": [] if potential.prior is None else potential.prior.molecules(),
        "units": {"length": "angstrom", "energy": "eV", "forces": "eV/angstrom"},
        "inputs": list(Inputs._fields),
        "outputs": ["energy"] if potential.force_mode == "none" else ["energy", "forces"],
        "forces": potential.force_mode,
        "computes_in": str(energies.dtype).removeprefix("torch."),
        "device": str(potential.reference.device),
    }


def _prepared(model: NDeMModel, device: str | None, precision: str | None) -> AtomicEnergies:
    """A copy of the potential, ready to be traced, if it can be exported at all."""
    from ndem_zoo.models.estimator import torch_device

    if precision is not None and precision not in _DTYPES:
        raise ConfigError(f"precision={precision!r}; allowed are {', '.join(_DTYPES)}")
    potential = copy.deepcopy(model._fitted()).requires_grad_(False)
    if potential.target != "energy":
        raise ConfigError(f"this model predicts {potential.target!r}; only energies and their forces can be exported")
    if potential.prior is not None:
        if not potential.prior.is_traceable:
            raise ConfigError(f"prior={model.resolved_['prior']!r} calls another program and cannot be exported")
        potential.prior.names_unknown = False
    backbone = potential.backbone
    if backbone.nearest is not None:
        raise ConfigError(
            f"{type(backbone).__name__} chooses the {backbone.nearest.number} nearest neighbors of each atom in every call, "
            "which cannot be traced; TorchMDNet can be exported"
        )
    dtype = _DTYPES.get(precision or model.resolved_["settings"]["precision"], torch.float32)
    return AtomicEnergies(potential.to(torch_device(model.device if device is None else device), dtype).eval())


# ------------------------------------------------------------------------------------------------------------- .pt2 files


def _pt2(energies: AtomicEnergies, record: dict[str, Any]) -> bytes:
    """Content of a ``.pt2`` file, made and tried."""
    elements = record["atomic_numbers"]
    program = _program(StructureModel(energies), next(examples(energies, elements)))
    content, run = (_saved if record["format"] == "torch_export" else _compiled)(program, record)
    check_exported(run, energies, elements)
    return content


def _program(module: StructureModel, inputs: Inputs) -> torch.export.ExportedProgram:
    """The module as a graph with its derivative, for any number of atoms and pairs."""
    from torch.export import Dim, export
    from torch.fx.experimental.proxy_tensor import make_fx

    atoms, pairs = {0: Dim("atoms", min=2)}, {0: Dim("pairs", min=2)}
    try:
        # torch.export alone does not look into the backward pass: first both passes become plain operations.
        graph = make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
        return export(graph, tuple(inputs), dynamic_shapes=(atoms, atoms, pairs, pairs, pairs), strict=False)
    except Exception as error:  # torch raises what it likes
        raise untraceable(module.energies, error) from error


def _saved(program: torch.export.ExportedProgram, record: dict[str, Any]) -> tuple[bytes, Callable[..., Any]]:
    """A program as torch.export.save writes it, and the function that it is."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(record)})
    return buffer.getvalue(), program.module()


def _compiled(program: torch.export.ExportedProgram, record: dict[str, Any]) -> tuple[bytes, Callable[..., Any]]:
    """A program compiled by AOTInductor, and the function that is read back from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pt2")
        options = {"aot_inductor.metadata": {METADATA: json.dumps(record)}}
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
        return Path(path).read_bytes(), torch._inductor.aoti_load_package(path)


# ------------------------------------------------------------------------------------------------------------------ checks


def examples(energies: AtomicEnergies, elements: list[int]) -> Iterator[Inputs]:
    """Structures to make a program with (the first) and to try it: of several sizes, or the molecules of a prior."""
    prior = energies.potential.prior
    molecules = [] if prior is None else [z for z in prior.molecules() if len(z) > 1][:_MOLECULES]
    if not molecules:
        rng = np.random.default_rng(0)
        molecules = [rng.choice(elements, n).tolist() for n in (5, 9, 3)]
    for number, z in enumerate([*molecules, molecules[-1]]):
        yield example(energies, z, number, periodic=number == len(molecules))


def example(energies: AtomicEnergies, z: list[int], seed: int, periodic: bool = False) -> Inputs:
    """Atoms `z` at random places, with their pairs; free, or in a cell with one open direction."""
    rng, potential, n = np.random.default_rng(seed), energies.potential, len(z)
    cutoff, device = potential.backbone.cutoff, potential.reference.device
    side = max(3, int(np.ceil(n ** (1 / 3))))
    width = 1.3 * n ** (1 / 3)  # Å; apart by about a bond length
    grid = np.argwhere(np.ones((side, side, side)))[rng.permutation(side**3)[:n]]
    pos = grid * width / (side - 1) + rng.normal(0.0, 0.1, (n, 3))
    cell, pbc = (np.diag([1.7 * width, 1.8 * width, 0.0]), [True, True, False]) if periodic else (None, None)
    src, dst, shift = neighbor_list(pos, cutoff, cell, pbc)
    arrays = np.asarray(z, dtype=np.int64), pos, src, dst, shift
    return Inputs(*(torch.from_numpy(np.asarray(array)).to(device) for array in arrays))


def range_of(energies: AtomicEnergies, elements: list[int]) -> float:
    """How far apart in Å an atom's energy and another atom can be: the cutoff, times the layers that pass messages on.

    Found from derivatives along a chain in which everyone sees the next atom only.
    """
    cutoff, potential = energies.potential.backbone.cutoff, energies.potential
    numbers = np.arange(_LONGEST)
    one_way = np.stack([numbers[1:], numbers[:-1]])  # neighbor, center
    src, dst = (torch.from_numpy(index) for index in np.concatenate([one_way, one_way[::-1]], axis=1))
    vectors = torch.zeros((len(src), 3), dtype=energies.dtype)
    vectors[:, 0] = 0.6 * cutoff * (src - dst)
    z = torch.full((_LONGEST,), elements[0])
    z, vectors, src, dst = (tensor.to(potential.reference.device) for tensor in (z, vectors, src, dst))
    with torch.enable_grad():
        vectors.requires_grad_()
        first = energies(z, vectors, src, dst)[0][0]
        (gradient,) = torch.autograd.grad(first, vectors)
    seen = (gradient != 0).any(dim=1)
    return cutoff * max(1, int(torch.where(seen, torch.maximum(src, dst), 0).max()))


def untraceable(energies: AtomicEnergies, error: Exception) -> ConfigError:
    """What to raise when torch could not make a program of a backbone, or not run it at another size."""
    name, reason = type(energies.potential.backbone).__name__, [*str(error).strip().splitlines(), ""]
    return ConfigError(f"{name} cannot be traced by torch {torch.__version__}: {type(error).__name__}: {reason[0]}")


def check_exported(run: Callable[..., Any], energies: AtomicEnergies, elements: list[int]) -> None:
    """Compare an exported program with the model on structures of other sizes than it was made with.

    Parameters
    ----------
    run
        Takes `Inputs`, returns energy and forces.
    energies, elements
        The model, and the atomic numbers that it knows.

    Raises
    ------
    ConfigError
        If they differ by more than `TOLERANCE`: a backbone whose operations depend on what it was traced with.
    """
    truth = StructureModel(energies)
    for inputs in examples(energies, elements):
        expected = truth(*inputs)
        limit = TOLERANCE[energies.dtype] * max(1.0, *(float(value.abs().max()) for value in expected[1:]), 0.0)
        try:
            results = run(*inputs)
        except RuntimeError as error:  # made for the size that it was traced with
            raise untraceable(energies, error) from error
        for name, found, value in zip(("energy", "forces"), results, expected, strict=False):
            difference = float((found - value).abs().max())
            if not difference <= limit:
                raise ConfigError(
                    f"the exported program gives another {name} than the model, by {difference:.3g} eV or eV/Å for {len(inputs.z)} atoms: "
                    f"{type(energies.potential.backbone).__name__} cannot be traced"
                )
