"""Weights as slices of one tensor: the training is the same, checkpoints do not tell, and afterwards nothing is left of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ndem_zoo import training
from ndem_zoo.checkpoint import load_tensors
from ndem_zoo.flat import FlatWeights, Weights
from ndem_zoo.fused import native
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet

needs_compiler = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler, and so no fused plan")

TINY = {"hidden_channels": 16, "num_layers": 2, "num_heads": 2, "num_rbf": 8}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2, bias=False)).double()


def groups(module: nn.Module) -> list[dict]:
    biases = [p for n, p in module.named_parameters() if n.endswith("bias")]
    others = [p for n, p in module.named_parameters() if not n.endswith("bias")]
    return [{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]


def steps(module: nn.Module, weights: Weights, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        weights.zero_grad()
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        with weights.forward():
            loss = module(x).square().sum()
        loss.backward(inputs=weights.inputs)
        optimizer.step()


def adamw(weights: Weights) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights.groups, lr=0.01)


def numbers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("first", [Weights, FlatWeights])
@pytest.mark.parametrize("then", [Weights, FlatWeights])
def test_optimizer_goes_on_however_the_weights_were_kept(first, then):
    expected = network()
    plain = Weights(groups(expected))
    steps(expected, plain, adamw(plain), range(7))

    module = network()
    weights = first(groups(module))
    optimizer = adamw(weights)
    steps(module, weights, optimizer, range(4))
    stored = weights.optimizer_state(optimizer)
    assert {name: tuple(v.shape) for name, v in stored.items() if name.endswith("exp_avg")} == {
        "0.exp_avg": (5, 3),
        "1.exp_avg": (2, 5),
        "2.exp_avg": (5,),
    }
    weights.release()

    weights = then(groups(module))
    optimizer = adamw(weights)
    weights.load_optimizer_state(optimizer, stored)
    steps(module, weights, optimizer, range(4, 7))
    for name, value in numbers(expected).items():
        assert torch.allclose(numbers(module)[name], value, rtol=0, atol=1e-15), name


def test_a_weight_without_state_has_zeros():
    module = network()
    plain = Weights(groups(module))
    optimizer = adamw(plain)
    steps(module, plain, optimizer, range(2))
    stored = {name: v for name, v in plain.optimizer_state(optimizer).items() if not name.startswith("1.")}
    plain.release()
    flat = FlatWeights(groups(module))
    optimizer = adamw(flat)
    flat.load_optimizer_state(optimizer, stored)
    found = flat.optimizer_state(optimizer)
    assert not found["1.exp_avg"].any()
    assert not found["1.exp_avg_sq"].any()
    assert found["0.exp_avg"].any()
    assert found["1.step"] == 2


def test_released_weights_have_memory_of_their_own():
    module = network()
    before = numbers(module)
    flat = FlatWeights(groups(module))
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == 2
    assert all(p.grad is not None for p in module.parameters())
    flat.tensors[0].data.add_(1.0)
    flat.release()
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == 3
    for name, p in module.named_parameters():
        assert p.grad is None
        assert torch.equal(p.detach(), before[name] + (0.0 if name.endswith("bias") else 1.0))
        assert p.untyped_storage().nbytes() == 8 * p.numel()


def test_copies_of_a_module_are_its_own():
    """As the average of the weights is one."""
    module = network()
    flat = FlatWeights(groups(module))
    other = copy.deepcopy(module)
    flat.tensors[0].data.zero_()
    assert all(p.detach().any() for p in other.parameters())


@pytest.fixture
def fitted(ethanol):
    """Fits a small model in double precision for some steps."""

    def fit(folder, plan: str = "fused", max_steps: int = 6, resume: bool = False, **options) -> NDeMTorchMDNet:
        defaults = {
            "backbone_options": TINY,
            "precision": "64-true",
            "batch_size": 4,
            "schedule": "constant",
            "lr": 1e-3,
        }
        defaults |= {"warmup_steps": 0, "seed": 3, "validate_every": 3, "device": "cpu", "progress": False}
        model = NDeMTorchMDNet(**defaults | options, plan=plan)
        return model.fit(ethanol[:12], ethanol[12:16], max_steps=max_steps, checkpoint_dir=folder, resume=resume)

    return fit


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        {"objective": "supervised"},
        {"objective": "ndem"},
        {"objective": "ndem", "accumulate": 2},
        {"objective": "dens"},
        {"objective": "ndem", "weight_decay": 0.1, "clip_norm": 0.1, "ema_decay": 0.9},
    ],
    ids=str,
)
def test_training_is_the_same_with_gradients_past_autograd(fitted, tmp_path, monkeypatch, options):
    kept = []
    monkeypatch.setattr(training, "FlatWeights", lambda g: kept.append(FlatWeights(g)) or kept[-1])
    flat = fitted(tmp_path / "flat", **options)
    assert len(kept) == 1
    monkeypatch.setattr(training, "FlatWeights", Weights)
    plain = fitted(tmp_path / "plain", **options)
    expected = dict(plain.potential_.named_parameters()) | dict(plain.objective_.named_parameters())
    found = dict(flat.potential_.named_parameters()) | dict(flat.objective_.named_parameters())
    for name, p in expected.items():
        assert (p - found[name]).abs().max() < 1e-9, name
    a, b = (load_tensors(tmp_path / x / "step-0000000006" / "trainer.safetensors") for x in ("flat", "plain"))
    assert a.keys() >= b.keys()
    moments = [name for name in b if name.endswith((".exp_avg", ".exp_avg_sq"))]
    assert moments
    for name in moments:
        assert torch.allclose(a[name], b[name], rtol=1e-7, atol=1e-12), name


@needs_compiler
@pytest.mark.parametrize(("first", "then"), [("fused", "eager"), ("eager", "fused")])
def test_a_run_goes_on_with_the_other_plan(fitted, tmp_path, first, then):
    """A run from a CPU may be continued on a GPU, where there is no fused plan."""
    whole = fitted(tmp_path / "whole", plan="eager", max_steps=8)
    fitted(tmp_path / "parts", plan=first, max_steps=4)
    parts = fitted(tmp_path / "parts", plan=then, max_steps=8, resume=True)
    expected = dict(whole.potential_.named_parameters())
    for name, p in parts.potential_.named_parameters():
        assert (p - expected[name]).abs().max() < 1e-8, name


@needs_compiler
def test_after_training_no_weight_is_a_slice(fitted, tmp_path):
    model = fitted(tmp_path)
    for p in [*model.potential_.parameters(), *model.objective_.parameters()]:
        assert p.untyped_storage().nbytes() == p.element_size() * p.numel()
        assert p.grad is None


@needs_compiler
def test_a_training_that_ends_in_an_error_releases_the_weights(fitted, tmp_path, monkeypatch):
    released = []
    monkeypatch.setattr(FlatWeights, "release", lambda self: released.append(self))
    monkeypatch.setattr(training.Run, "update", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path)
    assert len(released) == 1


def test_sizes_that_do_not_fill_a_cache_line():
    weights = [nn.Parameter(torch.full(shape, float(i))) for i, shape in enumerate([(1,), (3, 7), (16,), ()])]
    flat = FlatWeights([{"params": weights}])
    assert flat.tensors[0].shape == (16 + 32 + 16 + 16,)
    assert [p.data_ptr() % 64 for p in weights] == [flat.tensors[0].data_ptr() % 64] * 4
    assert [float(p.detach().mean()) for p in weights] == [0.0, 1.0, 2.0, 3.0]
    assert float(flat.tensors[0].detach().sum()) == np.dot([0, 1, 2, 3], [1, 21, 16, 1])
