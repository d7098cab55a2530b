"""A small genuine file of every kind that the package reads, how it is loaded, and what protects it.

One kind is one entry in `KINDS`. Ours carry SHA-256 checksums; packed formats of others have checksums of their own;
plain text and the pages of LMDB have none, so that a flipped digit is just another number: nobody can tell.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import lzma
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reliability.children import model_fingerprint, small_model
from ndem_zoo import MolecularDataset, NDeMModel, TorchMDNet, open_store
from ndem_zoo.checkpoint import checkpoints, load_record, save_record
from ndem_zoo.datasets import StoreWriter, read_extxyz, read_md17, read_sample
from ndem_zoo.datasets.extxyz import write_extxyz
from ndem_zoo.datasets.oc20 import linear_reference, read_oc20, read_reference
from ndem_zoo.datasets.pcqm4mv2 import read_pcqm4mv2
from ndem_zoo.datasets.qm9 import COLUMNS, read_qm9
from ndem_zoo.datasets.sample import sample_file
from ndem_zoo.foreign import import_checkpoint
from ndem_zoo.history import read_history
from ndem_zoo.predictions import Predictions
from ndem_zoo.training import _read_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes
    ----------
    make
        Writes the specimen into an empty folder.
    load
        Reads it from there; its result goes through `children.fingerprint`.
    protection
        What finds a damage; empty if nothing can.
    needs
        Module without which it cannot be made or read.
    files
        Names (patterns) of the files that are damaged; default all.
    """

    make: Callable[[Path], None]
    load: Callable[[Path], Any]
    protection: str
    needs: str = ""
    files: tuple[str, ...] = ("*",)


def frames(n: int = 5) -> MolecularDataset:
    """The first frames of the embedded ethanol sample."""
    return read_sample("ethanol")[:n]


def training(folder: Path, steps: int = 4, **options: Any) -> NDeMModel:
    """A short training with checkpoints; the same bits every time."""
    data = read_sample("ethanol")
    limits = {"max_steps": steps, "checkpoint_dir": folder, "checkpoint_every": 2}
    return small_model().fit(data[:10], data[10:14], **{**limits, **options})


# ------------------------------------------------------------------------------------------------------------------ ours


def make_model(folder: Path) -> None:
    data = read_sample("ethanol")
    small_model().fit(data[:10], data[10:14], max_steps=2).save(folder / "model")


def make_checkpoint(folder: Path) -> None:
    training(folder, steps=2)
    (folder / "history.csv").unlink()


def load_checkpoint(folder: Path) -> Any:
    return _read_checkpoint(checkpoints(folder)[0])


def make_unfinished_store(folder: Path) -> None:
    with StoreWriter(folder / "store") as writer:
        writer.append(frames(3))
        writer.commit("first")


def finish_store(folder: Path) -> Any:
    with StoreWriter(folder / "store") as writer:
        writer.append(read_sample("ethanol")[5:7])
        writer.commit("second")
        return writer.finish()


def make_predictions(folder: Path) -> None:
    data = frames()
    Predictions.of("test", data, {name: np.array(values) * 1.01 for name, values in data.targets.items()}).save(folder)


def make_history(folder: Path) -> None:
    training(folder, steps=4)
    for path in checkpoints(folder):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


# --------------------------------------------------------------------------------------------------------------- others


def make_md17(folder: Path, save: Callable[..., None] = np.savez) -> None:
    with np.load(sample_file("ethanol")) as raw:
        save(folder / "md17_ethanol.npz", z=raw["z"], **{name: raw[name][:5] for name in "REF"})


def make_extxyz(folder: Path, suffix: str = "") -> None:
    import bz2
    import gzip

    write_extxyz(folder / "frames.extxyz", frames())
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix)
    if pack is not None:
        plain = folder / "frames.extxyz"
        (folder / f"frames.extxyz{suffix}").write_bytes(pack(plain.read_bytes()))
        plain.unlink()


def qm9_values() -> list[list[float]]:
    """Properties of four fragments CH, as the official files have them: Hartree, D, ..."""
    return [
        [5.5, 6.5, 7.5, 0.1 * i, 9.25, -0.25, 0.0625, 0.3125, 35.5, 0.015, *[-38.6 - 0.01 * i] * 4, 6.25]
        for i in range(1, 5)
    ]


def make_qm9_archive(folder: Path) -> None:
    with tarfile.open(folder / "dsgdb9nsd.xyz.tar.bz2", "w:bz2") as tar:
        for i, values in enumerate(qm9_values(), 1):
            atoms = [f"C\t 0.\t 7.5*^-6\t 0.0{i:02d}\t-0.1", "H\t 0.\t 0.\t 1.125\t 0.1"]
            lines = ["2", f"gdb {i}\t" + "\t".join(map(str, values)), *atoms, "3100.", "[CH]\t[CH]\t", "InChI"]
            add_member(tar, f"dsgdb9nsd_{i:06d}.xyz", "\n".join(lines) + "\n")


def add_member(tar: tarfile.TarFile, name: str, text: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(text)
    tar.addfile(member, io.BytesIO(text.encode()))


def sd_file(titles: list[str]) -> str:
    """An SD file of fragments CH."""
    entries = []
    for i, title in enumerate(titles):
        atoms = [f"{0.1 * i:10.4f}    0.0000    0.2500 C   0  0", "    0.0000    1.1250    0.0000 H   0  0"]
        counts = "  2  1  0  0  0  0  0  0  0  0999 V2000"
        entries += [title, "     RDKit          3D", "", counts, *atoms, "  1  2  1  0", "M  END", "$$$$"]
    return "\n".join(entries) + "\n"


def make_qm9_sdf(folder: Path) -> None:
    titles = [f"gdb_{i}" for i in range(1, 5)]
    (folder / "gdb9.sdf").write_text(sd_file(titles))
    names = "mol_id,A,B,C,mu,alpha,homo,lumo,gap,r2,zpve,u0,u298,h298,g298,cv"
    rows = [",".join([title, *map(str, row)]) for title, row in zip(titles, qm9_values(), strict=True)]
    (folder / "gdb9.sdf.csv").write_text("\n".join([names, *rows]) + "\n")


def make_qm9_npz(folder: Path) -> None:
    columns = dict(zip(COLUMNS, np.array(qm9_values()).T, strict=True))
    pos = np.random.default_rng(0).normal(size=(8, 3))
    ids, counts, z = np.arange(1, 5), np.full(4, 2), np.tile([6, 1], 4).astype(np.uint8)
    np.savez_compressed(folder / "qm9.npz", id=ids, N=counts, Z=z, R=pos, **columns)


def make_pcqm4mv2(folder: Path) -> None:
    import gzip

    with tarfile.open(folder / "pcqm4m-v2-train.sdf.tar.gz", "w:gz") as tar:
        add_member(tar, "pcqm4m-v2-train.sdf", sd_file([""] * 5))
    table = "idx,smiles,homolumogap\n" + "".join(f"{i},[CH],{4.5 + i}\n" for i in range(5))
    (folder / "data.csv.gz").write_bytes(gzip.compress(table.encode()))


def load_pcqm4mv2(folder: Path) -> Any:
    return list(read_pcqm4mv2(folder / "pcqm4m-v2-train.sdf.tar.gz", folder / "data.csv.gz"))


def oc20_files() -> Any:
    """Writers of OC20's formats, from the tests."""
    path = ROOT / "tests" / "oc20_files.py"
    spec = importlib.util.spec_from_file_location("oc20_files", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_pyg_lmdb(folder: Path) -> None:
    writers = oc20_files()
    writers.write_pyg_lmdb(folder / "data.lmdb", [writers.pyg_fields(20, seed=k, fid=k) for k in range(12)])


def make_ase_lmdb(folder: Path) -> None:
    writers, values = oc20_files(), {}
    for k in range(1, 9):
        fields = {name: np.asarray(value) for name, value in writers.pyg_fields(20, seed=k).items()}
        record = {
            "numbers": fields["atomic_numbers"].astype(np.int64), "positions": fields["pos"].astype(np.float64),
            "cell": np.eye(3) * 15.0, "pbc": np.ones(3, dtype=bool), "tags": fields["tags"],
            "energy": float(fields["energy"]), "forces": fields["forces"].astype(np.float64),
        }  # fmt: skip
        values[str(k).encode()] = writers.ase_record(record)
    import zlib

    values |= {b"nextid": zlib.compress(b"9"), b"metadata": zlib.compress(b"{}")}
    writers.write_lmdb(folder / "data.aselmdb", values)


def make_oc20_text(folder: Path) -> None:
    text, log = oc20_files().text_frames(4)
    (folder / "0.extxyz.xz").write_bytes(lzma.compress(text.encode()))
    (folder / "0.txt.xz").write_bytes(lzma.compress(log.encode()))


def make_reference(folder: Path, as_json: bool) -> None:
    energies = {f"random{k}": -100.0 - 0.123 * k for k in range(30)}
    path = folder / f"oc20_ref.{'json' if as_json else 'pkl'}"
    path.write_bytes(json.dumps(energies).encode() if as_json else pickle.dumps(energies, protocol=4))


def make_torch_file(folder: Path) -> None:
    """A Lightning checkpoint of TorchMD-NET's Equivariant Transformer."""
    options = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "num_rbf": 4}
    backbone = TorchMDNet(**options)
    parts = {"representation_model.": backbone, "output_model.": backbone.scalar_head()}
    weights = {
        f"model.{prefix}{name}": value for prefix, part in parts.items() for name, value in part.state_dict().items()
    }
    hparams = {"num_heads": 2, "cutoff_upper": 5.0, "embedding_dimension": 8}
    torch.save({"state_dict": weights, "hyper_parameters": hparams}, folder / "epoch.ckpt")


def load_torch_file(folder: Path) -> Any:
    found = import_checkpoint(folder / "epoch.ckpt", partial=True)
    return [found.tensors, found.options, found.mean, found.std, found.hyper_parameters]


def make_ase_db(folder: Path) -> None:
    from ndem_zoo.schnetpack import write_ase_db

    write_ase_db(frames(), folder / "frames.db")


def load_ase_db(folder: Path) -> Any:
    from ndem_zoo.schnetpack import read_ase_db

    return read_ase_db(folder / "frames.db")


OWN = "SHA-256"

KINDS: dict[str, Kind] = {
    "model": Kind(make_model, lambda f: model_fingerprint(NDeMModel.load(f / "model")), OWN, files=("model/[!c]*", "model/config.json")),
    "checkpoint": Kind(make_checkpoint, load_checkpoint, OWN, files=("*/*",)),
    "store": Kind(lambda f: frames().save(f / "store"), lambda f: open_store(f / "store"), OWN, files=("store/*",)),
    "unfinished store": Kind(make_unfinished_store, finish_store, OWN, files=("store/*",)),
    "record (split, metrics)": Kind(
        lambda f: save_record(f / "split.json", {"seed": 1, "train": list(range(40)), "loss": 0.125}),
        lambda f: load_record(f / "split.json"),
        OWN,
    ),
    "predictions.npz": Kind(make_predictions, Predictions.load, "CRC-32 of zip"),
    "history.csv of a run": Kind(make_history, lambda f: read_history(f / "history.csv"), ""),
    "MD17 npz": Kind(make_md17, lambda f: read_md17(f / "md17_ethanol.npz"), "CRC-32 of zip"),
    "MD17 npz, compressed": Kind(
        lambda f: make_md17(f, np.savez_compressed), lambda f: read_md17(f / "md17_ethanol.npz"), "CRC-32 of zip"
    ),
    "extxyz": Kind(make_extxyz, lambda f: read_extxyz(f / "frames.extxyz"), ""),
    **{
        f"extxyz{suffix}": Kind(
            lambda f, s=suffix: make_extxyz(f, s), lambda f, s=suffix: read_extxyz(f / f"frames.extxyz{s}"), check
        )
        for suffix, check in {".gz": "CRC-32", ".bz2": "CRC-32", ".xz": "CRC-64"}.items()
    },
    "QM9 tar.bz2": Kind(make_qm9_archive, lambda f: read_qm9(f / "dsgdb9nsd.xyz.tar.bz2"), "CRC-32"),
    "QM9 sdf, csv": Kind(make_qm9_sdf, lambda f: read_qm9(f / "gdb9.sdf"), ""),
    "QM9 npz": Kind(make_qm9_npz, lambda f: read_qm9(f / "qm9.npz"), "CRC-32 of zip"),
    "PCQM4Mv2 tar.gz, csv.gz": Kind(make_pcqm4mv2, load_pcqm4mv2, "CRC-32"),
    "OC20 extxyz.xz, txt.xz": Kind(make_oc20_text, lambda f: read_oc20(f / "0.extxyz.xz"), "CRC-64"),
    "OC20 lmdb": Kind(make_pyg_lmdb, lambda f: read_oc20(f / "data.lmdb"), "", needs="lmdb"),
    "OC20 aselmdb": Kind(make_ase_lmdb, lambda f: read_oc20(f / "data.aselmdb", energy="total"), "", needs="lmdb"),
    "OC20 reference pkl": Kind(lambda f: make_reference(f, False), lambda f: read_reference(f / "oc20_ref.pkl"), ""),
    "OC20 reference json": Kind(lambda f: make_reference(f, True), lambda f: read_reference(f / "oc20_ref.json"), ""),
    "OC20 linear reference npz": Kind(
        lambda f: np.savez(f / "linref.npz", coeff=np.linspace(-9, 9, 100)),
        lambda f: linear_reference(f / "linref.npz"),
        "CRC-32 of zip",
    ),
    "torch checkpoint": Kind(make_torch_file, load_torch_file, "CRC-32 of zip"),
    "SchNetPack db": Kind(make_ase_db, load_ase_db, "", needs="schnetpack"),
}  # fmt: skip
