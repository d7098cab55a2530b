"""The exponential average of weights: what is predicted, validated, kept and saved is the average, not the last step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from ndem_zoo.models.torchmd_net import NDeMTorchMDNet, TorchMDNet

DECAY = 0.25


def fitted(dataset, steps: int, ema_decay: float, valid=None) -> NDeMTorchMDNet:
    """A model after some steps at a constant learning rate: fewer steps of the same run are its beginning."""
    model = NDeMTorchMDNet(
        backbone_options=TorchMDNet.tiny,
        batch_size=4,
        schedule="constant",
        warmup_steps=0,
        lr=3e-3,
        ema_decay=ema_decay,
        precision="64-true",
        device="cpu",
        progress=False,
    )
    return model.fit(dataset, valid, max_steps=steps)


def weights(model: NDeMTorchMDNet) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.potential_.named_parameters()}


@pytest.fixture(scope="module")
def steps(ethanol) -> list[NDeMTorchMDNet]:
    """The same run without an average, after 1, 2, 3 and 4 steps."""
    return [fitted(ethanol.select(range(16)), n, 0.0) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("validated", [False, True])
def test_the_average_is_what_remains(ethanol, steps, validated, tmp_path):
    train, valid = ethanol.select(range(16)), ethanol.select(range(100, 104)) if validated else None
    average = weights(steps[0])
    for t, model in enumerate(steps[1:], start=1):
        decay = min(DECAY, (1 + t) / (10 + t))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in weights(model).items()}
    model = fitted(train, 4, DECAY, valid)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, average[name], rtol=1e-9, atol=1e-12, msg=name)
    test = ethanol.select(range(200, 205))
    predicted, last = model.predict(test), steps[-1].predict(test)
    assert np.abs(predicted["forces"] - last["forces"]).max() > 1e-4, "the last step is something else"
    expected = copy.deepcopy(steps[-1])
    expected.potential_.load_state_dict(average, strict=False)
    np.testing.assert_allclose(predicted["forces"], expected.predict(test)["forces"], rtol=0, atol=1e-9)
    model.save(tmp_path / "model")
    loaded = NDeMTorchMDNet.load(tmp_path / "model").predict(test)
    np.testing.assert_array_equal(loaded["forces"], predicted["forces"])
    if validated:
        error = np.abs(model.predict(valid)["forces"] - valid.targets["forces"].reshape(4, -1, 3)).mean()
        assert any(value == pytest.approx(error, rel=1e-6) for value in model.history_[-1].values()), (
            "validated as well"
        )
