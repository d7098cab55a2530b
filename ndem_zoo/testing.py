"""The contract tests: `check_backbone`, `check_objective`, `check_dataset`, for this package's classes and for yours.

As scikit-learn ships `check_estimator`, so that a class written elsewhere is held to the same rules. Each probe is a
small function that raises AssertionError with the numbers, and whose docstring says which bug it catches; the lists
`BACKBONE_PROBES`, `OBJECTIVE_PROBES`, `NDEM_PROBES` and `DATASET_PROBES` let a test runner show them one by one.
Nothing here needs a test framework, draws from a global random generator, or depends on how torch draws its weights.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from unittest import SkipTest

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from jaxtyping import Float
from torch import Tensor, nn

from ndem_zoo.curvature import BOLTZMANN
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.graph import Batch, make_batch, neighbor_list
from ndem_zoo.models.base import Backbone, Features, Head, options_of
from ndem_zoo.models.potential import Potential
from ndem_zoo.noise import masked_gaussian
from ndem_zoo.objectives.base import Objective, SupervisedLoss
from ndem_zoo.objectives.ndem import NDeM
from ndem_zoo.physics import MAX_Z
from ndem_zoo.registry import BACKBONES, DATASETS, OBJECTIVES, lookup

#: Relative agreement in float64 of what symmetry makes equal, of what merely adds up in another order, and in float32.
SYMMETRY, ROUNDING, SINGLE = 1e-8, 1e-11, 1e-5
#: Relative agreement with a stored number: constants such as radial centers are made in float32, by torch's version.
GOLDEN = 1e-6
#: A comparison means nothing if what is compared is smaller than this.
NOT_ZERO = 1e-5


# ------------------------------------------------------------------------------------------------------ entry points


def check_backbone(
    backbone: str | type[Backbone],
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    *,
    golden: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
) -> None:
    """Hold a backbone to its contract.

    Parameters
    ----------
    backbone
        Name in the registry, or a class.
    options
        Options to build it with, on top of its `tiny` ones.
    device
        Where to run.
    golden
        Numbers of `golden_numbers` from an earlier version, to compare with.
    skip
        Names of probes to leave out, such as ``"smooth_cutoff"`` for a backbone that documents a discontinuity.

    Raises
    ------
    AssertionError
        If a probe fails; lists all that do.
    """
    _run(BACKBONE_PROBES, BackboneCase.of(backbone, options, device, golden), skip)


def check_objective(
    objective: str | type[Objective],
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    *,
    backbone: str | type[Backbone] = "torchmd_net",
    backbone_options: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
) -> None:
    """Hold an objective to its contract; subclasses of `NDeM` also to the relation that they rest on.

    Parameters
    ----------
    objective
        Name in the registry, or a class.
    options
        Its options.
    device
        Where to run.
    backbone, backbone_options
        What the potential is made of; its `tiny` options hold where nothing else is given.
    skip
        Names of probes to leave out.

    Raises
    ------
    AssertionError
        If a probe fails; lists all that do.
    """
    case = ObjectiveCase.of(objective, options, device, backbone, backbone_options)
    _run(objective_probes(case.cls), case, skip)


def objective_probes(cls: type[Objective]) -> list[Probe]:
    """The probes that apply to an objective."""
    return OBJECTIVE_PROBES + (NDEM_PROBES if issubclass(cls, NDeM) else [])


def _run(probes: Sequence[Probe], case: Any, skip: Sequence[str]) -> None:
    """Run all probes on a case and report every failure at once."""
    known = [probe.__name__ for probe in probes]
    for name in skip:
        if name not in known:
            raise ConfigError(f"skip={name!r} is no probe; there are {', '.join(known)}")
    failures = []
    for probe in probes:
        if probe.__name__ in skip:
            continue
        try:
            probe(case)
        except SkipTest:
            continue
        except AssertionError as error:
            failures.append(f"{probe.__name__}: {error}")
    if failures:
        raise AssertionError(f"{case.name} fails {len(failures)} of {len(probes)} probes:\n" + "\n".join(failures))


# --------------------------------------------------------------------------------------------------------- assertions


def require(condition: bool | Tensor, message: str) -> None:
    """Raise AssertionError with `message` unless `condition` holds; unlike ``assert``, also under ``python -O``."""
    if not bool(condition):
        raise AssertionError(message)


def require_close(value: Tensor, expected: Tensor, tolerance: float, what: str, floor: float = NOT_ZERO) -> None:
    """Raise AssertionError unless the largest difference is below `tolerance` times the largest expected value.

    Fails too if everything expected is smaller than `floor`: zeros agree with zeros whatever the code does.
    """
    require(value.shape == expected.shape, f"{what}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    size = float(expected.detach().abs().max())
    require(size >= floor, f"{what}: the largest expected value is {size:.1e}, so that the comparison means nothing")
    error = float((value.detach().double() - expected.detach().double()).abs().max()) / size
    require(error <= tolerance, f"{what}: relative difference {error:.2e}, allowed {tolerance:.0e}")


def require_same_bits(value: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError unless both tensors are equal to the last bit."""
    same = value.dtype == expected.dtype and value.shape == expected.shape and torch.equal(value, expected)
    require(same, f"{what}: not the same bits")


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
    """Numbers between -1 and 1 without pattern, the same everywhere: for displacements and directions."""
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
    labels = {"energy": torch.from_numpy(waves((batch.n_systems,), 1.0)), "forces": torch.from_numpy(waves((n, 3), 2.0))}
    return batch.replace(targets={name: value.to(device) for name, value in labels.items()})


def _tensors_of(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch by name."""
    names = ("z", "pos", "src", "dst", "shift", "system", "cell", "fixed")
    own = {name: getattr(batch, name) for name in names}
    return own | {f"targets.{k}": v for k, v in batch.targets.items()} | {f"extras.{k}": v for k, v in batch.extras.items()}


# ---------------------------------------------------------------------------------------------------------- backbones


class Outcome(NamedTuple):
    """All that a backbone can be asked: energy (S,), gradient forces (N, 3), vector head (N, 3), scalars (N, C)."""

    energy: Tensor
    forces: Tensor
    vectors: Tensor
    scalars: Tensor


@dataclass(frozen=True)
class BackboneCase:
    """A backbone to probe, and how to build it.

    Attributes
    ----------
    name : str
        For messages.
    cls : type
        The backbone.
    options : dict
        Its options, `tiny` ones included.
    device : str
        Where to run.
    golden : mapping or None
        Stored numbers to compare with.
    """

    name: str
    cls: type[Backbone]
    options: dict[str, Any]
    device: str = "cpu"
    golden: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        backbone: str | type[Backbone],
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        golden: Mapping[str, Any] | None = None,
    ) -> BackboneCase:
        """A case from a name in the registry or a class."""
        name, found = _resolve(BACKBONES, backbone, "backbone")
        return cls(name, found, {**found.tiny, **(options or {})}, device, golden)

    @property
    def cutoff(self) -> float:
        """Radius in Å of the backbone."""
        return float(self.cls(**self.options).cutoff)

    def potential(
        self, dtype: torch.dtype = torch.float64, forces: str = "gradient", device: str | None = None
    ) -> Potential:
        """A potential with reproducible weights, in evaluation mode."""
        potential = Potential(self.cls(**self.options), forces=forces, scale=0.7)
        return fill_weights(potential).to(device=device or self.device, dtype=dtype).eval()

    def vector_head(self, potential: Potential, device: str | None = None) -> Head:
        """A vector head with reproducible weights."""
        head = fill_weights(potential.backbone.vector_head())
        return head.to(device=device or self.device, dtype=next(potential.parameters()).dtype)

    def batch(self, structures: Sequence[Atoms], **options: Any) -> Batch:
        """Structures as a batch for this backbone."""
        return batch_of(structures, self.cutoff, **{"device": self.device, **options})

    def outcome(self, batch: Batch) -> Outcome:
        """What the backbone says about a batch, in its dtype and on its device."""
        device = str(batch.pos.device)
        potential = self.potential(batch.pos.dtype, device=device)
        with torch.no_grad():
            prediction = potential(batch)
            vectors = self.vector_head(potential, device)(prediction.features, batch)
        return Outcome(prediction.energy, prediction.forces, vectors, prediction.features.scalars)


def golden_numbers(case: BackboneCase) -> dict[str, list]:
    """Numbers to store for a backbone: energies, and the forces and vectors of three atoms."""
    outcome = case.outcome(case.batch(example_molecules()))
    return {
        "energy": outcome.energy.tolist(),
        "forces": outcome.forces[:3].tolist(),
        "vectors": outcome.vectors[:3].tolist(),
    }


def _resolve(table: dict[str, str], given: Any, what: str) -> tuple[str, Any]:
    """Name and object of something given by name or by itself."""
    if isinstance(given, str):
        return given, lookup(table, given, what)
    return getattr(given, "__name__", str(given)), given


def _rotation() -> Tensor:
    """A rotation about no special axis, (3, 3) float64."""
    w, x, y, z = np.array([0.8, -0.3, 0.5, 0.2]) / math.sqrt(0.8**2 + 0.3**2 + 0.5**2 + 0.2**2)
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )


def _turned(batch: Batch, matrix: Tensor) -> Batch:
    """`batch` with all vectors multiplied by an orthogonal matrix."""
    return batch.replace(pos=batch.pos @ matrix.T, shift=batch.shift @ matrix.T, cell=batch.cell @ matrix.T)


def _check_turned(case: BackboneCase, matrix: Tensor) -> None:
    """Energies and scalars stay, forces and vectors turn along; for molecules and a crystal."""
    matrix = matrix.to(case.device)
    for batch in (case.batch(example_molecules()), case.batch([example_crystal()])):
        before, after = case.outcome(batch), case.outcome(_turned(batch, matrix))
        require_close(after.energy, before.energy, SYMMETRY, "energy")
        require_close(after.scalars, before.scalars, SYMMETRY, "scalar features")
        require_close(after.forces, before.forces @ matrix.T, SYMMETRY, "forces")
        require_close(after.vectors, before.vectors @ matrix.T, SYMMETRY, "vector head")


def constructor(case: BackboneCase) -> None:
    """Catches options without defaults or types, an unset cutoff, and options swallowed by ``**kwargs``."""
    require(issubclass(case.cls, Backbone), f"{case.cls} is not a subclass of Backbone")
    kinds = {p.kind for p in inspect.signature(case.cls).parameters.values()}
    require(inspect.Parameter.VAR_KEYWORD not in kinds, "the constructor takes **kwargs, so a misspelt option is no error")
    options = options_of(case.cls, case.options)
    missing = [name for name, value in options.items() if value is inspect.Parameter.empty]
    require(not missing, f"options without a default: {missing}")
    require(0 < case.cutoff < math.inf, f"cutoff={case.cutoff} Å")


def shapes(case: BackboneCase) -> None:
    """Catches a bare squeeze and forgotten special cases: one atom, no edges, one structure, several."""
    single = Atoms("O", [[0.0, 0.0, 0.0]])
    far = Atoms("CO", [[0.0, 0.0, 0.0], [0.0, 0.0, 3.0 * case.cutoff]])
    for what, structures, radius in (
        ("one atom", [single], None),
        ("two structures of one atom", [single, single], None),
        ("no edges", [far], case.cutoff),
        ("edges beyond the cutoff only", [far], None),
        ("one structure", example_molecules()[:1], None),
        ("three structures", example_molecules(), None),
    ):
        _check_shapes(case, case.batch(structures, radius=radius), what)


def _check_shapes(case: BackboneCase, batch: Batch, what: str) -> None:
    """Shapes, dtypes and finiteness of everything that comes out for a batch."""
    outcome, n = case.outcome(batch), batch.z.shape[0]
    require(outcome.energy.shape == (batch.n_systems,), f"{what}: energy {tuple(outcome.energy.shape)}")
    require(outcome.forces.shape == (n, 3), f"{what}: forces {tuple(outcome.forces.shape)}")
    require(outcome.vectors.shape == (n, 3), f"{what}: vector head {tuple(outcome.vectors.shape)}")
    features = case.potential().backbone(batch)
    require(isinstance(features, Features), f"{what}: the backbone returns {type(features).__name__}, not Features")
    ranks = {"scalars": 2, "vectors": 3, "tensors": 3}
    for name, value in features._asdict().items():
        if value is None and name == "tensors":
            continue
        require(value.dim() == ranks[name] and value.shape[0] == n, f"{what}: {name} {tuple(value.shape)}")
        require(value.dtype == batch.pos.dtype, f"{what}: {name} is {value.dtype} for positions in {batch.pos.dtype}")
    require(features.vectors.shape[1] == 3, f"{what}: vectors {tuple(features.vectors.shape)}")
    require(all(bool(torch.isfinite(value).all()) for value in outcome), f"{what}: not finite")


def rotation(case: BackboneCase) -> None:
    """Catches mixed-up axes, and norms or activations applied to components."""
    _check_turned(case, _rotation())


def reflection(case: BackboneCase) -> None:
    """Catches cross products and wrong parities: energies of mirror images must be equal."""
    _check_turned(case, -_rotation())


def translation(case: BackboneCase) -> None:
    """Catches absolute positions in a network."""
    for batch in (case.batch(example_molecules()), case.batch([example_crystal()])):
        offset = torch.tensor([3.1, -7.7, 11.3], device=batch.pos.device, dtype=batch.pos.dtype)
        before, after = case.outcome(batch), case.outcome(batch.replace(pos=batch.pos + offset))
        for name in Outcome._fields:
            require_close(getattr(after, name), getattr(before, name), SYMMETRY, name)


def permutation(case: BackboneCase) -> None:
    """Catches a dependence on the order of the atoms."""
    atoms = example_molecules()[0]
    order = np.argsort(waves((len(atoms),)))
    before, after = case.outcome(case.batch([atoms])), case.outcome(case.batch([atoms[order]]))
    index = torch.from_numpy(order).to(case.device)
    require_close(after.energy, before.energy, SYMMETRY, "energy")
    for name in ("forces", "vectors", "scalars"):
        require_close(getattr(after, name), getattr(before, name)[index], SYMMETRY, name)


def edge_order(case: BackboneCase) -> None:
    """Catches code that silently relies on sorted edges: a graph from elsewhere need not have them sorted."""
    batch = case.batch(example_molecules())
    order = torch.from_numpy(np.argsort(waves((len(batch.src),)))).to(case.device)
    shuffled = batch.replace(src=batch.src[order], dst=batch.dst[order], shift=batch.shift[order])
    before, after = case.outcome(batch), case.outcome(shuffled)
    for name in Outcome._fields:
        require_close(getattr(after, name), getattr(before, name), ROUNDING, name)


def edge_direction(case: BackboneCase) -> None:
    """Catches swapped `src` and `dst`: along a single edge, the center sees the neighbor and not the other way round."""
    backbone = case.potential().backbone
    batch = case.batch([Atoms("CO", [[0.0, 0.0, 0.0], [0.3, 0.4, 1.0]])])
    keep = batch.dst == 0  # the one edge with center 0 and neighbor 1
    batch = batch.replace(src=batch.src[keep], dst=batch.dst[keep], shift=batch.shift[keep])
    other = batch.replace(z=torch.tensor([6, 7], device=case.device)), batch.replace(z=torch.tensor([7, 8], device=case.device))
    with torch.no_grad():
        before, neighbor_changed, center_changed = (backbone(b).scalars for b in (batch, *other))
    seen = float((neighbor_changed - before)[0].abs().max())
    require(seen > NOT_ZERO, f"the center does not see its neighbor: features change by {seen:.1e}")
    leak = float((center_changed - before)[1].abs().max())
    require(leak == 0, f"a neighbor sees the center of a one-way edge: features change by {leak:.1e}")


def elements(case: BackboneCase) -> None:
    """Catches a network that does not see elements, or only those of the neighbors or only its own."""
    atoms = example_molecules()[1]
    energies = []
    for symbols in ("OHH", "SHH", "OLiH"):
        atoms.symbols = symbols
        energies.append(float(case.outcome(case.batch([atoms])).energy[0]))
    changes = np.abs(np.diff(energies))
    require((changes > NOT_ZERO).all(), f"energies of OHH, SHH, OLiH are {energies}")


def batching(case: BackboneCase) -> None:
    """Catches structures that see each other, and neighbor lists that disagree with all pairs (a large one is mixed in)."""
    structures = [*example_molecules(), example_cluster()]
    together = case.outcome(case.batch(structures))
    singles = [case.outcome(case.batch([atoms])) for atoms in structures]
    for name in Outcome._fields:
        require_close(getattr(together, name), torch.cat([getattr(s, name) for s in singles]), SYMMETRY, name)


def isolation(case: BackboneCase) -> None:
    """Catches norms or averages over the whole batch: the energy of one structure has no gradient on another."""
    batch = case.batch(example_molecules())
    pos = batch.pos.clone().requires_grad_()
    energy = case.potential()(batch.replace(pos=pos), need_forces=False).energy
    (gradient,) = torch.autograd.grad(energy[1], pos)
    own = batch.system == 1
    inside, outside = float(gradient[own].abs().max()), float(gradient[~own].abs().max())
    require(inside > NOT_ZERO, f"the energy's gradient on its own structure is {inside:.1e}")
    require(outside == 0, f"the energy of structure 1 has a gradient of {outside:.1e} on other structures")


def finite_differences(case: BackboneCase) -> None:
    """Catches a wrong sign or a detached part of the forces: they are -dE/dpos, for a molecule and in a crystal."""
    for atoms in (example_molecules()[1], example_crystal()):
        potential, batch = case.potential(), case.batch([atoms])
        numeric = _numeric_forces(potential, lambda moved: case.batch(moved), atoms)
        require_close(potential(batch).forces, numeric.to(case.device), 1e-7, "forces against finite differences")


def _numeric_forces(potential: Potential, make: Callable[[list[Atoms]], Batch], atoms: Atoms, h: float = 1e-3) -> Tensor:
    """-dE/dpos (n, 3) of fourth order: all displaced copies in one batch."""
    moved = []
    for index in np.ndindex(len(atoms), 3):
        for step in (2, 1, -1, -2):
            copy = atoms.copy()
            copy.positions[index] += step * h
            moved.append(copy)
    with torch.no_grad():
        energy = potential(make(moved), need_forces=False).energy.cpu().reshape(len(atoms), 3, 4)
    return -(energy @ torch.tensor([-1.0, 8.0, -8.0, 1.0], dtype=torch.float64)) / (12 * h)


def second_derivatives(case: BackboneCase) -> None:
    """Catches kernels whose second derivative is wrong: first derivatives alone would pass, and training on forces not."""
    batch, potential = case.batch(example_molecules()[1:2]), case.potential()
    pos = batch.pos.clone().requires_grad_()

    def energy(moved: Tensor) -> Tensor:
        return potential(batch.replace(pos=moved), need_forces=False).energy

    try:
        torch.autograd.gradgradcheck(energy, (pos,), fast_mode=True, nondet_tol=1e-12)
    except RuntimeError as error:
        raise AssertionError(f"gradgradcheck: {error}") from error


def force_loss_gradient(case: BackboneCase) -> None:
    """Catches weights whose gradient under a force loss is wrong or missing, against finite differences."""
    potential, batch = case.potential().train(), case.batch(example_molecules()[:2])
    parameters = [p for p in potential.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    direction = [torch.from_numpy(waves(p.shape, i)).to(p) for i, p in enumerate(parameters)]
    weights = torch.from_numpy(waves(batch.pos.shape)).to(batch.pos)

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            for p, p0, d in zip(parameters, start, direction, strict=True):
                p.copy_(p0 + step * d)
        forces = potential(batch).forces
        return (forces * weights).sum() + forces.square().sum()

    gradients = torch.autograd.grad(loss(0.0), parameters, allow_unused=True)
    analytic = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    h = 1e-4
    values = torch.stack([loss(step * h).detach() for step in (2, 1, -1, -2)])
    numeric = (values * values.new_tensor([-1.0, 8.0, -8.0, 1.0])).sum() / (12 * h)
    require_close(analytic.reshape(1), numeric.reshape(1), 1e-6, "gradient of a force loss by the weights")


def isolated_atoms(case: BackboneCase) -> None:
    """Catches NaN gradients of norms of zero vectors: an atom without neighbors must not spoil a force loss."""
    lone = Atoms("N", [[0.0, 0.0, 0.0]])
    far = Atoms("CO", [[0.0, 0.0, 0.0], [0.0, 0.0, 3.0 * case.cutoff]])
    near = example_molecules()[1] + Atoms("H", [[0.0, 0.0, 2.0 * case.cutoff]])
    for structures in ([lone], [far], [near], [*example_molecules(), lone, far]):
        potential = case.potential().train()
        prediction = potential(case.batch(structures))
        (prediction.forces.square().sum() + prediction.energy.square().sum()).backward()
        for name, p in potential.named_parameters():
            require(p.grad is None or torch.isfinite(p.grad).all(), f"gradient of {name} is not finite")


def smooth_cutoff(case: BackboneCase) -> None:
    """Catches jumps of energies, forces or vectors, and forces that miss part of the energy, as an atom crosses the cutoff."""
    start, steps = _crossing(case, -0.3), (1e-4, 1e-5)
    reach = abs(float(_crossing(case, -0.5).energy - start.energy))
    require(reach > 1e-7, f"moving an atom within the cutoff changes the energy by {reach:.1e} only")
    jumps = {name: [] for name in ("energy", "forces", "vectors")}
    for step in steps:
        inside, outside = _crossing(case, -step), _crossing(case, step)
        for name, found in jumps.items():
            found.append(float((getattr(outside, name) - getattr(inside, name)).abs().max()))
        slope = -float(inside.forces[2] @ _CROSSING + outside.forces[2] @ _CROSSING) / 2
        error = abs(float(outside.energy - inside.energy) / (2 * step) - slope)
        require(error < 1e-4, f"energy changes at a rate that differs by {error:.1e} eV/Å from the force on the crossing atom")
    for name, (coarse, fine) in jumps.items():
        require(fine < 0.2 * coarse or fine < 1e-9, f"{name} jumps by {fine:.1e} ({coarse:.1e} over ten times the way)")


_CROSSING = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)


def _crossing(case: BackboneCase, beyond: float) -> Outcome:
    """What a diatomic says of which a third atom is `beyond` Å outside the cutoff of one atom, and farther from the other."""
    third = (case.cutoff + beyond) * _CROSSING.numpy()
    outcome = case.outcome(case.batch([Atoms("COH", [[0.0, 0.0, 0.0], [-0.7, 0.5, -0.8], third])]))
    return Outcome(*(value.cpu() for value in outcome))


def skin(case: BackboneCase) -> None:
    """Catches edges beyond the cutoff that count: with a skin, or with all pairs, nothing may change."""
    water, ammonia = example_molecules()[1], distorted(molecule("NH3"))
    ammonia.positions += np.array([0.0, 0.3, case.cutoff - 0.2])  # some pairs inside, some outside
    atoms = water + ammonia
    exact = case.outcome(case.batch([atoms], radius=case.cutoff))
    for what, radius in (("a skin of 1 Å", case.cutoff + 1.0), ("all pairs", None)):
        wider = case.outcome(case.batch([atoms], radius=radius))
        for name in Outcome._fields:
            require_close(getattr(wider, name), getattr(exact, name), ROUNDING, f"{name} with {what}")
    none = case.outcome(case.batch([atoms], radius=0.2))
    require(abs(float(none.energy - exact.energy)) > NOT_ZERO, "edges make no difference at all")


def periodic_images(case: BackboneCase) -> None:
    """Catches ignored image shifts: a supercell has the energy of its cells, and their forces."""
    for atoms in (example_crystal(), bulk("Cu", "fcc", a=3.6)):
        repeats = (2, 1, 3)
        cell, supercell = case.outcome(case.batch([atoms])), case.outcome(case.batch([atoms.repeat(repeats)]))
        number = math.prod(repeats)
        require_close(supercell.energy, cell.energy * number, SYMMETRY, "energy of a supercell")
        # Pitfall: where symmetry makes an atom's vector features vanish, their norm has a cusp, and the forces of a network
        # that uses norms are rounding noise times a finite slope. So forces are compared without symmetry only.
        if len(atoms) > 1:
            require_close(supercell.forces, cell.forces.repeat(number, 1), SYMMETRY, "forces in a supercell")


def vector_head(case: BackboneCase) -> None:
    """Catches vector heads that do not turn with the structure when used as forces, or ignore the potential's scale."""
    matrix = _rotation().to(case.device)
    batch, potential = case.batch(example_molecules()), case.potential(forces="direct")
    with torch.no_grad():
        before, after = potential(batch), potential(_turned(batch, matrix))
        raw = potential.force_head(before.features, batch)
    require_close(after.forces, before.forces @ matrix.T, SYMMETRY, "direct forces")
    require_close(before.forces, raw * potential.scale, ROUNDING, "direct forces against scale times the head's output")


def new_heads(case: BackboneCase) -> None:
    """Catches heads that share weights: two heads of a backbone are two sets of parameters."""
    backbone = case.potential().backbone
    for make in (backbone.scalar_head, backbone.vector_head):
        heads = make(), make()
        first, second, own = ({id(p) for p in module.parameters()} for module in (*heads, backbone))
        require(not first & second, f"{make.__name__} hands out the same parameters twice")
        require(not first & own, f"{make.__name__} hands out the backbone's parameters")


def node_vectors(case: BackboneCase) -> None:
    """Catches silently ignored force encodings: they are refused with a ConfigError, or change things and turn along."""
    backbone, batch = case.potential().backbone, case.batch(example_molecules())
    vectors = torch.from_numpy(waves((batch.z.shape[0], 3))).to(batch.pos)
    matrix = _rotation().to(batch.pos)
    try:
        with torch.no_grad():
            encoded = backbone(batch, vectors)
            turned = backbone(_turned(batch, matrix), vectors @ matrix.T)
            plain = backbone(batch)
    except ConfigError:
        return
    require_close(turned.scalars, encoded.scalars, SYMMETRY, "scalar features with node_vectors")
    require_close(turned.vectors, torch.einsum("ij,njc->nic", matrix, encoded.vectors), SYMMETRY, "vector features")
    change = float((encoded.scalars - plain.scalars).abs().max())
    require(change > NOT_ZERO, f"node_vectors are accepted, but change the features by {change:.1e} only")


def input_unchanged(case: BackboneCase) -> None:
    """Catches in-place operations on the batch, forwards and backwards."""
    batch = case.batch([*example_molecules(), example_crystal()])
    before = {name: value.clone() for name, value in _tensors_of(batch).items()}
    prediction = case.potential().train()(batch)
    (prediction.forces.square().sum() + prediction.energy.sum()).backward()
    for name, value in _tensors_of(batch).items():
        require_same_bits(value, before[name], f"batch.{name} after a step")
        require(not value.requires_grad, f"batch.{name} requires a gradient after a step")


def repeatable(case: BackboneCase) -> None:
    """Catches hidden state and randomness in a forward pass: the same batch twice gives the same bits (on a CPU)."""
    batch, potential = case.batch(example_molecules()), case.potential()
    first, second = potential(batch), potential(batch)
    for name in ("energy", "forces"):
        value, expected = getattr(second, name), getattr(first, name)
        if case.device == "cpu":
            require_same_bits(value, expected, f"{name} the second time")
        else:
            require_close(value, expected, ROUNDING, f"{name} the second time")


def saved_weights(case: BackboneCase) -> None:
    """Catches state outside the state dict: saved as safetensors and loaded, predictions have the same bits."""
    from safetensors.torch import load, save

    batch, potential = case.batch(example_molecules()), case.potential()
    stored = load(save({name: value.cpu().contiguous() for name, value in potential.state_dict().items()}))
    fresh = Potential(case.cls(**case.options), scale=0.3).to(device=case.device, dtype=torch.float64).eval()
    fresh.load_state_dict(stored, strict=True)
    one, other = potential(batch), fresh(batch)
    for name in ("energy", "forces"):
        value, expected = getattr(other, name), getattr(one, name)
        if case.device == "cpu":
            require_same_bits(value, expected, f"{name} of the loaded weights")
        else:
            require_close(value, expected, ROUNDING, f"{name} of the loaded weights")


def golden(case: BackboneCase) -> None:
    """Catches any unintended change of the function that a set of weights stands for."""
    if case.golden is None:
        raise SkipTest(f"no golden numbers are stored for {case.name}")
    for name, value in golden_numbers(case).items():
        stored = torch.tensor(case.golden[name], dtype=torch.float64)
        require_close(torch.tensor(value, dtype=torch.float64), stored, GOLDEN, f"{name} against the stored number")


def single_precision(case: BackboneCase) -> None:
    """Catches cancellation and constants in the wrong dtype: float32 agrees with float64 to 1e-5."""
    double = case.outcome(case.batch(example_molecules()))
    single = case.outcome(case.batch(example_molecules(), dtype=torch.float32))
    require(single.forces.dtype == torch.float32, f"forces are {single.forces.dtype} for positions in float32")
    for name in Outcome._fields:
        require_close(getattr(single, name), getattr(double, name), SINGLE, f"{name} in float32")


def gpu_agrees(case: BackboneCase) -> None:
    """Catches kernels that differ between devices: CUDA agrees with the CPU to 1e-5 in float32."""
    if not torch.cuda.is_available():
        raise SkipTest("there is no CUDA device")
    structures = [*example_molecules(), example_crystal()]
    batch = batch_of(structures, case.cutoff, dtype=torch.float32)
    cpu, gpu = case.outcome(batch), case.outcome(batch.to("cuda"))
    for name in Outcome._fields:
        require_close(getattr(gpu, name).cpu(), getattr(cpu, name), SINGLE, f"{name} on CUDA")


Probe = Callable[[Any], None]

#: Every probe of `check_backbone`, in the order from plain to subtle.
BACKBONE_PROBES: list[Probe] = [
    constructor,
    shapes,
    rotation,
    reflection,
    translation,
    permutation,
    edge_order,
    edge_direction,
    elements,
    batching,
    isolation,
    finite_differences,
    second_derivatives,
    force_loss_gradient,
    isolated_atoms,
    smooth_cutoff,
    skin,
    periodic_images,
    vector_head,
    new_heads,
    node_vectors,
    input_unchanged,
    repeatable,
    saved_weights,
    golden,
    single_precision,
    gpu_agrees,
]


# --------------------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class ObjectiveCase:
    """An objective to probe, and the potential to probe it with.

    Attributes
    ----------
    name : str
        For messages.
    cls : type
        The objective.
    options : dict
        Its options.
    backbone : BackboneCase
        What the potential is made of.
    """

    name: str
    cls: type[Objective]
    options: dict[str, Any]
    backbone: BackboneCase

    @classmethod
    def of(
        cls,
        objective: str | type[Objective],
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        backbone: str | type[Backbone] = "torchmd_net",
        backbone_options: Mapping[str, Any] | None = None,
    ) -> ObjectiveCase:
        """A case from names in the registry or classes."""
        name, found = _resolve(OBJECTIVES, objective, "objective")
        return cls(name, found, dict(options or {}), BackboneCase.of(backbone, backbone_options, device))

    @property
    def device(self) -> str:
        """Where to run."""
        return self.backbone.device

    def build(self, *, forces: str = "gradient", weight: float = 1.0, **keywords: Any) -> tuple[Objective, Potential]:
        """The objective and a potential, both with reproducible weights and ready to train."""
        potential = self.backbone.potential(forces=forces)
        objective = self.cls(weight=weight, **{"options": self.options, **keywords})
        objective.build(potential, columns_of(self.batch()))
        fill_weights(objective)
        return objective.to(device=self.device, dtype=torch.float64).train(), potential.train()

    def batch(self, dtype: torch.dtype = torch.float64) -> Batch:
        """Labelled structures."""
        return with_labels(self.backbone.batch(example_molecules(), dtype=dtype))

    def rng(self, seed: int = 0) -> torch.Generator:
        """A source of noise."""
        return torch.Generator(device=self.device).manual_seed(seed)

    def terms(self, batch: Batch | None = None, **keywords: Any) -> dict[str, Tensor]:
        """The terms of a freshly built objective."""
        objective, potential = self.build(**keywords)
        return objective(potential, self.batch() if batch is None else batch, self.rng())


def columns_of(batch: Batch) -> Any:
    """What objectives read of a training set, from a batch: `z`, `pos`, `ptr` and `targets` as numpy columns."""
    return SimpleNamespace(
        z=batch.z.cpu().numpy(),
        pos=batch.pos.double().cpu().numpy(),
        ptr=np.concatenate([[0], np.cumsum(batch.n_atoms.cpu().numpy())]),
        targets={name: value.cpu().numpy() for name, value in batch.targets.items()},
    )


def terms_are_scalars(case: ObjectiveCase) -> None:
    """Catches unreduced losses and terms without a graph: named finite scalars that can be minimized."""
    terms = case.terms()
    require(len(terms) > 0, "there are no terms")
    for name, value in terms.items():
        require(value.shape == (), f"term {name} has shape {tuple(value.shape)}")
        require(torch.isfinite(value), f"term {name} is {float(value)}")
        require(value.requires_grad, f"term {name} depends on no weight")


def same_rng_same_value(case: ObjectiveCase) -> None:
    """Catches noise from a generator other than the one given: the same seed gives the same bits."""
    for name, value in case.terms().items():
        require_same_bits(value, case.terms()[name], f"term {name} with the same seed")


def all_weights_train(case: ObjectiveCase) -> None:
    """Catches heads that were built and never used, and weights cut off by a detach."""
    objective, potential = case.build()
    sum(objective(potential, case.batch(), case.rng()).values()).backward()
    for owner, module in (("potential", potential), ("objective", objective)):
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            require(p.grad is not None, f"{owner}.{name} gets no gradient")
            require(torch.isfinite(p.grad).all(), f"the gradient of {owner}.{name} is not finite")
            require(owner == "potential" or bool(p.grad.any()), f"the gradient of {owner}.{name} is 0 throughout")


def nothing_else_changes(case: ObjectiveCase) -> None:
    """Catches changed inputs, buffers or modes, and touched global state: random generators, default dtype."""
    objective, potential = case.build()
    batch = case.batch()
    random_states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    before = {name: value.clone() for name, value in _tensors_of(batch).items()}
    state = {name: value.clone() for name, value in potential.state_dict().items()}
    sum(objective(potential, batch, case.rng()).values()).backward()
    require_same_bits(torch.get_rng_state(), random_states[0], "torch's global random state")
    require(np.array_equal(np.random.get_state()[1], random_states[1]), "numpy's global random state changed")  # noqa: NPY002
    require(random.getstate() == random_states[2], "Python's global random state changed")
    require(torch.get_default_dtype() == torch.float32, f"the default dtype is {torch.get_default_dtype()} now")
    require(potential.training and objective.training, "the potential or the objective left training mode")
    for name, value in _tensors_of(batch).items():
        require_same_bits(value, before[name], f"batch.{name} after a step")
    for name, value in potential.state_dict().items():
        require_same_bits(value, state[name], f"{name} of the potential after a step without optimizer")


def weight_zero_is_supervised(case: ObjectiveCase) -> None:
    """Catches auxiliary terms that leak into the baseline: weight 0 gives its terms and gradients to the last bit."""
    plain = ObjectiveCase.of("supervised", device=case.device, backbone=case.backbone.cls, backbone_options=case.backbone.options)
    results = []
    for subject, weight in ((plain, 1.0), (case, 0.0)):
        objective, potential = subject.build(weight=weight)
        terms = objective(potential, case.batch(), case.rng())
        sum(terms.values()).backward()
        results.append((terms, {name: p.grad for name, p in potential.named_parameters()}))
    (expected, expected_gradients), (terms, gradients) = results
    require(set(terms) >= set(expected), f"terms {sorted(terms)} lack some of {sorted(expected)}")
    for name, value in terms.items():
        if name in expected:
            require_same_bits(value, expected[name], f"term {name} at weight 0")
        else:
            require(float(value) == 0, f"term {name} is {float(value)} at weight 0")
    for name, gradient in gradients.items():
        if gradient is None or expected_gradients[name] is None:
            require(gradient is expected_gradients[name], f"{name} has a gradient in one of the two only")
        else:
            require_same_bits(gradient, expected_gradients[name], f"gradient of {name} at weight 0")


def weight_scales_the_rest(case: ObjectiveCase) -> None:
    """Catches weights applied twice or to the wrong term: supervised terms stay, the others are proportional to it."""
    single, double = case.terms(weight=1.0), case.terms(weight=2.0)
    require(set(single) == set(double), f"terms {sorted(single)} at weight 1 and {sorted(double)} at weight 2")
    for name, value in single.items():
        factor = 1.0 if name in ("energy", "forces") else 2.0
        require_close(double[name].reshape(1), factor * value.reshape(1), ROUNDING, f"term {name} at weight 2")


def schedule(case: ObjectiveCase) -> None:
    """Catches schedules that start or end at the wrong weight."""
    objective, _ = case.build(weight=0.5)
    expected = {"constant": (0.5, 0.5, 0.5), "decay": (0.5, 0.475, 0.0), "warmup": (0.0, 0.25, 0.5)}
    for kind, values in expected.items():
        objective, _ = case.build(weight=0.5, weight_schedule=kind)
        for progress, value in zip((0.0, 0.05, 1.0), values, strict=True):
            objective.progress = progress
            found = objective.current_weight()
            require(abs(found - value) < 1e-12, f"{kind}: weight {found} at progress {progress}, expected {value}")


def requirements(case: ObjectiveCase) -> None:
    """Catches labels that are used and not declared, or declared and not used."""
    batch = case.batch()
    objective, potential = case.build()
    needed = objective.requires
    require(isinstance(needed, frozenset), f"requires is a {type(needed).__name__}, not a frozenset")
    only = batch.replace(targets={name: value for name, value in batch.targets.items() if name in needed})
    objective(potential, only, case.rng())
    for name in needed & set(batch.targets):
        lacking = batch.replace(targets={key: value for key, value in batch.targets.items() if key != name})
        try:
            objective(potential, lacking, case.rng())
        except KeyError:
            continue
        raise AssertionError(f"requires names {name!r}, but the objective does not read it")


def inference_is_unaffected(case: ObjectiveCase) -> None:
    """Catches objectives that leave something in the potential: its weights and predictions are those without one."""
    plain = case.backbone.potential()
    _, potential = case.build()
    batch = case.batch()
    require(potential.state_dict().keys() == plain.state_dict().keys(), "the potential has other weights than before")
    one, other = plain.eval()(batch), potential.eval()(batch)
    for name in ("energy", "forces"):
        require_close(getattr(other, name), getattr(one, name), 0.0, f"predicted {name}")


def unknown_options(case: ObjectiveCase) -> None:
    """Catches misspelt options that are silently ignored."""
    try:
        case.cls(options={**case.options, "sgima": 0.1})
    except ConfigError as error:
        require("sgima" in str(error), f"the error does not name the option: {error}")
        return
    raise AssertionError("an option that does not exist was accepted")


def lone_atoms(case: ObjectiveCase) -> None:
    """Catches NaN from structures of one atom and from atoms without neighbors."""
    lone = Atoms("N", [[0.0, 0.0, 0.0]])
    far = example_molecules()[1] + Atoms("H", [[0.0, 0.0, 2.0 * case.backbone.cutoff]])
    objective, potential = case.build()
    batch = with_labels(case.backbone.batch([lone, far, lone]))
    sum(objective(potential, batch, case.rng()).values()).backward()
    for name, p in [*potential.named_parameters(), *objective.named_parameters()]:
        require(p.grad is None or torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite")


def works_in_single_precision(case: ObjectiveCase) -> None:
    """Catches mixed dtypes: float32 geometry and weights with float64 labels."""
    objective, potential = (module.float() for module in case.build())
    terms = objective(potential, case.batch(torch.float32), case.rng())
    sum(terms.values()).backward()
    require(all(torch.isfinite(value) for value in terms.values()), f"terms in float32: {terms}")


#: Every probe of `check_objective` that any objective must pass.
OBJECTIVE_PROBES: list[Probe] = [
    terms_are_scalars,
    same_rng_same_value,
    all_weights_train,
    nothing_else_changes,
    weight_zero_is_supervised,
    weight_scales_the_rest,
    schedule,
    requirements,
    inference_is_unaffected,
    unknown_options,
    lone_atoms,
    works_in_single_precision,
]


# ------------------------------------------------------------------------------------- NDeM on a potential known exactly


class HarmonicBackbone(Backbone):
    """Stands in for a network: its features are the displacement d from ``batch.extras["origin"]`` and d²/2.

    With its heads, every atom sits in an isotropic spring: E = k d²/2 and F = -k d, in units of the potential's scale.
    So F(X) - F(X + epsilon) = +k epsilon holds exactly, and what an objective makes of it can be computed by hand.

    Parameters
    ----------
    stiffness
        k of all atoms, or by atomic number; in 1/Å², as energies are in units of the scale.
    """

    tiny: ClassVar[dict[str, Any]] = {}

    def __init__(self, *, stiffness: float | Mapping[int, float] = 20.0) -> None:
        super().__init__()
        self.cutoff = 3.0
        by_element = stiffness if isinstance(stiffness, Mapping) else dict.fromkeys(range(MAX_Z + 1), stiffness)
        self.stiffness = torch.zeros(MAX_Z + 1, dtype=torch.float64)
        for z, value in by_element.items():
            self.stiffness[z] = value

    def forward(self, batch: Batch, node_vectors: Tensor | None = None) -> Features:
        """d²/2 as scalars (N, 1), d as vectors (N, 3, 1)."""
        displacement = batch.pos - batch.extras["origin"]
        return Features(displacement.square().sum(-1, keepdim=True) / 2, displacement.unsqueeze(-1))

    def scalar_head(self) -> Head:
        """Energy of the springs."""
        return HarmonicHead(self.stiffness, vector=False)

    def vector_head(self) -> Head:
        """Forces of the springs: as noisy-force head, an oracle."""
        return HarmonicHead(self.stiffness, vector=True)


class HarmonicHead(Head):
    """Energy (N,) or force (N, 3) of atoms in springs; the spring constants are its weights."""

    def __init__(self, stiffness: Tensor, vector: bool) -> None:
        super().__init__()
        self.stiffness, self.vector = nn.Parameter(stiffness.clone()), vector

    def forward(self, features: Features, batch: Batch) -> Tensor:
        """k d²/2, or -k d."""
        k = self.stiffness.index_select(0, batch.z)
        return -k.unsqueeze(-1) * features.vectors[:, :, 0] if self.vector else k * features.scalars[:, 0]


#: Spring constants of the oracle probes, different for each element, and the scale of their potential in eV.
SPRINGS, SPRING_SCALE = {1: 12.0, 6: 45.0, 7: 38.0, 8: 27.0}, 0.7


def harmonic_case(
    cls: type[NDeM], stiffness: float | Mapping[int, float], **options: Any
) -> tuple[NDeM, Potential, Batch, torch.Generator]:
    """An NDeM objective on springs, with its noisy-force head an oracle: (objective, potential, labelled batch, rng)."""
    potential = Potential(HarmonicBackbone(stiffness=stiffness), scale=SPRING_SCALE).double().train()
    structures = example_molecules()
    origin = torch.from_numpy(np.concatenate([atoms.positions for atoms in structures]))
    batch = batch_of(structures, 3.0).replace(extras={"origin": origin})
    batch = batch.replace(pos=origin + 0.1 * torch.from_numpy(waves(origin.shape)))
    prediction = potential(batch, create_graph=False)
    batch = batch.replace(targets={"energy": prediction.energy, "forces": prediction.forces.double()})
    objective = cls(options=options)
    objective.build(potential, columns_of(batch))
    return objective.double().train(), potential, batch, torch.Generator().manual_seed(0)


def _ndem_term(cls: type[NDeM], stiffness: Any, change: Callable[[NDeM], None] | None = None, **options: Any) -> float:
    """NDeM's term on springs, after an optional change to the objective."""
    objective, potential, batch, rng = harmonic_case(cls, stiffness, **options)
    if change is not None:
        change(objective)
    return float(objective(potential, batch, rng)["ndem"].detach())


def oracle(case: ObjectiveCase) -> None:
    """Catches a wrong sign, unit or scale in NDeM's relation: on springs, with an oracle for a head, the residual is 0."""
    sigma = 0.05
    for options in (
        {"stiffness": 1 / sigma, "sigma": sigma, "target": "paper"},
        {"stiffness": 1 / sigma, "sigma": sigma, "target": "paper", "ratio": 1.0, "grad_main": "flow"},
        {"stiffness": 1 / sigma, "sigma": sigma, "target": "paper", "grad_main": "label"},
        {"stiffness": 30.0, "sigma": (0.01, 0.2), "target": "kappa", "kappa": 30.0 * SPRING_SCALE},
        {"stiffness": 30.0, "target": "kappa", "kappa": 30.0 * SPRING_SCALE, "reuse_main_head": True},
    ):
        value = _ndem_term(case.cls, **options)
        require(value < 1e-24, f"the mean square of the residual is {value:.1e} with {options}; it must vanish")


def oracle_by_element(case: ObjectiveCase) -> None:
    """Catches constants given to the wrong element: springs by element, and the curvature <F²>/kT of their own forces."""
    temperature = 300.0

    def exact(objective: NDeM) -> None:
        for z, k in SPRINGS.items():
            objective.curvature.constants[z] = k * SPRING_SCALE

    value = _ndem_term(case.cls, SPRINGS, exact, target="boltzmann", temperature=temperature)
    require(value < 1e-24, f"the mean square of the residual is {value:.1e} with exact constants; it must vanish")
    objective, _, batch, _ = harmonic_case(case.cls, SPRINGS, target="boltzmann", temperature=temperature)
    for z in SPRINGS:
        square = batch.targets["forces"][batch.z == z].square().mean()
        expected = square / (BOLTZMANN * temperature)
        require_close(objective.curvature.constants[z].reshape(1), expected.reshape(1), ROUNDING, f"curvature of element {z}")


def wrong_signs(case: ObjectiveCase) -> None:
    """Catches an oracle probe that would pass with anything: with a sign turned the residual must not vanish."""
    sigma = 0.05

    def turned_head(objective: NDeM) -> None:
        with torch.no_grad():
            objective.noisy_force_head.stiffness.neg_()

    def turned_target(objective: NDeM) -> None:
        target = objective.target
        objective.target = lambda *given: -target(*given)

    for what, change in (("head", turned_head), ("target", turned_target)):
        value = _ndem_term(case.cls, 1 / sigma, change, sigma=sigma, target="paper")
        require(value > 0.1, f"with the sign of the {what} turned the mean square of the residual is {value:.1e}")


def no_forces_is_denoising(case: ObjectiveCase) -> None:
    """Catches anything but -(prediction) - epsilon/sigma where a potential has no forces: classic denoising."""
    objective, potential = case.build(
        forces="none",
        supervised=SupervisedLoss(force_weight=0.0),
        options={**case.options, "grad_main": "stop", "target": "paper", "loss_on": "all", "reduction": "element_mean"},
    )
    batch, options = case.batch(), objective.options
    value = objective(potential, batch, case.rng())["ndem"]
    noise_options = {"cutoff": potential.backbone.cutoff, "sigma": options.sigma, "ratio": options.ratio}
    kinds = {"sample": options.sigma_sample, "per": options.sigma_per}
    noisy, noise = masked_gaussian(batch, case.rng(), **noise_options, **kinds)
    predicted = -objective.noisy_forces(potential, noisy)  # Noisy Nodes' head predicts the noise, with the other sign
    expected = (predicted - noise.epsilon / noise.sigma).square().mean()
    require_close(value.reshape(1), expected.reshape(1), ROUNDING, "NDeM without forces against denoising")


def main_head_gradient(case: ObjectiveCase) -> None:
    """Catches a dropped detach: with stop and label, NDeM's term has no gradient on the main head; with flow it has."""
    sizes = {}
    for grad_main in ("stop", "label", "flow", 0.5):
        objective, potential = case.build(options={**case.options, "grad_main": grad_main, "reuse_main_head": False})
        term = objective(potential, case.batch(), case.rng())["ndem"]
        parameters = [p for p in potential.energy_head.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(term, parameters, allow_unused=True)
        sizes[grad_main] = [torch.zeros(1) if g is None else g.reshape(-1) for g in gradients]
    for grad_main in ("stop", "label"):
        largest = max(float(g.abs().max()) for g in sizes[grad_main])
        require(largest == 0, f"grad_main={grad_main!r}: gradient of {largest:.1e} on the main head")
    require_close(torch.cat(sizes[0.5]), 0.5 * torch.cat(sizes["flow"]), ROUNDING, "gradient with grad_main=0.5")


def reduction(case: ObjectiveCase) -> None:
    """Catches sums where means belong: the paper's sum over x, y, z is three times the mean over components."""
    terms = {}
    for kind in ("atom_sum_xyz", "element_mean"):
        terms[kind] = case.terms(options={**case.options, "reduction": kind})["ndem"].reshape(1)
    require_close(terms["atom_sum_xyz"], 3 * terms["element_mean"], ROUNDING, "atom_sum_xyz against element_mean")


def loss_on(case: ObjectiveCase) -> None:
    """Catches a mask that is ignored: the loss on all atoms is that on the moved and on the others, by their number."""
    ratio = 0.5
    options = {**case.options, "ratio": ratio}
    every = case.terms(options=options)["ndem"]
    masked = case.terms(options={**options, "loss_on": "masked"})["ndem"]
    without_others = case.terms(options={**options, "unmasked_weight": 0.0})["ndem"]
    batch = case.batch()
    objective, potential = case.build(options=options)
    _, noise = masked_gaussian(
        batch,
        case.rng(),
        cutoff=potential.backbone.cutoff,
        sigma=objective.options.sigma,
        ratio=ratio,
        sample=objective.options.sigma_sample,
        per=objective.options.sigma_per,
    )
    moved = noise.mask.double().mean()
    require_close(without_others.reshape(1), (masked * moved).reshape(1), ROUNDING, "loss with unmasked_weight=0")
    require(float(every) > float(without_others) * 1.0001, "atoms that were not moved do not count with loss_on='all'")


def net_target(case: ObjectiveCase) -> None:
    """Catches a target with a net component: with all atoms moved, epsilon/sigma sums to 0 in every structure."""
    objective, potential = case.build(options={**case.options, "ratio": 1.0, "target": "paper"})
    batch = case.batch()
    _, noise = masked_gaussian(batch, case.rng(), cutoff=potential.backbone.cutoff, sigma=0.05, ratio=1.0)
    target = objective.target(potential, batch, noise)
    net = torch.zeros(batch.n_systems, 3, dtype=target.dtype, device=target.device).index_add(0, batch.system, target)
    size, largest = float(target.abs().max()), float(net.abs().max())
    require(size > 0.1 and largest < 1e-12, f"targets up to {size:.1e} sum to {largest:.1e} in a structure")


def stationary_solution(case: ObjectiveCase) -> None:
    """Catches a wrong balance of terms: the optimum on a harmonic mode is the one that theory gives.

    Atoms sit in springs of stiffness K with thermal variance s², and noise has variance sigma². With weight w of the
    force term, lambda of NDeM's and r = s² / (s² + sigma²), the main head's optimal stiffness is
    (w K + lambda (1 - r) / sigma) / (w + lambda (1 - r)) when gradients flow through F(X): pulled toward 1/sigma. With
    stop-gradient or labels it is K.
    """
    for grad_main in ("flow", "stop", "label"):
        found, expected = _optimal_stiffness(case.cls, grad_main)
        error = abs(found / expected - 1)
        require(error < 0.02, f"grad_main={grad_main!r}: stiffness {found:.2f} at the optimum, theory says {expected:.2f}")


def _optimal_stiffness(cls: type[NDeM], grad_main: str, n: int = 20_000) -> tuple[float, float]:
    """Main stiffness at the optimum on n atoms in springs, and what theory says: both in units of the scale."""
    stiffness, s, sigma, w, strength = 60.0, 0.06, 0.05, 3.0, 5.0
    rng = torch.Generator().manual_seed(1)
    pos = s * torch.randn((n, 3), generator=rng, dtype=torch.float64)
    batch = make_batch(np.ones(n), pos.numpy(), np.ones(n, dtype=np.int64), 3.0, dtype=torch.float64)
    labels = {"energy": torch.zeros(n, dtype=torch.float64), "forces": -stiffness * SPRING_SCALE * pos}
    batch = batch.replace(targets=labels, extras={"origin": torch.zeros_like(pos)})
    potential = Potential(HarmonicBackbone(), scale=SPRING_SCALE).double().train()
    # Choice: every atom is a structure of its own, of which at least one atom is moved: all, and none is centered.
    options = {"sigma": sigma, "ratio": 0.5, "grad_main": grad_main, "reduction": "element_mean"}
    objective = cls(SupervisedLoss(energy_weight=0.0, force_weight=w), weight=strength, options=options)
    objective.build(potential)
    main, noisy = potential.energy_head.stiffness, objective.double().noisy_force_head.stiffness

    def gradient() -> Tensor:
        terms = objective(potential, batch, torch.Generator().manual_seed(2))
        slopes = torch.autograd.grad(sum(terms.values()), [main, noisy])
        return torch.stack([slope[1] for slope in slopes])

    # The loss is quadratic in the two spring constants (of hydrogen), so that one Newton step from anywhere finds the
    # stationary point; the Hessian's columns are differences of gradients.
    with torch.no_grad():
        main.zero_(), noisy.zero_()
    start, columns = gradient(), []
    for parameter in (main, noisy):
        with torch.no_grad():
            parameter[1] = 1.0
        columns.append(gradient() - start)
        with torch.no_grad():
            parameter[1] = 0.0
    found = torch.linalg.solve(torch.stack(columns, dim=1), -start)[0]
    pull = strength * (1 - s * s / (s * s + sigma * sigma)) if grad_main == "flow" else 0.0
    return float(found), (w * stiffness + pull / sigma) / (w + pull)


#: Further probes for `NDeM` and its subclasses.
NDEM_PROBES: list[Probe] = [
    oracle,
    oracle_by_element,
    wrong_signs,
    no_forces_is_denoising,
    main_head_gradient,
    reduction,
    loss_on,
    net_target,
    stationary_solution,
]
