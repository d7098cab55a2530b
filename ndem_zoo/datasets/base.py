"""`MolecularDataset`: structures and labels as flat columns, and every shape in which others want to see them.

Loaders make it, in eV and Å with float64 labels; the training loop reads its columns. Items are DGLGraphs or
`ase.Atoms`; DeepChem's ``X, y, w, ids``, scikit-learn's indexing and plain slices work on the same object. Units are
converted in the loaders, files are handled in `files.py`, diagnostics in `summary.py` and `checks.py`.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ndem_zoo.errors import ConfigError, DataError, DataIndexError, DataTypeError, DataWarning
from ndem_zoo.featurizers.base import Featurizer, Structure, as_numbers, read_atoms
from ndem_zoo.graph import PER_ATOM, check_node_data, from_dgl, import_dgl, is_dgl_graph, make_batch

if TYPE_CHECKING:
    import torch
    from ase import Atoms
    from dgl import DGLGraph

    from ndem_zoo.datasets.files import DatasetCard
    from ndem_zoo.datasets.summary import Summary
    from ndem_zoo.graph import Batch

#: Targets with one row per structure. A name that is neither here nor in `PER_ATOM` is told by its number of rows.
PER_STRUCTURE = frozenset("energy dipole stress charge spin A B C mu alpha homo lumo gap r2 zpve U0 U H G Cv".split())

#: Ids that are joined to one string at a time, for a hash.
_HASHED_AT_ONCE = 100_000

_ALLOWED = (
    "a MolecularDataset, a DeepChem dataset whose X holds DGLGraphs, a DGLGraph (single or batched), a list of DGLGraphs, "
    "an ase.Atoms, or a list of ase.Atoms"
)


class MolecularDataset:
    """Structures with labels, stored column by column.

    Parameters
    ----------
    z : (A,) integer
        Atomic numbers of all structures, one after the other.
    pos : (A, 3)
        Positions in Å; kept as they are when they are float64 already, so memory-mapped arrays stay on disk.
    ptr : (S + 1,) int64
        Structure i owns the rows ``ptr[i]:ptr[i + 1]``.
    targets : mapping
        Labels in eV and Å, float64, with one row per structure (``energy``, ...) or per atom (``forces``).
    cell, pbc : (S, 3, 3) and (S, 3), optional
        Cell vectors as rows in Å, and which of them are periodic.
    fixed : (A,) bool, optional
        Atoms that must not move.
    ids : (S,), optional
        Names of the structures; default their numbers.
    extras : mapping, optional
        Further columns, per structure or per atom, in their own dtype.
    card
        Where the data come from.
    name
        For reports.
    featurizer
        Makes the graphs that ``dataset[i]`` returns; default ``RadiusGraph(cutoff=5.0)``.
    per_atom : mapping of str to bool, optional
        Whether a target or extra column has one row per atom, where neither its name nor its length tells.
    checked
        True: `checks.check_structures` has passed these very columns, and all targets are finite; nothing looks at all
        structures again before a training.

    Raises
    ------
    DataError
        If columns do not fit together, or it is not clear whether a column is per atom or per structure.

    Notes
    -----
    The arrays are read-only: every method returns a new dataset, which shares what it can.
    """

    def __init__(
        self,
        z: np.ndarray,
        pos: np.ndarray,
        ptr: np.ndarray,
        *,
        targets: Mapping[str, np.ndarray] | None = None,
        cell: np.ndarray | None = None,
        pbc: np.ndarray | None = None,
        fixed: np.ndarray | None = None,
        ids: Sequence | np.ndarray | None = None,
        extras: Mapping[str, np.ndarray] | None = None,
        card: DatasetCard | None = None,
        name: str = "",
        featurizer: Featurizer | None = None,
        per_atom: Mapping[str, bool] | None = None,
        checked: bool = False,
    ) -> None:
        z, ptr = as_numbers("z", z), np.asarray(as_numbers("ptr", ptr), dtype=np.int64)
        _check_rows(z, ptr)
        n_atoms, n = len(z), len(ptr) - 1
        self.ptr = _frozen(ptr)
        self.z = _frozen(z)
        self.pos = _column("pos", pos, (n_atoms, 3), np.float64)
        self.cell, self.pbc = _cells(cell, pbc, n)
        self.fixed = None if fixed is None else _column("fixed", fixed, (n_atoms,), bool)
        self.ids = _column("ids", np.arange(n) if ids is None else ids, (n,), str)
        columns = {**(targets or {}), **(extras or {})}
        known = per_atom or {}
        self.per_atom = frozenset(
            key for key, value in columns.items() if _is_per_atom(key, value, n, n_atoms, known.get(key))
        )
        self.targets = {key: self._rows(key, value, np.float64) for key, value in (targets or {}).items()}
        self.extras = {key: self._rows(key, value, None) for key, value in (extras or {}).items()}
        self.card, self.name, self.checked = card, name, checked
        self._featurizer = featurizer
        self._graphs: np.ndarray | None = None

    def _rows(self, name: str, values: Any, dtype: Any) -> np.ndarray:
        """A target or extra column in its final shape; a column (S, 1) of a known property becomes (S,)."""
        values = np.asanyarray(values)
        rows = len(self.z) if name in self.per_atom else len(self)
        is_one_number = name in PER_STRUCTURE - {"dipole", "stress"}
        if is_one_number and values.shape == (rows, 1):
            values = values.reshape(rows)
        shape = {"energy": (rows,), "forces": (rows, 3)}.get(name, (rows, *values.shape[1:]))
        return _column(name, values, shape, dtype)

    # ------------------------------------------------------------------------------------------------ from other forms

    @classmethod
    def from_atoms(
        cls,
        structures: Sequence[Atoms],
        *,
        energy_key: str | None = None,
        forces_key: str | None = None,
        incomplete: str = "error",
        **options: Any,
    ) -> MolecularDataset:
        """Make a dataset of `ase.Atoms`, with the labels that they carry.

        Parameters
        ----------
        structures
            Structures with energies in eV and forces in eV/Å in an ASE calculator (as ASE's readers leave them), or in
            `info` and `arrays` under the names in `featurizers.base.LABEL_KEYS`.
        energy_key, forces_key
            Read only this entry.
        incomplete
            What to do when some structures have a label and others do not: ``"error"``; ``"drop_structures"``, leave
            out those that lack it; ``"drop_target"``, leave out the label.
        **options
            `card`, `name`, `ids`, `featurizer` of the constructor.

        Raises
        ------
        DataError
            If there are no structures, or one of them cannot be read; names its index.
        """
        if incomplete not in ("error", "drop_structures", "drop_target"):
            raise ConfigError(f"incomplete={incomplete!r}; allowed are 'error', 'drop_structures', 'drop_target'")
        records = []
        for index, atoms in enumerate(structures):
            try:
                records.append(read_atoms(atoms, energy_key, forces_key))
            except DataError as error:
                raise DataError(f"structure {index}: {error}") from error
        keep, targets = _complete(records, incomplete)
        if options.get("ids") is not None:
            options["ids"] = np.asarray(options["ids"])[keep]
        else:
            options["ids"] = keep
        return cls(**_columns_of([records[i] for i in keep]), targets=targets, **options)

    @classmethod
    def from_graphs(cls, graphs: DGLGraph | Sequence[DGLGraph], **options: Any) -> MolecularDataset:
        """Make a dataset of DGLGraphs with the node data of `graph.to_dgl`: one, several, or a batched one.

        The edges are not kept: models make their own from the positions.

        Raises
        ------
        DataError
            If a graph lacks positions, or some graphs have labels and others do not; names the index.
        """
        dgl = import_dgl()
        if isinstance(graphs, dgl.DGLGraph):
            return cls._from_batch(graphs, **options)
        graphs = list(graphs)
        if not graphs:
            raise DataError("there are no graphs; needed is one or more")
        _check_equal_fields(graphs)
        for index, graph in enumerate(graphs):
            try:
                check_node_data(graph)
            except DataError as error:
                raise DataError(f"structure {index}: {error}") from error
        fields = [(dict(graph.node_attr_schemes()), dict(graph.edge_attr_schemes())) for graph in graphs]
        if all(own == fields[0] for own in fields):
            return cls._from_batch(dgl.batch(graphs), **options)
        whole = cls.concatenate([cls._from_batch(graph) for graph in graphs])
        return cls(**whole.columns(), **{"ids": None, **options})

    @classmethod
    def _from_batch(cls, graph: DGLGraph, **options: Any) -> MolecularDataset:
        import torch

        batch = from_dgl(graph, cutoff=1.0, dtype=torch.float64)
        cell = batch.cell.numpy()
        pbc = (cell != 0).any(axis=-1)
        ptr = np.concatenate([[0], np.cumsum(batch.n_atoms.numpy())])
        periodic = {"cell": cell, "pbc": pbc} if pbc.any() else {}
        targets = {name: value.numpy() for name, value in batch.targets.items()}
        fixed = batch.fixed.numpy() if bool(batch.fixed.any()) else None
        return cls(batch.z.numpy(), batch.pos.numpy(), ptr, targets=targets, fixed=fixed, **periodic, **options)

    @classmethod
    def concatenate(cls, datasets: Sequence[MolecularDataset]) -> MolecularDataset:
        """Put datasets one after the other; they must have the same targets and extras.

        Raises
        ------
        DataError
            If there is none, or their columns differ.
        """
        datasets = list(datasets)
        if not datasets:
            raise DataError("there are no datasets to concatenate; needed is one or more")
        first = datasets[0]
        for number, other in enumerate(datasets):
            for kind in ("targets", "extras"):
                ours, theirs = sorted(getattr(first, kind)), sorted(getattr(other, kind))
                if ours != theirs:
                    raise DataError(
                        f"dataset {number} has the {kind} {theirs}, dataset 0 has {ours}; they must be equal"
                    )
        offsets = np.cumsum([0] + [len(d.z) for d in datasets])
        joined = {
            "z": np.concatenate([d.z for d in datasets]),
            "pos": np.concatenate([d.pos for d in datasets]),
            "ptr": np.concatenate([[0]] + [d.ptr[1:] + offset for d, offset in zip(datasets, offsets, strict=False)]),
            "ids": np.concatenate([d.ids for d in datasets]),
            "targets": {k: np.concatenate([d.targets[k] for d in datasets]) for k in first.targets},
            "extras": {k: np.concatenate([d.extras[k] for d in datasets]) for k in first.extras},
        }
        if any(d.cell is not None for d in datasets):
            joined["cell"] = np.concatenate([np.zeros((len(d), 3, 3)) if d.cell is None else d.cell for d in datasets])
            joined["pbc"] = np.concatenate([np.zeros((len(d), 3), bool) if d.pbc is None else d.pbc for d in datasets])
        if any(d.fixed is not None for d in datasets):
            joined["fixed"] = np.concatenate(
                [np.zeros(len(d.z), bool) if d.fixed is None else d.fixed for d in datasets]
            )
        joined["per_atom"] = {name: name in first.per_atom for name in (*first.targets, *first.extras)}
        joined["checked"] = all(d.checked for d in datasets)
        return cls(**joined, card=first.card, name=first.name, featurizer=first._featurizer)

    # ---------------------------------------------------------------------------------------------------- size and shape

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @property
    def shape(self) -> tuple[int]:
        """``(S,)``, the number of structures: scikit-learn reads it."""
        return (len(self),)

    @property
    def counts(self) -> np.ndarray:
        """Number of atoms of each structure: (S,) int64."""
        return np.diff(self.ptr)

    @property
    def tasks(self) -> list[str]:
        """Names of the targets, energy first."""
        return sorted(self.targets, key=lambda name: (name != "energy", name != "forces"))

    @property
    def is_periodic(self) -> bool:
        """Whether any structure has periodic boundaries."""
        return self.pbc is not None and bool(self.pbc.any())

    @property
    def split_hash(self) -> str:
        """SHA-256 over the ids in order: equal for the same structures in the same order, on every machine."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _HASHED_AT_ONCE):
            rows = self._rows_of("ids", slice(start, start + _HASHED_AT_ONCE))
            digest.update(("\n" if start else "").encode() + "\n".join(rows.tolist()).encode())
        return digest.hexdigest()

    def _rows_of(self, name: str, rows: Any) -> np.ndarray:
        """Some rows of the column of this name."""
        return (self.targets[name] if name in self.targets else getattr(self, name))[rows]

    def spaced_rows(self, most: int) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
        """Evenly spaced rows of every column but `ids` and `extras`, about `most` of each, to tell datasets apart.

        Yields
        ------
        name, shape, rows
            Name and shape of the whole column, and the rows.
        """
        for name in ("ptr", "z", "pos", "cell", "pbc", "fixed", *self.targets):
            shape = self._shape_of(name)
            if shape is not None:
                yield name, shape, self._rows_of(name, slice(None, None, max(1, shape[0] // most)))

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a column; None if the dataset has none."""
        column = self.targets[name] if name in self.targets else getattr(self, name)
        return None if column is None else column.shape

    def origin(self) -> tuple[MolecularDataset, np.ndarray | None]:
        """The dataset whose columns hold these structures, and their numbers (S,) in it; None: all of them, in order.

        A selection from a store on disk (`store.py`) has no columns of its own until somebody asks for them; whoever
        gathers batches takes them from here.
        """
        return self, None

    def columns(self) -> dict[str, Any]:
        """The columns as keyword arguments of the constructor."""
        names = ("z", "pos", "ptr", "cell", "pbc", "fixed", "targets", "extras")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        title = f"{self.name}: " if self.name else ""
        targets = ", ".join(self.tasks) or "none"
        return f"<MolecularDataset {title}{len(self):,} structures, {len(self.z):,} atoms, targets: {targets}>"

    # --------------------------------------------------------------------------------------------------------- selection

    def select(self, indices: slice | Sequence[int] | np.ndarray) -> MolecularDataset:
        """The structures with these numbers, in this order; neighboring ones are not copied.

        Parameters
        ----------
        indices
            A slice, integers (negative ones count from the end), or a mask (S,) of booleans.

        Raises
        ------
        DataIndexError
            If a number is out of range, or a mask has another length; an `IndexError` as well.
        """
        index = _integers(indices, len(self))
        if len(index) and (np.diff(index) == 1).all():
            start, stop = int(index[0]), int(index[-1]) + 1
            structures: Any = slice(start, stop)
            atoms: Any = slice(int(self.ptr[start]), int(self.ptr[stop]))
            ptr = self.ptr[start : stop + 1] - self.ptr[start]
        else:
            structures, atoms, ptr = index, *_atom_rows(self.ptr, index)
        return self._taken(structures, atoms, ptr)

    def _taken(self, structures: Any, atoms: Any, ptr: np.ndarray) -> MolecularDataset:
        """A dataset of these rows; columns are known to fit, so nothing is checked again."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, ptr=_frozen(ptr), _graphs=None)
        for name in ("z", "pos", "fixed"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else _frozen(value[atoms]))
        for name in ("cell", "pbc", "ids"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else _frozen(value[structures]))
        for kind in ("targets", "extras"):
            rows = {key: atoms if key in self.per_atom else structures for key in getattr(self, kind)}
            setattr(new, kind, {key: _frozen(getattr(self, kind)[key][row]) for key, row in rows.items()})
        return new

    def split(
        self, n_train: int | float, n_valid: int | float, seed: int = 1, n_test: int | float | None = None
    ) -> tuple[MolecularDataset, MolecularDataset, MolecularDataset]:
        """Split at random into training, validation and test data, as TorchMD-NET does.

        Parameters
        ----------
        n_train, n_valid
            Numbers of structures, or fractions (floats between 0 and 1).
        seed
            Of ``numpy.random.default_rng(seed).permutation``: its first entries train, the next validate.
        n_test
            Number or fraction for testing; default: all the rest.

        Raises
        ------
        DataError
            If there are too few structures.
        """
        return tuple(self.select(part) for part in split_indices(len(self), n_train, n_valid, seed, n_test))

    def with_featurizer(self, featurizer: Featurizer) -> MolecularDataset:
        """The same data, with items made by another featurizer."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, _featurizer=featurizer, _graphs=None)
        return new

    def with_targets(self, names: Sequence[str]) -> MolecularDataset:
        """The same data with only these of its targets, in this order.

        Raises
        ------
        DataError
            If it has no such target; lists those that it has.
        """
        missing = [name for name in names if name not in self.targets]
        if missing:
            raise DataError(f"there is no target {missing[0]!r}; there are {', '.join(self.tasks) or 'none'}")
        whole, chosen = self.origin()
        new = object.__new__(type(whole))
        new.__dict__.update(whole.__dict__, targets={name: whole.targets[name] for name in names}, _graphs=None)
        new = new if chosen is None else new.select(chosen)
        new.name, new.card, new._featurizer = self.name, self.card, self._featurizer
        return new

    def replace_positions(self, pos: Float[np.ndarray, "A 3"]) -> MolecularDataset:
        """The same atoms elsewhere, in Å, without labels: these belong to the old places."""
        return MolecularDataset(
            **{**self.columns(), "pos": pos, "targets": {}},
            ids=self.ids,
            card=self.card,
            name=self.name,
            featurizer=self._featurizer,
            per_atom={name: name in self.per_atom for name in self.extras},
        )

    def with_extras(self, columns: Mapping[str, np.ndarray], per_atom: bool = False) -> MolecularDataset:
        """The same with further extras, all of them with one row per structure (S, ...), or all per atom (A, ...)."""
        extras = {**self.extras, **columns}
        names = (*self.targets, *extras)
        return MolecularDataset(
            **{**self.columns(), "extras": extras},
            ids=self.ids,
            card=self.card,
            name=self.name,
            featurizer=self.featurizer,
            per_atom={name: per_atom if name in columns else name in self.per_atom for name in names},
            checked=self.checked,
        )

    def replace_targets(self, targets: Mapping[str, np.ndarray]) -> MolecularDataset:
        """The same structures with other labels in the place of all targets.

        Parameters
        ----------
        targets
            Columns with one row per structure, or per atom where the present target or the name says so.

        Raises
        ------
        DataError
            If a column does not fit.
        """
        names = (*targets, *self.extras)
        return MolecularDataset(
            **{**self.columns(), "targets": targets},
            ids=self.ids,
            card=self.card,
            name=self.name,
            featurizer=self._featurizer,
            per_atom={name: name in self.per_atom for name in names if name in self.targets or name in self.extras},
        )

    # ------------------------------------------------------------------------------------------------------------- items

    @property
    def featurizer(self) -> Featurizer:
        """Makes the graphs of items."""
        if self._featurizer is None:
            from ndem_zoo.featurizers.radius import RadiusGraph

            self._featurizer = RadiusGraph(cutoff=5.0)
        return self._featurizer

    def __getitem__(self, index: Any) -> DGLGraph | MolecularDataset:
        """A DGLGraph for an integer; a dataset for a slice, integers or a mask."""
        if isinstance(index, tuple) and len(index) == 2 and index[1] is Ellipsis:
            index = index[0]  # scikit-learn writes array[rows, ...]
        if isinstance(index, (int, np.integer)) and not isinstance(index, (bool, np.bool_)):
            return self.graph(int(index))
        return self.select(index)

    def __iter__(self) -> Iterator[DGLGraph]:
        return (self.graph(i) for i in range(len(self)))

    def structure(self, index: int) -> Structure:
        """Structure `index` as arrays."""
        if not -len(self) <= index < len(self):
            raise DataIndexError(f"index {index} is out of range for {len(self)} structures")
        i = range(len(self))[index]
        rows = slice(self.ptr[i], self.ptr[i + 1])
        energy, forces = self.targets.get("energy"), self.targets.get("forces")
        return Structure(
            z=np.asarray(self.z[rows], dtype=np.int64),
            pos=self.pos[rows],
            cell=None if self.cell is None else self.cell[i],
            pbc=None if self.pbc is None else self.pbc[i],
            energy=None if energy is None else float(energy[i]),
            forces=None if forces is None else forces[rows],
            fixed=None if self.fixed is None else self.fixed[rows],
        )

    def graph(self, index: int) -> DGLGraph:
        """Structure `index` as a DGLGraph, made by the featurizer."""
        structure = self.structure(index)
        try:
            return self.featurizer(structure)
        except DataError as error:
            raise DataError(f"structure {index}: {error}") from error

    def atoms(self, index: int) -> Atoms:
        """Structure `index` as `ase.Atoms`, with its labels in a `SinglePointCalculator`."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.constraints import FixAtoms

        s = self.structure(index)
        atoms = Atoms(numbers=s.z, positions=s.pos, cell=s.cell, pbc=s.pbc, info={"id": str(self.ids[index])})
        if s.fixed is not None and s.fixed.any():
            atoms.set_constraint(FixAtoms(mask=s.fixed))
        labels = {"energy": s.energy, "forces": None if s.forces is None else np.array(s.forces)}
        labels = {name: value for name, value in labels.items() if value is not None}
        if labels:
            atoms.calc = SinglePointCalculator(atoms, **labels)
        return atoms

    def to_batch(self, cutoff: float, dtype: torch.dtype | None = None) -> Batch:
        """All structures as one `Batch` on the CPU, with edges up to `cutoff` Å; geometry in `dtype` (float32).

        Extras that are no numbers (names, SMILES) stay behind.
        """
        import torch

        return make_batch(
            self.z,
            self.pos,
            self.counts,
            cutoff,
            cell=self.cell,
            pbc=self.pbc,
            fixed=self.fixed,
            targets=self.targets,
            extras={name: column for name, column in self.extras.items() if column.dtype.kind in "biuf"},
            dtype=torch.float32 if dtype is None else dtype,
        )

    # ---------------------------------------------------------------------------------------------------- DeepChem's form

    @property
    def X(self) -> np.ndarray:
        """Graphs of all structures: (S,) object array of DGLGraph, made when first asked for."""
        if self._graphs is None:
            graphs = np.empty(len(self), dtype=object)
            for i in range(len(self)):
                graphs[i] = self.graph(i)
            self._graphs = _frozen(graphs)
        return self._graphs

    @property
    def y(self) -> np.ndarray:
        """Targets that are one number per structure: (S, T) float64, energy first; zeros (S, 1) without any.

        Forces are no column of `y`: DeepChem has no place for ragged labels. They ride in the graphs.
        """
        names = self._scalar_targets()
        return np.stack([self.targets[name] for name in names], axis=1) if names else np.zeros((len(self), 1))

    @property
    def w(self) -> np.ndarray:
        """Weights (S, tasks) as DeepChem has them: ones shaped like `y`, or zeros where there are no labels."""
        names = self._scalar_targets()
        return np.ones((len(self), len(names))) if names else np.zeros((len(self), 1))

    def _scalar_targets(self) -> list[str]:
        """Targets that are one number per structure."""
        return [name for name in self.tasks if name not in self.per_atom and self.targets[name].ndim == 1]

    def iterbatches(
        self,
        batch_size: int | None = None,
        epochs: int = 1,
        deterministic: bool = False,
        pad_batches: bool = False,
        *,
        seed: int | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Batches ``(X, y, w, ids)`` as DeepChem's datasets give them.

        Parameters
        ----------
        batch_size
            Structures per batch; None: all in one.
        epochs
            Passes over the data.
        deterministic
            True keeps the order; False shuffles.
        pad_batches
            Fill the last batch by repeating structures, with weight 0.
        seed
            Of the shuffling; None: another order each time.
        """
        size = len(self) if batch_size is None else batch_size
        if size < 1:
            raise ConfigError(f"batch_size={batch_size!r} with {len(self)} structures; it must be at least 1")
        rng = np.random.default_rng(seed)
        y, w = self.y, self.w
        for _ in range(epochs):
            order = np.arange(len(self)) if deterministic else rng.permutation(len(self))
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                weight = w[rows]
                if pad_batches and len(rows) < size:
                    weight = np.concatenate([weight, np.zeros((size - len(rows), w.shape[1]))])
                    rows = np.resize(rows, size)
                graphs = np.empty(len(rows), dtype=object)
                for k, row in enumerate(rows):
                    graphs[k] = self.graph(int(row)) if self._graphs is None else self._graphs[row]
                yield graphs, y[rows], weight, self.ids[rows]

    def to_deepchem(self) -> Any:
        """A `deepchem.data.NumpyDataset` with graphs as `X`, energies (S, 1) as `y`; forces are in the graphs."""
        from ndem_zoo.optional import require

        import_dgl()  # Pitfall: DeepChem imports DGL itself, without our guard.
        data = require("deepchem.data", extra="deepchem")
        return data.NumpyDataset(X=np.array(self.X), y=self.y, w=self.w, ids=np.array(self.ids, dtype=object))

    def save(self, folder: str | os.PathLike) -> None:
        """Write a store: a folder of flat ``.npy`` columns that `open_store` maps into memory, in no time.

        Parameters
        ----------
        folder
            A new or empty folder.

        Raises
        ------
        DataError
            If a structure or a label cannot be used; names it.
        FileExistsError
            If there is something in the folder.
        """
        from ndem_zoo.datasets.store import save_store

        save_store(self, folder)

    def summary(self) -> Summary:
        """Diagnostics of the data: print it for a table of units, ranges, duplicates, net forces, temperature."""
        from ndem_zoo.datasets.summary import summarize

        return summarize(self)


# ------------------------------------------------------------------------------------------------------------ conversion


def as_dataset(data: Any) -> MolecularDataset:
    """Turn whatever holds structures into a `MolecularDataset`.

    Parameters
    ----------
    data
        A MolecularDataset (returned as it is); a DeepChem dataset, or anything with ``X``, ``y``, ``w`` and ``ids``,
        whose ``X`` holds DGLGraphs; a DGLGraph, single or batched; an `ase.Atoms`; a list of either.

    Raises
    ------
    DataTypeError
        If it is none of these; a `TypeError` as well.
    DataError
        If one of the structures is unusable; names its index.
    """
    from ase import Atoms

    if isinstance(data, MolecularDataset):
        return data
    if isinstance(data, Atoms):
        return MolecularDataset.from_atoms([data])
    if is_dgl_graph(data):
        return MolecularDataset.from_graphs(data)
    if all(hasattr(data, name) for name in ("X", "y", "w", "ids")):
        return _from_deepchem(data)
    if not isinstance(data, (list, tuple, np.ndarray)):
        hint = "; read files with load_extxyz" if isinstance(data, (str, bytes)) or hasattr(data, "__fspath__") else ""
        raise DataTypeError(f"got {type(data).__name__}; allowed are {_ALLOWED}{hint}")
    if len(data) == 0:
        raise DataError("there are no structures; needed is one or more")
    if all(isinstance(item, Atoms) for item in data):
        return MolecularDataset.from_atoms(data)
    _check_all_graphs(data)
    return MolecularDataset.from_graphs(list(data))


def _check_all_graphs(items: Any) -> None:
    """Raise unless all items are DGLGraphs; names the first that is not."""
    for index, item in enumerate(items):
        if isinstance(item, np.ndarray) and item.size == 0:
            raise DataError(
                f"structure {index} is an empty array: DeepChem's featurizers leave one where they failed. Remove it, or "
                "use ndem_zoo.featurizers.RadiusGraph, which says what is wrong"
            )
        if not is_dgl_graph(item):
            raise DataTypeError(f"item {index} is {type(item).__name__}; allowed are {_ALLOWED}")


def _from_deepchem(data: Any) -> MolecularDataset:
    """Graphs and labels of a DeepChem dataset; `y` counts, unless all weights are 0 (DeepChem's "no labels")."""
    graphs, y, w = data.X, np.asarray(data.y), np.asarray(data.w, dtype=np.float64)
    if len(graphs) == 0:
        raise DataError("the dataset is empty; needed is one or more structures")
    _check_all_graphs(graphs)
    dataset = MolecularDataset.from_graphs(list(graphs), ids=[str(i) for i in data.ids])
    if not w.any():
        return dataset
    if y.dtype == object or y.size != len(graphs):
        raise DataError(
            f"y has shape {y.shape} and dtype {y.dtype}; needed is one energy per structure, ({len(graphs)}, 1)"
        )
    columns = dataset.columns()
    columns["targets"] = {**dataset.targets, "energy": y.reshape(len(graphs)).astype(np.float64)}
    if not (w == 1).all():
        warnings.warn(
            "the weights w are not all 1; they are kept in extras['weight'], but training weighs all structures equally",
            DataWarning,
            stacklevel=3,
        )
        columns["extras"] = {**dataset.extras, "weight": w.reshape(len(graphs), -1)[:, 0]}
    return MolecularDataset(**columns, ids=dataset.ids)


# ---------------------------------------------------------------------------------------------------------------- splits


def split_indices(
    n: int, n_train: int | float, n_valid: int | float, seed: int = 1, n_test: int | float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers (n_train,), (n_valid,), (n_test,) of the structures of each part; see `MolecularDataset.split`.

    Raises
    ------
    DataError
        If the parts need more than `n` structures, or nothing is left to train on.
    ConfigError
        If a size is neither a count nor a fraction.
    """
    train, valid = _size("n_train", n_train, n), _size("n_valid", n_valid, n)
    test = n - train - valid if n_test is None else _size("n_test", n_test, n)
    if train < 1:
        raise DataError(f"n_train={n_train!r} leaves nothing to train on; there are {n} structures")
    if test < 0 or train + valid + test > n:
        parts = {"training": train, "validation": valid, "test": None if n_test is None else test}
        needed = " + ".join(f"{size:,} for {part}" for part, size in parts.items() if size is not None)
        raise DataError(f"there are only {n:,} structures; the split needs {needed}")
    order = np.random.default_rng(seed).permutation(n)
    return order[:train], order[train : train + valid], order[train + valid : train + valid + test]


def _size(name: str, value: int | float, n: int) -> int:
    """A size as a count; fractions are rounded as TorchMD-NET rounds them."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if is_number and float(value).is_integer() and value >= 0 and not (isinstance(value, float) and value == 1.0):
        return int(value)
    if is_number and 0 < value <= 1:
        return round(n * float(value))
    raise ConfigError(f"{name}={value!r}; it must be a count >= 0 or a fraction between 0 and 1")


# --------------------------------------------------------------------------------------------------------------- columns


def _frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view: the caller's own array stays as it was."""
    view = array.view()
    view.flags.writeable = False
    return view


def _column(name: str, values: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`values` as a read-only array of this shape; not copied when the dtype fits."""
    if dtype in (np.float64, bool):
        array = as_numbers(name, values, dtype)
    else:  # names, and extras of any kind
        array = np.asanyarray(values) if dtype is None else np.asanyarray(values, dtype=dtype)
    if array.shape != shape:
        raise DataError(f"{name} has shape {array.shape}; needed is {shape}")
    return _frozen(array)


def _check_rows(z: np.ndarray, ptr: np.ndarray) -> None:
    """Raise DataError unless `z` and `ptr` describe rows of structures."""
    if z.ndim != 1 or not np.issubdtype(z.dtype, np.integer):
        raise DataError(f"z has shape {z.shape} and dtype {z.dtype}; needed are integers of shape (A,)")
    if ptr.ndim != 1 or len(ptr) == 0 or ptr[0] != 0 or ptr[-1] != len(z):
        raise DataError(
            f"ptr of shape {ptr.shape} must be (S + 1,), begin with 0 and end with {len(z)}, the number of atoms"
        )
    if (np.diff(ptr) < 0).any():
        index = int(np.flatnonzero(np.diff(ptr) < 0)[0])
        raise DataError(f"structure {index}: ptr falls from {ptr[index]} to {ptr[index + 1]}; it must not fall")


def _cells(cell: Any, pbc: Any, n: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Cells and flags, both or none; a cell without flags is periodic in no direction."""
    if cell is None:
        if pbc is not None and np.any(pbc):
            raise DataError("pbc is given without cell; periodic structures need cell vectors")
        return None, None
    flags = np.zeros((n, 3), dtype=bool) if pbc is None else pbc
    return _column("cell", cell, (n, 3, 3), np.float64), _column("pbc", flags, (n, 3), bool)


def _is_per_atom(name: str, values: Any, n: int, n_atoms: int, known: bool | None = None) -> bool:
    """Whether a column has one row per atom: as is known, else by its name, else by its length."""
    shape = np.shape(values)
    rows = shape[0] if shape else None
    if known is None and (name in PER_ATOM or name in PER_STRUCTURE):
        known = name in PER_ATOM
    if known is not None:
        needed = n_atoms if known else n
        if rows != needed:
            kind = "atom" if known else "structure"
            raise DataError(f"{name} has shape {shape}; it needs one row per {kind}, {needed}")
        return known
    if rows not in (n, n_atoms):
        raise DataError(f"{name} has shape {shape}; it needs {n} rows (one per structure) or {n_atoms} (one per atom)")
    if n == n_atoms and n > 0:
        raise DataError(
            f"{name} is ambiguous: with {n} structures of one atom, its {rows} rows may be per atom or per structure"
        )
    return rows == n_atoms


def _integers(indices: Any, n: int) -> np.ndarray:
    """Row numbers from a slice, integers or a mask."""
    if isinstance(indices, slice):
        return np.arange(n)[indices]
    index = np.asarray(indices)
    if index.dtype == bool:
        if index.shape != (n,):
            raise DataIndexError(f"the mask has shape {index.shape}; needed is ({n},)")
        return np.flatnonzero(index)
    if index.size == 0:
        return np.zeros(0, dtype=np.int64)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise DataIndexError(
            f"got indices of shape {index.shape} and dtype {index.dtype}; allowed are integers or a mask, (n,)"
        )
    if index.min() < -n or index.max() >= n:
        raise DataIndexError(f"index {index[(index < -n) | (index >= n)][0]} is out of range for {n} structures")
    return np.where(index < 0, index + n, index).astype(np.int64)


def _atom_rows(ptr: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the atoms of the structures `index`, and their new ptr."""
    counts = ptr[index + 1] - ptr[index]
    new = np.concatenate([[0], np.cumsum(counts)])
    return np.repeat(ptr[index] - new[:-1], counts) + np.arange(new[-1]), new


def _columns_of(records: list[Structure]) -> dict[str, Any]:
    """Geometry columns of structures."""
    if not records:
        raise DataError("there are no structures; needed is one or more")
    columns: dict[str, Any] = {
        "z": np.concatenate([r.z for r in records]),
        "pos": np.concatenate([r.pos for r in records]),
        "ptr": np.concatenate([[0], np.cumsum([len(r.z) for r in records])]),
    }
    if any(r.cell is not None for r in records):
        columns["cell"] = np.stack([np.zeros((3, 3)) if r.cell is None else r.cell for r in records])
        columns["pbc"] = np.stack([np.zeros(3, bool) if r.pbc is None else r.pbc for r in records])
    if any(r.fixed is not None for r in records):
        columns["fixed"] = np.concatenate([np.zeros(len(r.z), bool) if r.fixed is None else r.fixed for r in records])
    return columns


def _complete(records: list[Structure], incomplete: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Numbers of the structures to keep, and their labels, where labels may be missing."""
    keep = np.ones(len(records), dtype=bool)
    names = []
    for name in ("energy", "forces"):
        has = np.array([getattr(record, name) is not None for record in records], dtype=bool)
        if not has.any() or (incomplete == "drop_target" and not has.all()):
            continue
        if not has.all() and incomplete == "error":
            raise DataError(
                f"structure {int(np.flatnonzero(~has)[0])} has no {name}, but {int(has.sum())} of {len(has)} structures have; "
                "choose incomplete='drop_structures' to leave out those without, or 'drop_target' to leave out the label"
            )
        keep &= has
        names.append(name)
    kept = np.flatnonzero(keep)
    if names and not len(kept):
        raise DataError(f"no structure has all of {', '.join(names)}; choose incomplete='drop_target'")
    columns = {name: [getattr(records[i], name) for i in kept] for name in names}
    join = {"energy": np.array, "forces": np.concatenate}
    return kept, {name: join[name](values) for name, values in columns.items()}


def _check_equal_fields(graphs: Sequence[DGLGraph]) -> None:
    """Raise DataError when a graph lacks atoms' numbers or positions, or a label that others have."""
    for name in ("Z", "R", "F", "energy"):
        has = [name in graph.ndata for graph in graphs]
        if (name in "ZR" or any(has)) and not all(has):
            raise DataError(
                f"structure {has.index(False)} has no ndata[{name!r}]; {sum(has)} of {len(has)} graphs have. All graphs "
                "need Z and R, and the same labels"
            )
