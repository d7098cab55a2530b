"""Classes from elsewhere can be registered, are found by name, and cannot take the place of others."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from ndem_zoo import NDeMModel, TorchMDNet, load_sample, registry
from ndem_zoo.errors import ConfigError
from ndem_zoo.objectives.supervised import Supervised


class Narrow(TorchMDNet):
    """A backbone that the package does not have."""


class NarrowModel(NDeMModel):
    """Its estimator."""

    backbone_name = "narrow"


class Doubled(Supervised):
    """An objective that the package does not have: every term counts twice."""

    def forward(self, potential, batch, rng):
        return {name: 2 * value for name, value in super().forward(potential, batch, rng).items()}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """The registries as they are, whatever a test adds."""
    for name in ("BACKBONES", "OBJECTIVES", "MODELS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


def register_all():
    registry.register(registry.BACKBONES, "narrow", Narrow)
    registry.register(registry.OBJECTIVES, "doubled", Doubled)
    registry.register(registry.MODELS, "NarrowModel", NarrowModel)


def small(objective):
    options = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}
    return NarrowModel(preset="md17_fast", objective=objective, backbone_options=options, progress=False, lr=1e-6)


def test_registered_classes_are_trained_saved_and_loaded(tmp_path):
    register_all()
    _, (train, _, test), _ = load_sample("ethanol", n_train=8, n_valid=4)
    model, plain = (small(objective).fit(train, max_steps=2) for objective in ("doubled", "supervised"))
    assert type(model.potential_.backbone) is Narrow
    assert type(model.objective_) is Doubled
    first, second = (m.history_[0]["train_loss"] for m in (model, plain))
    assert first == pytest.approx(2 * second, rel=1e-5), "the registered objective is the one that is minimized"
    model.save(tmp_path / "model")
    again = NDeMModel.load(tmp_path / "model")
    assert type(again) is NarrowModel
    assert (again.predict(test[:3])["energy"] == model.predict(test[:3])["energy"]).all()


def test_a_saved_model_needs_its_parts_registered(tmp_path, monkeypatch):
    register_all()
    _, (train, _, _), _ = load_sample("ethanol", n_train=8, n_valid=4)
    small("supervised").fit(train, max_steps=1).save(tmp_path / "model")
    monkeypatch.delitem(registry.MODELS, "NarrowModel")
    with pytest.raises(ValueError, match="NarrowModel"):
        NDeMModel.load(tmp_path / "model")


def test_names_are_not_taken_from_others():
    with pytest.raises(ConfigError, match=r"'torchmd_net' is taken by ndem_zoo\.models\.torchmd_net:TorchMDNet"):
        registry.register(registry.BACKBONES, "torchmd_net", Narrow)
    assert registry.lookup(registry.BACKBONES, "torchmd_net", "backbone") is TorchMDNet


def test_a_cell_can_be_run_again(monkeypatch):
    """In a notebook the class is another object the second time, and the new one counts."""
    notebook = types.ModuleType("a_notebook")
    monkeypatch.setitem(sys.modules, "a_notebook", notebook)
    for _ in range(2):
        notebook.Mine = type("Mine", (torch.nn.Module,), {"__module__": "a_notebook"})
        registry.register(registry.BACKBONES, "mine", notebook.Mine)
        assert registry.lookup(registry.BACKBONES, "mine", "backbone") is notebook.Mine


def test_what_cannot_be_found_again_is_refused():
    class Local(Narrow):
        pass

    with pytest.raises(ConfigError, match="top level of a module"):
        registry.register(registry.BACKBONES, "local", Local)
    with pytest.raises(ConfigError, match="top level of a module"):
        registry.register(registry.BACKBONES, "instance", 3)
    assert not {"local", "instance"} & set(registry.BACKBONES)


def test_a_model_goes_by_the_name_of_its_class():
    with pytest.raises(ConfigError, match="'NarrowModel', not as 'narrow'"):
        registry.register(registry.MODELS, "narrow", NarrowModel)
