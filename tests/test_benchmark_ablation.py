"""The ablation harness: every cell trains, budgets are what they say, the table pairs by seed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("rdkit", reason="needs RDKit: some cells need bonds")

from benchmarks.accuracy import ablation


@pytest.mark.parametrize("cell", ablation.CELLS)
def test_every_cell_trains(cell, ethanol):
    model = ablation.model_of(cell, 0).set_params(
        backbone_options={"hidden_channels": 16, "num_layers": 1, "num_heads": 2}
    )
    model.fit(ethanol.select(np.arange(0, 200, 10)), max_steps=2)
    assert np.isfinite(model.evaluate(ethanol.select([5, 15]))["forces_mae"])
    given = ablation.CELLS[cell].keywords
    assert model.resolved_["objective"]["name"] == given["objective"]
    assert (model.potential_.prior is None) == ("prior" not in given)


def test_shuffled_noise_is_not_the_noise(ethanol):
    """The control's target is on the same atoms and of the same size, and has nothing to do with the displacement."""
    models = [ablation.model_of(cell, 0).fit(ethanol.select([0, 9]), max_steps=1) for cell in ("ndem", "shuffled")]
    batch = ethanol.select([3, 4]).to_batch(5.0)
    import torch

    _, noise = models[0].objective_.options.displace(batch, torch.Generator().manual_seed(0), 5.0)
    plain, shuffled = (m.objective_.target(m.potential_, batch, noise) for m in models)
    moved = noise.mask
    assert torch.equal(plain[moved].ne(0), shuffled[moved].ne(0))
    assert not shuffled[~moved].any()
    assert not torch.isclose(plain[moved], shuffled[moved]).any()
    assert 0.3 < float(shuffled[moved].std()) < 3.0


def test_steps_of_a_budget():
    costs = {"supervised": {"ratio": 1.0}, "ndem": {"ratio": 1.25}, "delta_pairs": {"ratio": 1.04}}
    assert ablation.steps_of("ndem", "time", 1000, costs) == 800
    assert ablation.steps_of("ndem", "steps", 1000, costs) == 1000
    assert ablation.steps_of("delta_pairs", "time", 1000, costs) == 1000
    assert ablation.steps_of("supervised_longer", "steps", 1000, costs) == 1500


def test_table_pairs_by_seed_and_plot_needs_two_sizes(tmp_path):
    def run(cell: str, seed: int, force: float, n_train: int = 100) -> dict:
        errors = {"forces_mae_kcal": force, "energy_mae_kcal": force / 3}
        return {
            "cell": cell, "seed": seed, "n_train": n_train, "budget": "time", "base_steps": 10, "steps": 8, "test": errors,
            "train_forces_mae_kcal": 0.5,
        }  # fmt: skip

    runs = [run("supervised", 0, 1.0), run("supervised", 1, 2.0), run("ndem", 1, 1.5), run("ndem", 2, 9.0)]
    lines = ablation.table("ethanol", runs).splitlines()
    (row,) = [line for line in lines if line.startswith("| `ndem`")]
    assert "| 2 | 1.25 | 5.2500 ± 5.3033 | -25.0 % (-0.5000) |" in row
    ablation.plot("ethanol", runs, tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()
    pytest.importorskip("matplotlib")
    ablation.plot("ethanol", [*runs, run("ndem", 0, 3.0, 200)], tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes()[:4] == b"\x89PNG"
