"""`ConformerGraph`: from SMILES or RDKit molecules to DGL graphs, by way of conformers that RDKit makes.

Conformers are drawn by ETKDGv3 with a fixed seed, cleaned up by MMFF94 or UFF, and connected as `RadiusGraph` does it.
What cannot be turned into a geometry is an error or, if asked for, left out and reported; bonded terms come from
`terms.py`. RDKit is imported when the first molecule is seen.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ndem_zoo.errors import ConfigError, DataError, DataWarning
from ndem_zoo.featurizers.base import Featurizer, Structure, as_structure
from ndem_zoo.featurizers.radius import RadiusGraph, check_distances
from ndem_zoo.featurizers.terms import BondedTerms, find_terms, pad_terms
from ndem_zoo.graph import all_pairs
from ndem_zoo.optional import require
from ndem_zoo.physics import KCAL_PER_MOL

if TYPE_CHECKING:
    from dgl import DGLGraph
    from rdkit.Chem import Mol

    from ndem_zoo.datasets.base import MolecularDataset

#: Force fields that geometries can be cleaned up with; UFF stands in where MMFF94 has no parameters.
FORCE_FIELDS = ("MMFF94", "MMFF94s", "UFF", None)

#: What a molecule may be only if `allow` says so: models know neither charges nor spins nor where fragments belong.
PECULIARITIES = ("charge", "radical", "fragments")

#: Largest seed, and largest number of anything. RDKit reckons with seeds modulo 2**31 - 1.
MAX_SEED = 2**31 - 3

#: Choice: Å between fragments before the force field pulls them together, along x.
FRAGMENT_GAP = 3.0

_WIDTHS = {"bonds": 2, "angles": 3, "torsions": 4, "rotors": 4}


@dataclass(frozen=True)
class Outcome:
    """What became of one molecule.

    Attributes
    ----------
    index : int
        Its number in the input.
    input : str
        Its SMILES.
    n_conformers : int
        How many geometries it gave; 0 is a failure.
    force_field : str
        What they were cleaned up with; "" for nothing.
    reason : str
        Why it failed, or what else than usual was done; "" if all went as asked for.
    """

    index: int
    input: str
    n_conformers: int
    force_field: str
    reason: str


@dataclass(frozen=True)
class ConformerReport:
    """What became of each molecule of a call; print it for those that are worth a look.

    Attributes
    ----------
    outcomes
        One for each molecule of the input, in its order.
    indices : (G,) int64
        The molecule that each graph belongs to.
    """

    outcomes: list[Outcome]
    indices: np.ndarray = field(repr=False)

    @property
    def failures(self) -> list[Outcome]:
        """Molecules without a graph."""
        return [outcome for outcome in self.outcomes if outcome.n_conformers == 0]

    @property
    def notes(self) -> list[Outcome]:
        """Molecules with a graph that was not made as asked for."""
        return [outcome for outcome in self.outcomes if outcome.n_conformers and outcome.reason]

    def __str__(self) -> str:
        lines = [f"{len(self.outcomes)} molecules, {len(self.failures)} failed, {len(self.notes)} with notes"]
        lines += [f"  failed {_line(outcome)}" for outcome in self.failures]
        return "\n".join([*lines, *(f"  note {_line(outcome)}" for outcome in self.notes)])


@dataclass(frozen=True, eq=False)
class Conformers:
    """Geometries of one molecule.

    Attributes
    ----------
    mol
        The molecule with all hydrogens, and one RDKit conformer for each geometry.
    z : (n,) int64
        Atomic numbers, the atoms of the input first and in their order, then the hydrogens that were added.
    pos : (K, n, 3)
        Positions in Å, the lowest energy first.
    energies : (K,)
        Energies of the force field in eV, NaN without one. No labels: each force field has a zero of its own.
    force_field
        The one that was used, or "".
    n_given
        How many of the atoms the input has.
    notes
        What was done otherwise than asked for.
    """

    mol: Mol
    z: np.ndarray
    pos: np.ndarray
    energies: np.ndarray
    force_field: str
    n_given: int
    notes: tuple[str, ...] = ()


class ConformerGraph(Featurizer):
    """Makes graphs of molecules that are given as SMILES or as RDKit molecules.

    Parameters
    ----------
    cutoff
        Radius of the edges in Å, as of `RadiusGraph`.
    n_conformers
        Conformers that are drawn of each molecule.
    keep
        ``"lowest"``: the one of lowest energy; ``"all"``: all of them, lowest energy first, so that there are more graphs
        than molecules (``report_.indices`` says which belongs where).
    seed
        Of each molecule, so that its conformers do not depend on what else is in the list.
    force_field
        ``"MMFF94"``, ``"MMFF94s"``, ``"UFF"``, or None for ETKDG's geometry. Where MMFF has no parameters, UFF is used and
        reported; where neither has, ETKDG's geometry is kept and reported.
    add_hydrogens
        False leaves hydrogens that the input does not have as atoms out of the graph. Geometries are always made with them.
    hydrogen_rotors
        See `terms.find_terms`.
    max_iterations
        Steps of the clean-up; a molecule that needs more is reported. Choice: 2,000; 500 are too few for C40.
    allow
        Which of ``"charge"``, ``"radical"`` and ``"fragments"`` a molecule may have: a total charge, unpaired electrons,
        more than one fragment. Models know nothing of the first two, and where fragments lie to each other is arbitrary.
    on_failure
        ``"raise"``: one error that lists all molecules that failed; ``"drop"``: they are left out, with a warning, and are in
        ``report_``.

    Attributes
    ----------
    report_ : ConformerReport
        Of the last call, `featurize` or `to_dataset`.

    Raises
    ------
    ConfigError
        If an option is out of range.

    Notes
    -----
    Stereo that the input states is kept, and checked in the finished geometry; where it states none, ETKDG takes one
    isomer, which is reported. Conformers that a molecule brings along are not used.

    DGL has no place for lists of different lengths per graph, so bonds, angles, torsions and rotors are not in the graphs:
    `terms` returns those of a molecule, and the extras of `to_dataset` those of all, padded with -1.

    Examples
    --------
    >>> graph = ConformerGraph(cutoff=5.0)("CCO")
    >>> graph.ndata["Z"].tolist()
    [6, 6, 8, 1, 1, 1, 1, 1, 1]
    """

    def __init__(
        self,
        cutoff: float = 5.0,
        n_conformers: int = 1,
        *,
        keep: Literal["lowest", "all"] = "lowest",
        seed: int = 0,
        force_field: str | None = "MMFF94",
        add_hydrogens: bool = True,
        hydrogen_rotors: bool = True,
        max_iterations: int = 2000,
        allow: Sequence[str] = (),
        on_failure: Literal["raise", "drop"] = "raise",
    ) -> None:
        _check_choice("keep", keep, ("lowest", "all"))
        _check_choice("force_field", force_field, FORCE_FIELDS)
        _check_choice("on_failure", on_failure, ("raise", "drop"))
        _check_count("n_conformers", n_conformers, 1, MAX_SEED)
        _check_count("seed", seed, 0, MAX_SEED)
        _check_count("max_iterations", max_iterations, 1, MAX_SEED)
        if isinstance(allow, str):
            raise ConfigError(f"allow={allow!r} is a str; give a tuple, such as allow=({allow!r},)")
        for name in allow:
            _check_choice("allow", name, PECULIARITIES)
        self._edges = RadiusGraph(cutoff)
        self.cutoff, self.n_conformers, self.keep, self.seed = cutoff, n_conformers, keep, seed
        self.force_field, self.add_hydrogens, self.hydrogen_rotors = force_field, add_hydrogens, hydrogen_rotors
        self.max_iterations, self.allow, self.on_failure = max_iterations, allow, on_failure

    # ------------------------------------------------------------------------------------------------------------ graphs

    def graph(self, structure: Structure) -> DGLGraph:
        """Graph of a structure that has a geometry already, as `RadiusGraph` makes it."""
        return self._edges.graph(structure)

    def __call__(self, molecule: Any) -> Any:
        """Graph of one molecule (with ``keep="all"``, an array of them); for several, the same as `featurize`.

        What has a geometry already, `ase.Atoms` or arrays, becomes a graph as with `RadiusGraph`: so datasets of conformers
        can keep their featurizer.
        """
        if not _is_molecule(molecule):
            return self.featurize(molecule) if _is_many(molecule) else self._edges(molecule)
        graphs = self.featurize([molecule])
        return graphs if self.keep == "all" else graphs[0]

    def featurize(self, molecules: Any, **_: Any) -> np.ndarray:
        """Graphs of many molecules.

        Parameters
        ----------
        molecules
            SMILES or RDKit molecules: a list, an array, a column of a table; a single one counts as a list of one.
        **_
            Ignored: DeepChem passes options of its logging.

        Returns
        -------
        graphs : (G,) object array of DGLGraph
            As many as there are molecules, unless ``keep="all"`` or ``on_failure="drop"``; see ``report_.indices``.

        Raises
        ------
        DataError
            Lists all molecules that failed, with their reasons; with ``on_failure="drop"`` only if all of them did.

        Warns
        -----
        DataWarning
            About molecules that were left out, or that did not get the geometry that was asked for.
        """
        structures = [s for conformers in self._make(molecules).values() for s in self._structures(conformers)]
        graphs = np.empty(len(structures), dtype=object)
        for i, structure in enumerate(structures):
            graphs[i] = self.graph(structure)
        return graphs

    def to_dataset(
        self,
        molecules: Any,
        targets: Mapping[str, Any] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        name: str = "",
    ) -> MolecularDataset:
        """A dataset of the conformers of many molecules, with their bonded terms.

        Parameters
        ----------
        molecules
            As for `featurize`.
        targets
            Labels in eV and Å with one row for each molecule of the input.
        ids
            Names of the molecules; default their numbers. With ``keep="all"``, ``-0``, ``-1``, ... are appended.
        name
            For reports.

        Returns
        -------
        dataset
            Extras: ``smiles`` (S,), ``molecule`` (S,), its number in the input, ``conformer_energy`` (S,), the force field's
            in eV; ``bonds`` (S, B, 2), ``angles`` (S, A, 3), ``torsions`` (S, T, 4) and ``rotors`` (S, R, 4) int32, indices
            of atoms within the structure, filled up with -1. Padding is what lets them be selected, split, and batched like
            all other columns. The dataset's featurizer is this one.

        Raises
        ------
        DataError
            As `featurize`; or if targets or ids have another number of rows than there are molecules.
        """
        from ndem_zoo.datasets.base import MolecularDataset

        items = _as_list(molecules)
        labels = {key: np.asarray(value) for key, value in (targets or {}).items()}
        names = np.array([str(i) for i in (range(len(items)) if ids is None else ids)])
        for key, values in {"ids": names, **labels}.items():
            if len(values) != len(items):
                raise DataError(f"{key} has {len(values)} rows; there are {len(items)} molecules")
        made = list(self._make(items).values())
        rows = self.report_.indices
        structures = [s for conformers in made for s in self._structures(conformers)]
        if self.keep == "all":
            ordinals = [k for conformers in made for k in range(self._n_kept(conformers))]
            graph_ids = [f"{names[row]}-{k}" for row, k in zip(rows, ordinals, strict=True)]
        return MolecularDataset(
            z=np.concatenate([s.z for s in structures]),
            pos=np.concatenate([s.pos for s in structures]),
            ptr=np.concatenate([[0], np.cumsum([len(s.z) for s in structures])]),
            targets={key: values[rows] for key, values in labels.items()},
            ids=graph_ids if self.keep == "all" else names[rows],
            extras=self._extras(made),
            name=name,
            featurizer=self,
        )

    def _extras(self, made: list[Conformers]) -> dict[str, np.ndarray]:
        """Further columns of a dataset, one row for each graph."""
        repeats = [self._n_kept(conformers) for conformers in made]
        terms = [self._terms(conformers.mol, conformers.n_given).columns() for conformers in made]
        padded = {key: pad_terms([columns[key] for columns in terms], width) for key, width in _WIDTHS.items()}
        energies = [conformers.energies[:n] for conformers, n in zip(made, repeats, strict=True)]
        return {
            "smiles": np.array([self.report_.outcomes[i].input for i in self.report_.indices]),
            "molecule": self.report_.indices,
            "conformer_energy": np.concatenate(energies),
            **{key: np.repeat(rows, repeats, axis=0) for key, rows in padded.items()},
        }

    def _make(self, molecules: Any) -> dict[int, Conformers]:
        """Conformers of the molecules that could be made, by number; sets the report."""
        items, made, outcomes = _as_list(molecules), {}, []
        for index, item in enumerate(items):
            try:
                conformers = self.conformers(item)
                for structure in self._structures(conformers):
                    check_overlaps(structure)
            except DataError as error:
                outcomes.append(Outcome(index, _text(item), 0, "", str(error)))
                continue
            made[index] = conformers
            notes = "; ".join(conformers.notes)
            outcomes.append(Outcome(index, _text(item), self._n_kept(conformers), conformers.force_field, notes))
        indices = np.repeat(np.arange(len(items)), [outcome.n_conformers for outcome in outcomes])
        self.report_ = ConformerReport(outcomes, indices)
        self._judge()
        return made

    def _judge(self) -> None:
        """Raise or warn about what the report holds."""
        failures, notes = self.report_.failures, self.report_.notes
        if failures and (self.on_failure == "raise" or len(failures) == len(self.report_.outcomes)):
            lines = "\n".join(f"  {_line(outcome)}" for outcome in failures)
            hint = "; on_failure='drop' leaves them out" if self.on_failure == "raise" else ""
            raise DataError(f"{len(failures)} of {len(self.report_.outcomes)} molecules failed{hint}:\n{lines}")
        for what, found in (("failed and were left out", failures), ("were not made as usual", notes)):
            if found:
                message = f"{len(found)} molecules {what}, the first is {_line(found[0])}; see report_"
                warnings.warn(message, DataWarning, stacklevel=4)

    # -------------------------------------------------------------------------------------------------------- geometries

    def conformers(self, molecule: str | Mol) -> Conformers:
        """All conformers of one molecule, lowest energy first, with all hydrogens.

        Raises
        ------
        DataError
            If `molecule` is no SMILES or RDKit molecule, is one that models cannot tell (see `allow`), or no geometry of it
            can be made.
        """
        given = self._prepare(molecule)
        mol = require("rdkit.Chem", extra="chem").AddHs(given)
        notes = _open_stereo(given) + _embed(mol, self.n_conformers, self.seed)
        force_field, energies, more = _clean_up(mol, self.force_field, self.max_iterations)
        order, dropped = _with_stated_stereo(mol, np.argsort(energies, kind="stable"))
        mol = _reordered(mol, order)
        pos = np.stack([conformer.GetPositions() for conformer in mol.GetConformers()])
        if not np.isfinite(pos).all():
            raise DataError(f"the geometry from {force_field or 'ETKDG'} is not finite")
        z = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64)
        notes += more + dropped
        return Conformers(mol, z, pos, energies[order], force_field, given.GetNumAtoms(), tuple(notes))

    def terms(self, molecule: str | Mol) -> BondedTerms:
        """Bonds, angles, torsions and rotors of one molecule, for the atoms of its graph; needs no geometry."""
        given = self._prepare(molecule)
        mol = require("rdkit.Chem", extra="chem").AddHs(given)
        return self._terms(mol, given.GetNumAtoms())

    def _prepare(self, molecule: Any) -> Mol:
        """The molecule as it is given, without added hydrogens, once it is known that it can be used."""
        mol = read_molecule(molecule)
        _check_molecule(mol, self.allow)
        return mol

    def _terms(self, mol: Mol, n_given: int) -> BondedTerms:
        """Terms among the atoms of the graph, of a molecule with all hydrogens."""
        found = find_terms(mol, hydrogen_rotors=self.hydrogen_rotors)
        return found if self.add_hydrogens else found.of_first(n_given)

    def _n_kept(self, conformers: Conformers) -> int:
        """How many of a molecule's conformers become graphs."""
        return len(conformers.pos) if self.keep == "all" else 1

    def _structures(self, conformers: Conformers) -> list[Structure]:
        """Those of a molecule's conformers that become graphs, with the atoms that they have there."""
        n = len(conformers.z) if self.add_hydrogens else conformers.n_given
        return [as_structure((conformers.z[:n], pos[:n])) for pos in conformers.pos[: self._n_kept(conformers)]]


# -------------------------------------------------------------------------------------------------------------- molecules


def read_molecule(value: Any) -> Mol:
    """A sanitized copy of an RDKit molecule, or the molecule of a SMILES with its atoms in the order of the text.

    Raises
    ------
    DataError
        If it is neither, or chemically impossible; says what RDKit found.
    """
    chem = require("rdkit.Chem", extra="chem")
    with require("rdkit.rdBase", extra="chem").BlockLogs():
        mol = _parse(value, chem) if isinstance(value, str) else _copy(value, chem)
        problems = chem.DetectChemistryProblems(mol)
        if problems:
            raise DataError("; ".join(problem.Message() for problem in problems))
        chem.SanitizeMol(mol)
        chem.AssignStereochemistry(mol, cleanIt=True, force=True)
        return mol


def _parse(smiles: str, chem: Any) -> Mol:
    if not smiles.strip():
        raise DataError("the SMILES is empty")
    options = chem.SmilesParserParams()
    options.sanitize = False
    options.removeHs = False  # Pitfall: by default [H] atoms vanish, and with them the numbers of the others change
    mol = chem.MolFromSmiles(smiles, options)
    if mol is None:
        raise DataError("it is no SMILES (an unknown symbol, or a ring or bracket that is not closed)")
    return mol


def _copy(value: Any, chem: Any) -> Mol:
    if value is None:
        raise DataError("got None, which RDKit's readers leave where they fail; a molecule is a SMILES or an RDKit Mol")
    if not isinstance(value, chem.Mol):
        raise DataError(f"got {type(value).__name__}; a molecule is a SMILES or an RDKit Mol")
    return chem.Mol(value)


def _check_molecule(mol: Mol, allow: Sequence[str]) -> None:
    """Raise DataError for what models cannot tell."""
    chem = require("rdkit.Chem", extra="chem")
    if mol.GetNumAtoms() == 0:
        raise DataError("it has no atoms; allowed is one or more")
    unknown = [atom.GetIdx() for atom in mol.GetAtoms() if atom.GetAtomicNum() == 0]
    if unknown:
        raise DataError(f"atom {unknown[0]} is a dummy ('*', R); allowed are elements")
    charge = chem.GetFormalCharge(mol)
    radicals = sum(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())
    fragments = len(chem.GetMolFrags(mol))
    for name, found, text in (
        ("charge", charge != 0, f"its total charge is {charge:+d}"),
        ("radical", radicals > 0, f"it has {radicals} unpaired electrons"),
        ("fragments", fragments > 1, f"it has {fragments} fragments"),
    ):
        if found and name not in allow:
            raise DataError(f"{text}; allow=({name!r},) takes it all the same")


# -------------------------------------------------------------------------------------------------------------- geometries


def _embed(mol: Mol, n: int, seed: int) -> list[str]:
    """Give a molecule `n` conformers; notes if that took more, or gave less, than usual."""
    geometry = require("rdkit.Chem.rdDistGeom", extra="chem")
    options = geometry.ETKDGv3()
    # Pitfall: RDKit multiplies the seed by the number of the conformer, so that with seed 0 they are all the same.
    options.randomSeed, options.trackFailures = seed + 1, True
    with require("rdkit.rdBase", extra="chem").BlockLogs():
        try:
            found, notes = len(geometry.EmbedMultipleConfs(mol, n, options)), []
            if not found:
                options.useRandomCoords = True
                found = len(geometry.EmbedMultipleConfs(mol, n, options))
                notes = ["embedded from random coordinates, since ETKDGv3 failed otherwise"]
        except (RuntimeError, ValueError) as error:
            raise DataError(f"ETKDGv3 cannot embed it: {' '.join(str(error).split())}") from error
    if not found:
        causes = dict(zip(geometry.EmbedFailureCauses.names, options.GetFailureCounts(), strict=False))
        counts = ", ".join(f"{name} {count} times" for name, count in causes.items() if count)
        raise DataError(f"ETKDGv3 found no geometry ({counts or 'no cause given'}); is the stereo possible?")
    _spread_fragments(mol)
    return notes + ([f"only {found} of {n} conformers could be made"] if found < n else [])


def _spread_fragments(mol: Mol) -> None:
    """Put fragments side by side; RDKit puts all of them at the origin."""
    fragments = [list(atoms) for atoms in require("rdkit.Chem", extra="chem").GetMolFrags(mol)]
    for conformer in mol.GetConformers() if len(fragments) > 1 else []:
        pos = conformer.GetPositions()
        for before, atoms in itertools.pairwise(fragments):
            pos[atoms, 0] += pos[before, 0].max() + FRAGMENT_GAP - pos[atoms, 0].min()
        for i, x in enumerate(pos.tolist()):
            conformer.SetAtomPosition(i, x)


def _clean_up(mol: Mol, force_field: str | None, max_iterations: int) -> tuple[str, np.ndarray, list[str]]:
    """Minimize all conformers in place: the force field that could, energies (K,) in eV, notes."""
    fields = require("rdkit.Chem.rdForceFieldHelpers", extra="chem")
    none = np.full(mol.GetNumConformers(), np.nan)
    if force_field is None:
        return "", none, []
    with require("rdkit.rdBase", extra="chem").BlockLogs():
        used = force_field
        if used != "UFF" and not fields.MMFFHasAllMoleculeParams(mol):
            used = "UFF"
        if used == "UFF" and not fields.UFFHasAllMoleculeParams(mol):
            return "", none, ["neither MMFF94 nor UFF has parameters for it; the geometry is ETKDG's"]
        if used == "UFF":
            results = fields.UFFOptimizeMoleculeConfs(mol, maxIters=max_iterations)
        else:
            results = fields.MMFFOptimizeMoleculeConfs(mol, maxIters=max_iterations, mmffVariant=used)
    notes = [] if used == force_field else [f"{force_field} has no parameters for it; {used} was used"]
    status = np.array([state for state, _ in results])
    if (status < 0).any():
        raise DataError(f"{used} cannot be set up for it")
    if status.any():
        notes.append(f"{used} did not converge in {max_iterations} steps")
    return used, np.array([energy for _, energy in results]) * KCAL_PER_MOL, notes


def _open_stereo(mol: Mol) -> list[str]:
    """A note if the molecule leaves stereo open."""
    chem = require("rdkit.Chem", extra="chem")
    states = [info.specified for info in chem.FindPotentialStereo(mol)]
    n = states.count(chem.StereoSpecified.Unspecified)
    return [f"{n} stereo centers or double bonds are not specified; one isomer was taken"] if n else []


def _with_stated_stereo(mol: Mol, order: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Those of the conformers `order` that have the stereo which the molecule states, and a note if others have not."""
    chem = require("rdkit.Chem", extra="chem")
    stated = _stereo(mol, chem)
    numbers = [conformer.GetId() for conformer in mol.GetConformers()]
    keep = []
    for k in order if stated else []:
        other = chem.Mol(mol)
        chem.AssignStereochemistryFrom3D(other, numbers[k], replaceExistingTags=True)
        found = _stereo(other, chem)
        keep.append(all(found.get(place) == label for place, label in stated.items()))
    if not stated or all(keep):
        return order, []
    if not any(keep):
        raise DataError(f"no geometry has the stereo that the input states ({stated})")
    return order[keep], [f"{keep.count(False)} conformers had lost the stereo that the input states"]


def _reordered(mol: Mol, order: np.ndarray) -> Mol:
    """A copy with these conformers, in this order."""
    chem = require("rdkit.Chem", extra="chem")
    conformers = list(mol.GetConformers())
    new = chem.Mol(mol)
    new.RemoveAllConformers()
    for k in order:
        new.AddConformer(chem.Conformer(conformers[k]), assignId=True)
    return new


def _stereo(mol: Mol, chem: Any) -> dict[str, str]:
    """Stated stereo by place: tetrahedral centers and double bonds."""
    chem.AssignStereochemistry(mol, cleanIt=False, force=True)
    atoms = {f"atom {a.GetIdx()}": a.GetProp("_CIPCode") for a in mol.GetAtoms() if a.HasProp("_CIPCode")}
    cis_trans = (chem.BondStereo.STEREOE, chem.BondStereo.STEREOZ)
    bonds = {f"bond {b.GetIdx()}": str(b.GetStereo()) for b in mol.GetBonds() if b.GetStereo() in cis_trans}
    return atoms | bonds


# ----------------------------------------------------------------------------------------------------------------- helpers


def _is_molecule(value: Any) -> bool:
    """Whether `value` is one molecule; without RDKit nothing but a SMILES is."""
    return isinstance(value, str) or value is None or type(value).__module__.startswith("rdkit.")


def _as_list(molecules: Any) -> list[Any]:
    """Molecules one by one."""
    items = [molecules] if _is_molecule(molecules) else list(molecules)
    if not items:
        raise DataError("there are no molecules; needed is one or more")
    return items


def _is_many(value: Any) -> bool:
    """Whether `value` holds molecules, and is no structure with a geometry."""
    if isinstance(value, (tuple, list, np.ndarray)):
        return len(value) == 0 or _is_molecule(value[0])
    return hasattr(value, "to_numpy")  # a column of a table


def check_overlaps(structure: Structure) -> None:
    """Raise DataError if two atoms of a free structure are closer than atoms can be."""
    src, dst = all_pairs([len(structure.z)])
    check_distances(src, dst, np.linalg.norm(structure.pos[src] - structure.pos[dst], axis=1))


def _text(value: Any) -> str:
    """A molecule for people to read."""
    if isinstance(value, str) or not type(value).__module__.startswith("rdkit."):
        return str(value)
    try:
        return require("rdkit.Chem", extra="chem").MolToSmiles(value)
    except RuntimeError:  # a molecule that is not sanitized
        return repr(value)


def _line(outcome: Outcome) -> str:
    return f"molecule {outcome.index} ({outcome.input!r}): {outcome.reason}"


def _check_choice(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}; allowed are {', '.join(map(repr, allowed))}")


def _check_count(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}; it must be an integer from {low} to {high}")
