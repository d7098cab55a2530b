"""RadiusGraph against ASE's neighbor list, on molecules, small cells, mixed boundaries and genuine slabs."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list as ase_neighbors

from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.featurizers import RadiusGraph, Structure
from ndem_zoo.graph import neighbor_list

pytestmark = [pytest.mark.dgl, pytest.mark.usefixtures("dgl")]


def random_cell(pbc) -> Atoms:
    """Ten atoms in a skewed cell that is smaller than the cutoff, with atoms outside of it."""
    pos = np.random.default_rng(0).uniform(-8, 8, (10, 3))
    return Atoms("H10", positions=pos, cell=[[3, 0, 0], [1, 2.5, 0], [0.3, 0.4, 2]], pbc=pbc)


def wire() -> Atoms:
    pos = np.random.default_rng(1).uniform(-30, 30, (4, 3))
    return Atoms("H4", positions=pos, cell=[4, 0, 0], pbc=[True, False, False])


def slab_without_third_vector() -> Atoms:
    atoms = fcc111("Cu", (1, 1, 3), vacuum=5)
    atoms.pbc = [True, True, False]
    atoms.cell[2] = 0
    return atoms


CASES = {
    "molecule": (molecule("CH3CH2OH"), 3.0),
    "single atom": (Atoms("He"), 5.0),
    "atom in a crystal": (bulk("Cu"), 6.0),
    "cutoff above the cell": (bulk("NaCl", "rocksalt", a=5.6), 9.0),
    "slab": (fcc111("Cu", (2, 2, 3), vacuum=5), 6.0),
    "slab without third vector": (slab_without_third_vector(), 7.0),
    "wire": (wire(), 9.0),
    **{f"pbc {pbc}": (random_cell(np.array(pbc, bool)), 4.0) for pbc in np.ndindex(2, 2, 2)},
}


def edges(src, dst, shift) -> list[tuple]:
    """Edges in one order, whatever order they were found in."""
    rows = np.column_stack([dst, src, np.round(shift, 6) + 0.0])
    return sorted(map(tuple, rows.tolist()))


def expected_edges(atoms: Atoms, cutoff: float) -> list[tuple]:
    i, j, image = ase_neighbors("ijS", atoms, cutoff)
    return edges(j, i, image @ atoms.cell.array)


def assert_same_edges(found: list[tuple], expected: list[tuple]) -> None:
    """Equal up to the rounding of shifts, which may also exchange neighbors in the order."""
    assert len(found) == len(expected)
    for edge, other in zip(found, expected, strict=True):
        assert edge[:2] == other[:2]
    order = [sorted(tuple(np.round(edge, 4) + 0.0) for edge in edges_) for edges_ in (found, expected)]
    assert order[0] == order[1]


def edges_of(graph) -> list[tuple]:
    src, dst = graph.edges()
    return edges(src.numpy(), dst.numpy(), graph.edata["shift"].numpy())


@pytest.mark.parametrize("case", CASES)
def test_edges_are_ases(case):
    atoms, cutoff = CASES[case]
    graph = RadiusGraph(cutoff=cutoff)(atoms)
    assert_same_edges(edges_of(graph), expected_edges(atoms, cutoff))
    src, dst = (index.numpy() for index in graph.edges())
    shift = graph.edata["shift"].numpy()
    assert not ((src == dst) & (shift == 0).all(axis=1)).any()
    vectors = atoms.positions[src] + shift - atoms.positions[dst]
    assert (np.linalg.norm(vectors, axis=1) < cutoff).all()


def test_every_edge_has_its_reverse():
    graph = RadiusGraph(cutoff=4.0)(random_cell([True, True, False]))
    src, dst = (index.numpy() for index in graph.edges())
    shift = graph.edata["shift"].numpy()
    assert edges(src, dst, shift) == edges(dst, src, -shift)


def test_genuine_slabs(shared_data):
    from ndem_zoo.datasets import read_extxyz

    dataset = read_extxyz(shared_data / "oc20" / "s2ef_mini100" / "0.extxyz.xz")
    for i in (0, 50, 99):
        atoms = dataset.atoms(i)
        graph = dataset.with_featurizer(RadiusGraph(cutoff=6.0))[i]
        assert graph.num_edges() > 500
        assert_same_edges(edges_of(graph), expected_edges(atoms, 6.0))
        np.testing.assert_array_equal(graph.ndata["cell"][0].numpy(), atoms.cell.array)
        assert graph.ndata["pbc"].all()


def test_fields(dgl):
    atoms = molecule("H2O")
    forces = np.arange(9.0).reshape(3, 3)
    atoms.calc = SinglePointCalculator(atoms, energy=-3.5, forces=forces)
    graph = RadiusGraph()(atoms)
    assert isinstance(graph, dgl.DGLGraph)
    assert set(graph.ndata) == {"Z", "R", "F", "energy"}
    assert set(graph.edata) == {"shift"}
    assert graph.ndata["Z"].tolist() == [8, 1, 1]
    np.testing.assert_array_equal(graph.ndata["R"].numpy(), atoms.positions)
    np.testing.assert_array_equal(graph.ndata["F"].numpy(), forces)
    assert graph.ndata["energy"].tolist() == [-3.5] * 3
    assert str(graph.ndata["R"].dtype) == str(graph.edata["shift"].dtype) == "torch.float64"
    assert set(RadiusGraph()(molecule("H2O")).ndata) == {"Z", "R"}
    crystal = RadiusGraph()(bulk("Cu"))
    assert set(crystal.ndata) == {"Z", "R", "cell", "pbc"}


def test_arrays_give_the_same_graph():
    atoms = random_cell([True, True, True])
    z, pos, cell = atoms.numbers, atoms.positions, atoms.cell.array
    expected = edges_of(RadiusGraph(4.0)(atoms))
    forms = [(z, pos, cell, atoms.pbc), (z, pos, cell), (z.tolist(), pos.tolist(), cell.tolist())]
    forms.append(Structure(z, pos, cell, atoms.pbc))
    for form in forms:
        assert edges_of(RadiusGraph(4.0)(form)) == expected
    assert edges_of(RadiusGraph(4.0)((z, pos))) == edges_of(RadiusGraph(4.0)(random_cell(False)))


def test_featurize_many():
    frames = [molecule("H2O"), molecule("CH4"), bulk("Cu")]
    graphs = RadiusGraph().featurize(frames)
    assert graphs.dtype == object
    assert [graph.num_nodes() for graph in graphs] == [3, 5, 1]
    assert [graph.num_nodes() for graph in RadiusGraph()(frames)] == [3, 5, 1]
    assert [graph.num_nodes() for graph in RadiusGraph().featurize(frames[0])] == [3]
    assert len(RadiusGraph().featurize([])) == 0


def test_skin_adds_edges():
    atoms = molecule("C6H6")
    with_skin = RadiusGraph(cutoff=2.0, skin=1.0)
    assert with_skin.radius == 3.0
    assert edges_of(with_skin(atoms)) == edges_of(RadiusGraph(cutoff=3.0)(atoms))
    assert with_skin(atoms).num_edges() > RadiusGraph(cutoff=2.0)(atoms).num_edges()


# --------------------------------------------------------------------------------------------------- limited neighbors


def lengths(atoms: Atoms, center: np.ndarray, distance: np.ndarray) -> list[list[float]]:
    """Lengths of the edges into each atom, ascending: who of equally near images is chosen does not show in them."""
    return [np.sort(distance[center == atom]).round(6).tolist() for atom in range(len(atoms))]


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
@pytest.mark.parametrize("strict", [True, False])
def test_nearest_neighbors(limit, strict):
    atoms = random_cell([True, True, False])
    graph = RadiusGraph(cutoff=4.0, max_neighbors=limit, strict=strict)(atoms)
    i, d = ase_neighbors("id", atoms, 4.0)
    expected = []
    for found in lengths(atoms, i, d):
        bound = found[limit] ** 2 + 0.01 if limit < len(found) else np.inf
        expected.append(found[:limit] if strict else [r for r in found if r**2 <= bound])
    src, dst = (t.numpy() for t in graph.edges())
    pos = graph.ndata["R"].numpy()
    distance = np.linalg.norm(pos[src] + graph.edata["shift"].numpy() - pos[dst], axis=1)
    assert lengths(atoms, dst, distance) == expected
    assert set(edges_of(graph)) <= set(edges_of(RadiusGraph(cutoff=4.0)(atoms)))
    if limit < 7:
        degrees = graph.in_degrees().tolist()
        assert degrees == [limit] * 10 if strict else sum(degrees) > limit * 10


@pytest.mark.parametrize("angle", [0, 11, 23, 47, 71])
def test_equally_near_neighbors_are_chosen_by_index(angle):
    methane = molecule("CH4")  # the four hydrogens are equally far from each other, and from the carbon
    methane.rotate(angle, (1, 2, 3))  # ... up to the last bits
    src, dst = RadiusGraph(cutoff=3.0, max_neighbors=2)(methane).edges()
    chosen = {int(center): sorted(src[dst == center].tolist()) for center in range(5)}
    assert chosen[0] == [1, 2]
    assert chosen[4] == [0, 1]
    assert chosen[1] == [0, 2]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Atoms("H2", positions=[[0, 0, 0], [0, 0, np.nan]]), "structure 1: position of atom 1 is .*nan"),
        (Atoms(), "structure 1: it has no atoms"),
        (
            Atoms("HX", positions=[[0, 0, 0], [0, 0, 1]]),
            "structure 1: atom 1 has atomic number 0; allowed are 1 to 100",
        ),
        (Atoms([103], positions=[[0, 0, 0]]), "atomic number 103"),
        (Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.05]]), "structure 1: atoms . and . are 0.05 Å apart"),
        (Atoms("H2", positions=[[0, 0, 0.0], [0, 0, 2.99]], cell=[3, 3, 3], pbc=True), "are 0.01 Å apart"),
        (Atoms("H", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 1]], pbc=True), "structure 1: the cell .* is singular"),
        (Atoms("H", pbc=True), "is singular"),
        ((np.array([1, 1]), np.zeros((3, 3))), r"structure 1: positions have shape \(3, 3\)"),
        ((np.array([1.0]), np.zeros((1, 3))), "integers"),
        ((np.array([1]),), "a structure is an ase.Atoms or a tuple"),
        ("water", "got str; a structure is"),
        (np.array([]), "got ndarray"),
    ],
)
def test_bad_structures_are_named(bad, message):
    with pytest.raises(DataError, match=message):
        RadiusGraph().featurize([molecule("H2O"), bad])


@pytest.mark.parametrize(
    "options",
    [{"cutoff": 0.0}, {"cutoff": -1}, {"cutoff": np.inf}, {"skin": -0.1}, {"max_neighbors": 0}, {"max_neighbors": 2.5}],
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        RadiusGraph(**options)


def test_the_order_of_edges_is_by_center():
    src, dst, shift = neighbor_list(molecule("C6H6").positions, 3.0)
    assert (np.diff(dst) >= 0).all()
    assert src.dtype == dst.dtype == np.int64
    assert shift.shape == (len(src), 3)


def test_repr_names_the_options():
    assert repr(RadiusGraph(4.0, max_neighbors=3)) == "RadiusGraph(cutoff=4.0, max_neighbors=3, skin=0.0, strict=True)"


WATER = np.array([[0.0, 0, 0], [0.96, 0, 0], [0, 0.96, 0]])


@pytest.mark.parametrize(
    ("z", "pos", "message"),
    [
        ([8, 1, 1], [[0, 0, 0], [1, 0]], "cannot be an array"),
        ([8, 1, 1], WATER.astype(str), "positions cannot be an array of float64: the dtype is <U"),
        ([8, 1, 1], WATER + 0j, "dtype is complex128"),
        ([8, 1, 1], np.zeros((3, 3), dtype="datetime64[s]"), "dtype is datetime64"),
        ([8, 1, 1], np.ma.masked_equal(WATER, 0.96), "2 masked entries"),
        ([8, 1, 1], None, "dtype is object"),
        ([8.0, 1.0, 1.0], WATER, "integers"),
        ([True] * 3, WATER, "dtype bool"),
        (["O", "H", "H"], WATER, "atomic numbers cannot be an array"),
        ([2**70] * 3, WATER, "atomic numbers cannot be an array"),
        ([8, 1, 1], WATER + 2e6, r"position of atom 0 .* up to 1e\+06 Å"),
        ([8, 1, 1], WATER * 1100, r"extends over 1056 Å; allowed are 1000 Å"),
    ],
)
def test_arrays_that_are_no_structures(z, pos, message):
    with pytest.raises(DataError, match=message):
        RadiusGraph(5.0)((z, pos))


@pytest.mark.parametrize(
    ("cell", "pbc", "message"),
    [
        (np.diag([9.0, 9.0, 0.05]), None, r"opposite faces 0\.05 Å apart"),
        (np.array([[9.0, 0, 0], [900.0, 9.0, 0], [0, 0, 9.0]]), None, r"opposite faces 0\.09 Å"),
        (np.eye(3) * 1001, None, "longer than 1000 Å"),
        (np.eye(3) * 1e300, None, "longer than 1000 Å"),
        ("cubic", None, "cell cannot be an array"),
        (np.eye(3) * (9 + 1j), None, "cell cannot be an array"),
        (np.eye(3) * 9, [1.0, np.nan, 0.0], "allowed are True and False"),
        (np.eye(3) * 9, ["T", "T", "F"], "pbc cannot be an array of bool"),
    ],
)
def test_cells_that_are_none(cell, pbc, message):
    with pytest.raises(DataError, match=message):
        RadiusGraph(5.0)(([8, 1, 1], WATER, cell, pbc))


def test_atoms_may_be_in_any_image_of_their_cell():
    far = WATER + np.array([[0, 0, 0], [4500.0, 0, 0], [0, 0, -9000.0]])
    graph = RadiusGraph(1.2)(([8, 1, 1], far, np.eye(3) * 9.0, [True, False, True]))
    assert graph.num_edges() == 4
    with pytest.raises(DataError, match="extends over"):
        RadiusGraph(1.2)(([8, 1, 1], far, np.eye(3) * 9.0, [False, True, True]))
