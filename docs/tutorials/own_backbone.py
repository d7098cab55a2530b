# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # Bring your own backbone and objective
#
# A backbone turns structures into features of atoms; an objective turns a potential and a batch into something to minimize.
# Neither knows the other. This page writes one of each in 60 lines, holds them to the contracts that the package's own
# classes are held to, and trains them: with each other, and with what is there already. What a class that is to become
# part of the package needs besides stands in `CONTRIBUTING.md`.
#
# ## A backbone
#
# A small equivariant message-passing network: each atom has scalars and vectors, neighbors send both, filtered by the
# distance. The rules that matter:
#
# - options are keywords with defaults; `cutoff` in Å; `tiny` are options small enough for tests;
# - edges may be longer than the cutoff, and must not count then: everything that comes from an edge carries the smooth
#   envelope that is 0 there;
# - `batch.vectors()` points from the center `dst` to the neighbor `src`; `sum_over_neighbors` sums for each center;
# - lengths come from `safe_norm`, whose derivatives are 0 for a vector that is 0. A plain norm gives NaN in the gradient of a
#   force loss.

# %%
# %matplotlib inline
from typing import ClassVar

import torch
from torch import nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.graph import sum_over_neighbors
from ndem_zoo.models.base import Backbone, Features, Head
from ndem_zoo.physics import safe_norm


class AtomHead(Head):
    """One number per atom, or one vector per atom: the vectors of the features, weighted by what the scalars say."""

    def __init__(self, channels: int, width: int, is_vector: bool) -> None:
        super().__init__()
        out = channels if is_vector else 1
        self.is_vector, self.net = (
            is_vector,
            nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, out)),
        )

    def forward(self, features, batch):
        values = self.net(features.scalars)  # (N, C) or (N, 1)
        return (features.vectors * values[:, None]).sum(-1) if self.is_vector else values[:, 0]


class LittleNet(Backbone):
    """Scalars and vectors of atoms, exchanged between neighbors."""

    tiny: ClassVar[dict] = {"channels": 8, "layers": 2, "n_rbf": 8}

    def __init__(
        self, channels: int = 32, layers: int = 2, n_rbf: int = 20, cutoff: float = 5.0, max_z: int = 101
    ) -> None:
        super().__init__()
        self.cutoff, self.max_z, self.channels, self.n_rbf = cutoff, max_z, channels, n_rbf
        self.embedding = nn.Embedding(max_z, channels)
        self.filters = nn.ModuleList(nn.Linear(n_rbf, 3 * channels) for _ in range(layers))
        self.senders = nn.ModuleList(nn.Linear(channels, 3 * channels) for _ in range(layers))
        self.mixers = nn.ModuleList(nn.Linear(2 * channels, channels) for _ in range(layers))

    def envelope(self, d):
        return 0.5 * (torch.cos(torch.pi * d / self.cutoff) + 1) * (d < self.cutoff)

    def forward(self, batch, node_vectors=None):
        if node_vectors is not None:
            raise ConfigError("LittleNet takes no node_vectors (force encoding)")
        r = batch.vectors()  # (E, 3)
        d = safe_norm(r, keepdim=True)  # (E, 1)
        grid = torch.arange(1, self.n_rbf + 1, device=d.device, dtype=d.dtype)
        rbf = torch.sinc(grid * d / self.cutoff)  # (E, K)
        unit = r / d.clamp(min=1e-3)
        s = self.embedding(batch.z)  # (N, C)
        v = s.new_zeros(len(s), 3, self.channels)
        for make_filter, send, mix in zip(self.filters, self.senders, self.mixers, strict=True):
            sent = make_filter(rbf) * self.envelope(d) * send(s).index_select(0, batch.src)
            a, b, c = sent.chunk(3, dim=-1)  # (E, C) each
            v = v + sum_over_neighbors(unit[..., None] * b[:, None] + v.index_select(0, batch.src) * c[:, None], batch)
            s = s + nn.functional.silu(mix(torch.cat([s + sum_over_neighbors(a, batch), safe_norm(v, dim=1)], dim=-1)))
        return Features(s, v)

    def scalar_head(self):
        return AtomHead(self.channels, self.channels, is_vector=False)

    def vector_head(self, width=None):
        return AtomHead(self.channels, width or self.channels, is_vector=True)


# %% [markdown]
# ## An objective
#
# NDeM's ideal head says two things at once: the clean force, guessed from the displaced structure, minus the noise
# ([the key identity](../theory/ndem.md#the-key-identity)). Which of the two is it that helps, if anything? The objective that is
# needed to ask leaves out the noise: a second head sees the displaced structure and has to tell the force of the clean one.
#
# Options are a dataclass; `NoiseOptions` has those of the noise, and moves the atoms. `build` makes what belongs to the objective
# alone, `forward` returns named terms with their weights, and all randomness comes from `rng`.

# %%
from ndem_zoo.objectives.base import NoiseOptions, Objective, mean_of_rows


class CleanForces(Objective):
    """Supervised terms, plus: tell the forces of the structure before it was displaced."""

    Options = NoiseOptions
    extra_requirements = frozenset({"forces"})

    def build(self, potential, dataset=None):
        self.force_head = potential.backbone.vector_head()

    def forward(self, potential, batch, rng):
        terms = self.supervised.terms(potential(batch), batch, potential.scale)
        if self.current_weight() == 0:
            return terms
        noisy, _ = self.options.displace(batch, rng, potential.backbone.cutoff)
        guess = self.force_head(potential.backbone(noisy), noisy)
        residual = guess - (batch.targets["forces"] / potential.scale).to(guess.dtype)
        return terms | {"clean_forces": self.current_weight() * mean_of_rows(residual.square(), ~batch.fixed)}


# %% [markdown]
# ## The contracts
#
# `check_backbone` rotates, mirrors, shifts and reorders; compares forces with finite differences and second derivatives with
# numeric ones; lets an atom cross the cutoff; looks for structures that see each other, for NaN, for weights that are not
# saved, and so on. `check_objective` does the same for objectives. Silence is success. For tests of your own,
# `ndem_zoo.testing.structures()` and `bad_structures()` are Hypothesis strategies: structures in every form that arrays have,
# and spoilt ones.

# %%
from ndem_zoo.testing import check_backbone, check_objective

check_backbone(LittleNet)
check_objective(CleanForces, backbone=LittleNet)

# %% [markdown]
# What they say when something is wrong: here is the same network with a hard cutoff in place of the envelope.


# %%
class HardCutoff(LittleNet):
    """A mistake: edges count fully up to the cutoff."""

    def envelope(self, d):
        return (d < self.cutoff).to(d.dtype)


try:
    check_backbone(HardCutoff)
    complaint = ""
except AssertionError as error:
    complaint = str(error)
print(complaint)

# %% [markdown]
# ## Training
#
# A line each makes them known by name, and three lines make an estimator, with all that estimators have: presets, `fit`,
# `predict`, `evaluate`, `save`, the calculator.

# %%
from ndem_zoo import NDeMModel, load_sample
from ndem_zoo.registry import BACKBONES, MODELS, OBJECTIVES, register


class NDeMLittleNet(NDeMModel):
    """Force field on LittleNet."""

    backbone_name = "little"


register(BACKBONES, "little", LittleNet)
register(OBJECTIVES, "clean_forces", CleanForces)
register(MODELS, "NDeMLittleNet", NDeMLittleNet)

tasks, (train, valid, test), transformers = load_sample("ethanol")
settings = {"batch_size": 4, "lr": 5e-3, "warmup_steps": 30, "ema_decay": 0.98, "max_steps": 160, "validate_every": 40}
models = {}
for objective in ("supervised", "clean_forces", "ndem"):
    model = NDeMLittleNet(preset="md17_fast", objective=objective, progress=False, seed=0, **settings)
    models[objective] = model.fit(train, valid)

# %%
from ndem_zoo.plots import learning_curve_figure

learning_curve_figure({name: model.history_ for name, model in models.items()}, against="step")

# %%
zero = abs(test.targets["forces"]).mean()
errors = {name: model.evaluate(test[:300])["forces_mae"] for name, model in models.items()}
print(f"force MAE, always zero: {zero:.3f} eV/Å")
for name, value in errors.items():
    print(f"force MAE, {name:12s}: {value:.3f} eV/Å   last terms:", end=" ")
    print({key: round(v, 3) for key, v in models[name].history_[-1].items() if key.startswith("train_")})

# %% [markdown]
# A network of some 20,000 weights and seconds of training beat zero forces by far; which of the three objectives is
# best cannot be said from one seed and 160 steps ([choosing sigma, mask and weight](sigma_mask_weight.py) shows how large
# the spread of seeds is). The term of `clean_forces` goes below 1, which is what a head that always says 0 would have.
#
# A saved model is found again by the name of its class; whoever loads it must have registered the classes before, since
# no code is stored in it.

# %%
models["ndem"].save("little-model")
again = NDeMModel.load("little-model")
print(type(again).__name__, f"{again.potential_.n_parameters:,} parameters")

# %% tags=["hide-input"]
import numpy as np

assert "smooth_cutoff" in complaint and "finite_differences" not in complaint, "the right probe complains, and no other"
assert all(value < 0.6 * zero for value in errors.values()), "what was written here learns forces"
assert models["clean_forces"].history_[-1]["train_clean_forces"] < 0.95, "and its objective is minimized"
assert np.array_equal(again.predict(test[:5])["forces"], models["ndem"].predict(test[:5])["forces"])
