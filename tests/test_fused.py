"""The fused plan against the eager one, its native kernels against torch, and what happens where they cannot be had.

That the plan keeps the whole contract of a backbone, in both precisions, is tested in test_contracts.py.
"""

from __future__ import annotations

import copy
import gc
import os
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.fused import backbone as fused_backbone
from ndem_zoo.fused import gradients_in_place, native
from ndem_zoo.graph import Batch, make_batch
from ndem_zoo.models.potential import Potential
from ndem_zoo.models.torchmd_net import TorchMDNet
from ndem_zoo.physics import forces_from_energy, hessian_vector_product

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler, and so no fused plan")

SMALL = {"hidden_channels": 16, "num_layers": 2, "num_heads": 2, "num_rbf": 8}


def scattered(counts: list[int], box: float, periodic: bool = False, dtype: torch.dtype = torch.float64) -> Batch:
    """Random structures whose atoms keep a distance of 0.9 Å."""
    rng, pos = np.random.default_rng(0), []
    for count in counts:
        placed: list[np.ndarray] = []
        while len(placed) < count:
            new = rng.uniform(0, box, 3)
            if all(np.linalg.norm(new - other) > 0.9 for other in placed):
                placed.append(new)
        pos += placed
    n = len(counts)
    cells = {"cell": np.repeat(np.eye(3)[None] * box, n, 0), "pbc": np.ones((n, 3), bool)} if periodic else {}
    z = rng.choice([1, 6, 8], sum(counts))
    return make_batch(z, np.array(pos), np.array(counts), 5.0, dtype=dtype, **cells)


def potential_of(plan: str, dtype: torch.dtype = torch.float64, **options: object) -> Potential:
    """A potential with weights that depend on the options only, none of them zero."""
    rng = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    potential = Potential(TorchMDNet(**{**SMALL, **options}), forces="gradient", scale=0.7)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    potential.backbone.plan = plan
    return potential.to(dtype).train()


def gradients(potential: Potential, batch: Batch, **inputs: Tensor) -> dict[str, Tensor]:
    """Energy, forces and the gradient of a loss of both, by weights and by the inputs."""
    prediction = potential(batch, **inputs)
    (prediction.forces.square().sum() + (prediction.energy.square() / 7).sum()).backward()
    found = {"energy": prediction.energy.detach(), "forces": prediction.forces.detach()}
    found |= {name: p.grad for name, p in potential.named_parameters() if p.grad is not None}
    return found | {name: value.grad for name, value in inputs.items()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12))
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the native functions that are called: a test of the fused plan must not compare eager with eager."""
    names: list[str] = []
    call = native.Library.call

    def recorded(self: native.Library, name: str, *arguments: object) -> int:
        names.append(name)
        return call(self, name, *arguments)

    monkeypatch.setattr(native.Library, "call", recorded)
    return names


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vector_cutoff": False},
        {"num_layers": 1},
        {"hidden_channels": 12, "num_heads": 2, "num_rbf": 5},  # 6 channels a head: no whole vectors
        {"hidden_channels": 10, "num_heads": 5, "num_layers": 3},
        {"hidden_channels": 64, "num_heads": 8, "num_rbf": 32},  # compiled with constants
        {"hidden_channels": 128, "num_heads": 8, "num_rbf": 32, "num_layers": 2},
        {"hidden_channels": 256, "num_heads": 8, "num_rbf": 64, "num_layers": 2},
        {"cutoff": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case",
    [
        ([6, 1, 9], 4.5, False),
        ([2], 4.0, False),
        ([14, 11], 4.8, True),  # cells smaller than the cutoff: an atom sees its own images
        ([40], 9.0, False),  # a neighbor list, pairs in several tiles
    ],
    ids=["molecules", "two atoms", "periodic", "large"],
)
def test_equals_eager(case, options, ran):
    batch = scattered(*case)
    expected = gradients(potential_of("eager", **options), batch)
    assert not ran
    assert_alike(gradients(potential_of("fused", **options), batch), expected, 1e-10)
    assert "network_gradient" in ran


@pytest.mark.parametrize("case", [([7, 8, 5], 4.5, False), ([14], 4.8, True)], ids=["molecules", "periodic"])
def test_single_precision(case, ran):
    options = {"hidden_channels": 128, "num_heads": 8, "num_rbf": 32, "num_layers": 3}
    expected = gradients(potential_of("eager", **options), scattered(*case))
    batch = scattered(*case, dtype=torch.float32)
    found = gradients(potential_of("fused", torch.float32, **options), batch)
    assert_alike(found, expected, 1e-4)
    assert_alike(
        {name: found[name] for name in ("energy", "forces")}, {n: expected[n] for n in ("energy", "forces")}, 3e-6
    )


def test_encoded_vectors(ran):
    batch = scattered([6, 5], 4.5)
    values = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = [
        gradients(potential_of(plan, encode_vectors=True), batch, node_vectors=values.clone().requires_grad_())
        for plan in ("eager", "fused")
    ]
    assert_alike(found[1], found[0], 1e-10)
    assert found[0]["node_vectors"].norm() > 1e-3
    assert "network_gradient" in ran


def test_energy_alone_gives_positions_a_gradient_too(ran):
    batch, found = scattered([6, 5], 4.5), []
    for plan in ("eager", "fused"):
        potential, pos = potential_of(plan), batch.pos.clone().requires_grad_()
        potential(batch.replace(pos=pos), need_forces=False).energy.square().sum().backward()
        weights = {name: p.grad for name, p in potential.named_parameters() if p.grad is not None}
        found.append(weights | {"pos": pos.grad})
    assert_alike(found[1], found[0], 1e-10)
    assert "network_gradient" in ran


def test_forces_of_two_energies_from_one_set_of_features():
    """Each leaves adjoints and tangents for the final pass, which has to add them."""
    batch, found = scattered([6, 5], 4.5), []
    for plan in ("eager", "fused"):
        potential, other = potential_of(plan), potential_of("eager").backbone.scalar_head().double()
        with torch.no_grad():
            for i, parameter in enumerate(other.parameters()):
                parameter.copy_(torch.sin(torch.arange(parameter.numel()) + i).reshape(parameter.shape) / 3)
        pos = batch.pos.clone().requires_grad_()
        pos.is_private = True
        moved = batch.replace(pos=pos)
        features = potential.backbone(moved)
        energies = [head(features, moved).sum().reshape(1) for head in (potential.energy_head, other)]
        forces = [forces_from_energy(energy, pos, create_graph=True) for energy in energies]
        (forces[0].square().sum() + (forces[1] ** 3).sum()).backward()
        found.append({name: p.grad for name, p in potential.named_parameters() if p.grad is not None})
    bias = "energy_head.output_network.1.update_net.2.bias"  # no force depends on it: a zero here, nothing there
    assert not found[1].pop(bias).any()
    assert_alike(found[1], found[0], 1e-10)


def test_a_graph_that_is_kept_gives_the_same_gradient_again():
    potential, batch = potential_of("fused"), scattered([6, 5], 4.5)
    loss = potential(batch).forces.square().sum()
    found = []
    for keep in (True, False):
        potential.zero_grad()
        loss.backward(retain_graph=keep)
        found.append({name: p.grad for name, p in potential.named_parameters() if p.grad is not None})
    assert_alike(found[1], found[0], 0.0)


def test_frozen_weights_get_no_gradient():
    potential = potential_of("fused")
    potential.backbone.attention_layers.requires_grad_(False)
    found = gradients(potential, scattered([6], 4.0))
    assert not [name for name in found if "attention_layers" in name]
    everything = gradients(potential_of("eager"), scattered([6], 4.0))
    assert_alike(found, {name: everything[name] for name in found}, 1e-10)


def test_in_place_and_by_autograd_give_the_same_gradient_and_add_up():
    batch = scattered([7, 5], 4.5)
    potential = potential_of("fused")
    prediction = potential(batch)
    loss = prediction.forces.square().sum() + prediction.energy.sum()
    loss.backward(inputs=[p for p in potential.parameters() if p.requires_grad])
    expected = {name: p.grad.clone() for name, p in potential.named_parameters() if p.grad is not None}
    anchor = nn.Parameter(torch.zeros(()))
    places = {id(p): torch.ones_like(p) for p in potential.parameters() if p.requires_grad}
    for p in potential.parameters():
        p.grad = places.get(id(p))
    for _ in range(2):
        with gradients_in_place(anchor, places):
            prediction = potential(batch)
        loss = prediction.forces.square().sum() + prediction.energy.sum()
        loss.backward(inputs=[anchor])
    assert anchor.grad is None
    for name, p in potential.named_parameters():
        if p.requires_grad:
            wanted = 1.0 + 2.0 * expected.get(name, torch.zeros_like(p))
            assert torch.allclose(p.grad, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max())), name
        else:
            assert p.grad is None


def test_weights_without_a_place_for_their_gradient_get_it_from_autograd():
    potential = potential_of("fused")
    weights = [p for p in potential.parameters() if p.requires_grad]
    some = {id(p): torch.zeros_like(p) for p in weights[1:]}
    with gradients_in_place(nn.Parameter(torch.zeros(())), some):
        energy = potential(scattered([6], 4.5)).energy
    energy.sum().backward(inputs=weights)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in weights) > 20


def test_second_derivatives_by_positions_are_refused():
    batch, potential = scattered([5], 3.5), potential_of("fused")
    pos = batch.pos.clone().requires_grad_()
    forces = potential(batch.replace(pos=pos)).forces
    with pytest.raises(ConfigError, match="eager"):
        hessian_vector_product(forces, pos, torch.ones_like(pos))
    energy = potential(batch.replace(pos=pos), need_forces=False).energy
    with pytest.raises(ConfigError, match="forces_from_energy"):
        torch.autograd.grad(energy.sum(), pos, create_graph=True)


def test_one_sided_edges_take_the_eager_plan(ran):
    batch = scattered([7], 4.0)
    keep = torch.ones(len(batch.src), dtype=torch.bool)
    keep[3] = False
    for chosen in (keep, batch.src < batch.dst, batch.src > batch.dst):
        cut = batch.replace(src=batch.src[chosen], dst=batch.dst[chosen], shift=batch.shift[chosen])
        found = gradients(potential_of("fused"), cut)
        assert "network_forward" not in ran
        assert_alike(found, gradients(potential_of("eager"), cut), 0.0)


def test_many_one_sided_edges_do_not_overflow():
    """Room is made for half of the edges; without a look at it, this writes megabytes behind it."""
    batch = scattered([2], 2.5)
    n = 1_000_000
    one_sided = batch.replace(
        src=torch.ones(n, dtype=torch.long), dst=torch.zeros(n, dtype=torch.long), shift=batch.shift.new_zeros(n, 3)
    )
    kernels = native.Kernels(native.library(), torch.float64)
    assert fused_backbone.find_pairs(kernels, one_sided, 5.0, 100) is None


def test_trainable_radial_functions_take_the_eager_plan(ran):
    batch = scattered([5], 3.5)
    found = gradients(potential_of("fused", trainable_rbf=True), batch)
    assert found["backbone.distance_expansion.means"].norm() > 0
    assert not ran


def test_weights_in_another_memory_order_take_the_eager_plan(ran):
    batch, potential = scattered([5], 3.5), potential_of("fused")
    expected = gradients(potential, batch)["forces"]
    weight = potential.backbone.attention_layers[1].v_proj.weight
    weight.data = weight.data.t().contiguous().t()
    ran.clear()
    torch.testing.assert_close(potential(batch).forces, expected, atol=1e-10, rtol=0)
    assert "network_forward" not in ran


@pytest.mark.parametrize("plan", ["eager", "fused"])
@pytest.mark.parametrize("number", [-1, 100])
def test_unknown_atomic_numbers_do_not_read_beyond_the_table(number, plan):
    batch = scattered([5], 3.5)
    with pytest.raises(IndexError):
        potential_of(plan)(batch.replace(z=torch.full_like(batch.z, number)))


def test_threads_change_nothing_but_rounding():
    batch, before = scattered([9, 8, 7, 6, 5, 4], 4.5), torch.get_num_threads()
    options = {"hidden_channels": 64, "num_heads": 8, "num_rbf": 32}
    one = gradients(potential_of("fused", **options), batch)
    try:
        torch.set_num_threads(3)
        several = gradients(potential_of("fused", **options), batch)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one["energy"], several["energy"])
    assert_alike(several, one, 1e-12)


def test_same_bits_every_time():
    batch = scattered([9, 8, 7], 4.5, dtype=torch.float32)
    first, second = (gradients(potential_of("fused", torch.float32), batch) for _ in range(2))
    assert_alike(first, second, 0.0)


def test_results_do_not_change_when_memory_is_used_again():
    """What leaves a pass must not lie in its workspace."""
    potential, batch = potential_of("fused"), scattered([9, 8], 4.5)
    kept = potential(batch)
    copies = [t.detach().clone() for t in (kept.energy, kept.forces, *kept.features[:2])]
    tensors = [t.detach() for t in (kept.energy, kept.forces, *kept.features[:2])]
    del kept
    gc.collect()
    for counts in ([9, 8], [5], [12, 3]):
        gradients(potential, scattered(counts, 4.5))
    assert all(torch.equal(now, then) for now, then in zip(tensors, copies, strict=True))


def test_threads_of_the_caller_do_not_share_memory():
    """Every thread has a network of its own; a block of memory that two of them took would mix their values."""
    batches = [scattered([n], 4.5) for n in (5, 6, 7, 8)]
    shared = potential_of("fused")  # torch's seed is one for all threads
    expected = [gradients(copy.deepcopy(shared), batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda batch: gradients(copy.deepcopy(shared), batch), batches))
            for one, other in zip(found, expected, strict=True):
                assert_alike(one, other, 0.0)


def test_a_step_leaves_nothing_behind():
    """Without a collection of garbage: the workspace must come back as soon as the loss is gone."""
    potential, batch = potential_of("fused"), scattered([9, 8], 4.5)
    made: list[weakref.ref] = []
    build = fused_backbone.BackbonePasses.__init__

    def recorded(self: object, *arguments: object) -> None:
        made.append(weakref.ref(self))
        build(self, *arguments)

    gc.disable()
    try:
        fused_backbone.BackbonePasses.__init__ = recorded
        gradients(potential, batch)
        potential(batch)
    finally:
        fused_backbone.BackbonePasses.__init__ = build
        gc.enable()
    assert len(made) == 2
    assert [ref() for ref in made] == [None, None]


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (7, 5, 3), (6, 16, 64), (13, 300, 100), (168, 128, 65), (5, 0, 4)]
)
def test_products(m, k, n, dtype):
    kernels, rng = native.Kernels(native.library(), dtype), torch.Generator().manual_seed(0)
    a, b, bias, c = (torch.randn(s, dtype=dtype, generator=rng) for s in ((m, k), (k, n), (n,), (m, n)))
    exact = a.double() @ b.double()
    scale = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(
        kernels.product(a, b, bias).double(), exact + bias.double(), atol=scale * (k + 1), rtol=0
    )
    transposed = a.t().contiguous().t()
    sums = kernels.product(transposed, b, out=c.clone(), add=True)
    torch.testing.assert_close(sums.double(), exact + c.double(), atol=scale * (k + 1), rtol=0)


@pytest.mark.parametrize("plan", ["eager", "fused"])
def test_not_a_number_passes_through(plan):
    batch = scattered([5, 5], 4.0)
    pos = batch.pos.clone()
    pos[2, 1] = float("nan")
    prediction = potential_of(plan).eval()(batch.replace(pos=pos))
    assert torch.isnan(prediction.energy[0])
    assert torch.isfinite(prediction.energy[1])
    assert torch.isfinite(prediction.forces[5:]).all()


# ----------------------------------------------------------------------------------------------------------- building


@pytest.fixture
def fresh(monkeypatch):
    """The library is looked for anew, and again after the test."""
    native.library.cache_clear()
    yield monkeypatch
    native.library.cache_clear()


def test_without_a_compiler_one_warning_and_the_same_numbers(fresh, tmp_path, ran):
    fresh.setenv("CXX", "no-such-compiler")
    fresh.setenv("NDEM_ZOO_CACHE", str(tmp_path))
    batch = scattered([6], 4.0)
    with pytest.warns(RuntimeWarning, match="no-such-compiler.*eager plan"):
        found = gradients(potential_of("fused"), batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(potential_of("fused"), batch)
    assert_alike(found, gradients(potential_of("eager"), batch), 0.0)
    assert not ran


def test_a_compiler_that_fails_says_why(fresh, tmp_path):
    script = tmp_path / "broken"
    script.write_text(
        "#!/bin/sh\ncase $1 in --version) echo 1;; *) echo 'x.cpp:1: error: no room' >&2; exit 1;; esac\n"
    )
    script.chmod(0o755)
    fresh.setenv("CXX", str(script))
    fresh.setenv("NDEM_ZOO_CACHE", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match="no room"):
        assert native.library() is None
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_switched_off(fresh):
    fresh.setenv("NDEM_ZOO_NATIVE", "0")
    assert native.library() is None


def test_compiled_once_and_made_anew_if_damaged(fresh, tmp_path, monkeypatch):
    fresh.setenv("NDEM_ZOO_CACHE", str(tmp_path))
    runs: list[list[str]] = []
    run = native._run
    monkeypatch.setattr(native, "_run", lambda command: (runs.append(command), run(command))[1])
    assert native.library() is not None
    (library,) = (tmp_path / "kernels").glob("*.so")
    native.library.cache_clear()
    assert native.library() is not None
    assert len([command for command in runs if "-c" in command]) == 1
    content = library.read_bytes()
    library.unlink()  # not written to: it is loaded
    library.write_bytes(content[:-1000] + bytes(1000))
    native.build(tmp_path / "kernels")
    assert len([command for command in runs if "-c" in command]) == 2
    assert library.read_bytes() == content


def test_installed_with_the_package():
    sources = sorted(path.name for path in native.SOURCE.iterdir())
    assert sources == ["atoms.h", "head.h", "interface.cpp", "network.h", "pairs.h", "product.h", "vector.h"]
    setup = Path(__file__).resolve().parents[1] / "setup.py"
    if setup.exists():
        assert "fused/source/*.h" in setup.read_text(encoding="utf-8")


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("NDEM_ZOO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "somewhere")
    assert native.cache_folder() == Path(os.sep) / "somewhere" / "ndem_zoo" / "kernels"
