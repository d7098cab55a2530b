"""Small files in OC20's formats, written for tests: pickled PyG records without torch_geometric, LMDB, text."""

from __future__ import annotations

import contextlib
import json
import lzma
import pickle
import sys
import types
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _Object:
    """What PyG's classes are to pickle: an object with a dict."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def _module(name: str, *classes: str) -> types.ModuleType:
    module = types.ModuleType(name)
    for cls in classes:
        setattr(module, cls, type(cls, (_Object,), {"__module__": name, "__qualname__": cls}))
    return module


@contextlib.contextmanager
def fake_pyg() -> Iterator[Any]:
    """Modules with the names of PyG's, so that real pickling writes what it writes with PyG."""
    data = _module("torch_geometric.data.data", "Data", "DataEdgeAttr", "DataTensorAttr")
    storage = _module("torch_geometric.data.storage", "GlobalStorage", "BaseStorage")
    names = ("torch_geometric", "torch_geometric.data", data.__name__, storage.__name__)
    before = {name: sys.modules.get(name) for name in names}
    modules = (types.ModuleType(names[0]), types.ModuleType(names[1]), data, storage)
    sys.modules.update(zip(names, modules, strict=True))
    try:
        yield types.SimpleNamespace(data=data, storage=storage)
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def pyg_pickle(fields: Mapping[str, Any], generation: int = 2) -> bytes:
    """A pickled `Data` of PyG 1 or 2."""
    with fake_pyg() as pyg:
        if generation == 1:
            return pickle.dumps(pyg.data.Data(x=None, edge_index=None, **fields, __num_nodes__=None), protocol=-1)
        store = pyg.storage.GlobalStorage(_mapping=dict(fields), _parent=None)
        classes = {"_edge_attr_cls": pyg.data.DataEdgeAttr, "_tensor_attr_cls": pyg.data.DataTensorAttr}
        return pickle.dumps(pyg.data.Data(**classes, _store=store), protocol=-1)


def pyg_fields(n: int = 4, seed: int = 0, *, is_old: bool = False, sid: int = 7, fid: int = 3) -> dict[str, Any]:
    """Fields of a small slab, under their new or old names."""
    rng = np.random.default_rng(seed)
    pos = np.array([[1.8 * k, 0.0, 0.0] for k in range(n)]) + rng.uniform(-0.1, 0.1, (n, 3))
    numbers = torch.from_numpy(rng.choice([1, 8, 79], n))
    forces = torch.from_numpy(rng.normal(size=(n, 3))).float()
    energy = np.float64(rng.normal())
    return {
        "pos": torch.from_numpy(pos).float(),
        "cell": torch.eye(3)[None] * 15.0,
        "atomic_numbers": numbers.float() if is_old else numbers.to(torch.uint8),
        "natoms": n,
        "tags": torch.arange(n) % 3,
        ("y" if is_old else "energy"): energy,
        ("force" if is_old else "forces"): forces,
        "fixed": (torch.arange(n) < 1).float() if is_old else (torch.arange(n) < 1).int(),
        "sid": sid,
        "fid": fid,
    }


def write_lmdb(path: Path, values: Mapping[bytes, bytes]) -> Path:
    """An LMDB file with these keys and values."""
    import lmdb

    path.parent.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(path), map_size=2**28, subdir=False, meminit=False, map_async=True, lock=False)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    environment.close()
    return path


def write_pyg_lmdb(path: Path, records: list[dict[str, Any]], generation: int = 2, length: bool = True) -> Path:
    """A file as OC20's preprocessing writes it."""
    values = {str(k).encode(): pyg_pickle(record, generation) for k, record in enumerate(records)}
    return write_lmdb(path, values | ({b"length": pickle.dumps(len(records), protocol=-1)} if length else {}))


def ase_record(fields: Mapping[str, Any]) -> bytes:
    """A structure as ase-db-backends writes it."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {"__ndarray__": [list(value.shape), value.dtype.name, value.reshape(-1).tolist()]}
        return value

    return zlib.compress(json.dumps({name: plain(value) for name, value in fields.items()}).encode())


def text_frames(n_frames: int, n: int = 4, seed: int = 0, sid: int = 11) -> tuple[str, str]:
    """An extxyz file and its log; energies are totals, -100 eV below adsorption energies."""
    rng = np.random.default_rng(seed)
    blocks, log = [], []
    for fid in range(n_frames):
        properties = "species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3"
        blocks += [str(n)]
        blocks += [
            f'Lattice="20 0 0 0 15 0 0 0 30" Properties={properties} energy={-100.0 - fid} free_energy=-1 pbc="T T T"'
        ]
        for k in range(n):
            x = 1.8 * k + rng.uniform(-0.1, 0.1)
            forces = " ".join(f"{value:.8f}" for value in rng.normal(size=3))
            blocks.append(f"{'Cu' if k else 'H'} {x:.8f} 0.5 -0.25 {'F' if k == 0 else 'T'} {k % 3} {forces}")
        log.append(f"random{sid},frame{fid},-98.500000000")
    return "\n".join(blocks) + "\n", "\n".join(log) + "\n"


def write_text(folder: Path, number: int, n_frames: int = 3, is_compressed: bool = True, **options: Any) -> None:
    """``N.extxyz.xz`` and ``N.txt.xz``, or both without ``.xz``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(("extxyz", "txt"), text_frames(n_frames, **options), strict=True):
        raw = text.encode()
        path = folder / (f"{number}.{name}.xz" if is_compressed else f"{number}.{name}")
        path.write_bytes(lzma.compress(raw) if is_compressed else raw)
