"""`Batch`, edges, and the way to and from DGL, against ASE's neighbor lists and DGL's own message passing."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.neighborlist import neighbor_list as ase_neighbor_list

from ndem_zoo import graph
from ndem_zoo.errors import DataError
from ndem_zoo.featurizers.radius import RadiusGraph
from ndem_zoo.testing import batch_of, waves
from ndem_zoo.testing.common import distorted, example_cluster, example_crystal, example_molecules


def edges_as_set(src, dst, shift) -> set[tuple]:
    """Edges by their atoms and image shift; fails on duplicates."""
    edges = [(int(s), int(d), *np.round(v, 6).tolist()) for s, d, v in zip(src, dst, shift, strict=True)]
    assert len(set(edges)) == len(edges)
    return {tuple(x + 0.0 for x in e) for e in edges}  # + 0.0 turns -0.0 into 0.0


def edges_of_ase(atoms: Atoms, cutoff: float) -> set[tuple]:
    i, j, image = ase_neighbor_list("ijS", atoms, cutoff)
    return edges_as_set(j, i, image @ atoms.cell.array)


# ---------------------------------------------------------------------------------------------------------------- sums


def test_vectors_point_from_center_to_neighbor():
    atoms = Atoms("HO", [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    batch = batch_of([atoms], 5.0)
    edge = torch.nonzero((batch.src == 1) & (batch.dst == 0)).item()
    assert batch.vectors()[edge].tolist() == [1.0, 2.0, 3.0]


def test_vectors_include_the_image_shift():
    batch = batch_of([bulk("Cu", "sc", a=2.5)], 2.6)
    vectors = batch.vectors()
    assert sorted(map(tuple, vectors.round(decimals=6).tolist())) == sorted(
        tuple(sign * 2.5 * np.eye(3)[axis]) for axis in range(3) for sign in (1, -1)
    )


@pytest.mark.dgl
def test_sum_over_neighbors_is_what_dgl_does(dgl):
    fn = dgl.function
    batch = batch_of(example_molecules(), 5.0, radius=2.0)
    values = torch.from_numpy(waves((len(batch.src), 4, 2)))
    g = dgl.graph((batch.src, batch.dst), num_nodes=len(batch.z))
    g.edata["m"] = values
    g.update_all(fn.copy_e("m", "m"), fn.sum("m", "h"))
    ours = graph.sum_over_neighbors(values, batch)
    torch.testing.assert_close(ours, g.ndata["h"], rtol=1e-14, atol=1e-14)
    # The values are those of neighbors: with what u sends to v, DGL's src is our neighbor and its dst our center.
    g.ndata["x"] = torch.arange(len(batch.z), dtype=torch.float64)
    g.update_all(fn.copy_u("x", "m"), fn.sum("m", "s"))
    ours = graph.sum_over_neighbors(torch.arange(len(batch.z), dtype=torch.float64)[batch.src], batch)
    torch.testing.assert_close(ours, g.ndata["s"], rtol=1e-14, atol=1e-14)


def test_sums_and_means_over_atoms():
    batch = batch_of(example_molecules(), 5.0)
    values = torch.from_numpy(waves((len(batch.z), 3)))
    pieces = values.split(batch.n_atoms.tolist())
    torch.testing.assert_close(graph.sum_over_atoms(values, batch), torch.stack([p.sum(0) for p in pieces]))
    torch.testing.assert_close(graph.mean_over_atoms(values, batch), torch.stack([p.mean(0) for p in pieces]))
    torch.testing.assert_close(
        graph.mean_over_atoms(values[:, 0], batch), torch.stack([p[:, 0].mean() for p in pieces])
    )


def test_a_batch_cannot_be_changed():
    batch = batch_of(example_molecules(), 5.0)
    with pytest.raises(AttributeError):
        batch.pos = batch.pos + 1
    with pytest.raises((AttributeError, TypeError)):  # TypeError: Python issue 90562
        batch.something_else = 1


def test_to_changes_the_geometry_and_keeps_the_labels():
    batch = batch_of(example_molecules(), 5.0, targets={"energy": np.array([-17000.123456789, 0, 1])})
    single = batch.to(dtype=torch.float32)
    assert (single.pos.dtype, single.shift.dtype, single.cell.dtype) == (torch.float32,) * 3
    assert (single.z.dtype, single.targets["energy"].dtype) == (torch.int64, torch.float64)
    assert single.targets["energy"][0].item() == -17000.123456789
    assert batch.pos.dtype == torch.float64


def test_make_batch_copies_its_input():
    pos = np.zeros((2, 3))
    pos[1] = 1.0
    z = np.array([1, 6])
    batch = graph.make_batch(z, pos, np.array([2]), 5.0, dtype=torch.float64)
    pos[:], z[:] = 7, 7
    assert batch.pos[0].tolist() == [0, 0, 0]
    assert batch.z.tolist() == [1, 6]


# --------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("counts", [[1], [3], [2, 2, 2], [1, 1], [0, 0], [1, 4, 2], [5, 1], [33, 33]])
def test_all_pairs(counts):
    src, dst = graph.all_pairs(counts)
    owner = np.repeat(np.arange(len(counts)), counts)
    expected = {(j, i) for i in range(len(owner)) for j in range(len(owner)) if i != j and owner[i] == owner[j]}
    assert set(zip(src.tolist(), dst.tolist(), strict=True)) == expected
    assert len(src) == len(expected)
    assert (np.diff(dst) >= 0).all(), "sorted by center"


@pytest.mark.parametrize("pbc", [(0, 0, 0), (1, 1, 1), (1, 1, 0), (0, 1, 0)])
@pytest.mark.parametrize(
    "atoms",
    [
        distorted(molecule("CH3CH2OH")),
        distorted(bulk("NaCl", "rocksalt", a=5.64)),
        bulk("Cu"),
        distorted(fcc111("Pt", (2, 2, 3), vacuum=6.0, periodic=True)),
        Atoms("HHO", [[-7.0, 0.2, 0.1], [12.0, 0.3, 5.0], [0.4, 30.0, -2.0]], cell=[[4, 0, 0], [1, 5, 0], [0, 2, 6]]),
    ],
    ids=["molecule", "tilted cell", "one atom", "slab", "outside the cell"],
)
@pytest.mark.parametrize("cutoff", [3.3, 6.1])
def test_neighbor_list_is_that_of_ase(atoms, pbc, cutoff):
    atoms = atoms.copy()
    if atoms.cell.rank < 3 and any(pbc):
        atoms.cell = np.diag([9.0, 10.0, 11.0])
    atoms.pbc = pbc
    src, dst, shift = graph.neighbor_list(atoms.positions, cutoff, atoms.cell.array, atoms.pbc)
    assert edges_as_set(src, dst, shift) == edges_of_ase(atoms, cutoff)
    assert (np.diff(dst) >= 0).all(), "sorted by center"
    assert (src.dtype, dst.dtype, shift.dtype) == (np.int64, np.int64, np.float64)


def test_small_molecules_get_all_pairs_and_large_ones_a_list():
    small, large = example_molecules()[0], example_cluster()
    assert len(large) > graph.ALL_PAIRS_UP_TO
    assert math.isinf(batch_of([small], 2.0).cutoff)
    mixed = batch_of([small, large, small], 2.0)
    assert mixed.cutoff == 2.0
    offsets = np.cumsum([0, len(small), len(large)])
    expected = [
        (s + o, d + o, *v)
        for atoms, o in zip([small, large, small], offsets, strict=True)
        for s, d, *v in edges_of_ase(atoms, 2.0)
    ]
    assert edges_as_set(mixed.src, mixed.dst, mixed.shift.numpy()) == set(expected)


def test_a_batch_of_molecules_and_crystals():
    crystal, water = example_crystal(), example_molecules()[1]
    batch = batch_of([crystal, water], 5.0)
    expected = edges_of_ase(crystal, 5.0) | {(s + 2, d + 2, *v) for s, d, *v in edges_of_ase(water, 5.0)}
    assert edges_as_set(batch.src, batch.dst, batch.shift.numpy()) == expected
    np.testing.assert_allclose(batch.cell[0], crystal.cell.array)
    assert not batch.cell[1].any()


def test_no_structures_give_no_edges():
    batch = graph.make_batch(np.zeros(0), np.zeros((0, 3)), np.zeros(0, dtype=np.int64), 5.0)
    assert (len(batch.src), batch.n_systems, batch.n_atoms.shape) == (0, 0, (0,))


# -------------------------------------------------------------------------------------------------- moving atoms around


def test_displace_keeps_all_pairs():
    batch = batch_of(example_molecules(), 5.0)
    moved = graph.displace(batch, torch.full_like(batch.pos, 100.0), 5.0)
    assert moved.src is batch.src
    torch.testing.assert_close(moved.pos, batch.pos + 100.0)


@pytest.mark.parametrize(("size", "kept"), [(0.49, True), (0.51, False)])
def test_displace_keeps_the_edges_while_the_skin_suffices(size, kept):
    cluster = example_cluster()
    batch = batch_of([cluster], 3.0, radius=4.0)  # a skin of 1 Å: two atoms may move by 0.5 Å each
    epsilon = torch.zeros_like(batch.pos)
    epsilon[3, 1] = size
    moved = graph.displace(batch, epsilon, 3.0)
    assert (moved.src is batch.src) == kept
    cluster.positions += epsilon.numpy()
    found = moved.vectors().norm(dim=-1) < 3.0
    edges = edges_as_set(moved.src[found], moved.dst[found], moved.shift[found].numpy())
    assert edges == edges_of_ase(cluster, 3.0), "complete up to the cutoff either way"
    assert moved.cutoff == (4.0 if kept else 3.0)


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 0, 1)])
def test_displace_rebuilds_edges_of_crystals(pbc):
    atoms = distorted(bulk("NaCl", "rocksalt", a=5.64), 0.4)
    atoms.pbc = pbc
    batch = batch_of([atoms, example_molecules()[1]], 4.0)
    epsilon = torch.from_numpy(waves(batch.pos.shape)).requires_grad_()
    moved = graph.displace(batch, epsilon, 4.0)
    atoms.positions += epsilon.detach().numpy()[:2]
    chosen = moved.dst < 2
    edges = edges_as_set(moved.src[chosen], moved.dst[chosen], moved.shift[chosen].numpy())
    assert edges == edges_of_ase(atoms, 4.0)
    lengths = moved.vectors()[chosen].norm(dim=-1).detach().numpy()
    np.testing.assert_allclose(np.sort(lengths), np.sort(ase_neighbor_list("d", atoms, 4.0)), rtol=1e-12)
    assert moved.pos.requires_grad, "the graph of the displacement survives"


def test_rebuild_edges_for_other_positions():
    batch = batch_of([example_cluster()], 3.0)
    shrunk = graph.rebuild_edges(batch, 3.0, pos=batch.pos * 0.8)
    assert len(shrunk.src) > len(batch.src)
    assert shrunk.pos.equal(batch.pos * 0.8)


# ----------------------------------------------------------------------------------------------------------------- DGL


def dgl_graph(atoms: Atoms, cutoff: float = 5.0, **labels):
    src, dst, shift = graph.neighbor_list(atoms.positions, cutoff, atoms.cell.array, atoms.pbc)
    return graph.to_dgl(atoms.numbers, atoms.positions, src, dst, shift, cell=atoms.cell.array, pbc=atoms.pbc, **labels)


@pytest.mark.dgl
def test_there_and_back(dgl):
    molecules = example_molecules()
    labels = [{"energy": -1000.5 * (i + 1), "forces": waves((len(a), 3), i)} for i, a in enumerate(molecules)]
    graphs = [dgl_graph(a, **label) for a, label in zip(molecules, labels, strict=True)]
    expected = batch_of(molecules, 5.0, radius=5.0)
    for given in (graphs, tuple(graphs), dgl.batch(graphs)):
        batch = graph.from_dgl(given, 5.0, dtype=torch.float64)
        for name in ("z", "pos", "system", "cell", "fixed", "src", "dst", "shift"):
            assert getattr(batch, name).equal(getattr(expected, name)), name
        assert (batch.n_systems, batch.cutoff) == (3, 5.0)
        assert batch.targets["energy"].tolist() == [-1000.5, -2001.0, -3001.5]
        assert batch.targets["forces"].equal(torch.from_numpy(np.concatenate([label["forces"] for label in labels])))
    single = graph.from_dgl(graphs[1], 5.0)
    assert (single.pos.dtype, single.targets["forces"].dtype, single.n_systems) == (torch.float32, torch.float64, 1)


@pytest.mark.dgl
def test_crystals_survive_batching(dgl):
    crystal = example_crystal()
    slab = crystal.copy()
    slab.pbc = (True, False, True)
    batch = graph.from_dgl([dgl_graph(crystal), dgl_graph(slab)], 5.0, dtype=torch.float64)
    np.testing.assert_allclose(batch.cell[0], crystal.cell.array)
    assert not batch.cell[1][1].any(), "a direction that is not periodic has no cell vector"
    expected = batch_of([crystal, slab], 5.0)
    assert edges_as_set(batch.src, batch.dst, batch.shift.numpy()) == edges_as_set(
        expected.src, expected.dst, expected.shift.numpy()
    )


@pytest.mark.dgl
def test_graphs_that_cannot_be_used(dgl):
    g = dgl_graph(example_molecules()[1])
    for looped in (dgl.add_self_loop(g), dgl.add_self_loop(g, fill_data=0.0)):
        with pytest.raises(DataError, match="self-loops"):
            graph.from_dgl(looped, 5.0)
    with pytest.raises(DataError, match="self-loops"):
        graph.from_dgl(dgl.add_self_loop(dgl_graph(example_crystal()), fill_data=0.0), 5.0)
    for name in ("Z", "R"):
        lacking = g.clone()
        del lacking.ndata[name]
        with pytest.raises(DataError, match=rf"no ndata\['{name}'\]"):
            graph.from_dgl(lacking, 5.0)


@pytest.mark.dgl
def test_edges_to_own_images_are_no_self_loops(dgl):
    batch = graph.from_dgl(dgl_graph(bulk("Cu")), 5.0, dtype=torch.float64)
    assert (batch.src == batch.dst).all()
    assert batch.vectors().norm(dim=-1).min() > 2.5


@pytest.mark.dgl
def test_is_dgl_graph(dgl):
    assert graph.is_dgl_graph(dgl_graph(example_molecules()[1]))
    assert not graph.is_dgl_graph(example_molecules()[1])


def run_python(code: str, *folders) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, with folders in front of the path and no user site."""
    lines = "\n".join(f"sys.path.insert(0, {str(folder)!r})" for folder in folders)
    command = [sys.executable, "-c", f"import sys\n{lines}\n{textwrap.dedent(code)}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_importing_the_core_does_not_import_dgl():
    result = run_python("import ndem_zoo.graph; print('dgl' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def fake_dgl(folder, init: str, graphbolt: str | None = None, library: bool = False):
    """A package `dgl` in `folder`, as DGL 2 is laid out."""
    package = folder / "dgl"
    package.mkdir()
    (package / "__init__.py").write_text(init)
    if graphbolt is not None:
        (package / "graphbolt").mkdir()
        (package / "graphbolt" / "__init__.py").write_text(graphbolt)
        if library:
            version = torch.__version__.split("+")[0]
            (package / "graphbolt" / f"libgraphbolt_pytorch_{version}.so").write_text("")
    return folder


BROKEN_GRAPHBOLT = "raise FileNotFoundError('Cannot find DGL C++ graphbolt library')"


def test_a_graphbolt_that_does_not_fit_is_replaced(tmp_path):
    fake_dgl(tmp_path, "from . import graphbolt\nclass DGLGraph: pass\nworks = True", BROKEN_GRAPHBOLT)
    result = run_python(
        """
        from ndem_zoo.graph import import_dgl
        dgl = import_dgl()
        assert dgl.works and import_dgl() is dgl
        assert not hasattr(dgl.graphbolt, "__wrapped__")
        try:
            dgl.graphbolt.ItemSet
        except ImportError as error:
            print(error)
        """,
        tmp_path,
    )
    assert "dgl.graphbolt.ItemSet is not available" in result.stdout, result.stderr


def test_without_the_guard_that_import_fails(tmp_path):
    fake_dgl(tmp_path, "from . import graphbolt", BROKEN_GRAPHBOLT)
    assert "Cannot find DGL C++ graphbolt library" in run_python("import dgl", tmp_path).stderr


def test_a_dgl_without_graphbolt_is_left_alone(tmp_path):
    fake_dgl(tmp_path, "import sys\nclean = 'dgl.graphbolt' not in sys.modules")
    result = run_python("from ndem_zoo.graph import import_dgl; print(import_dgl().clean)", tmp_path)
    assert result.stdout.strip() == "True", result.stderr


def test_a_graphbolt_that_fits_is_used(tmp_path):
    fake_dgl(tmp_path, "from . import graphbolt", "genuine = True", library=True)
    (tmp_path / "torchdata").mkdir()
    (tmp_path / "torchdata" / "__init__.py").write_text("")
    (tmp_path / "torchdata" / "datapipes.py").write_text("")
    result = run_python("from ndem_zoo.graph import import_dgl; print(import_dgl().graphbolt.genuine)", tmp_path)
    assert result.stdout.strip() == "True", result.stderr


def test_a_dgl_that_fails_otherwise_leaves_no_stand_in(tmp_path):
    fake_dgl(tmp_path, "raise OSError('broken library')", BROKEN_GRAPHBOLT)
    result = run_python(
        """
        from ndem_zoo.graph import import_dgl
        try:
            import_dgl()
        except OSError as error:
            print(error, 'dgl.graphbolt' in sys.modules)
        """,
        tmp_path,
    )
    assert result.stdout.strip() == "broken library False", result.stderr


def test_a_missing_dgl_names_the_extra():
    result = run_python(
        """
        import importlib.util
        import ndem_zoo.graph as graph
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "dgl" else find(name, *rest)
        try:
            graph.import_dgl()
        except ImportError as error:
            print(error)
        """
    )
    assert "pip install 'ndem_zoo[dgl]'" in result.stdout, result.stderr


def test_fixed_atoms_survive_dgl(dgl):
    """OC20's slabs: which atoms must not move has to come back from a batched graph."""
    z, pos = np.array([1, 8, 1]), np.array([[0.0, 0, 0], [0, 0, 1.0], [0, 1.0, 1.0]])
    fixed = np.array([True, False, True])
    src, dst, shift = graph.neighbor_list(pos, 5.0)
    one = graph.to_dgl(z, pos, src, dst, shift, fixed=fixed)
    batch = graph.from_dgl(dgl.batch([one, one]), cutoff=5.0)
    assert batch.fixed.tolist() == [*fixed, *fixed]
    plain = graph.to_dgl(z, pos, src, dst, shift)
    assert not graph.from_dgl(plain, cutoff=5.0).fixed.any()


# ------------------------------------------------------------------------------------- edges without lists, and limits


@pytest.mark.parametrize("cutoff", [3.3, 6.1])
@pytest.mark.parametrize("pairs_at_once", [1, 1 << 24])
def test_edges_on_device_are_those_of_ase(cutoff, pairs_at_once, monkeypatch):
    monkeypatch.setattr(graph, "PAIRS_AT_ONCE", pairs_at_once)
    outside = Atoms(
        "HHO", [[-7.0, 0.2, 0.1], [12.0, 0.3, 5.0], [0.4, 30.0, -2.0]], cell=[[4, 0, 0], [1, 5, 0], [0, 2, 6]]
    )
    outside.pbc = (True, False, True)
    structures = [
        molecule("CH3CH2OH"),
        outside,
        distorted(fcc111("Pt", (2, 2, 3), vacuum=6.0, periodic=True)),
        example_crystal(),
    ]
    pos = torch.from_numpy(np.concatenate([atoms.positions for atoms in structures]))
    cell = np.stack([np.where(atoms.pbc[:, None], atoms.cell.array, 0.0) for atoms in structures])
    counts = torch.tensor([len(atoms) for atoms in structures])
    src, dst, shift = graph.edges_on_device(pos, counts, cutoff, torch.from_numpy(cell))
    first = 0
    for atoms in structures:
        chosen = (dst >= first) & (dst < first + len(atoms))
        found = edges_as_set(src[chosen] - first, dst[chosen] - first, shift[chosen].numpy())
        assert found == edges_of_ase(atoms, cutoff)
        first += len(atoms)
    assert (torch.diff(dst) >= 0).all(), "sorted by center"


def nearest_lengths(batch: graph.Batch) -> list[list[float]]:
    distance = batch.vectors().norm(dim=-1).detach()
    return [distance[batch.dst == atom].sort().values.tolist() for atom in range(len(batch.z))]


def test_a_limited_batch_is_made_displaced_and_made_again():
    slab = distorted(fcc111("Pt", (2, 2, 3), vacuum=6.0, periodic=True))
    limit = graph.Nearest(7)

    def limited(atoms: Atoms) -> graph.Batch:
        cell, pbc, counts = atoms.cell.array[None], atoms.pbc[None], np.array([len(atoms)])
        return graph.make_batch(
            atoms.numbers, atoms.positions, counts, 6.0, nearest=limit, cell=cell, pbc=pbc, dtype=torch.float64
        )

    def expected(atoms: Atoms) -> list[np.ndarray]:
        i, d = ase_neighbor_list("id", atoms, 6.0)
        return [np.sort(d[i == atom])[:7] for atom in range(len(atoms))]

    batch = limited(slab)
    assert batch.nearest == limit
    np.testing.assert_allclose(nearest_lengths(batch), expected(slab), rtol=1e-12)
    complete = batch_of([slab], 6.0)
    np.testing.assert_allclose(nearest_lengths(graph.within(complete, 6.0, limit)), expected(slab), rtol=1e-12)

    epsilon = torch.from_numpy(0.8 * waves(batch.pos.shape))
    moved = graph.displace(batch, epsilon, 6.0)
    slab.positions += epsilon.numpy()
    np.testing.assert_allclose(nearest_lengths(moved), expected(slab), rtol=1e-12)
    reused = graph.displace(batch, epsilon, 6.0, reuse_edges=True)
    assert reused.src is batch.src
    assert not np.allclose(nearest_lengths(reused), expected(slab)), "the displacement changes who is nearest"


def test_all_pairs_are_limited_by_the_backbone_only():
    batch = graph.make_batch(
        np.ones(4), waves((4, 3)), np.array([4]), 5.0, nearest=graph.Nearest(1), dtype=torch.float64
    )
    assert (len(batch.src), batch.nearest) == (12, None)
    within = graph.within(batch, 5.0, graph.Nearest(1))
    assert (len(within.src), within.nearest) == (4, graph.Nearest(1))
    assert graph.displace(within, torch.zeros_like(within.pos), 5.0).nearest is None, "all pairs again"


def test_nearest_edges_are_the_same_for_many_atoms():
    """Beyond half a million atoms, center, length and neighbor do not fit into one number to sort by."""
    pos = waves((60, 3)) * 4
    src, dst, _ = graph.neighbor_list(pos, 5.0)
    distance = torch.from_numpy(np.linalg.norm(pos[src] - pos[dst], axis=1))
    edges = distance, torch.from_numpy(src), torch.from_numpy(dst)
    few, many = (graph.nearest_edges(*edges, n_atoms, graph.Nearest(6)) for n_atoms in (60, (1 << 19) + 1))
    assert torch.equal(few, many)
    assert 0 < few.sum() < len(src)
    assert edges[2][few].bincount().max() == 6


@pytest.mark.parametrize("name", ["fcc111", "rocksalt", "one atom"])
def test_equally_near_images_are_chosen_alike_by_everybody(name, monkeypatch):
    """A perfect crystal has nothing but ties: lists, a calculator's larger radius, the GPU's search, and rotations agree."""
    slab = {
        "fcc111": lambda: fcc111("Cu", (3, 3, 2), vacuum=6.0, periodic=True),
        "rocksalt": lambda: bulk("NaCl", "rocksalt", a=5.64).repeat((2, 1, 1)),
        "one atom": lambda: bulk("Cu"),
    }[name]()
    slab.pbc = True
    limit = graph.Nearest(20)
    turned = slab.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)

    def edges(atoms: Atoms, cutoff: float, nearest: graph.Nearest | None) -> graph.Batch:
        cell, pbc, counts = atoms.cell.array[None], atoms.pbc[None], np.array([len(atoms)])
        return graph.make_batch(
            atoms.numbers, atoms.positions, counts, cutoff, nearest=nearest, cell=cell, pbc=pbc, dtype=torch.float64
        )

    def images(batch: graph.Batch, atoms: Atoms) -> set[tuple]:
        number = np.round(batch.shift.numpy() @ np.linalg.inv(atoms.cell.array)).astype(int)
        return {(int(s), int(d), *n) for s, d, n in zip(batch.src, batch.dst, number.tolist(), strict=True)}

    expected = images(edges(slab, 9.0, limit), slab)
    assert len(expected) == 20 * len(slab)
    assert images(graph.within(edges(slab, 9.5, None), 9.0, limit), slab) == expected
    assert images(edges(turned, 9.0, limit), turned) == expected
    monkeypatch.setattr(graph, "LISTS_ON", ())
    assert images(graph.rebuild_edges(edges(slab, 9.0, limit), 9.0), slab) == expected
    featurized = RadiusGraph(cutoff=9.0, max_neighbors=20)(slab)
    batch = graph.from_dgl(featurized, 9.0, torch.float64)
    assert images(batch, slab) == expected


def test_a_small_cell_among_large_ones_does_not_make_chunks_too_large(monkeypatch):
    monkeypatch.setattr(graph, "PAIRS_AT_ONCE", 1 << 16)
    counts, reach = torch.tensor([40, 2, 40]), torch.tensor([[1, 1, 0], [4, 4, 4], [1, 1, 0]])
    for first, last in graph._chunks(counts, reach):
        images = (2 * reach[first:last].amax(0) + 1).prod()
        assert last - first == 1 or int(counts[first:last].square().sum() * images) <= 1 << 16
    assert graph._chunks(counts, reach)[0][0] == 0
    assert graph._chunks(counts, reach)[-1][1] == 3


# ------------------------------------------------------------------------------------------------------ far, flat, broken


@pytest.mark.parametrize("pbc", [(False, False, False), (True, True, True), (True, False, True)])
def test_where_a_structure_is_does_not_matter_in_float32(pbc):
    """Also where only one of its atoms is far away, in another image of its cell."""
    near = distorted(bulk("NaCl", "rocksalt", a=5.64), 0.4)
    near.pbc = pbc
    far = near.copy()
    far.positions += [91234.5, -5000.25, 77.0]
    scattered = near.copy()
    scattered.positions[1] += np.array([900, 0, -700]) * pbc @ near.cell.array
    expected = np.sort(batch_of([near], 5.0, radius=5.0).vectors().numpy(), axis=0)
    for atoms in (far, scattered):
        batch = batch_of([near, atoms], 5.0, dtype=torch.float32)
        assert float(batch.pos.abs().max()) < 20
        vectors = batch.vectors()[batch.dst >= 2]
        vectors = np.sort(vectors[vectors.norm(dim=1) < 5.0].numpy(), axis=0)
        assert vectors.shape == expected.shape
        assert np.abs(vectors - expected).max() < 2e-6


def test_what_is_near_or_in_float64_stays_where_it_is():
    pos = np.array([[0.0, 0, 0], [63.9, 0, 0]])
    assert graph.near_origin(pos, np.array([2]), torch.float32) is pos
    far = pos + 1e5
    assert graph.near_origin(far, np.array([2]), torch.float64) is far
    before = far.copy()
    moved = graph.near_origin(far, np.array([1, 1]), torch.float32)
    assert np.array_equal(far, before)
    assert np.abs(moved).max() == 0  # two structures of one atom


def test_neighbors_of_what_is_not_finite():
    with pytest.raises(DataError, match=r"position of atom 1 is .*nan"):
        graph.neighbor_list(np.array([[0.0, 0, 0], [0, np.nan, 0]]), 3.0)


def made(dgl, **changes):
    fields = {"Z": torch.tensor([1, 8]), "R": torch.tensor([[0.0, 0, 0], [1.0, 0, 0]])}
    built = dgl.graph((torch.tensor([], dtype=torch.long),) * 2, num_nodes=2)
    for name, values in (fields | changes).items():
        built.ndata[name] = values
    return built


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Z": torch.tensor([1.5, 8.0])}, r"ndata\['Z'\] has shape \(2,\) and dtype torch.float32"),
        ({"Z": torch.ones(2, 1, dtype=torch.long)}, r"ndata\['Z'\] has shape \(2, 1\)"),
        ({"R": torch.zeros(2, 3, dtype=torch.complex64)}, r"ndata\['R'\].*complex64"),
        ({"R": torch.zeros(2, 2)}, r"ndata\['R'\] has shape \(2, 2\)"),
        ({"cell": torch.zeros(2, 3, 3)}, "only one of"),
        ({"cell": torch.diag(torch.tensor([9.0, 9.0, 0])).expand(2, 3, 3), "pbc": torch.ones(2, 3, dtype=torch.bool)}, "zeros"),
    ],
)  # fmt: skip
def test_graphs_with_other_fields(dgl, changes, message):
    with pytest.raises(DataError, match=message):
        graph.from_dgl(made(dgl, **changes), 5.0)
    from ndem_zoo.datasets import as_dataset

    with pytest.raises(DataError, match=f"structure 1: .*{message}"):
        as_dataset([made(dgl), made(dgl, **changes)])


def test_graphs_without_atoms_and_of_different_dtypes(dgl):
    from ndem_zoo.datasets import as_dataset

    empty = dgl.remove_nodes(made(dgl), [0, 1])
    with pytest.raises(DataError, match="structure 1: it has no atoms"):
        as_dataset([made(dgl), empty])
    with pytest.raises(DataError, match="structure 1 of the batch has no atoms"):
        as_dataset(dgl.batch([made(dgl), empty]))
    part = made(dgl).subgraph(torch.tensor([1]))  # DGL adds columns of its own
    assert as_dataset([made(dgl), part]).z.tolist() == [1, 8, 8]
    both = as_dataset([made(dgl), made(dgl, R=torch.tensor([[0.0, 0, 0], [2.0, 0, 0]], dtype=torch.float64))])
    assert both.pos[:, 0].tolist() == [0, 1, 0, 2]


def test_far_graphs_in_float32(dgl):
    pos = torch.tensor([[0.0, 0, 0], [1.0, 0, 0]], dtype=torch.float64) + 50_000.1
    batch = graph.from_dgl(made(dgl, R=pos), 5.0)
    assert np.allclose(batch.pos[1] - batch.pos[0], [1, 0, 0], atol=1e-7)
