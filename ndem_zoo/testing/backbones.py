"""`check_backbone`: what every network must do, whatever it computes.

Each probe is a small function whose docstring says which bug it catches; `BACKBONE_PROBES` lists them, so that a test
runner can show them one by one. Weights are filled by a formula, so that numbers do not depend on torch's version.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import SkipTest

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch
from ndem_zoo.models.base import Backbone, Features, Head, options_of
from ndem_zoo.models.potential import Potential
from ndem_zoo.registry import BACKBONES
from ndem_zoo.testing.common import (
    GOLDEN,
    NOT_ZERO,
    ROUNDING,
    SINGLE,
    SYMMETRY,
    Probe,
    batch_of,
    distorted,
    example_cluster,
    example_crystal,
    example_molecules,
    fill_weights,
    require,
    require_close,
    require_equal,
    require_same_bits,
    resolve,
    run_probes,
    tensors_of,
    waves,
)


def check_backbone(
    backbone: str | type[Backbone],
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    *,
    golden: Mapping[str, Any] | None = None,
    plan: str = "eager",
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
    plan
        How to run it.
    skip
        Names of probes to leave out, such as ``"smooth_cutoff"`` for a backbone that documents a discontinuity.

    Raises
    ------
    AssertionError
        If a probe fails; lists all that do.
    """
    run_probes(BACKBONE_PROBES, BackboneCase.of(backbone, options, device, golden, plan), skip)


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
    plan : str
        How the backbone is run.
    """

    name: str
    cls: type[Backbone]
    options: dict[str, Any]
    device: str = "cpu"
    golden: Mapping[str, Any] | None = None
    plan: str = "eager"

    @classmethod
    def of(
        cls,
        backbone: str | type[Backbone],
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        golden: Mapping[str, Any] | None = None,
        plan: str = "eager",
    ) -> BackboneCase:
        """A case from a name in the registry or a class."""
        name, found = resolve(BACKBONES, backbone, "backbone")
        return cls(name, found, {**found.tiny, **(options or {})}, device, golden, plan)

    @property
    def cutoff(self) -> float:
        """Radius in Å of the backbone."""
        return float(self.cls(**self.options).cutoff)

    @property
    def symmetry(self) -> float:
        """Relative agreement of what a rotation makes equal, as the backbone states it."""
        return self.cls.symmetry

    def potential(
        self, dtype: torch.dtype = torch.float64, forces: str = "gradient", device: str | None = None
    ) -> Potential:
        """A potential with reproducible weights, in evaluation mode."""
        potential = Potential(self.cls(**self.options), forces=forces, scale=0.7)
        potential.backbone.use_plan(self.plan, torch.device(device or self.device))
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
        require_close(after.energy, before.energy, case.symmetry, "energy")
        require_close(after.scalars, before.scalars, case.symmetry, "scalar features")
        require_close(after.forces, before.forces @ matrix.T, case.symmetry, "forces")
        require_close(after.vectors, before.vectors @ matrix.T, case.symmetry, "vector head")


def constructor(case: BackboneCase) -> None:
    """Catches options without defaults or types, an unset cutoff, and options swallowed by ``**kwargs``."""
    require(issubclass(case.cls, Backbone), f"{case.cls} is not a subclass of Backbone")
    kinds = {p.kind for p in inspect.signature(case.cls).parameters.values()}
    require(
        inspect.Parameter.VAR_KEYWORD not in kinds, "the constructor takes **kwargs, so a misspelt option is no error"
    )
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
    for name, rank in ranks.items():
        value = getattr(features, name)
        if value is None and name == "tensors":
            continue
        require(value.dim() == rank and value.shape[0] == n, f"{what}: {name} {tuple(value.shape)}")
        require(value.dtype == batch.pos.dtype, f"{what}: {name} is {value.dtype} for positions in {batch.pos.dtype}")
    require(features.vectors.shape[1] == 3, f"{what}: vectors {tuple(features.vectors.shape)}")
    require(all(bool(torch.isfinite(value).all()) for value in outcome), f"{what}: not finite")


def rotation(case: BackboneCase) -> None:
    """Catches mixed-up axes, and norms or activations applied to components."""
    _check_turned(case, _rotation())


def reflection(case: BackboneCase) -> None:
    """Catches cross products and wrong parities: energies of mirror images must be equal."""
    if not case.cls.mirror:
        raise SkipTest(f"{case.name} tells mirror images apart")
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

    def scalars(edges: Tensor, symbols: tuple[int, int] = (6, 8)) -> Tensor:
        parts = {"src": batch.src[edges], "dst": batch.dst[edges], "shift": batch.shift[edges]}
        with torch.no_grad():
            return backbone(batch.replace(z=torch.tensor(symbols, device=case.device), **parts)).scalars

    one_way, none = batch.dst == 0, batch.dst < 0  # the edge with center 0 and neighbor 1; no edge
    seen = float((scalars(one_way, (6, 7)) - scalars(one_way))[0].abs().max())
    require(seen > NOT_ZERO, f"the center does not see its neighbor: features change by {seen:.1e}")
    leak = float((scalars(one_way) - scalars(none))[1].abs().max())
    require(leak < ROUNDING, f"a one-way edge changes the features of the neighbor by {leak:.1e}")


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


def _numeric_forces(
    potential: Potential, make: Callable[[list[Atoms]], Batch], atoms: Atoms, h: float = 1e-3
) -> Tensor:
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
    except ConfigError as error:  # a plan may refuse them, but not give wrong ones
        require(case.plan != "eager" and "eager" in str(error), f"second derivatives are refused: {error}")


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
    h = 2e-5
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
    if not case.cls(**case.options).is_smooth:
        raise SkipTest(f"{case.name} says that its energies jump at the cutoff")
    reach = abs(float(crossing(case, -0.5).energy - crossing(case, -0.3).energy))
    require(reach > 1e-7, f"moving an atom within the cutoff changes the energy by {reach:.1e} only")
    steps = (1e-4, 1e-5)
    sides = [(crossing(case, -step), crossing(case, step)) for step in steps]
    for name in ("energy", "forces", "vectors"):
        coarse, fine = (float((getattr(b, name) - getattr(a, name)).abs().max()) for a, b in sides)
        require(fine < 0.2 * coarse or fine < 1e-9, f"{name} jumps by {fine:.1e} ({coarse:.1e} over ten times the way)")
    for step, (inside, outside) in zip(steps, sides, strict=True):
        slope = -float((inside.forces[2] + outside.forces[2]) @ CROSSING) / 2
        error = abs(float(outside.energy - inside.energy) / (2 * step) - slope)
        require(error < 1e-4, f"the energy's slope differs by {error:.1e} eV/Å from the force on the crossing atom")


CROSSING = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)


def crossing(case: BackboneCase, beyond: float) -> Outcome:
    """What a diatomic says of which a third atom is `beyond` Å outside the cutoff of one atom, and farther from the other."""
    third = (case.cutoff + beyond) * CROSSING.numpy()
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
        require_close(supercell.energy, cell.energy * number, case.symmetry, "energy of a supercell")
        # Pitfall: where symmetry makes an atom's vector features vanish, their norm has a cusp, and the forces of a network
        # that uses norms are rounding noise times a finite slope. So forces are compared without symmetry only.
        if len(atoms) > 1:
            require_close(supercell.forces, cell.forces.repeat(number, 1), case.symmetry, "forces in a supercell")


def vector_head(case: BackboneCase) -> None:
    """Catches vector heads that do not turn with the structure when used as forces, or ignore the potential's scale."""
    matrix = _rotation().to(case.device)
    batch, potential = case.batch(example_molecules()), case.potential(forces="direct")
    with torch.no_grad():
        before, after = potential(batch), potential(_turned(batch, matrix))
        raw = potential.force_head(before.features, batch)
    require_close(after.forces, before.forces @ matrix.T, case.symmetry, "direct forces")
    require_close(before.forces, raw * potential.scale, ROUNDING, "direct forces against scale times the head's output")


def new_heads(case: BackboneCase) -> None:
    """Catches heads that share weights: two heads of a backbone are two sets of parameters."""
    backbone = case.potential().backbone
    for make in (backbone.scalar_head, backbone.vector_head):
        heads = make(), make()
        first, second, own = ({id(p) for p in module.parameters()} for module in (*heads, backbone))
        require(not first & second, f"{make.__name__} hands out the same parameters twice")
        require(not first & own, f"{make.__name__} hands out the backbone's parameters")


def plans_agree(case: BackboneCase) -> None:
    """Catches a plan that gives other numbers than plain operations, in values or in the gradient of a loss."""

    def everything(plan: str, dtype: torch.dtype) -> dict[str, Tensor]:
        subject = dataclasses.replace(case, plan=plan)
        potential, batch = subject.potential(dtype).train(), case.batch(example_molecules(), dtype=dtype)
        head = subject.vector_head(potential)
        prediction = potential(batch)
        vectors = head(prediction.features, batch)
        (prediction.forces.square().sum() + prediction.energy.square().sum() + vectors.square().sum()).backward()
        weights = {**dict(potential.named_parameters()), **{f"head.{n}": p for n, p in head.named_parameters()}}
        gradients = {f"gradient of {n}": p.grad for n, p in weights.items() if p.grad is not None}
        values = {"energy": prediction.energy, "forces": prediction.forces, "vectors": vectors}
        return {name: value.detach().double() for name, value in {**values, **gradients}.items()}

    exact = everything("eager", torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        found = everything(case.plan, dtype)
        require(found.keys() == exact.keys(), f"other weights have gradients: {sorted(found.keys() ^ exact.keys())}")
        for name, value in exact.items():
            error = (found[name] - value).norm() / value.norm().clamp_min(1e-12)
            limit = tolerance if name.startswith("gradient") else min(tolerance, 1e-5)
            require(error <= limit, f"{name} in {dtype}: {error:.1e} off, relative to its norm; allowed {limit}")


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
    require_close(turned.scalars, encoded.scalars, case.symmetry, "scalar features with node_vectors")
    require_close(
        turned.vectors, torch.einsum("ij,njc->nic", matrix, encoded.vectors), case.symmetry, "vector features"
    )
    change = float((encoded.scalars - plain.scalars).abs().max())
    require(change > NOT_ZERO, f"node_vectors are accepted, but change the features by {change:.1e} only")


def input_unchanged(case: BackboneCase) -> None:
    """Catches in-place operations on the batch, forwards and backwards."""
    batch = case.batch([*example_molecules(), example_crystal()])
    before = {name: value.clone() for name, value in tensors_of(batch).items()}
    prediction = case.potential().train()(batch)
    (prediction.forces.square().sum() + prediction.energy.sum()).backward()
    for name, value in tensors_of(batch).items():
        require_same_bits(value, before[name], f"batch.{name} after a step")
        require(not value.requires_grad, f"batch.{name} requires a gradient after a step")


def repeatable(case: BackboneCase) -> None:
    """Catches hidden state and randomness in a forward pass: the same batch twice gives the same."""
    batch, potential = case.batch(example_molecules()), case.potential()
    first, second = potential(batch), potential(batch)
    for name in ("energy", "forces"):
        require_equal(getattr(second, name), getattr(first, name), f"{name} the second time")


def saved_weights(case: BackboneCase) -> None:
    """Catches state outside the state dict: saved as safetensors and loaded, predictions have the same bits."""
    from safetensors.torch import load, save

    batch, potential = case.batch(example_molecules()), case.potential()
    stored = load(save({name: value.cpu().contiguous() for name, value in potential.state_dict().items()}))
    fresh = Potential(case.cls(**case.options), scale=0.3).to(device=case.device, dtype=torch.float64).eval()
    fresh.backbone.use_plan(case.plan, torch.device(case.device))
    fresh.load_state_dict(stored, strict=True)
    one, other = potential(batch), fresh(batch)
    for name in ("energy", "forces"):
        require_equal(getattr(other, name), getattr(one, name), f"{name} of the loaded weights")


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
    plans_agree,
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
