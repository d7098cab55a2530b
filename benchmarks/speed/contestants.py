"""The contestants: our potential, and torchmd-net 3.1's Equivariant Transformer with the same weights and the same loss.

Each has `step` (zero gradients, loss, backward, AdamW), `loss`, and `infer` (energy and forces). `compare` says how far
apart their numbers are; nothing is timed before it has been looked at.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed.structures import CUTOFF, Inputs, molecule_sets
from ndem_zoo.flat import FlatWeights, Weights
from ndem_zoo.graph import Batch
from ndem_zoo.models.potential import Potential
from ndem_zoo.models.torchmd_net import TorchMDNet
from ndem_zoo.objectives.base import Objective
from ndem_zoo.objectives.ndem import NDeM
from ndem_zoo.objectives.supervised import Supervised
from ndem_zoo.sampling import Collator
from ndem_zoo.shares import Cutter, Share, ShareRng, Shares, shares_for
from ndem_zoo.training import seeded

ROOT = Path(__file__).resolve().parents[2]

#: NDeM, Table 7, with TorchMD-NET's cutoff. `vector_cutoff`: continuous energies, in both.
MD17 = {
    "hidden_channels": 128,
    "num_layers": 6,
    "num_heads": 8,
    "num_rbf": 32,
    "cutoff": CUTOFF,
    "vector_cutoff": True,
}
#: Small, so that the weights of both contestants stay the same in all digits that matter.
LEARNING_RATE = 1e-5

#: Largest relative differences that float32 explains.
TOLERANCE = {"energy": 1e-5, "forces": 1e-5, "gradient": 1e-4}


@lru_cache(maxsize=1)
def available_plans() -> tuple[str, ...]:
    """Execution plans of this version of the package: ``eager``, and ``fused`` where a small training step runs with it."""
    if not hasattr(TorchMDNet(**TorchMDNet.tiny), "plan"):
        return ("eager",)
    try:
        Ours(plan="fused", options=TorchMDNet.tiny).step(molecule_sets("ethanol", 1, n_sets=1)[0])
    except Exception as error:  # whatever keeps it from working, a missing compiler above all, is said and not hidden
        print(f"the fused plan does not work here: {error!r}", flush=True)
        return ("eager",)
    return ("eager", "fused")


@lru_cache(maxsize=1)
def best_plan() -> str:
    """``fused``, or ``eager`` with a notice."""
    plans = available_plans()
    if "fused" not in plans:
        print("notice: there is no fused plan here; 'ours' is the eager plan", flush=True)
    return plans[-1]


def torchmd_net_version() -> str | None:
    """Version of torchmd-net, or None if it is not installed."""
    try:
        return importlib.metadata.version("torchmd-net")
    except importlib.metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _golden_script() -> ModuleType:
    """The script that knows the names of torchmd-net's weights; the parity test uses it too."""
    path = ROOT / "scripts" / "make_golden_torchmd_net.py"
    spec = importlib.util.spec_from_file_location("make_golden_torchmd_net", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def initial(options: dict[str, Any] | None = None) -> Potential:
    """A potential with reproducible weights; biases are drawn too, so that no term is zero by chance."""
    with seeded(0):
        potential = Potential(TorchMDNet(**(MD17 if options is None else options)))
        with torch.no_grad():
            for name, parameter in potential.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return potential


def _built(objective: type[Objective], potential: Potential) -> Objective:
    """An objective with its heads; the same ones every time."""
    term = objective()
    with seeded(1):
        term.build(potential)
    return term


def adamw(parameters: list[nn.Parameter] | list[dict[str, Any]], fused: bool = True) -> torch.optim.AdamW:
    """AdamW: torch's fused kernel, as our training loop has it, or the default, as torchmd-net's has."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, **({"fused": True} if fused else {}))


def kept(potential: Potential, objective: Objective) -> Weights:
    """The weights to be trained, kept as `training.Run` keeps them."""
    weights = [p for part in (potential, objective) for p in part.parameters() if p.requires_grad]
    return (FlatWeights if potential.backbone.plan == "fused" else Weights)([{"params": weights}])


class Ours:
    """Our potential and one of its objectives, as the training loop runs them.

    Parameters
    ----------
    objective
        ``"supervised"`` or ``"ndem"``.
    plan
        Execution plan of the backbone; default: the best there is.
    options
        Options of the backbone; default: `MD17`.
    """

    def __init__(
        self, objective: str = "supervised", plan: str | None = None, options: dict[str, Any] | None = None
    ) -> None:
        self.potential = initial(options).train()
        self.plan = best_plan() if plan is None else plan
        set_plan(self.potential, self.plan)
        self.objective = _built({"supervised": Supervised, "ndem": NDeM}[objective], self.potential)
        self.optimize()
        self.rng, self._cut = torch.Generator(), {}

    def optimize(self) -> None:
        """Make the optimizer, with weights kept as in our training loop."""
        self.weights = kept(self.potential, self.objective)
        self.optimizer = adamw(self.weights.groups)

    def terms(self, inputs: Inputs) -> dict[str, Tensor]:
        """Weighted terms of the objective."""
        self.rng.manual_seed(0)
        with self.weights.forward():
            return self.objective(self.potential, inputs.batch, self.rng)

    def loss(self, inputs: Inputs) -> Tensor:
        """Sum of the terms."""
        return sum(self.terms(inputs).values())

    def backward(self, loss: Tensor) -> None:
        """Gradients of the weights; those of the positions are not wanted, and the fused plan has none."""
        loss.backward(inputs=self.weights.inputs)

    def zero_grad(self) -> None:
        """Set all gradients to 0."""
        self.weights.zero_grad()

    def step(self, inputs: Inputs) -> None:
        """One training step; of a large batch in shares, as the training loop makes it."""
        self.zero_grad()
        for share in self._shares(inputs):
            if share.cut is None:
                terms = self.terms(inputs)
            else:
                rng = ShareRng(share.cut, 0, 0)
                with self.weights.forward():
                    terms = self.objective(self.potential, share.batch, rng)
                terms = self.objective.counted(terms, share.cut, self.rng.manual_seed(0))
            self.backward(sum(terms.values()))
        self.optimizer.step()

    def _shares(self, inputs: Inputs) -> Shares:
        """Made once for each input set, as its batch is."""
        number = shares_for(len(inputs.z), torch.device("cpu"))
        if id(inputs) not in self._cut:
            cutter = Cutter(Collator(inputs.dataset(), CUTOFF), number, range(number))
            whole = Shares([Share(inputs.batch)])
            self._cut[id(inputs)] = inputs, whole if number == 1 else cutter(np.arange(len(inputs.counts)))
        return self._cut[id(inputs)][1]

    def freeze(self) -> None:
        """Make it ready for inference."""
        self.potential.eval().requires_grad_(False)

    def infer(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Energies and forces of a batch whose edges are there."""
        return self._infer(inputs.batch)

    def infer_from_positions(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Energies and forces, neighbor list included: what torchmd-net's forward does too."""
        return self._infer(inputs.fresh_batch())

    def _infer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        prediction = self.potential(batch, create_graph=False)
        return prediction.energy, prediction.forces

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the backbone and energy head by our name."""
        return {n: p.grad for n, p in self.potential.named_parameters() if p.grad is not None}


def set_plan(potential: Potential, plan: str) -> None:
    """Choose the execution plan of a potential's backbone; without a choice there is only the eager one."""
    if hasattr(potential.backbone, "plan"):
        potential.backbone.plan = plan
    elif plan != "eager":
        raise ValueError(f"this version of the package has no plan {plan!r}")


class TorchMDNetRival:
    """torchmd-net's model with our initial weights.

    Its neighbor list is made in the forward pass, as shipped. For ``"ndem"`` there is a naive second forward pass of its
    backbone on the noisy coordinates, with a vector head of its own; the noise is ours, so both draw the same.

    Parameters
    ----------
    objective
        ``"supervised"`` or ``"ndem"``.
    own_optimizer
        True: torch's default AdamW, as torchmd-net's `LNNP` has it; False: the fused one, as ours.
    max_num_neighbors
        What its neighbor list has room for; 32 is its default.
    """

    def __init__(self, objective: str = "supervised", own_optimizer: bool = False, max_num_neighbors: int = 32) -> None:
        with contextlib.suppress(ImportError):
            import warp

            warp.config.quiet = True  # it greets on the terminal otherwise
        script = _golden_script()
        potential = initial()
        self.model = script.torchmd_net_model(MD17, precision=32, max_num_neighbors=max_num_neighbors)
        script.copy_weights(potential, self.model)
        self.model.train()
        self.supervised = SupervisedTerms()
        self.noise = self.head = None
        if objective == "ndem":
            ours = _built(NDeM, potential)
            self.noise, self.weight = ours.options, ours.weight
            self.head = script.torchmd_net_vector_head(ours.noisy_force_head, MD17["hidden_channels"]).float()
        modules = nn.ModuleList([self.model] if self.head is None else [self.model, self.head])
        self.optimizer = adamw(list(modules.parameters()), fused=not own_optimizer)
        self.rng = torch.Generator()

    def terms(self, inputs: Inputs) -> dict[str, Tensor]:
        """The same terms as ours."""
        batch = inputs.batch
        energy, forces = self._forward(inputs)
        terms = self.supervised(energy, forces, batch)
        if self.head is None:
            return terms
        self.rng.manual_seed(0)
        noisy, noise = self.noise.displace(batch, self.rng, CUTOFF)
        x, vec, z, pos, system = self.model.representation_model(batch.z, noisy.pos, batch.system)
        noisy_forces = self.head.pre_reduce(x, vec, z, pos, system)
        residual = forces.detach() - noisy_forces - noise.epsilon / noise.sigma
        return terms | {"ndem": self.weight * residual.square().sum(-1).mean()}

    def loss(self, inputs: Inputs) -> Tensor:
        """Sum of the terms."""
        return sum(self.terms(inputs).values())

    def _forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Energy (S,) and forces (N, 3)."""
        batch = inputs.batch
        # It sets requires_grad on the positions that it is given: they are detached, so that ours do not change.
        energy, forces = self.model(batch.z, batch.pos.detach(), batch.system, box=inputs.box)
        return energy[:, 0], forces

    def backward(self, loss: Tensor) -> None:
        """Gradients of everything, as shipped: the positions are among it."""
        loss.backward()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad()

    def step(self, inputs: Inputs) -> None:
        """One training step."""
        self.zero_grad()
        self.backward(self.loss(inputs))
        self.optimizer.step()

    def freeze(self) -> None:
        """Make it ready for inference, as its calculators do."""
        self.model.eval().requires_grad_(False)

    def infer(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Energies and forces."""
        energy, forces = self._forward(inputs)
        return energy.detach(), forces

    infer_from_positions = infer

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by torchmd-net's name."""
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


class SupervisedTerms:
    """The supervised terms on plain tensors, with our weights (1 : 30) and the scale 1."""

    def __init__(self) -> None:
        self.loss = Supervised().supervised

    def __call__(self, energy: Tensor, forces: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Both weighted terms, rounded where ours are."""
        errors = {
            "energy": (energy - batch.targets["energy"]).to(forces.dtype),
            "forces": forces - batch.targets["forces"].to(forces.dtype),
        }
        return self.loss.terms_of_errors(errors)


# ---------------------------------------------------------------------------------------------------------- agreement


def compare(ours: Ours, rival: TorchMDNetRival | None, inputs: Inputs, gradients: bool = True) -> dict[str, Any]:
    """Relative differences |a - b| / |b| of energies, forces and loss gradients, before anything has been timed.

    To the eager plan in float64 for both, and to each other. Call it with contestants that have made no step yet.
    """
    found = {"ours": _numbers(ours, inputs, gradients)}
    if rival is not None:
        found["torchmd-net"] = _numbers(rival, inputs, gradients)
    truth = _truth(ours, inputs, gradients)
    result = {f"{name} - float64": differences(values, truth) for name, values in found.items()}
    if rival is not None:
        result["ours - torchmd-net"] = differences(found["ours"], found["torchmd-net"])
    result["ok"] = all(result["ours - float64"][name] <= TOLERANCE[name] for name in truth) and all(
        value <= 2 * TOLERANCE[name] for name, value in result.get("ours - torchmd-net", {}).items()
    )
    return result


def _numbers(entrant: Any, inputs: Inputs, gradients: bool) -> dict[str, Tensor]:
    """Energies, forces, and gradients in our order, float64."""
    energy, forces = entrant.infer(inputs)
    found = {"energy": energy.detach().double(), "forces": forces.detach().double()}
    if gradients:
        entrant.zero_grad()
        entrant.backward(entrant.loss(inputs))
        found["gradient"] = flat_gradients(entrant)
        entrant.zero_grad()
    return found


def flat_gradients(entrant: Any) -> Tensor:
    """Gradients of the weights that are trained, in the order of our names; 0 where a term has none."""
    rename = _golden_script().their_name if isinstance(entrant, TorchMDNetRival) else lambda name: name
    given = entrant.gradients()
    trained = {n: p for n, p in initial().named_parameters() if p.requires_grad}
    return torch.cat([given.get(rename(n), torch.zeros_like(p)).reshape(-1) for n, p in trained.items()]).double()


def _truth(ours: Ours, inputs: Inputs, gradients: bool) -> dict[str, Tensor]:
    """The same numbers from the eager plan in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = copy.copy(ours)
        exact.potential, exact.objective = copy.deepcopy((ours.potential, ours.objective))
    exact.potential.double()
    exact.objective.double()
    set_plan(exact.potential, "eager")
    if gradients:  # frozen weights have none
        exact.optimize()
    # The noise of a float64 batch would be another draw: positions are those of the float32 batch in any case.
    batch = inputs.batch.to(dtype=torch.float64)
    return _numbers(exact, Inputs(batch, inputs.z, inputs.pos, inputs.counts, inputs.cell, inputs.pbc), gradients)


def differences(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """|a - b| / |b| by name."""
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in reference.items()}
