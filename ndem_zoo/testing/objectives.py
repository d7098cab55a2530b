"""`check_objective`: what every objective must do; and what NDeM and its variants must do besides.

The potential of `HarmonicBackbone` is known exactly, and so is what NDeM must make of it. Probes are listed in
`OBJECTIVE_PROBES` and `NDEM_PROBES`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import Batch, make_batch
from ndem_zoo.models.base import Backbone, Features, Head
from ndem_zoo.models.potential import Potential
from ndem_zoo.noise import masked_gaussian
from ndem_zoo.objectives.base import Objective, SupervisedLoss
from ndem_zoo.objectives.ndem import NDeM
from ndem_zoo.physics import BOLTZMANN, MAX_Z
from ndem_zoo.registry import OBJECTIVES, lookup
from ndem_zoo.sampling import Collator, step_seed
from ndem_zoo.shares import Cutter, ShareRng
from ndem_zoo.testing.backbones import BackboneCase
from ndem_zoo.testing.common import (
    ROUNDING,
    Probe,
    batch_of,
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
    with_labels,
)


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
    run_probes(objective_probes(case.cls), case, skip)


def objective_probes(cls: type[Objective]) -> list[Probe]:
    """The probes that apply to an objective."""
    return OBJECTIVE_PROBES + (NDEM_PROBES if issubclass(cls, NDeM) else [])


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
        plan: str = "eager",
    ) -> ObjectiveCase:
        """A case from names in the registry or classes."""
        name, found = resolve(OBJECTIVES, objective, "objective")
        encode = {"encode_vectors": True} if found.encodes_vectors else {}
        network = BackboneCase.of(backbone, {**encode, **(backbone_options or {})}, device, plan=plan)
        return cls(name, found, {**found.probed_with, **(options or {})}, network)

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
        """Labelled structures, with what the objective needs besides labels."""
        return self.batch_of(example_molecules(), dtype)

    def batch_of(self, structures: Sequence[Atoms], dtype: torch.dtype = torch.float64) -> Batch:
        """The same of other structures."""
        batch = with_labels(self.backbone.batch(structures, dtype=dtype))
        dataset = columns_of(batch)
        prepared = self.cls(options=self.options).prepare(dataset)
        if prepared is dataset:
            return batch
        kinds = {"targets": prepared.targets, "extras": prepared.extras}
        tensors = {
            kind: {name: torch.from_numpy(np.array(value)).to(self.device) for name, value in columns.items()}
            for kind, columns in kinds.items()
        }
        return batch.replace(**tensors)

    def rng(self, seed: int = 0) -> torch.Generator:
        """A source of noise."""
        return torch.Generator(device=self.device).manual_seed(seed)

    def terms(self, batch: Batch | None = None, **keywords: Any) -> dict[str, Tensor]:
        """The terms of a freshly built objective."""
        objective, potential = self.build(**keywords)
        return objective(potential, self.batch() if batch is None else batch, self.rng())


def columns_of(batch: Batch) -> MolecularDataset:
    """A batch without periodic boundaries as the dataset that it could have been made of."""
    columns = {"targets": batch.targets, "extras": batch.extras}
    return MolecularDataset(
        z=batch.z.cpu().numpy(),
        pos=batch.pos.double().cpu().numpy(),
        ptr=np.concatenate([[0], np.cumsum(batch.n_atoms.cpu().numpy())]),
        fixed=batch.fixed.cpu().numpy() if bool(batch.fixed.any()) else None,
        per_atom={name: len(value) == len(batch.z) for column in columns.values() for name, value in column.items()},
        **{kind: {name: value.cpu().numpy() for name, value in column.items()} for kind, column in columns.items()},
    )


def terms_are_scalars(case: ObjectiveCase) -> None:
    """Catches unreduced losses and terms without a graph: named finite scalars that can be minimized."""
    terms = case.terms()
    require(len(terms) > 0, "there are no terms")
    for name, value in terms.items():
        require(value.shape == (), f"term {name} has shape {tuple(value.shape)}")
        require(torch.isfinite(value), f"term {name} is {float(value.detach())}")
        require(value.requires_grad, f"term {name} depends on no weight")


def same_rng_same_value(case: ObjectiveCase) -> None:
    """Catches noise from a generator other than the one given: the same seed gives the same bits."""
    for name, value in case.terms().items():
        require_equal(value, case.terms()[name], f"term {name} with the same seed")


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
    before = {name: value.clone() for name, value in tensors_of(batch).items()}
    state = {name: value.clone() for name, value in potential.state_dict().items()}
    sum(objective(potential, batch, case.rng()).values()).backward()
    require_same_bits(torch.get_rng_state(), random_states[0], "torch's global random state")
    require(np.array_equal(np.random.get_state()[1], random_states[1]), "numpy's global random state changed")  # noqa: NPY002
    require(random.getstate() == random_states[2], "Python's global random state changed")
    require(torch.get_default_dtype() == torch.float32, f"the default dtype is {torch.get_default_dtype()} now")
    require(potential.training and objective.training, "the potential or the objective left training mode")
    for name, value in tensors_of(batch).items():
        require_same_bits(value, before[name], f"batch.{name} after a step")
    for name, value in potential.state_dict().items():
        require_same_bits(value, state[name], f"{name} of the potential after a step without optimizer")


def weight_zero_is_supervised(case: ObjectiveCase) -> None:
    """Catches auxiliary terms that leak into the baseline: weight 0 gives its terms and gradients to the last bit."""
    plain = ObjectiveCase("supervised", lookup(OBJECTIVES, "supervised", "objective"), {}, case.backbone)
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
            require_equal(value, expected[name], f"term {name} at weight 0")
        else:
            require(float(value.detach()) == 0, f"term {name} is {float(value.detach())} at weight 0")
    for name, gradient in gradients.items():
        if gradient is None or expected_gradients[name] is None:
            require(gradient is expected_gradients[name], f"{name} has a gradient in one of the two only")
        else:
            require_equal(gradient, expected_gradients[name], f"gradient of {name} at weight 0")


def weight_scales_the_rest(case: ObjectiveCase) -> None:
    """Catches weights applied twice or to the wrong term: supervised terms stay, the others are proportional to it."""
    single, double = case.terms(weight=1.0), case.terms(weight=2.0)
    require(set(single) == set(double), f"terms {sorted(single)} at weight 1 and {sorted(double)} at weight 2")
    for name, value in single.items():
        factor = 1.0 if name in ("energy", "forces") else 2.0
        require_close(double[name].reshape(1), factor * value.reshape(1), ROUNDING, f"term {name} at weight 2")


def shares_add_up(case: ObjectiveCase) -> None:
    """Catches means over rows that `Objective.rows` does not tell, and noise that depends on who else is in the batch."""
    objective, potential = case.build()
    if objective.needs_whole_batch or not objective.shares_noise:
        return
    dataset, backbone = columns_of(case.batch()), potential.backbone
    collate = Collator(dataset, backbone.cutoff, torch.float64, nearest=backbone.nearest, device=case.device)
    indices = np.arange(len(dataset))
    expected = objective(potential, collate(indices), case.rng(step_seed(0, 0)))
    found: dict[str, float] = dict.fromkeys(expected, 0.0)
    for share in Cutter(collate, 2, range(2))(indices):
        terms = objective(potential, share.batch, ShareRng(share.cut, 0, 0))
        for name, term in objective.counted(terms, share.cut, case.rng(step_seed(0, 0))).items():
            found[name] = found[name] + term
    for name, value in expected.items():
        require_close(found[name].reshape(1), value.reshape(1), ROUNDING, f"term {name}, added up over two shares")


def schedule(case: ObjectiveCase) -> None:
    """Catches schedules that start or end at the wrong weight."""
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
        require_equal(getattr(other, name), getattr(one, name), f"predicted {name}")


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
    batch = case.batch_of([lone, far, lone])
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
    shares_add_up,
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

    def vector_head(self, width: int | None = None) -> Head:
        """Forces of the springs: as noisy-force head, an oracle."""
        return HarmonicHead(self.stiffness, vector=True)


class HarmonicHead(Head):
    """Energy (N,) or force (N, 3) of atoms in springs; the spring constants are its weights."""

    def __init__(self, stiffness: Tensor, vector: bool) -> None:
        super().__init__()
        self.stiffness, self.vector = nn.Parameter(stiffness.clone()), vector

    def forward(self, features: Features, batch: Batch) -> Tensor:
        """Energy k d²/2 (N,), or force -k d (N, 3)."""
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
        require_close(
            objective.curvature.constants[z].reshape(1), expected.reshape(1), ROUNDING, f"curvature of element {z}"
        )


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
    require(bool(every > without_others * 1.0001), "atoms that were not moved do not count with loss_on='all'")


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
        require(
            error < 0.02, f"grad_main={grad_main!r}: stiffness {found:.2f} at the optimum, theory says {expected:.2f}"
        )


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
