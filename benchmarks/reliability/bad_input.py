"""Bad input, at volume: structures of every kind through every public entry, judged by an oracle that shares no code with it.

    python -m benchmarks.reliability bad_input --out FOLDER [--quick] [--seed 0]

A case is one call of an entry with one to three structures, of which at most one is spoilt (`ndem_zoo.testing.structures`).
`flaw_of` judges each structure with plain numpy. What is sound must be computed, and be equal to the float64 reference:
edges to those of all pairs and images, energies and forces to the eager network in float64, one structure at a time, with
edges of that search. What is spoilt must be refused by an error of `ndem_zoo.errors` that names the structure. All else is
a loss: another exception, a result for a spoilt structure, another result, changed input, more than `PATIENCE` seconds.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import itertools
import signal
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from ndem_zoo import Ensemble, MolecularDataset, NDeMCalculator, NDeMTorchMDNet, RadiusGraph, errors, open_store
from ndem_zoo.datasets.checks import check_structures
from ndem_zoo.graph import Batch, import_dgl
from ndem_zoo.testing.structures import RawStructure, bad_structures, structures

#: Limits that the documentation states: Å between atoms and between faces of a cell; extent and coordinates in Å; Z.
LEAST_DISTANCE, MOST_EXTENT, MOST_COORDINATE, MOST_Z = 0.1, 1000.0, 1e6, 100
#: Elements that the models of the harness know.
ELEMENTS = (1, 6, 7, 8)
#: Seconds after which a call counts as a hang.
PATIENCE = 30
#: Allowed deviations from the float64 reference, of paths in float32: eV per atom, and eV/Å relative to the largest force
#: of the structure or 1 eV/Å. The network's unit is 1 eV and its edges have rounded lengths of up to 1e-5 Å.
ENERGY32, FORCE32 = 2e-5, 2e-4
#: The same of paths in float64.
ENERGY64, FORCE64 = 1e-9, 1e-8
#: Å for positions that go through a text file with 8 decimals.
TEXT = 1e-7

CUTOFF = 4.0


# -------------------------------------------------------------------------------------------------------------- oracle


def plain_array(value: Any) -> np.ndarray | None:
    """`value` as an array, if it is a whole one of numbers."""
    try:
        array = np.asanyarray(value)
    except (ValueError, TypeError):
        return None
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        return None
    return np.asarray(array) if array.dtype.kind in "iufb" else None


def flaw_of(raw: RawStructure) -> str | None:
    """What is wrong with a structure; None if nothing is. Written from the documentation alone."""
    z, pos = plain_array(raw.z), plain_array(raw.pos)
    if z is None or z.dtype.kind not in "iu" or z.ndim != 1:
        return "elements"
    if len(z) == 0:
        return "no atoms"
    if pos is None or pos.dtype.kind == "b" or pos.shape != (len(z), 3):
        return "positions"
    pos = pos.astype(np.float64)
    if not np.isfinite(pos).all() or np.abs(pos).max() > MOST_COORDINATE:
        return "coordinate"
    if any(not 1 <= int(number) <= MOST_Z for number in z):
        return "element"
    cell, flags = np.zeros((3, 3)), np.zeros(3, dtype=bool)
    if raw.cell is not None and (raw.pbc is None or np.any(plain_array(raw.pbc) is None or np.asarray(raw.pbc) != 0)):
        flags_array = np.ones(3) if raw.pbc is None else plain_array(raw.pbc)
        cell_array = plain_array(raw.cell)
        if flags_array is None or flags_array.shape != (3,) or not np.isin(flags_array, (0, 1)).all():
            return "flags"
        flags = flags_array.astype(bool)
        if cell_array is None or cell_array.shape != (3, 3) or cell_array.dtype.kind == "b":
            return "cell shape"
        cell = cell_array.astype(np.float64)
        problem = lattice_flaw(cell[flags]) if flags.any() else None
        if problem or not np.isfinite(cell).all():
            return problem or "cell"
    if extent(pos, cell, flags) > MOST_EXTENT:
        return "extent"
    _, _, vectors = edges_by_hand(pos, 1.5 * LEAST_DISTANCE, cell, flags)
    return "too near" if len(vectors) and np.linalg.norm(vectors, axis=1).min() < LEAST_DISTANCE else None


def lattice_flaw(rows: np.ndarray) -> str | None:
    """What is wrong with the periodic vectors of a cell: lengths, and distances between faces by Gram-Schmidt."""
    if not np.isfinite(rows).all():
        return "cell"
    lengths = np.sqrt(np.sum(np.square(rows / 1e3), axis=1)) * 1e3 if np.abs(rows).max() < 1e150 else [np.inf]
    if max(lengths) > MOST_EXTENT or min(lengths) == 0:
        return "cell length"
    for k in range(len(rows)):
        rest = rows[k]
        basis: list[np.ndarray] = []
        for other in np.delete(rows, k, axis=0):
            for b in basis:
                other = other - (other @ b) * b
            norm = np.linalg.norm(other)
            if norm < 1e-9:
                return "cell height"
            basis.append(other / norm)
        for b in basis:
            rest = rest - (rest @ b) * b
        if np.linalg.norm(rest) < LEAST_DISTANCE:
            return "cell height"
    return None


def full_cell(cell: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """A cell of full rank: what is not periodic becomes a unit vector across the rest."""
    rows = [cell[k] for k in range(3) if flags[k]]
    full = np.array(cell, dtype=np.float64)
    null = np.linalg.svd(np.array(rows).reshape(-1, 3))[2][len(rows) :] if rows else np.eye(3)
    full[[k for k in range(3) if not flags[k]]] = null[: 3 - len(rows)]
    return full


def extent(pos: np.ndarray, cell: np.ndarray, flags: np.ndarray) -> float:
    """Largest difference of a Cartesian coordinate, with periodic directions taken into the cell."""
    full = full_cell(cell, flags)
    fractional = pos @ np.linalg.inv(full)
    folded = (fractional - np.floor(fractional) * flags) @ full
    return float(np.ptp(folded, axis=0).max())


def edges_by_hand(
    pos: np.ndarray, cutoff: float, cell: np.ndarray, flags: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbors, centers and vectors of all pairs closer than `cutoff`, from all pairs and all images that can matter."""
    full = full_cell(cell, flags)
    inverse = np.linalg.inv(full)
    whole = np.floor(pos @ inverse) * flags
    folded = pos - whole @ full
    # An image n a + ... is at least |n| - 1 heights away from the cell.
    reach = [int(np.ceil(cutoff * np.linalg.norm(inverse[:, k]))) + 1 if flags[k] else 0 for k in range(3)]
    images = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach))), dtype=np.float64) @ full
    between = folded[None, :, None, :] + images[None, None] - folded[:, None, None, :]  # (center, neighbor, image, 3)
    near = np.square(between).sum(-1) < cutoff**2
    center = np.arange(len(pos))
    near[center, center, np.flatnonzero((images == 0).all(1))[0]] = False
    i, j, _ = np.nonzero(near)
    return j, i, between[near]


def reference_batch(raw: RawStructure, cutoff: float) -> Batch:
    """A structure in float64 with the edges of `edges_by_hand`, near the origin."""
    pos = np.asarray(raw.pos, dtype=np.float64)
    periodic = raw.cell is not None and np.any(raw.pbc if raw.pbc is not None else True)
    cell = np.asarray(raw.cell, dtype=np.float64) if periodic else np.zeros((3, 3))
    flags = (np.ones(3) if raw.pbc is None else np.asarray(raw.pbc)).astype(bool) if periodic else np.zeros(3, bool)
    src, dst, vectors = edges_by_hand(pos, cutoff, cell, flags)
    pos = pos - pos.mean(axis=0)
    n = len(pos)
    return Batch(
        z=torch.tensor([int(number) for number in raw.z]),
        pos=torch.from_numpy(pos),
        src=torch.from_numpy(src),
        dst=torch.from_numpy(dst),
        shift=torch.from_numpy(vectors - pos[src] + pos[dst]),
        system=torch.zeros(n, dtype=torch.long),
        n_systems=1,
        cutoff=cutoff,
        cell=torch.from_numpy(np.where(flags[:, None], cell, 0.0))[None],
        fixed=torch.zeros(n, dtype=torch.bool),
    )


# --------------------------------------------------------------------------------------------------------------- world


def label(atoms: Atoms) -> Atoms:
    """A structure with labels that are smooth functions of it."""
    center = atoms.positions - atoms.positions.mean(axis=0)
    forces = -0.05 * center
    energy = -3.0 * len(atoms) + 0.025 * float(np.square(center).sum())
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


def training_set() -> list[Atoms]:
    """A few molecules with H, C, N and O."""
    names = ("CH3CH2OH", "CH3CN", "HCN", "H2O", "CO2", "CH3NO2")
    rng = np.random.default_rng(0)
    found = []
    for name in names:
        atoms = molecule(name)
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        found.append(label(atoms))
    return found


class World:
    """Models, folders and datasets that the entries use, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Any] = {}
        self._numbers = itertools.count()

    def path(self, name: str) -> Path:
        """A path that nothing has been written to."""
        place = self.folder / f"case{next(self._numbers)}"
        place.mkdir()
        return place / name

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned the first time."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def new_model(self, **options: Any) -> NDeMTorchMDNet:
        """A model that is not fitted."""
        small = {"hidden_channels": 16, "num_layers": 1, "num_heads": 2, "num_rbf": 8, "cutoff": CUTOFF}
        keywords = {"objective": "supervised", "progress": False, "device": "cpu", "batch_size": 4}
        return NDeMTorchMDNet(preset="md17_fast", backbone_options=small, **{**keywords, **options})

    def model(self, **options: Any) -> NDeMTorchMDNet:
        """A fitted model with these options."""
        key = "model " + repr(sorted(options.items()))
        return self.once(key, lambda: self.new_model(**options).fit(training_set(), max_steps=3))

    def reference(self, model: Any) -> Any:
        """The model's potential, in float64 and with plain operations."""

        def make() -> Any:
            potential = copy.deepcopy(model.potential_).double().eval()
            potential.backbone.use_plan("eager", torch.device("cpu"))
            return potential

        return self.once(f"reference {id(model)}", make)

    def truth(self, model: Any, raw: RawStructure) -> tuple[float, np.ndarray]:
        """Energy in eV and forces in eV/Å by the float64 reference."""
        potential = self.reference(model)
        prediction = potential(reference_batch(raw, potential.backbone.cutoff))
        return prediction.energy.item(), prediction.forces.numpy()


# -------------------------------------------------------------------------------------------------------------- judging


class Wrong(AssertionError):
    """A result that is not the reference's."""


def same(found: Any, expected: Any, tolerance: float, what: str) -> None:
    """Raise `Wrong` unless arrays agree."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if found.shape != expected.shape:
        raise Wrong(f"{what} has shape {found.shape} instead of {expected.shape}")
    if found.size and not np.abs(found - expected).max() <= tolerance:  # so that NaN is wrong
        raise Wrong(f"{what} is off by {np.abs(found - expected).max():.3g}, allowed is {tolerance:.3g}")


def same_predictions(world: World, model: Any, raws: Sequence[RawStructure], found: dict, exact: bool = False) -> None:
    """Raise `Wrong` unless energies (S,) and forces of each structure are the reference's."""
    energy, force = (ENERGY64, FORCE64) if exact else (ENERGY32, FORCE32)
    for k, raw in enumerate(raws):
        true_energy, true_forces = world.truth(model, raw)
        same(found["energy"][k], true_energy, energy * len(true_forces), f"energy of structure {k}")
        tolerance = force * max(1.0, float(np.abs(true_forces).max()))
        same(found["forces"][k], true_forces, tolerance, f"forces of structure {k}")


def same_edges(
    found: np.ndarray, raw: RawStructure, cutoff: float, center: np.ndarray, tolerance: float = 1e-7
) -> None:
    """Raise `Wrong` unless vectors (E, 3) to the neighbors of each center are those of the search by hand."""
    batch = reference_batch(raw, cutoff)
    expected = batch.vectors().numpy()
    if len(found) != len(expected):
        raise Wrong(f"{len(found)} edges instead of {len(expected)}")
    order = [np.lexsort((*np.round(v.T, 4), c)) for v, c in ((found, center), (expected, batch.dst.numpy()))]
    same(center[order[0]], batch.dst.numpy()[order[1]], 0, "centers of the edges")
    difference = np.abs(found[order[0]] - expected[order[1]])
    if len(difference) and difference.max() > tolerance:  # rounding may swap edges: compare each with the nearest
        distance = np.abs(found[:, None] - expected[None]).max(-1).min(1)
        same(distance, np.zeros(len(distance)), tolerance, "vectors of the edges")


def atoms_of(raws: Sequence[RawStructure]) -> tuple[list[Atoms], list[RawStructure]]:
    """As `ase.Atoms`, and what these hold; ValueError and the like where ASE itself refuses."""
    found = [raw.atoms() for raw in raws]
    held = []
    for raw, atoms in zip(raws, found, strict=True):
        periodic = bool(atoms.pbc.any())
        cell = atoms.cell.array.copy() if periodic else None
        flags = atoms.pbc.copy() if periodic else None
        held.append(RawStructure(atoms.numbers.copy(), atoms.positions.copy(), cell, flags, raw.kind))
    return found, held


# -------------------------------------------------------------------------------------------------------------- entries


@dataclass(frozen=True)
class Entry:
    """One way into the package.

    Attributes
    ----------
    call
        From the world, and structures in the entry's form, to a result.
    compare
        Raises `Wrong` if the result is not that of these (sound) structures.
    form
        ``"arrays"`` or ``"atoms"``.
    share
        Of the cases, in thousandths of all.
    many
        Whether it takes several structures.
    may_refuse
        Whether sound structures may be refused too, such as those that are no molecules where bonds are needed.
    may_accept
        Whether it is for spoilt structures, too, of which it says what is wrong.
    needs
        Module without which the entry does not exist.
    elements
        From which sound structures are made.
    """

    call: Callable[[World, Any], Any]
    compare: Callable[[World, Sequence[RawStructure], Any], None] = lambda world, raws, found: None
    form: str = "atoms"
    share: float = 10.0
    many: bool = True
    may_refuse: bool = False
    may_accept: bool = False
    needs: str | None = None
    elements: tuple[int, ...] = ELEMENTS
    options: dict[str, Any] = field(default_factory=dict)


ENTRIES: dict[str, Entry] = {}


def entry(name: str, **options: Any) -> Callable[[Callable], Callable]:
    """Register a function as an entry."""

    def register(call: Callable) -> Callable:
        ENTRIES[name] = Entry(call, **options)
        return call

    return register


ANY_ELEMENT = (1, 2, 6, 8, 26, 79, 92, 100)


def compare_graphs(world: World, raws: Sequence[RawStructure], graphs: Sequence[Any]) -> None:
    """Atoms and edges of DGLGraphs with a radius of 3 Å."""
    if len(graphs) != len(raws):
        raise Wrong(f"{len(graphs)} graphs of {len(raws)} structures")
    for raw, graph in zip(raws, graphs, strict=True):
        src, dst = (index.numpy() for index in graph.edges())
        pos = graph.ndata["R"].numpy()
        same(graph.ndata["Z"].numpy(), [int(number) for number in raw.z], 0, "Z")
        same(pos, np.asarray(raw.pos, dtype=np.float64), 0, "R")
        same_edges(pos[src] + graph.edata["shift"].numpy() - pos[dst], raw, 3.0, dst)


def compare_batch(world: World, raws: Sequence[RawStructure], batch: Batch) -> None:
    """Edges within 3 Å of a batch in float32."""
    vectors, dst = batch.vectors().double().numpy(), batch.dst.numpy()
    if batch.pos.dtype != torch.float32 or len(batch.z) != len(raws[0].z):
        raise Wrong(f"{len(batch.z)} atoms in {batch.pos.dtype}")
    kept = np.linalg.norm(vectors, axis=1) < 3.0
    near = np.abs(np.linalg.norm(reference_batch(raws[0], 3.1).vectors().numpy(), axis=1) - 3.0) < 1e-3
    if not near.any():  # rounding may take those just at the radius to its other side
        same_edges(vectors[kept], raws[0], 3.0, dst[kept], 1e-4)


@entry(
    "RadiusGraph, arrays",
    needs="dgl",
    form="arrays",
    many=False,
    elements=ANY_ELEMENT,
    share=90,
    compare=compare_graphs,
)
def radius_graph(world: World, raws: Any) -> Any:
    return [RadiusGraph(3.0)(raws[0].arrays())]


@entry("RadiusGraph.featurize", needs="dgl", form="arrays", elements=ANY_ELEMENT, share=50, compare=compare_graphs)
def radius_graphs(world: World, raws: Any) -> Any:
    return RadiusGraph(3.0).featurize([raw.arrays() for raw in raws])


@entry("RadiusGraph, Atoms", needs="dgl", elements=ANY_ELEMENT, share=40, compare=compare_graphs)
def radius_graph_of_atoms(world: World, atoms: Any) -> Any:
    return RadiusGraph(3.0).featurize(atoms)


def compare_nearest(world: World, raws: Sequence[RawStructure], graph: Any) -> None:
    src, dst = (index.numpy() for index in graph.edges())
    pos = graph.ndata["R"].numpy()
    length = np.linalg.norm(pos[src] + graph.edata["shift"].numpy() - pos[dst], axis=1)
    batch = reference_batch(raws[0], 5.0)
    expected = np.linalg.norm(batch.vectors().numpy(), axis=1)
    for atom in range(len(pos)):
        same(
            np.sort(length[dst == atom]), np.sort(expected[batch.dst.numpy() == atom])[:4], 2e-4, f"neighbors of {atom}"
        )


@entry("RadiusGraph(max_neighbors=4)", needs="dgl", form="arrays", many=False, share=40, compare=compare_nearest)
def nearest_graph(world: World, raws: Any) -> Any:
    return RadiusGraph(5.0, max_neighbors=4)(raws[0].arrays())


@entry("ConformerGraph, geometries", form="arrays", many=False, share=20, needs="rdkit", compare=compare_graphs)
def conformer_graph(world: World, raws: Any) -> Any:
    from ndem_zoo import ConformerGraph

    return [ConformerGraph(3.0)(raws[0].arrays())]


def dataset_of(raw: RawStructure) -> MolecularDataset:
    """Columns of one structure, as they are."""
    n = np.shape(raw.z)[0] if np.ndim(raw.z) else 1
    periodic = {} if raw.cell is None else {"cell": [raw.cell], "pbc": [np.ones(3) if raw.pbc is None else raw.pbc]}
    return MolecularDataset(raw.z, raw.pos, [0, n], **periodic)


@entry("MolecularDataset, check_structures", form="arrays", many=False, share=100, compare=compare_batch)
def dataset_columns(world: World, raws: Any) -> Any:
    dataset = dataset_of(raws[0])
    check_structures(dataset)
    return dataset.to_batch(3.0)


@entry("MolecularDataset[i], X", needs="dgl", form="arrays", many=False, share=40, compare=compare_graphs)
def dataset_items(world: World, raws: Any) -> Any:
    dataset = dataset_of(raws[0]).with_featurizer(RadiusGraph(3.0))
    assert dataset.X[0].num_edges() == dataset[0].num_edges()
    return [dataset[0]]


@entry("MolecularDataset.summary", share=15, may_accept=True)
def summary(world: World, atoms: Any) -> Any:
    return str(MolecularDataset.from_atoms(labeled_copies(atoms)).summary())


@entry("as_dataset, no structures", form="arrays", share=15, may_refuse=True, many=False)
def no_structures(world: World, raws: Any) -> Any:
    choice = len(raws[0].kind) % 5
    parts = [raw.arrays() for raw in raws]
    return world.model().predict([parts, raws[0].pos, raws[0], {"z": raws[0].z}, [raws[0].pos]][choice])


@entry("MolecularDataset.select", form="arrays", share=15, may_refuse=True, may_accept=True, many=False)
def selection(world: World, raws: Any) -> Any:
    return world.once("frames", lambda: MolecularDataset.from_atoms(training_set())).select(raws[0].z)


@entry("MolecularDataset.iterbatches", needs="dgl", share=15, compare=compare_graphs)
def iterbatches(world: World, atoms: Any) -> Any:
    dataset = MolecularDataset.from_atoms(atoms).with_featurizer(RadiusGraph(3.0))
    return [graph for X, *_ in dataset.iterbatches(2, deterministic=True) for graph in X]


@entry("MolecularDataset.from_atoms", elements=ANY_ELEMENT, share=40, compare=lambda w, raws, d: compare_rows(raws, d))
def from_atoms(world: World, atoms: Any) -> Any:
    dataset = MolecularDataset.from_atoms(atoms)
    check_structures(dataset)
    return MolecularDataset.concatenate([dataset.select([k]) for k in range(len(dataset))])


def compare_rows(raws: Sequence[RawStructure], dataset: MolecularDataset, tolerance: float = 0.0) -> None:
    """The columns of a dataset are those of the structures."""
    same(dataset.counts, [len(raw.z) for raw in raws], 0, "counts")
    same(dataset.z, np.concatenate([np.asarray(raw.z).astype(np.int64) for raw in raws]), 0, "z")
    same(dataset.pos, np.concatenate([np.asarray(raw.pos, dtype=np.float64) for raw in raws]), tolerance, "pos")


@entry("NDeMModel.predict, Atoms", share=70, compare=lambda w, raws, p: same_predictions(w, w.model(), raws, p))
def predict_atoms(world: World, atoms: Any) -> Any:
    return world.model().predict(atoms)


@entry(
    "NDeMModel.predict, dataset", form="arrays", many=False, share=60,
    compare=lambda w, raws, p: same_predictions(w, w.model(), raws, p),
)  # fmt: skip
def predict_dataset(world: World, raws: Any) -> Any:
    return world.model().predict(dataset_of(raws[0]))


DOUBLE = {"precision": "64-true"}


@entry(
    "NDeMModel.predict, float64",
    share=30,
    compare=lambda w, raws, p: same_predictions(w, w.model(**DOUBLE), raws, p, True),
)
def predict_double(world: World, atoms: Any) -> Any:
    return world.model(**DOUBLE).predict(atoms)


@entry(
    "NDeMModel.predict, eager", share=30, compare=lambda w, raws, p: same_predictions(w, w.model(plan="eager"), raws, p)
)
def predict_eager(world: World, atoms: Any) -> Any:
    return world.model(plan="eager").predict(atoms)


def graph_of(raw: RawStructure) -> Any:
    """A DGLGraph made by hand; whatever torch or DGL refuse is no case."""
    dgl = import_dgl()
    numbers = np.asarray(raw.z)
    numbers = numbers.astype(np.int64) if numbers.dtype == np.uint64 else numbers  # of which torch knows little
    z, pos = torch.as_tensor(numbers), torch.tensor(np.asarray(raw.pos))
    graph = dgl.graph((torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)), num_nodes=len(z))
    graph.ndata["Z"], graph.ndata["R"] = z, pos
    if raw.cell is not None:
        flags = torch.as_tensor(np.ones(3, bool) if raw.pbc is None else np.asarray(raw.pbc))
        cell = torch.as_tensor(np.asarray(raw.cell))
        graph.ndata["cell"] = cell.expand(len(z), *cell.shape).contiguous()
        graph.ndata["pbc"] = flags.expand(len(z), *flags.shape).contiguous()
    return graph


@entry(
    "NDeMModel.predict, DGLGraph", form="graphs", share=40, needs="dgl",
    compare=lambda w, raws, p: same_predictions(w, w.model(), raws, p),
)  # fmt: skip
def predict_graphs(world: World, graphs: Any) -> Any:
    return world.model().predict(graphs)


def compare_errors(world: World, raws: Sequence[RawStructure], found: Any) -> None:
    metrics, score, labeled = found
    truth = [world.truth(world.model(), raw) for raw in raws]
    errors = np.abs([energy - atoms.get_potential_energy() for (energy, _), atoms in zip(truth, labeled, strict=True)])
    same(metrics["energy_mae"], errors.mean(), 1e-3, "energy_mae")
    forces = np.concatenate([np.abs(f - a.get_forces()).ravel() for (_, f), a in zip(truth, labeled, strict=True)])
    same(metrics["forces_mae"], forces.mean(), 1e-3, "forces_mae")
    same(score, -forces.mean(), 1e-3, "score")


def labeled_copies(atoms: Sequence[Atoms]) -> list[Atoms]:
    return [label(a.copy()) for a in atoms]


@entry("NDeMModel.evaluate, score", share=30, compare=compare_errors)
def evaluate(world: World, atoms: Any) -> Any:
    labeled = labeled_copies(atoms)
    return world.model().evaluate(labeled), world.model().score(labeled), labeled


def compare_fitted(world: World, raws: Sequence[RawStructure], model: Any) -> None:
    for parameter in model.potential_.parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise Wrong("a weight is not finite")


for objective in ("supervised", "ndem", "noisy_nodes", "dens", "geossl"):

    @entry(f"NDeMModel.fit, {objective}", share=6, compare=compare_fitted, options={"objective": objective})
    def fit(world: World, atoms: Any, objective: str = objective) -> Any:
        return world.new_model(objective=objective).fit(labeled_copies(atoms), max_steps=1)


for objective in ("frad", "slide", "ndem_curvature"):

    @entry(f"NDeMModel.fit, {objective}", share=3, compare=compare_fitted, may_refuse=True, needs="rdkit")
    def fit_bonded(world: World, atoms: Any, objective: str = objective) -> Any:
        return world.new_model(objective=objective).fit(labeled_copies(atoms), max_steps=1)


@entry("NDeMModel.fit, valid=", share=6, compare=compare_fitted)
def fit_valid(world: World, atoms: Any) -> Any:
    return world.new_model().fit(training_set(), labeled_copies(atoms), max_steps=1, callback=None)


@entry("NDeMModel.partial_fit", share=6, compare=compare_fitted)
def partial_fit(world: World, atoms: Any) -> Any:
    return copy.deepcopy(world.model()).partial_fit(labeled_copies(atoms), max_steps=1)


@entry("NDeMModel.pretrain", share=6, compare=compare_fitted)
def pretrain(world: World, atoms: Any) -> Any:
    return world.new_model(objective="noisy_nodes").pretrain(atoms, max_steps=1)


@entry("NDeMCalculator", many=False, share=70, compare=lambda w, raws, p: same_predictions(w, w.model(), raws, p))
def calculator(world: World, atoms: Any) -> Any:
    atoms[0].calc = world.once("calculator", lambda: NDeMCalculator(world.model()))
    return {"energy": [atoms[0].get_potential_energy()], "forces": [atoms[0].get_forces()]}


@entry(
    "NDeMCalculator, float64, moved", many=False, share=40,
    compare=lambda w, raws, p: same_predictions(w, w.model(), [p["raw"]], p, True),
)  # fmt: skip
def calculator_double(world: World, atoms: Any) -> Any:
    one = atoms[0]
    one.calc = NDeMCalculator(world.model(), precision="64-true", skin=0.3)
    one.get_potential_energy()
    moved = one.copy()
    moved.positions += 0.05 * np.sin(np.arange(3.0 * len(one))).reshape(-1, 3)
    moved.calc = one.calc  # edges are those of before
    found = {"energy": [moved.get_potential_energy()], "forces": [moved.get_forces()]}
    return {**found, "raw": atoms_of_one(moved)}


def atoms_of_one(atoms: Atoms) -> RawStructure:
    """What an `ase.Atoms` holds."""
    periodic = bool(atoms.pbc.any())
    return RawStructure(
        atoms.numbers.copy(), atoms.positions.copy(),
        atoms.cell.array.copy() if periodic else None, atoms.pbc.copy() if periodic else None,
    )  # fmt: skip


def compare_dynamics(world: World, raws: Sequence[RawStructure], record: Any) -> None:
    same(record.potential[0], world.truth(world.model(), raws[0])[0], 1e-4 * len(raws[0].z), "first energy")
    if not np.isfinite(record.total).all() or len(record.time) != 3:
        raise Wrong(f"{len(record.time)} energies {record.total}")


@entry("run_md", many=False, share=20, compare=compare_dynamics)
def dynamics(world: World, atoms: Any) -> Any:
    from ndem_zoo.dynamics import run_md

    return run_md(atoms[0], world.once("calculator", lambda: NDeMCalculator(world.model())), steps=2, temperature=50.0)


def compare_ensemble(world: World, raws: Sequence[RawStructure], found: Any) -> None:
    first, prediction = found
    same(prediction["energy_std"] * 0, np.zeros(len(raws)), 0, "energy_std")
    starts = np.cumsum([0] + [len(raw.z) for raw in raws])
    parts = {"energy": first["energy"][0], "forces": np.split(first["forces"][0], starts[1:-1])}
    same_predictions(world, world.model(), raws, parts)


@entry("Ensemble.predict", share=30, compare=compare_ensemble)
def ensemble(world: World, atoms: Any) -> Any:
    members = world.once("ensemble", lambda: Ensemble([world.model(), twin_of(world)]))
    return members.predict_members(atoms), members.predict(atoms)


def twin_of(world: World) -> Any:
    """The model with slightly other weights."""
    twin = copy.deepcopy(world.model())
    with torch.no_grad():
        for parameter in twin.potential_.parameters():
            parameter.mul_(1.01)
    return twin


@entry("NDeMEquiformerV2.predict", share=6, compare=lambda w, raws, p: same_predictions(w, equiformer(w), raws, p))
def predict_equiformer(world: World, atoms: Any) -> Any:
    return equiformer(world).predict(atoms)


def equiformer(world: World) -> Any:
    from ndem_zoo import EquiformerV2, NDeMEquiformerV2

    options = {**EquiformerV2.tiny, "cutoff": CUTOFF}
    keywords = {"objective": "supervised", "progress": False, "device": "cpu", "batch_size": 4, "forces": "gradient"}
    model = NDeMEquiformerV2(backbone_options=options, **keywords)
    return world.once("equiformer", lambda: model.fit(training_set(), max_steps=1))


@entry(
    "NDeMPaiNN.predict", share=12, needs="schnetpack", compare=lambda w, raws, p: same_predictions(w, painn(w), raws, p)
)
def predict_painn(world: World, atoms: Any) -> Any:
    return painn(world).predict(atoms)


def painn(world: World) -> Any:
    from ndem_zoo import NDeMPaiNN, SchNetPackBackbone

    options = {**SchNetPackBackbone.tiny, "cutoff": CUTOFF}
    keywords = {"objective": "supervised", "progress": False, "device": "cpu", "batch_size": 4}
    return world.once("painn", lambda: NDeMPaiNN(backbone_options=options, **keywords).fit(training_set(), max_steps=1))


# ------------------------------------------------------------------------------------------------ files and other formats


def text_of(raws: Sequence[RawStructure]) -> str:
    """Extended XYZ with whatever the arrays say, written by hand."""
    lines = []
    for raw in raws:
        z, pos = np.asarray(raw.z), np.asarray(raw.pos)
        head = f"Properties=species:S:1:pos:R:3 {lattice_of(raw)}"
        lines += [str(len(z)), head]
        symbols = [SYMBOLS.get(int(number), f"Q{number}") for number in z]
        rows = zip(symbols, pos, strict=True)
        lines += [" ".join([symbol, *(repr(float(x)) for x in row)]) for symbol, row in rows]
    return "\n".join(lines) + "\n"


SYMBOLS = {1: "H", 2: "He", 6: "C", 7: "N", 8: "O", 26: "Fe", 79: "Au", 92: "U", 100: "Fm"}


def lattice_of(raw: RawStructure) -> str:
    if raw.cell is None:
        return 'pbc="F F F"'
    flags = np.ones(3, bool) if raw.pbc is None else np.asarray(raw.pbc).astype(bool)
    numbers = " ".join(repr(float(x)) for x in np.asarray(raw.cell).ravel())
    return f'Lattice="{numbers}" pbc="{" ".join("T" if flag else "F" for flag in flags)}"'


@entry("load_extxyz", form="text", share=50, compare=lambda w, raws, d: compare_rows(raws, d, 1e-12))
def load_extxyz(world: World, text: Any) -> Any:
    from ndem_zoo.datasets import read_extxyz

    path = world.path("case.xyz")
    path.write_text(text)
    return read_extxyz(path)


@entry("write_extxyz", share=20, compare=lambda w, raws, d: compare_rows(raws, d, TEXT))
def write_extxyz(world: World, atoms: Any) -> Any:
    from ndem_zoo.datasets import read_extxyz, write_extxyz

    path = world.path("case.xyz")
    write_extxyz(path, atoms)
    return read_extxyz(path)


def compare_file(world: World, raws: Sequence[RawStructure], path: Path) -> None:
    from ase.io import read

    frames = read(path, ":", format="extxyz")
    found = {"energy": [a.get_potential_energy() for a in frames], "forces": [a.get_forces() for a in frames]}
    same_predictions(world, world.model(), raws, found)


class ExitCode(Exception):
    """A command ended with this code and message."""


def command(world: World, *words: str) -> None:
    """Run ``ndem-zoo``; what it says about bad data is raised as the error that it was."""
    from ndem_zoo import cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(words)
    if code == cli.DATA:
        raise errors.DataError(said.getvalue())
    if code != cli.OK:
        raise ExitCode(f"exit code {code}: {said.getvalue()}")


def saved_model(world: World) -> str:
    def make() -> str:
        world.model().save(world.folder / "model")
        return str(world.folder / "model")

    return world.once("saved model", make)


@entry("ndem-zoo predict", form="text", share=20, needs="typer", compare=compare_file)
def command_predict(world: World, text: Any) -> Any:
    path = world.path("case.xyz")
    path.write_text(text)
    command(
        world, "predict", "--model", saved_model(world), "--data", str(path), "--out", str(path.with_name("out.xyz"))
    )
    return path.with_name("out.xyz")


@entry("ndem-zoo md", form="text", many=False, share=6, needs="typer")
def command_md(world: World, text: Any) -> Any:
    path = world.path("case.xyz")
    path.write_text(text)
    command(world, "md", "--model", saved_model(world), "--start", str(path), "--steps", "1", "--temperature", "10")


@entry(
    "ndem-zoo convert", form="text", share=10, needs="typer", compare=lambda w, raws, d: compare_rows(raws, d, 1e-12)
)
def command_convert(world: World, text: Any) -> Any:
    path = world.path("case.xyz")
    path.write_text(text)
    command(world, "convert", str(path), str(path.with_name("store")), "--quiet")
    return open_store(path.with_name("store"))


def labeled_file(world: World, text: str) -> Path:
    """The structures with labels, in a file."""
    path = world.path("case.xyz")
    path.write_text(text.replace("Properties", "energy=-1.5 Properties"))
    return path


@entry("ndem-zoo evaluate", form="text", share=6, needs="typer")
def command_evaluate(world: World, text: Any) -> Any:
    path = labeled_file(world, text)
    command(world, "evaluate", "--model", saved_model(world), "--data", str(path))


@entry("ndem-zoo train", form="text", share=3, needs="typer")
def command_train(world: World, text: Any) -> Any:
    path = labeled_file(world, text)
    small = [f"--set={key}={value}" for key, value in (("hidden_channels", 16), ("num_layers", 1), ("force_weight", 0))]
    command(
        world, "train", "--data", str(path), "--out", str(path.with_name("run")), "--max-steps", "1", "--n-train", "1.0",
        "--n-valid", "0", "--n-test", "0", "--quiet", "--device", "cpu", "--objective", "supervised", "--preset", "md17_fast", *small,
    )  # fmt: skip


@entry("MolecularDataset.save, open_store", share=20, compare=lambda w, raws, d: compare_rows(raws, d))
def store(world: World, atoms: Any) -> Any:
    folder = world.path("store")
    MolecularDataset.from_atoms(atoms).save(folder)
    return open_store(folder)


@entry("read_oc20", form="text of crystals", share=20, compare=lambda w, raws, d: compare_rows(raws, d, 1e-12))
def oc20(world: World, text: Any) -> Any:
    from ndem_zoo.datasets import read_oc20

    path = world.path("0.extxyz")
    path.write_text(text.replace("Properties", "energy=-1.5 Properties"))
    return read_oc20(path, energy="total", stored="total")


def sdf_of(raws: Sequence[RawStructure]) -> str | None:
    """Entries of an SD file; None where a number does not fit into its columns."""
    text = ""
    for raw in raws:
        rows = [[f"{float(x):10.4f}" for x in row] for row in np.asarray(raw.pos)]
        symbols = [SYMBOLS.get(int(number), "Q") for number in raw.z]
        if raw.cell is not None or any(len(word) > 10 for row in rows for word in row) or len(rows) != len(symbols):
            return None
        lines = [f"{''.join(row)} {symbol:<3} 0  0" for row, symbol in zip(rows, symbols, strict=True)]
        text += "\n".join(
            ["name", "", "", f"{len(rows):3d}  0  0  0  0  0  0  0  0  0999 V2000", *lines, "M  END", "$$$$\n"]
        )
    return text


@entry("read_pcqm4mv2", form="sdf", share=20, compare=lambda w, raws, d: compare_rows(raws, d, 6e-5))
def pcqm4mv2(world: World, text: Any) -> Any:
    from ndem_zoo.datasets import read_pcqm4mv2

    path = world.path("case.sdf")
    path.write_text(text)
    dataset = MolecularDataset.concatenate(list(read_pcqm4mv2(path)))
    check_structures(dataset)
    return dataset


@entry("ndem-zoo bench", form="text", share=1, many=False, needs="typer")
def command_bench(world: World, text: Any) -> Any:
    path = labeled_file(world, text)
    command(
        world, "bench", str(path), "--model", saved_model(world), "--steps", "1", "--rounds", "1", "--device", "cpu"
    )


def npz(world: World, **arrays: Any) -> Path:
    path = world.path("case.npz")
    np.savez(path, **arrays)
    return path


@entry("read_md17", form="npz", many=False, share=40, compare=lambda w, raws, d: compare_rows(raws, d))
def md17(world: World, raws: Any) -> Any:
    from ndem_zoo.datasets import read_md17

    z, pos = np.asarray(raws[0].z), np.asarray(raws[0].pos)
    path = npz(world, z=z, R=pos[None], E=np.full((1, 1), -10.0), F=np.zeros((1, *np.shape(pos))))
    dataset = read_md17(path)
    check_structures(dataset)
    return dataset


@entry("read_qm9", form="npz", many=False, share=20, compare=lambda w, raws, d: compare_rows(raws, d))
def qm9(world: World, raws: Any) -> Any:
    from ndem_zoo.datasets import read_qm9
    from ndem_zoo.datasets.qm9 import _ATOMS, COLUMNS

    z, pos = np.asarray(raws[0].z), np.asarray(raws[0].pos)
    atoms = {1: "H", 6: "C", 7: "N", 8: "O"}
    total = sum(_ATOMS["U0"].get(atoms.get(int(number), "H"), 0.0) - 0.15 for number in np.ravel(z) if number == number)
    columns = {name: np.full(1, total if name in ("U0", "U", "H", "G") else 1.0) for name in COLUMNS}
    path = npz(world, id=np.array([1]), N=np.array([len(z) if z.ndim else 1]), Z=z, R=pos, **columns)
    dataset = read_qm9(path)
    check_structures(dataset)
    return dataset


@entry(
    "write_ase_db, read_ase_db", share=6, needs="schnetpack", compare=lambda w, raws, d: compare_rows(raws, d, 1e-12)
)
def ase_db(world: World, atoms: Any) -> Any:
    from ndem_zoo.schnetpack import read_ase_db, write_ase_db

    path = world.path("case.db")
    write_ase_db(MolecularDataset.from_atoms(atoms), path)
    dataset = read_ase_db(path)
    check_structures(dataset)
    return dataset


@entry(
    "to_schnetpack, from_schnetpack",
    share=10,
    needs="schnetpack",
    many=False,
    compare=lambda w, raws, b: compare_batch(w, raws, b),
)
def schnetpack_batch(world: World, atoms: Any) -> Any:
    from ndem_zoo.schnetpack import from_schnetpack, to_schnetpack

    dataset = MolecularDataset.from_atoms(atoms)
    check_structures(dataset)
    return from_schnetpack(to_schnetpack(dataset.to_batch(3.0)), 3.0)


@entry("deepchem.RadiusGraphFeaturizer", share=12, needs="deepchem", compare=compare_graphs)
def deepchem_featurizer(world: World, atoms: Any) -> Any:
    from ndem_zoo.deepchem import RadiusGraphFeaturizer

    return RadiusGraphFeaturizer(3.0).featurize(atoms)


@entry("deepchem.to_disk", share=4, needs="deepchem")
def deepchem_disk(world: World, atoms: Any) -> Any:
    from ndem_zoo.deepchem import to_disk

    disk = to_disk(MolecularDataset.from_atoms(labeled_copies(atoms)), world.path("disk"))
    if len(disk) != len(atoms):
        raise Wrong(f"{len(disk)} structures on disk of {len(atoms)}")


@entry("deepchem.from_deepchem", share=8, needs="deepchem", compare=lambda w, raws, d: compare_rows(raws, d))
def deepchem_dataset(world: World, atoms: Any) -> Any:
    from ndem_zoo.deepchem import from_deepchem

    return from_deepchem(MolecularDataset.from_atoms(labeled_copies(atoms)).to_deepchem())


@entry("deepchem.TorchMDNetModel", share=8, needs="deepchem")
def deepchem_model(world: World, atoms: Any) -> Any:
    from ndem_zoo.deepchem import TorchMDNetModel

    model = TorchMDNetModel(estimator=copy.deepcopy(world.model()), model_dir=str(world.folder / "deepchem"))
    return model.predict_forces(atoms)


# ------------------------------------------------------------------------------------------------------------- chemistry

#: The one entry that takes no structures: see `run_smiles`.
TEXTS = "ConformerGraph, text"
ENTRIES[TEXTS] = Entry(lambda world, texts: None, share=20, needs="rdkit")


@entry("topology.perceive, add_terms", share=15, needs="rdkit", may_refuse=True)
def bonds(world: World, atoms: Any) -> Any:
    from ndem_zoo.topology import add_terms

    dataset = MolecularDataset.from_atoms(atoms)
    check_structures(dataset)
    return add_terms(dataset)


def classical(name: str) -> Callable[[World, Any], Any]:
    def call(world: World, atoms: Any) -> Any:
        from ndem_zoo.forcefields import make_force_field

        dataset = MolecularDataset.from_atoms(labeled_copies(atoms))
        check_structures(dataset)
        return make_force_field(name).fit(dataset).columns(dataset)

    return call


def compare_finite(world: World, raws: Sequence[RawStructure], found: Any) -> None:
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise Wrong(f"{name} is not finite")


for field_name, needs in {"pairs": None, "valence": "rdkit", "mmff94": "rdkit", "gfn2-xtb": "tblite"}.items():
    ENTRIES[f"force field {field_name}"] = Entry(
        classical(field_name), compare_finite, share=4, may_refuse=True, needs=needs
    )


@entry("curvature.Springs", share=4, may_refuse=True, many=False)
def curvature(world: World, atoms: Any) -> Any:
    from ndem_zoo.curvature import Springs

    dataset = MolecularDataset.from_atoms(atoms)
    check_structures(dataset)
    batch = dataset.to_batch(CUTOFF, torch.float64)
    change = Springs().force_change(batch, torch.full_like(batch.pos, 0.01))
    if not bool(torch.isfinite(change).all()):
        raise Wrong("a change of force is not finite")


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Tally:
    """What became of the cases of an entry."""

    valid: int = 0
    clear_errors: int = 0
    not_cases: int = 0
    losses: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.valid + self.clear_errors + len(self.losses)


@contextlib.contextmanager
def patience(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def can_be_written(raw: RawStructure) -> bool:
    """Whether a text file says the same as the arrays."""
    whole = np.asarray(raw.z).dtype.kind in "iu" and not np.ma.is_masked(raw.pos)
    parts = (raw.pos, 0.0 if raw.cell is None else raw.cell)
    whole = whole and all(np.asarray(part).dtype.kind in "iuf" for part in parts)
    whole = whole and (raw.pbc is None or np.asarray(raw.pbc).dtype.kind == "b")
    return whole and np.ndim(raw.pos) == 2 and np.shape(raw.pos)[1] <= 3


def prepared(entry: Entry, raws: Sequence[RawStructure]) -> tuple[Any, Sequence[RawStructure]] | None:
    """The structures in the entry's form, and what that holds; None where the form itself cannot be made of them."""
    try:
        if entry.form == "atoms":
            return atoms_of(raws)
        if entry.form == "graphs":
            if any(np.ma.is_masked(raw.pos) for raw in raws):
                return None  # torch has no masks
            return [graph_of(raw) for raw in raws], raws
        if entry.form in ("text", "text of crystals", "sdf"):
            if entry.form == "text of crystals" and any(raw.cell is None for raw in raws):
                return None
            if not all(can_be_written(raw) for raw in raws):
                return None
            text = sdf_of(raws) if entry.form == "sdf" else text_of(raws)
            return None if text is None else (text, raws)
        if entry.form == "npz":
            raw = raws[0]
            if raw.cell is not None or any(np.asarray(v).dtype.kind in "OUM" for v in (raw.z, raw.pos)):
                return None
            filled = [np.ma.filled(v, np.nan) if np.ma.isMaskedArray(v) else np.asarray(v) for v in (raw.z, raw.pos)]
            held = RawStructure(*filled, kind=raw.kind)
            return [held], [held]
        return raws, raws
    except Exception:  # of ASE, DGL, or numpy: not our entry
        return None


def snapshot(value: Any) -> Any:
    """A copy that can be compared."""
    return [
        (copy.deepcopy(raw.z), copy.deepcopy(raw.pos), copy.deepcopy(raw.cell), copy.deepcopy(raw.pbc)) for raw in value
    ]


def is_same_input(before: Any, raws: Sequence[RawStructure]) -> bool:
    """Whether the structures are what they were, to the last bit and dtype."""
    for old, raw in zip(before, raws, strict=True):
        for a, b in zip(old, (raw.z, raw.pos, raw.cell, raw.pbc), strict=True):
            if type(a) is not type(b) or repr(a) != repr(b):
                return False
            if isinstance(a, np.ndarray) and (a.dtype != b.dtype or a.tobytes() != b.tobytes()):
                return False
    return True


def judge(entry: Entry, name: str, world: World, raws: Sequence[RawStructure], tally: Tally) -> None:
    """One case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's and ASE's own, about imaginary parts
        made = prepared(entry, raws)
    if made is None:
        tally.not_cases += 1
        return
    given, held = made
    flaws = [flaw_of(raw) for raw in held]
    wrong = [k for k, flaw in enumerate(flaws) if flaw is not None]
    before = snapshot(raws)
    kinds = ", ".join(raw.kind for raw in raws)

    def loss(what: str) -> None:
        tally.losses.append(f"{name} [{kinds}; {flaws}]: {what}")

    try:
        with patience(PATIENCE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = entry.call(world, given)
            if not wrong:
                entry.compare(world, held, found)
    except errors.DataError as error:
        text = str(error)
        if wrong and not names_structure(text, wrong[0], len(raws)):
            loss(f"the error does not name structure {wrong[0]}: {text!r}")
        elif not wrong and not entry.may_refuse:
            loss(f"refused: {text!r}")
        else:
            tally.clear_errors += 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        loss(f"{type(error).__name__}: {error} (at {Path(place.filename).name}:{place.lineno})")
    else:
        if wrong and not entry.may_accept:
            loss("no error")
        else:
            tally.valid += 1
    if not is_same_input(before, raws):
        loss("the input was changed")


def names_structure(text: str, index: int, n: int) -> bool:
    """Whether an error says which structure is meant, where there are several."""
    return n == 1 or any(f"{word} {index}" in text for word in ("structure", "atom", "item", "molecule", "entry"))


def run_entry(name: str, world: World, cases: int, seed: int) -> Tally:
    """So many cases of one entry: as many sound structures as spoilt ones."""
    import hypothesis
    from hypothesis import strategies as st

    if name == TEXTS:
        return run_smiles(cases, seed)
    entry, tally = ENTRIES[name], Tally()
    good, bad = structures(entry.elements), bad_structures(entry.elements)
    if entry.may_refuse and entry.needs == "rdkit":
        good = st.one_of(good, st.sampled_from(MOLECULES).map(molecule_of))
    lists = st.lists(good, min_size=1, max_size=3 if entry.many else 1)
    mixed = st.tuples(st.lists(good, max_size=2 if entry.many else 0), bad, st.randoms(use_true_random=False))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(st.one_of(lists, mixed.map(shuffled)))
    def case(raws: list[RawStructure]) -> None:
        judge(entry, name, world, raws, tally)

    case()
    return tally


#: Pieces that SMILES are made of, and some that they are not.
SMILES = (
    "C",
    "c1ccccc1",
    "O",
    "N",
    "(",
    ")",
    "=O",
    "[H]",
    "[Na+]",
    "[C@H]",
    "#",
    "1",
    "%",
    "*",
    "Cl",
    ".",
    "[",
    "x",
    "é",
    "\0",
    "S",
)


def run_smiles(cases: int, seed: int) -> Tally:
    """Texts as molecules: each is an error that names the text's number, or a graph of a sound structure."""
    import hypothesis
    from hypothesis import strategies as st

    from ndem_zoo import ConformerGraph

    tally = Tally()
    featurizer = ConformerGraph(3.0, max_iterations=50)
    pieces = st.lists(st.sampled_from(SMILES), max_size=6).map("".join)
    whole = st.sampled_from(("CCO", "c1ccccc1O", "C[C@H](N)C(=O)O", "[H]C#N", "O", "C/C=C/C", "FC(F)F", "N#N"))

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=cases, database=None, deadline=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(st.one_of(whole, pieces, st.text(max_size=8), st.none(), st.floats(), st.binary(max_size=4)))
    def case(text: Any) -> None:
        try:
            with patience(PATIENCE), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (graph,) = featurizer.featurize([text])
                raw = RawStructure(graph.ndata["Z"].numpy(), graph.ndata["R"].numpy())
                if flaw_of(raw) is not None:
                    raise Wrong(f"the structure has a flaw: {flaw_of(raw)}")
                compare_graphs(None, [raw], [graph])
            tally.valid += 1
        except errors.DataError as error:
            if "molecule 0" in str(error):
                tally.clear_errors += 1
            else:
                tally.losses.append(f"ConformerGraph, text [{text!r}]: the error names no molecule: {error}")
        except Exception as error:
            tally.losses.append(f"ConformerGraph, text [{text!r}]: {type(error).__name__}: {error}")

    case()
    return tally


MOLECULES = ("CH3CH2OH", "H2O", "CH3CN", "CO2", "C6H6", "NH3")


def molecule_of(name: str) -> RawStructure:
    atoms = molecule(name)
    return RawStructure(atoms.numbers.copy(), atoms.positions.copy(), kind=name)


def shuffled(parts: tuple[list[RawStructure], RawStructure, Any]) -> list[RawStructure]:
    """The sound structures with the spoilt one somewhere among them."""
    found = list(parts[0])
    found.insert(parts[2].randint(0, len(found)), parts[1])
    return found


def available(entry: Entry) -> bool:
    """Whether what the entry needs is installed."""
    import importlib.util

    return entry.needs is None or importlib.util.find_spec(entry.needs) is not None


def run_cases(folder: Path, total: int, seed: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """About `total` cases over all entries, by their shares."""
    torch.set_num_threads(1)
    names = [name for name in ENTRIES if available(ENTRIES[name]) and (not only or name in only)]
    shares = sum(ENTRIES[name].share for name in names)
    world, tallies, seconds = World(folder), {}, {}
    for name in names:
        begin = time.perf_counter()
        wanted = max(2, round(total * ENTRIES[name].share / shares))
        tallies[name] = Tally()
        own_seed = seed + zlib.crc32(name.encode())  # other structures at every entry
        for attempt in range(12):  # some draws are no cases, since ASE or DGL refuse them
            if tallies[name].cases >= wanted:
                break
            found = run_entry(name, world, wanted - tallies[name].cases, own_seed + 1000 * attempt)
            for key in ("valid", "clear_errors", "not_cases"):
                setattr(tallies[name], key, getattr(tallies[name], key) + getattr(found, key))
            tallies[name].losses += found.losses
        seconds[name] = time.perf_counter() - begin
    losses = [text for tally in tallies.values() for text in tally.losses]
    return {
        "cases": sum(tally.cases for tally in tallies.values()),
        "valid": sum(tally.valid for tally in tallies.values()),
        "clear_errors": sum(tally.clear_errors for tally in tallies.values()),
        "losses": len(losses),
        "entries": {
            name: {"cases": t.cases, "valid": t.valid, "clear_errors": t.clear_errors, "losses": len(t.losses)}
            for name, t in tallies.items()
        },
        "left_out": {
            name: f"{ENTRIES[name].needs} is not installed" for name in ENTRIES if not available(ENTRIES[name])
        },
        "examples_of_losses": losses[:50],
        "slowest": dict(collections.Counter(seconds).most_common(8)),
        "seed": seed,
    }


def run(quick: bool, folder: Path, seed: int) -> dict[str, Any]:
    """10,000 cases (`quick`: 1,500): counts in all and by entry; files go into `folder`.

    Returns ``cases``, ``valid`` (computed, and equal to the reference), ``clear_errors``, ``losses``, ``entries``,
    ``left_out``, ``examples_of_losses``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = run_cases(Path(scratch), 1_500 if quick else 10_100, seed)
    return found | {"recovered": found["valid"], "report": report(found)}


def report(found: dict[str, Any]) -> list[str]:
    """A table of all entries."""
    lines = [
        "Structures that are sound and structures that are spoilt, at every public entry. Recovered: sound, and equal to the",
        "eager float64 reference, one structure at a time (neighbors: to a search over all images).",
        "",
        "| entry | cases | recovered | clear errors | losses |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["entries"].items():
        lines.append(f"| {name} | {row['cases']} | {row['valid']} | {row['clear_errors']} | {row['losses']} |")
    return lines + [f"| {name} | left out: {why} | | | |" for name, why in found["left_out"].items()]
