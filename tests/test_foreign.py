"""Checkpoints of TorchMD-NET, Zaidi et al., Frad and SliDe: names, shapes, signs, units, and files that are attacks.

The files are made here, with the names and shapes of the published code and random numbers; where torchmd-net is installed,
its own model says what energies and forces must come out.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import io
import math
import os
import pickle
import re
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units

from ndem_zoo.datasets.pickles import DictRecord, read_torch_file
from ndem_zoo.errors import ConfigError, FileFormatError, NotFittedError
from ndem_zoo.foreign import import_checkpoint
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet, TorchMDNet
from ndem_zoo.testing import batch_of
from ndem_zoo.testing.common import example_molecules
from ndem_zoo.transfer import start_from

F, K, LAYERS, MAX_Z = 16, 8, 2, 100
OPTIONS = {"hidden_channels": F, "num_layers": LAYERS, "num_heads": 2, "num_rbf": K}
#: Hyper-parameters as TorchMD-NET's training script saves them.
HPARAMS = {
    "model": "equivariant-transformer",
    "embedding_dimension": F,
    "num_layers": LAYERS,
    "num_heads": 2,
    "num_rbf": K,
    "cutoff_lower": 0.0,
    "cutoff_upper": 5.0,
    "activation": "silu",
    "attn_activation": "silu",
    "rbf_type": "expnorm",
    "trainable_rbf": False,
    "distance_influence": "both",
    "neighbor_embedding": True,
    "output_model": "Scalar",
    "prior_model": None,
    "reduce_op": "add",
    "aggr": "add",
}


def head_shapes(prefix: str, inner: str = "update_net.") -> dict[str, tuple[int, ...]]:
    """Two gated blocks."""
    shapes = {}
    for block, (i, o) in enumerate(((F, F // 2), (F // 2, 1))):
        name = f"{prefix}.output_network.{block}."
        shapes |= {f"{name}vec1_proj.weight": (i, i), f"{name}vec2_proj.weight": (o, i)}
        shapes |= {f"{name}{inner}0.weight": (i, 2 * i), f"{name}{inner}0.bias": (i,)}
        shapes |= {f"{name}{inner}2.weight": (2 * o, i), f"{name}{inner}2.bias": (2 * o,)}
    return shapes


def body_shapes(edge: int = K) -> dict[str, tuple[int, ...]]:
    """The representation model; `edge` is the width of what dk_proj and dv_proj read."""
    shapes = {
        "embedding.weight": (MAX_Z, F),
        "neighbor_embedding.embedding.weight": (MAX_Z, F),
        "neighbor_embedding.distance_proj.weight": (F, K),
        "neighbor_embedding.distance_proj.bias": (F,),
        "neighbor_embedding.combine.weight": (F, 2 * F),
        "neighbor_embedding.combine.bias": (F,),
        "out_norm.weight": (F,),
        "out_norm.bias": (F,),
    }
    for layer in range(LAYERS):
        name = f"attention_layers.{layer}."
        shapes |= {f"{name}layernorm.weight": (F,), f"{name}layernorm.bias": (F,), f"{name}vec_proj.weight": (3 * F, F)}
        for kind, out, width in (
            ("q", F, F), ("k", F, F), ("v", 3 * F, F), ("o", 3 * F, F), ("dk", F, edge), ("dv", 3 * F, edge),
        ):  # fmt: skip
            shapes |= {f"{name}{kind}_proj.weight": (out, width), f"{name}{kind}_proj.bias": (out,)}
    return {f"representation_model.{name}": shape for name, shape in shapes.items()}


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def weights(*, noise: str | None = "output_model_noise", inner: str = "update_net.", edge: int = K, **more) -> dict:
    """Weights of Frad's MD17 fine-tune model; `more` by name with dots for double underscores."""
    start = math.exp(-5.0)
    found = {"mean": torch.tensor(-3.5), "std": torch.tensor(2.5)} | drawn(body_shapes(edge))
    found |= {
        "representation_model.distance_expansion.means": torch.linspace(start, 1.0, K),
        "representation_model.distance_expansion.betas": torch.full((K,), (2.0 / K * (1.0 - start)) ** -2),
    }
    found |= drawn(head_shapes("output_model", inner), 1)
    if noise is not None:
        found |= drawn(head_shapes(noise, inner), 2)
        found |= {"pos_normalizer.acc_sum": torch.ones(3), "pos_normalizer.acc_squared_sum": torch.ones(3)}
        found |= {"pos_normalizer.acc_count": torch.ones(1), "pos_normalizer.num_accumulations": torch.ones(1)}
    return found | {name.replace("__", "."): torch.ones(shape) for name, shape in more.items()}


def lightning(path: Path, state: dict, hparams=HPARAMS, prefix: str = "model.") -> Path:
    """A file as Lightning writes it: ordered weights, hyper-parameters, callbacks by class, optimizer, counters."""
    content = {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "1.3.8",
        "state_dict": collections.OrderedDict((prefix + name, value) for name, value in state.items()),
        "callbacks": {collections.OrderedDict: {"best_model_score": torch.tensor(0.1), "best_model_path": "a.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "lr_schedulers": [{"best": np.float64(0.3), "factor": 0.8}],
        "hyper_parameters": hparams,
    }
    content["state_dict"]._metadata = {"": {"version": 1}}
    torch.save(content, path)
    return path


@pytest.fixture
def frad(tmp_path) -> Path:
    return lightning(tmp_path / "frad.ckpt", weights())


# ---------------------------------------------------------------------------------------------------- names and shapes


def expected_backbone(state: dict) -> dict[str, torch.Tensor]:
    return {
        k.removeprefix("representation_model."): v for k, v in state.items() if k.startswith("representation_model.")
    }


def test_every_weight_is_loaded_or_named(frad):
    found = import_checkpoint(frad)
    state = weights()
    assert found.flavor == "plain"
    assert found.options == {**OPTIONS, "cutoff": 5.0, "max_z": 100, "vector_cutoff": False} | {
        "trainable_rbf": False, "encode_vectors": False,
    }  # fmt: skip
    assert (found.mean, found.std) == (-3.5, 2.5)
    TorchMDNet(**found.options).load_state_dict(
        {k.removeprefix("backbone."): v for k, v in found.tensors.items() if k.startswith("backbone.")}
    )
    for name, value in expected_backbone(state).items():
        assert torch.equal(found.tensors[f"backbone.{name}"], value), name
    for name in head_shapes("x"):
        name = name.removeprefix("x.")
        assert torch.equal(found.tensors[f"energy_head.{name}"], state[f"output_model.{name}"])
        assert torch.equal(found.tensors[f"noise_head.{name}"], state[f"output_model_noise.{name}"])
    assert set(found.report.skipped) == {n for n in state if n.startswith("pos_normalizer.")} | {"mean", "std"}
    assert len(found.report.loaded) + len(found.report.skipped) == len(state)
    assert "pos_normalizer" in str(found.report)
    assert "statistics of the noise" in str(found.report)


@pytest.mark.parametrize("inner", ["update_net.", "update_net.layers."])
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("hparams", ["dict", "namespace", "lightning"])
def test_spellings_of_one_network_are_one(tmp_path, frad, inner, prefix, hparams, monkeypatch):
    kinds = {
        "dict": HPARAMS,
        "namespace": argparse.Namespace(**HPARAMS),
        "lightning": attribute_dict(monkeypatch, HPARAMS),
    }
    state = weights(inner=inner, representation_model__distance__box=(3, 3))
    found = import_checkpoint(lightning(tmp_path / "other.ckpt", state, kinds[hparams], prefix))
    expected = import_checkpoint(frad)
    assert found.options == expected.options
    assert found.hyper_parameters == expected.hyper_parameters
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(value, expected.tensors[name]) for name, value in found.tensors.items())
    assert "representation_model.distance.box" in found.report.skipped


def attribute_dict(monkeypatch, values: dict) -> dict:
    """An object of a class with the name of Lightning's, which need not be installed to read it."""
    module = types.ModuleType("pytorch_lightning.utilities.parsing")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    monkeypatch.setitem(os.sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(os.sys.modules, "pytorch_lightning.utilities", types.ModuleType("pytorch_lightning.utilities"))
    monkeypatch.setitem(os.sys.modules, module.__name__, module)
    return module.AttributeDict(values)


def test_bare_weights(tmp_path, frad):
    torch.save(weights(), tmp_path / "weights.pt")
    found, expected = import_checkpoint(tmp_path / "weights.pt"), import_checkpoint(frad)
    assert found.options == expected.options | {"num_heads": 8}, (
        "the cutoff is in the radial functions; heads: published"
    )
    assert found.hyper_parameters == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_views(tmp_path, dtype):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6).to(dtype)
    torch.save({"a": base[1:, ::2].T, "b": torch.nn.Parameter(base), "c": base[0, 0], "d": base[:0]}, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    for name, expected in (("a", base[1:, ::2].T), ("b", base), ("c", base[0, 0]), ("d", base[:0])):
        np.testing.assert_array_equal(found[name], expected.float().numpy())


def test_slide_heads(tmp_path):
    """SliDe: a list of heads, the first of which tells the noise; GET is refused, and read in part when asked."""
    state = weights(noise="output_model_noise.0", edge=F) | drawn(head_shapes("output_model_ff"), 5)
    state |= {f"output_model_noise.{i}.output_network.0.weight": torch.ones(F, F) for i in (1, 2, 3, 4)}
    state |= {f"representation_model.{n}": torch.ones(2, 2) for n in ("init_e.lin.weight", "update_es.0.w", "emb.x")}
    state |= {f"{n}_normalizer.acc_sum": torch.ones(3) for n in ("ff", "bond_pos", "reg_dev")}
    state |= {"angle_ijk_proj.weight": torch.ones(2, 2)}
    path = lightning(tmp_path / "slide.ckpt", state, HPARAMS | {"model": "equivariant-transformerf2d_org"})
    with pytest.raises(ConfigError, match=r"GET.*partial=True"):
        import_checkpoint(path)
    found = import_checkpoint(path, partial=True)
    assert found.flavor == "get"
    edges = {f"backbone.attention_layers.{i}.{kind}_proj.weight" for i in range(LAYERS) for kind in ("dk", "dv")}
    assert set(found.report.mismatched) == edges
    assert edges <= set(found.report.fresh)
    assert found.report.mismatched["backbone.attention_layers.0.dk_proj.weight"] == ((F, F), (F, K))
    name = "output_network.1.vec2_proj.weight"
    assert torch.equal(found.tensors[f"noise_head.{name}"], state[f"output_model_noise.0.{name}"])
    other = import_checkpoint(path, partial=True, noise_head="output_model_ff")
    assert torch.equal(other.tensors[f"noise_head.{name}"], state[f"output_model_ff.{name}"])
    untouched = {n for n in state if "normalizer" in n or "init_e" in n or re.match(r"output_model_noise\.[1-4]", n)}
    assert untouched <= set(found.report.skipped)


@pytest.mark.parametrize(
    ("more", "flavor"),
    [
        ({"layernorm_on_vec": "whitened"}, "whitened"),
        ({"layernorm_on_vec": None, "seperate_noise": True}, "whitened_noise"),
        ({}, "whitened"),
    ],
)
def test_norms_before_the_heads(tmp_path, more, flavor):
    state = weights(representation_model__out_norm_vec__weight=(F,))
    found = import_checkpoint(lightning(tmp_path / "x.ckpt", state, HPARAMS | more))
    assert found.flavor == flavor
    assert "representation_model.out_norm_vec.weight" in found.report.skipped
    assert "not the same function" in str(found.report)
    assert bool(found.why_no_energies()) == (flavor == "whitened")


def test_norms_in_every_layer_are_refused(tmp_path):
    state = weights(representation_model__vec_norms__0__weight=(F,), representation_model__vec_norms__1__weight=(F,))
    path = lightning(tmp_path / "x.ckpt", state)
    with pytest.raises(ConfigError, match="vec_norms"):
        import_checkpoint(path)
    found = import_checkpoint(path, partial=True)
    assert found.flavor == "per_layer_norms"
    assert not found.report.mismatched
    assert found.why_no_energies()


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "tanh"}, {"attn_activation": "relu"}, {"rbf_type": "gauss"}, {"distance_influence": "keys"},
        {"cutoff_lower": 0.5}, {"aggr": "mean"}, {"model": "tensornet"}, {"cutoff_upper": 4.5},
    ],
)  # fmt: skip
def test_hyper_parameters_that_change_the_function_are_refused(tmp_path, change):
    path = lightning(tmp_path / "x.ckpt", weights(), HPARAMS | change)
    with pytest.raises(ConfigError, match=re.escape(str(next(iter(change.values()))))):
        import_checkpoint(path)
    assert import_checkpoint(path, partial=True).why_no_energies()


@pytest.mark.parametrize(
    "name", ["prior_model.atomref.weight", "prior_model.0.atomref.weight", "prior_model.initial_atomref"]
)
def test_atom_references(tmp_path, name):
    table = torch.linspace(0, 1, 100).reshape(100, 1)
    state = weights() | {"prior_model.initial_atomref": torch.zeros(100, 1)} | {name: table}
    found = import_checkpoint(lightning(tmp_path / "x.ckpt", state, HPARAMS | {"prior_model": "Atomref"}))
    np.testing.assert_array_equal(found.atom_references[:100], table[:, 0].numpy())
    assert found.why_no_energies() == ""
    other = import_checkpoint(lightning(tmp_path / "y.ckpt", state, HPARAMS | {"prior_model": ["Atomref", "ZBL"]}))
    assert "ZBL" in other.why_no_energies()


# ------------------------------------------------------------------------------------------------ files that are attacks


class Call:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        lambda mark: Call(os.system, f"touch {mark}"),
        lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Call(getattr, dict, "keys"),
        lambda mark: Call(Path(mark).touch.__func__, Path(mark)),
        lambda mark: Call(torch.load, str(mark)),
    ],
)
@pytest.mark.parametrize("place", ["state_dict", "hyper_parameters", "callbacks"])
def test_calls_are_not_executed(tmp_path, attack, place):
    mark = tmp_path / "executed"
    content = {"state_dict": weights(), "hyper_parameters": dict(HPARAMS), "callbacks": {}}
    content[place]["x"] = attack(mark)
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(FileFormatError, match=r"bad.ckpt.*(may be an attack|is a DictRecord)"):
        import_checkpoint(tmp_path / "bad.ckpt")
    assert not mark.exists()
    with pytest.raises(FileFormatError):
        start_from(tmp_path / "bad.ckpt")


def test_the_attack_would_work(tmp_path):
    """The test above tests something: Python's own machine executes it."""
    buffer = io.BytesIO()
    torch.save({"x": Call(os.system, f"touch {tmp_path / 'executed'}")}, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    assert (tmp_path / "executed").exists()


def test_every_truncation_is_an_error(frad, tmp_path):
    whole = frad.read_bytes()
    for end in np.linspace(0, len(whole) - 1, 40).astype(int):
        (tmp_path / "cut.ckpt").write_bytes(whole[:end])
        with pytest.raises(FileFormatError, match=r"cut\.ckpt"):
            import_checkpoint(tmp_path / "cut.ckpt")


def rewritten(path: Path, out: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    """The archive with parts changed: `change` gets (name, content) and returns a new content, or None to leave it out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: None if n.endswith("data/0") else c, "data/0"),
        (lambda n, c: c[:-4] if n.endswith("data/5") else c, "storage that claims"),
        (lambda n, c: None if n.endswith("data.pkl") else c, "0 parts named data.pkl"),
        (lambda n, c: b"big" if n.endswith("byteorder") else c, "little-endian"),
        (lambda n, c: c + b"." if n.endswith("data.pkl") else c, "behind the end"),
        (lambda n, c: c[: len(c) // 2] if n.endswith("data.pkl") else c, "truncated"),
    ],
)
def test_damaged_archives(frad, tmp_path, change, message):
    if message == "little-endian":
        with zipfile.ZipFile(frad) as archive:
            if not any(name.endswith("byteorder") for name in archive.namelist()):
                pytest.skip("this torch does not write the order of bytes")
    with pytest.raises(FileFormatError, match=message):
        import_checkpoint(rewritten(frad, tmp_path / "bad.ckpt", change))


def test_compressed_archives_are_refused(frad, tmp_path):
    """A bomb: a megabyte of zeros for each kilobyte of file."""
    with pytest.raises(FileFormatError, match="compressed"):
        import_checkpoint(rewritten(frad, tmp_path / "bad.ckpt", lambda n, c: c, zipfile.ZIP_DEFLATED))


def test_a_small_file_does_not_fill_the_memory(tmp_path):
    """Bytes of 100 kB, made a hundred thousand times: 10 GB from a file of a megabyte."""
    text = b"X" + (100_000).to_bytes(4, "little") + b"a" * 100_000
    arguments = text + b"X\x06\x00\x00\x00latin1\x86q\x02"
    pickled = b"\x80\x02]c_codecs\nencode\nq\x00" + arguments + b"R" + b"h\x00h\x02R" * 100_000 + b"."
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(FileFormatError, match="over and over"):
        import_checkpoint(tmp_path / "bomb.ckpt")


def test_old_format_and_other_files(tmp_path):
    torch.save(weights(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    for name in ("old.pt", "text.ckpt", "pickle.ckpt"):
        with pytest.raises(FileFormatError, match=r"torch 1\.6"):
            import_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        import_checkpoint(tmp_path / "absent.ckpt")


def renamed(state: dict, old: str, new: str) -> dict:
    return {name.replace(old, new): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (lambda s: {"a": torch.ones(2)}, FileFormatError, "no Equivariant Transformer"),
        (lambda s: {k: v for k, v in s.items() if "q_proj" not in k}, FileFormatError, "q_proj"),
        (lambda s: s | {"representation_model.out_norm.weight": torch.ones(F + 1)}, FileFormatError, "out_norm"),
        (
            lambda s: s | {"representation_model.out_norm.bias": torch.full((F,), math.nan)},
            FileFormatError,
            "not finite",
        ),
        (lambda s: renamed(s, "attention_layers.1.", "attention_layers.7."), FileFormatError, r"\[0, 7\]"),
        (
            lambda s: s | {"representation_model.embedding.weight": torch.ones(2, 100_000)},
            ConfigError,
            "embedding|lacks",
        ),
        (lambda s: renamed(s, "distance_expansion", "other"), FileFormatError, "distance_expansion"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, state, error, message):
    path = lightning(tmp_path / "x.ckpt", state(weights()))
    with pytest.raises((error, FileFormatError), match=message):
        import_checkpoint(path)


def test_hyper_parameters_of_the_wrong_kind(tmp_path):
    for change in ({"num_heads": "many"}, {"cutoff_upper": [5.0]}, {"num_heads": 10**9}, {"cutoff_upper": math.nan}):
        with pytest.raises((FileFormatError, ConfigError)):
            import_checkpoint(lightning(tmp_path / "x.ckpt", weights(), HPARAMS | change))


def test_reading_draws_no_random_numbers(frad):
    before = torch.get_rng_state()
    import_checkpoint(frad)
    assert torch.equal(torch.get_rng_state(), before)


def test_ordered_dicts_keep_their_items(tmp_path):
    torch.save(collections.OrderedDict(b=1, a=[2, {"c": 3.5}]), tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    assert isinstance(found, DictRecord)
    assert found.entries == {"b": 1, "a": [2, {"c": 3.5}]}


# ------------------------------------------------------------------------------------------------------- models of them


def model_options(**more):
    options = {"device": "cpu", "progress": False, "precision": "64-true", "batch_size": 4, "warmup_steps": 0}
    return {**options, "lr": 1e-3, "min_lr": 0.0, **more}


def test_the_denoising_head_is_negated(frad, ethanol):
    """Theirs gives +epsilon; ours F - epsilon. Noisy Nodes' head gives +epsilon and takes it as it is."""
    batch = batch_of(example_molecules(), 5.0)
    same = NDeMTorchMDNet.from_checkpoint(frad, objective="noisy_nodes", **model_options())
    ours = NDeMTorchMDNet.from_checkpoint(frad, objective="ndem", **model_options())
    features = same.potential_.backbone(batch)
    theirs = same.objective_.noise_head(features, batch)
    negated = ours.objective_.noisy_force_head(ours.potential_.backbone(batch), batch)
    assert float(theirs.detach().abs().max()) > 1e-2
    assert torch.equal(negated, -theirs)
    assert "negated" in str(ours.init_report_)
    assert "negated" not in str(same.init_report_)


def test_a_checkpoint_without_units_predicts_nothing(frad, ethanol, tmp_path):
    model = NDeMTorchMDNet.from_checkpoint(frad, **model_options())
    with pytest.raises(NotFittedError, match="only pre-trained"):
        model.predict(ethanol[:2])
    model.save(tmp_path / "model")
    loaded = NDeMTorchMDNet.load(tmp_path / "model")
    for name, value in model.potential_.state_dict().items():
        assert torch.equal(loaded.potential_.state_dict()[name], value)
    assert "frad.ckpt" in (tmp_path / "model" / "card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["file", "imported", "model", "folder"])
def test_fit_begins_with_a_checkpoint(frad, ethanol, tmp_path, form):
    model = NDeMTorchMDNet.from_checkpoint(frad, **model_options())
    model.save(tmp_path / "model")
    sources = {"file": frad, "imported": import_checkpoint(frad), "model": model, "folder": tmp_path / "model"}
    options = {**OPTIONS, "vector_cutoff": False}
    fitted = NDeMTorchMDNet(backbone_options=options, **model_options(lr=0.0))
    fitted.fit(ethanol[:8], max_steps=1, init_from=sources[form])
    state = weights()
    for name, value in expected_backbone(state).items():
        assert torch.equal(fitted.potential_.backbone.state_dict()[name], value.double()), name
    head = fitted.objective_.noisy_force_head.state_dict()
    flipped = "output_network.1.vec2_proj.weight"
    for name, value in head.items():
        sign = -1.0 if name == flipped else 1.0
        assert torch.equal(value, sign * state[f"output_model_noise.{name}"].double()), name
    energy = fitted.potential_.energy_head.state_dict()
    assert not any(torch.equal(energy[n], state[f"output_model.{n}"].double()) for n in energy if n.endswith("weight"))


def test_other_options_are_refused_before_anything_is_done(frad, ethanol):
    for change, message in (
        ({"vector_cutoff": True}, "vector_cutoff"),
        ({"num_heads": 4}, "num_heads"),
        ({"cutoff": 4.0}, "cutoff"),
    ):
        model = NDeMTorchMDNet(backbone_options={**OPTIONS, "vector_cutoff": False, **change}, **model_options())
        with pytest.raises(ConfigError, match=message):
            model.fit(ethanol[:8], max_steps=1, init_from=frad)
        assert not hasattr(model, "potential_")
    model.fit(ethanol[:8], max_steps=1, init_from=frad, init_partial=True)
    assert "cutoff" in str(model.init_report_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy_unit": "eV"}, "elements"),
        ({"energy_unit": "furlong", "elements": "CHO"}, "furlong"),
        ({"energy_unit": "eV", "elements": ["Xx"]}, "Xx"),
        ({"energy_unit": "eV", "elements": "CHO", "target": "mu"}, "mu"),
    ],
)
def test_what_a_model_needs_to_be_told(frad, options, message):
    with pytest.raises(ConfigError, match=message):
        NDeMTorchMDNet.from_checkpoint(frad, **options)


def test_pretrained_networks_give_no_energies(tmp_path):
    path = lightning(tmp_path / "x.ckpt", weights(), HPARAMS | {"denoising_only": True})
    with pytest.raises(ConfigError, match="denoising only"):
        NDeMTorchMDNet.from_checkpoint(path, energy_unit="eV", elements="CHO")


# --------------------------------------------------------------------------------------------- torchmd-net's own numbers


def torchmd_net_script():
    """The committed script that builds torchmd-net's model."""
    path = Path(__file__).resolve().parents[1] / "scripts" / "make_golden_torchmd_net.py"
    spec = importlib.util.spec_from_file_location("make_golden_torchmd_net", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("vector_cutoff", [True, False])
@pytest.mark.parametrize("with_references", [True, False])
def test_energies_and_forces_are_those_of_torchmd_net(tmp_path, vector_cutoff, with_references):
    """Its own model, saved as Lightning does, read, and asked for the same molecules."""
    pytest.importorskip("torchmdnet", reason="torchmd-net is not installed")
    script = torchmd_net_script()
    torch.manual_seed(3)
    model = script.torchmd_net_model({**OPTIONS, "cutoff": 5.0, "vector_cutoff": vector_cutoff})
    model.mean, model.std = torch.tensor(-40.0).double(), torch.tensor(1.7).double()
    hparams = HPARAMS | {"vector_cutoff": vector_cutoff, "precision": 64, "derivative": True}
    if with_references:
        from torchmdnet.priors import Atomref

        prior = Atomref(max_z=100).double()
        prior.atomref.weight.data = torch.linspace(-3, 2, 100).double().reshape(100, 1)
        model.prior_model = torch.nn.ModuleList([prior])
        hparams |= {"prior_model": "Atomref"}
    noise = script.torchmd_net_vector_head(TorchMDNet(**OPTIONS).double().vector_head().double(), F)
    state = model.state_dict() | {f"output_model_noise.{k}": v for k, v in noise.state_dict().items()}
    path = lightning(tmp_path / "theirs.ckpt", state, hparams)

    molecules = example_molecules()
    batch = batch_of(molecules, 5.0)
    energy, forces = model(batch.z, batch.pos.clone(), batch.system)
    x, vec, z, pos, system = model.representation_model(batch.z, batch.pos.clone(), batch.system)
    vectors = noise.pre_reduce(x, vec, z, pos, system).detach()

    symbols = sorted({s for atoms in molecules for s in atoms.get_chemical_symbols()})
    ours = NDeMTorchMDNet.from_checkpoint(path, energy_unit="kcal/mol", elements=symbols, **model_options())
    predicted = ours.predict(molecules)
    factor = units.kcal / units.mol
    expected = factor * energy[:, 0].detach().numpy()
    np.testing.assert_allclose(predicted["energy"], expected, rtol=0, atol=1e-10 * abs(expected).max())
    found = np.concatenate(predicted["forces"])
    assert abs(found).max() > 1e-3
    np.testing.assert_allclose(found, factor * forces.detach().numpy(), rtol=0, atol=1e-10 * abs(found).max())
    head = ours.objective_.noisy_force_head(ours.potential_.backbone(batch), batch)
    torch.testing.assert_close(head, -vectors, rtol=0, atol=1e-10 * float(vectors.abs().max()))
    with pytest.raises(ValueError, match="not been trained on"):
        ours.predict(Atoms("Au"))


def test_energies_are_mean_std_and_references(tmp_path, frad):
    """Without torchmd-net: E = unit * (sum (std * s + reference) + mean), and forces are its derivative."""
    table = torch.linspace(0, 1, 100).reshape(100, 1)
    path = lightning(
        tmp_path / "x.ckpt", weights() | {"prior_model.atomref.weight": table}, HPARAMS | {"prior_model": "Atomref"}
    )
    molecules = example_molecules()
    symbols = sorted({s for atoms in molecules for s in atoms.get_chemical_symbols()})
    model = NDeMTorchMDNet.from_checkpoint(path, energy_unit="kcal/mol", elements=symbols, **model_options())
    batch = batch_of(molecules, 5.0)
    network = TorchMDNet(**OPTIONS, vector_cutoff=False).double()
    network.load_state_dict({k: v.double() for k, v in expected_backbone(weights()).items()})
    head = network.scalar_head().double()
    head.load_state_dict(
        {k.removeprefix("output_model."): v.double() for k, v in weights().items() if k.startswith("output_model.")}
    )
    scalars = 2.5 * head(network(batch), batch).detach() + table[batch.z, 0].double()
    expected = torch.zeros(batch.n_systems, dtype=torch.float64).index_add(0, batch.system, scalars) - 3.5
    predicted = model.predict(molecules)["energy"]
    np.testing.assert_allclose(predicted, expected.numpy() * units.kcal / units.mol, rtol=1e-12)
