"""Batches from columns: the right rows for every kind of column, in the order asked for."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import traceback

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111

from ndem_zoo import graph, sampling
from ndem_zoo.datasets.base import MolecularDataset
from ndem_zoo.errors import ConfigError, DataError
from ndem_zoo.graph import Nearest, make_batch
from ndem_zoo.models.torchmd_net import NDeMTorchMDNet, TorchMDNet
from ndem_zoo.sampling import Collator, Order, collate, expected_edges, load, size_batches, step_seed
from ndem_zoo.testing.common import distorted

SHARED = ("z", "src", "dst", "shift", "system", "cell", "fixed")


def mixed_sizes(z_last: int = 8) -> MolecularDataset:
    """Structures of 1, 2 and 3 atoms whose labels say where they come from."""
    counts = [1, 2, 3]
    atoms = np.arange(6, dtype=float)
    return MolecularDataset(
        np.array([1, 1, 8, 1, 6, z_last]),
        np.stack([1.5 * atoms, 0.3 * atoms**2, 0 * atoms], axis=1),
        np.concatenate([[0], np.cumsum(counts)]),
        targets={"energy": np.array([10.0, 20.0, 30.0]), "forces": np.repeat(atoms[:, None], 3, axis=1)},
        extras={"charges": atoms * 100, "smiles": np.array(["a", "b", "c"])},
    )


def test_rows_of_structures_and_atoms():
    batch = collate(mixed_sizes(), np.array([2, 0]), cutoff=5.0)
    assert batch.z.tolist() == [1, 6, 8, 1]
    assert batch.system.tolist() == [0, 0, 0, 1]
    assert batch.targets["energy"].tolist() == [30.0, 10.0]
    assert batch.targets["forces"][:, 0].tolist() == [3.0, 4.0, 5.0, 0.0]
    # a column of atoms with a name that nobody declared, and one that is no number
    assert batch.extras["charges"].tolist() == [300.0, 400.0, 500.0, 0.0]
    assert "smiles" not in batch.extras
    assert set(zip(batch.src.tolist(), batch.dst.tolist(), strict=True)) == {
        (0, 1),
        (1, 0),
        (0, 2),
        (2, 0),
        (1, 2),
        (2, 1),
    }


# --------------------------------------------------------------------------------------------------------------- collator


def assert_same_batch(a, b) -> None:
    assert (a.n_systems, a.cutoff) == (b.n_systems, b.cutoff)
    for name in (*SHARED, "pos"):
        assert getattr(a, name).dtype == getattr(b, name).dtype
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for kind in ("targets", "extras"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items()
        )


def assembled(dataset: MolecularDataset, indices, dtype=torch.float32):
    """The same batch, made of single structures."""
    parts = [dataset.select([int(i)]) for i in indices]
    joined = MolecularDataset.concatenate(parts)
    return make_batch(
        joined.z, joined.pos, joined.counts, 5.0, targets=joined.targets, extras=joined.extras, dtype=dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_batches_of_one_composition_share(ethanol, dtype):
    collator = Collator(ethanol, 5.0, dtype)
    orders = [[5, 900, 17], [1, 0, 1999], [30, 31], [7, 8, 9]]
    batches = [collator(np.array(order)) for order in orders]
    for order, batch in zip(orders, batches, strict=True):
        assert_same_batch(batch, assembled(ethanol, order, dtype))
    for name in SHARED:
        assert getattr(batches[0], name) is getattr(batches[1], name) is getattr(batches[3], name)
        assert getattr(batches[0], name) is not getattr(batches[2], name)
    for name in ("energy", "forces"):
        assert batches[0].targets[name].dtype == torch.float64
    assert Collator(ethanol, 5.0, with_targets=False)(np.array([3])).targets == {}


def test_few_shapes_are_kept(ethanol):
    collator = Collator(ethanol, 5.0)
    for size in range(1, 30):
        assert_same_batch(collator(np.arange(size)), assembled(ethanol, range(size)))
    assert len(collator._known) == sampling._KEPT_SHAPES


@pytest.mark.parametrize("difference", ["size", "elements", "order of the elements", "fixed", "cell", "many atoms"])
def test_batches_that_share_nothing(ethanol, difference):
    """Each of these would be wrong with the tensors of another batch of as many structures."""
    columns = ethanol[:4].columns() | {"ids": None}
    n = 9
    if difference == "size":
        data = mixed_sizes()
    elif difference == "elements":
        columns["z"] = np.where(np.arange(4 * n) == 30, 7, columns["z"])
        data = MolecularDataset(**columns)
    elif difference == "order of the elements":
        columns["z"] = np.concatenate([columns["z"][: 3 * n], columns["z"][:n][::-1]])
        data = MolecularDataset(**columns)
    elif difference == "fixed":
        data = MolecularDataset(**columns | {"fixed": np.arange(4 * n) == 30})
    elif difference == "cell":
        cell, pbc = np.tile(4.0 * np.eye(3), (4, 1, 1)), np.array([[True] * 3, [False] * 3] * 2)
        data = MolecularDataset(**columns | {"cell": cell, "pbc": pbc})
    else:
        atoms = [bulk("Cu", cubic=True) * (3, 3, k) for k in (1, 1, 1)]
        for number, item in enumerate(atoms):
            item.pbc = False
            item.rattle(0.1, seed=number)
        data = MolecularDataset.from_atoms(atoms)
    collator = Collator(data, 5.0)
    for indices in (np.array([0, 1]), np.array([1, len(data) - 1])):
        rows, counts = sampling.atom_indices(data.ptr, indices)
        optional = {
            name: None if getattr(data, name) is None else getattr(data, name)[at]
            for name, at in (("cell", indices), ("pbc", indices), ("fixed", rows))
        }
        batch = collator(indices)
        expected = make_batch(data.z[rows], data.pos[rows], counts, 5.0, **optional)
        assert_same_batch(batch.replace(targets={}, extras={}), expected)


def test_columns_on_disk_are_gathered_from_there(ethanol, tmp_path):
    file = np.memmap(tmp_path / "pos", dtype=np.float64, mode="w+", shape=ethanol.pos.shape)
    file[:] = ethanol.pos
    data = MolecularDataset(**ethanol.columns() | {"pos": file})
    collator = Collator(data, 5.0)
    for order in ([3, 1], [9, 4]):
        batch = collator(np.array(order))
        assert_same_batch(batch, assembled(ethanol, order))
        batch.pos.zero_()  # in memory of its own: neither the file nor another batch changes
    assert np.array_equal(file, ethanol.pos)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", ["backwards", "fortran"])
def test_columns_of_any_layout(ethanol, layout):
    frames = ethanol[:6]
    pos = frames.pos[::-1] if layout == "backwards" else np.asfortranarray(frames.pos)
    data = MolecularDataset(**frames.columns() | {"pos": pos})
    collator = Collator(data, 5.0)
    for order in ([3, 1], [0, 4]):
        assert_same_batch(collator(np.array(order)), assembled(data, order))


# ---------------------------------------------------------------------------------------------------------------- order

SIZES = np.random.default_rng(0).integers(3, 40, 200)


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize(("batch_size", "max_atoms"), [(4, None), (8, 100), (None, 100), (1, 39)])
def test_an_epoch_visits_every_structure_once(batch_size, max_atoms, bucket):
    order = Order(SIZES, batch_size, seed=3, max_atoms=max_atoms, bucket=bucket)
    epochs = [order.batches(epoch) for epoch in range(3)]
    for batches in epochs:
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(200))
        assert max(len(batch) for batch in batches) <= (batch_size or 200)
        assert max_atoms is None or max(SIZES[batch].sum() for batch in batches) <= max_atoms
    assert [order.length(epoch) for epoch in range(3)] == [len(batches) for batches in epochs]
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))
    again = Order(SIZES, batch_size, seed=3, max_atoms=max_atoms, bucket=bucket).batches(2)
    assert all(np.array_equal(a, b) for a, b in zip(again, epochs[2], strict=True))
    other = Order(SIZES, batch_size, seed=4, max_atoms=max_atoms, bucket=bucket).batches(2)
    assert not np.array_equal(np.concatenate(other), np.concatenate(epochs[2]))


def test_batches_by_number_of_structures():
    assert [len(batch) for batch in Order(np.full(10, 9), 4, seed=3).batches(0)] == [4, 4, 2]


def test_batches_are_as_full_as_the_order_allows():
    """What does not fit any more begins the next batch; no batch could have taken it."""
    batches = Order(SIZES, None, seed=0, max_atoms=100).batches(0)
    for batch, following in itertools.pairwise(batches):
        assert SIZES[batch].sum() + SIZES[following[0]] > 100


def test_buckets_hold_similar_sizes_in_random_order():
    order = Order(SIZES, 8, seed=0, bucket=True)
    spread = [np.mean([np.ptp(SIZES[b]) for b in Order(SIZES, 8, 0, bucket=k).batches(0)]) for k in (False, True)]
    assert spread[1] < 0.25 * spread[0]
    together = [{tuple(sorted(batch)) for batch in order.batches(epoch)} for epoch in (0, 1)]
    assert len(together[0] & together[1]) <= 1, "shuffled within the buckets"
    means = [SIZES[batch].mean() for batch in order.batches(0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5, "large ones come at any time"


def test_a_structure_that_is_too_large_is_named():
    with pytest.raises(ConfigError, match=r"structure 1 has 41 atoms, more than max_atoms=40"):
        Order(np.array([3, 41, 50]), None, 0, max_atoms=40)
    Order(np.array([3, 40]), None, 0, max_atoms=40)


@pytest.mark.parametrize("max_atoms", [None, 100])
def test_steps_are_found_again(max_atoms):
    order = Order(SIZES, 8, seed=4, max_atoms=max_atoms)
    straight = list(itertools.islice(order.after(0), 150))
    lengths = [order.length(epoch) for epoch in range(3)]
    assert max_atoms is None or len(set(lengths)) > 1, "the test must see epochs of different length"
    expected = [(epoch, position) for epoch in range(3) for position in range(lengths[epoch])]
    for step in (0, lengths[0] - 1, lengths[0], lengths[0] + lengths[1], sum(lengths[:2]) + 1):
        assert order.locate(step) == expected[step]
        follow = itertools.islice(order.after(step), 150 - step)
        assert all(np.array_equal(a, b) for a, b in zip(follow, straight[step:], strict=True))


# ------------------------------------------------------------------------------------------------- batches of predictions


def sizes_only(counts) -> MolecularDataset:
    counts = np.asarray(counts)
    ptr = np.concatenate([[0], np.cumsum(counts)])
    return MolecularDataset(np.ones(ptr[-1], dtype=int), np.random.default_rng(0).normal(size=(ptr[-1], 3)), ptr)


def test_one_large_structure_goes_alone():
    data = sizes_only([5] * 100 + [6000] + [7] * 100)
    batches = size_batches(data, 64, cutoff=5.0)
    assert [batch.tolist() for batch in batches[:1]] == [[100]]
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(201))
    assert len(batches) == 1 + 4
    assert all(np.ptp(data.counts[batch]) <= 2 for batch in batches)


def test_atoms_and_edges_are_limited():
    data = sizes_only([30] * 500 + [300] * 40)
    edges = expected_edges(data, 5.0)
    assert edges[0] == 30 * 29, "a small molecule has all its pairs"
    for members in (1, 4):
        batches = size_batches(data, 1000, 5.0, members)
        assert max(data.counts[batch].sum() for batch in batches) <= sampling.MAX_ATOMS // members
        sums = [edges[batch].sum() for batch in batches if len(batch) > 1]
        assert max(sums) <= sampling.MAX_EDGES // members
        assert max(sums) > 0.9 * sampling.MAX_EDGES // members


def test_structures_of_one_size_stay_in_order():
    assert np.array_equal(np.concatenate(size_batches(sizes_only([9] * 50), 8, 5.0)), np.arange(50))


def test_edges_of_crystals_are_expected_from_their_density():
    copper, slab = bulk("Cu", cubic=True) * (3, 3, 3), bulk("Cu", cubic=True) * (3, 3, 3)
    copper.rattle(0.01)
    slab.pbc = [True, True, False]
    data = MolecularDataset.from_atoms([copper, bulk("Cu"), slab])
    found = [len(collate(data, np.array([i]), 5.0).src) for i in range(3)]
    assert expected_edges(data, 5.0)[:2] == pytest.approx(found[:2], rel=0.2)
    assert 0.5 < expected_edges(data, 5.0)[2] / found[2] < 2.0


# -------------------------------------------------------------------------------------------------------------- loading


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ndem_zoo-batches")]


def test_ahead_or_not_the_batches_are_the_same(ethanol):
    order = Order(np.full(40, 9), 7, seed=1).batches(0)
    plain, ahead = (list(load(Collator(ethanol, 5.0), order, ahead=ahead)) for ahead in (None, True))
    assert len(plain) == 6
    for a, b in zip(plain, ahead, strict=True):
        assert_same_batch(a, b)
    assert not threads()


def test_one_batch_ahead_in_one_thread(ethanol):
    made = []

    class Recorder(Collator):
        def __call__(self, indices):
            made.append((int(indices[0]), threading.current_thread()))
            return super().__call__(indices)

    order = (np.array([i]) for i in itertools.count())
    with contextlib.closing(load(Recorder(ethanol, 5.0), order, ahead=True)) as batches:
        for number in range(5):
            next(batches)
            deadline = time.monotonic() + 10
            while len(made) < number + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert [index for index, _ in made] == list(range(number + 2)), "the next one, and no more"
        assert len(threads()) == 1
    assert not threads(), "the thread ends when the iterator is closed"
    assert {thread for _, thread in made}.isdisjoint({threading.main_thread()})
    assert len({thread for _, thread in made}) == 1


def test_on_a_cpu_there_is_no_thread_unless_asked_for(ethanol):
    with contextlib.closing(load(Collator(ethanol, 5.0), [np.array([0])] * 3)) as batches:
        next(batches)
        assert not threads()


def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_due(ethanol):
    class Broken(Collator):
        def __call__(self, indices):
            if indices[0] == 2:
                self.fail_here()
            return super().__call__(indices)

        def fail_here(self):
            raise OSError("the disk is gone")

    batches = load(Broken(ethanol, 5.0), [np.array([i]) for i in range(5)], ahead=True)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(OSError, match="the disk is gone") as error:
        next(batches)
    assert "fail_here" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert not threads()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_batches_arrive_whole(ethanol):
    """The copy is on another stream: what uses a batch must come after it, and its memory must not be taken away."""
    order = [np.arange(i, i + 500) for i in range(0, 1500, 100)]
    expected = [Collator(ethanol, 5.0)(indices) for indices in order]
    for ahead in (False, True):
        collator = Collator(ethanol, 5.0, device="cuda")
        found = []
        for batch in load(collator, order, ahead=ahead):
            assert batch.pos.is_cuda
            torch.cuda._sleep(10_000_000)  # the GPU is behind: the next batch is copied long before this one is read
            found.append(batch.replace(pos=batch.pos.clone()))
        for a, b in zip(found, expected, strict=True):
            assert_same_batch(a.to("cpu"), b)
    assert not threads()


def test_seeds_of_steps_differ():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4000
    assert max(seeds) < 2**63, "torch's generators take signed 64-bit seeds"


def test_an_element_beyond_the_embedding_is_refused_by_name():
    model = NDeMTorchMDNet(backbone_options=TorchMDNet.tiny, progress=False)
    with pytest.raises(DataError, match=r"structure 2: atomic number 100; this backbone knows those below 100"):
        model.fit(mixed_sizes(z_last=100), max_steps=1)
    assert not hasattr(model, "potential_")


@pytest.mark.parametrize("limit", [None, Nearest(6)])
def test_edges_that_are_made_on_the_device(limit, monkeypatch):
    """As on a GPU, which is asked to compare all images of all pairs; here on the CPU, with the lists for a truth."""
    slabs = [distorted(fcc111("Cu", (2, 2, n), vacuum=5.0, periodic=True)) for n in (2, 3)]
    data = MolecularDataset.from_atoms(slabs)
    expected = Collator(data, 5.0, torch.float64, nearest=limit)(np.array([1, 0]))
    monkeypatch.setattr(graph, "LISTS_ON", ())
    found = Collator(data, 5.0, torch.float64, nearest=limit)(np.array([1, 0]))
    assert (found.cutoff, found.nearest) == (expected.cutoff, expected.nearest)
    assert len(found.src) == len(expected.src)
    for batch in (found, expected):
        assert (torch.diff(batch.dst) >= 0).all()
    lengths = [
        [batch.vectors()[batch.dst == atom].norm(dim=-1).sort().values for atom in range(len(batch.z))]
        for batch in (found, expected)
    ]
    for one, other in zip(*lengths, strict=True):
        torch.testing.assert_close(one, other)


def test_a_limit_on_neighbors_is_known_to_predictions():
    slabs = MolecularDataset.from_atoms([fcc111("Cu", (3, 3, 4), vacuum=8.0, periodic=True)] * 12)
    atoms = len(slabs.z) // 12
    assert expected_edges(slabs, 12.0, Nearest(20)).tolist() == [20 * atoms] * 12
    assert expected_edges(slabs, 12.0)[0] > 100 * atoms


@pytest.mark.parametrize("n", [1, 3])
def test_columns_that_go_backwards_in_memory(n):
    """Also a single row, which numpy calls contiguous whatever its strides are."""
    pos = np.arange(3.0 * n).reshape(n, 3)
    data = MolecularDataset(np.ones(n, dtype=int), pos[::-1].copy()[::-1], [0, n])
    assert data.pos.strides[0] < 0
    assert Collator(data, 5.0, torch.float64)(np.array([0])).pos.tolist() == pos.tolist()


def test_far_frames_of_one_molecule_in_float32(ethanol):
    """The way of the shared batches: from the second call on."""
    far = ethanol[:4].replace_positions(ethanol[:4].pos + 80_000.0)
    collator = Collator(far, 5.0)
    expected = Collator(ethanol[:4], 5.0, torch.float64)(np.array([2, 3])).vectors()
    for _ in range(2):
        assert float((collator(np.array([2, 3])).vectors() - expected).abs().max()) < 2e-6
