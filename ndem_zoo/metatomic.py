"""A model with metatomic's interface, so that LAMMPS, i-PI, ASE and other engines can run it.

Imported by `export` only, since it needs metatomic (extra ``metatomic``). The network is traced, and a scripted module
around it speaks with the engine: pairs come from the engine's neighbor list, and forces and stress are the engine's
derivatives with respect to their vectors.
"""

# ruff: noqa: UP006, UP035, UP045 (TorchScript and metatomic know these forms only)
# Pitfall: no `from __future__ import annotations` here: metatomic compares the annotations of `forward` with types.
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import (
    AtomisticModel,
    ModelCapabilities,
    ModelMetadata,
    ModelOutput,
    NeighborListOptions,
    System,
)

from ndem_zoo.errors import ConfigError
from ndem_zoo.export import AtomicEnergies, Inputs, check_exported, examples, range_of

#: Name of the forces of a vector head; those of an energy are not named, engines take its derivative.
DIRECT_FORCES = "non_conservative_force"


class MetatomicModel(torch.nn.Module):
    """What an engine calls: energies of structures or atoms, and direct forces where the potential has them.

    Parameters
    ----------
    network
        `AtomicEnergies`, traced: (z (N,), vectors (E, 3) in Å, src (E,), dst (E,)) to energies (N,) and direct forces.
    cutoff
        Å.
    computes_in
        Type of the network's numbers; inputs and outputs are float64.
    """

    def __init__(self, network: torch.jit.ScriptModule, cutoff: float, computes_in: torch.dtype) -> None:
        super().__init__()
        self.network, self.computes_in = network, computes_in
        self.pairs = NeighborListOptions(cutoff=cutoff, full_list=True, strict=True)

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:
        """All pairs within the cutoff, in both directions."""
        return [self.pairs]

    def forward(
        self,
        systems: List[System],
        outputs: Dict[str, ModelOutput],
        selected_atoms: Optional[Labels],
    ) -> Dict[str, TensorMap]:
        """Energies in eV, per structure or per atom as asked for, and direct forces (N, 3, 1) in eV/Å."""
        energies: List[torch.Tensor] = []
        forces: List[torch.Tensor] = []
        owners: List[torch.Tensor] = []
        for number, system in enumerate(systems):
            neighbors = system.get_neighbor_list(self.pairs)
            center = neighbors.samples.column("first_atom").to(torch.int64)
            neighbor = neighbors.samples.column("second_atom").to(torch.int64)
            vectors = neighbors.values.reshape(-1, 3).to(self.computes_in)
            per_atom, direct = self.network(system.types.to(torch.int64), vectors, neighbor, center)
            atoms = torch.arange(len(system), device=vectors.device)
            if selected_atoms is not None:
                chosen = selected_atoms.column("system") == number
                atoms = selected_atoms.column("atom")[chosen].to(torch.int64)
            energies.append(per_atom.index_select(0, atoms))
            forces.append(direct.index_select(0, atoms))
            owners.append(torch.stack([torch.full_like(atoms, number), atoms], dim=1))
        energy, samples = torch.cat(energies).unsqueeze(1), torch.cat(owners)
        by_atom = Labels(["system", "atom"], samples.to(torch.int32))

        results: Dict[str, TensorMap] = {}
        nothing: List[Labels] = []
        if "energy" in outputs:
            labels = by_atom
            if outputs["energy"].sample_kind != "atom":
                total = energy.new_zeros((len(systems), 1)).index_add(0, samples[:, 0], energy)
                energy = total
                all_systems = torch.arange(len(systems), device=energy.device, dtype=torch.int32)
                labels = Labels(["system"], all_systems.unsqueeze(1))
            results["energy"] = as_map(energy, labels, nothing, "energy")
        if "non_conservative_force" in outputs:
            xyz = Labels(["xyz"], torch.arange(3, device=energy.device, dtype=torch.int32).unsqueeze(1))
            values = torch.cat(forces).unsqueeze(2)
            results["non_conservative_force"] = as_map(values, by_atom, [xyz], "non_conservative_force")
        return results


def as_map(
    values: torch.Tensor,
    samples: Labels,
    components: List[Labels],
    name: str,
) -> TensorMap:
    """Numbers with one row per sample, (samples, 1) or (samples, 3, 1), as the one block of a map."""
    index = torch.zeros((1, 1), dtype=torch.int32, device=values.device)
    return TensorMap(Labels(["_"], index), [TensorBlock(values, samples, components, Labels([name], index))])


def metatomic_model(energies: AtomicEnergies, record: dict[str, Any]) -> bytes:
    """Content of the file that engines load; see `export.export_model`, which checks the model first.

    Parameters
    ----------
    energies
        The potential.
    record
        Metadata; see `export.metadata_of`.

    Raises
    ------
    ConfigError
        If energies are not sums over atoms.
    """
    elements, shift = record["atomic_numbers"], float(energies.potential.shift)
    if shift:
        raise ConfigError(
            f"this model adds {shift:.6g} eV once for each structure (reference_energies='mean'), but engines ask for energies "
            "of atoms: train with reference energies of elements"
        )
    traced = traced_network(energies, elements)
    module = MetatomicModel(traced, record["cutoff"], energies.dtype).eval()
    outputs = {"energy": ModelOutput(unit="eV", sample_kind="atom", description="energy, reference energies included")}
    if energies.potential.force_mode == "direct":
        outputs[DIRECT_FORCES] = ModelOutput(unit="eV/A", sample_kind="atom", description="forces of a vector head")
    capabilities = ModelCapabilities(
        outputs=outputs,
        atomic_types=elements,
        interaction_range=range_of(energies, elements),
        length_unit="Angstrom",
        supported_devices=[energies.potential.reference.device.type],
        dtype="float64",
    )
    metadata = ModelMetadata(
        name=record["model"],
        description=f"Trained with ndem_zoo {record['ndem_zoo']} on {record['trained_on'] or 'unnamed data'}",
        extra={"ndem_zoo": json.dumps(record)},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.pt")
        AtomisticModel(module, metadata, capabilities).save(path)
        return Path(path).read_bytes()


def traced_network(energies: AtomicEnergies, elements: List[int]) -> torch.jit.ScriptModule:
    """The network as TorchScript, for any number of atoms and pairs; compared with the model at other sizes.

    Raises
    ------
    ConfigError
        If they differ.
    """

    def arguments(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        pos = inputs.pos.to(energies.dtype)
        vectors = pos[inputs.src] + inputs.shift.to(energies.dtype) - pos[inputs.dst]
        return inputs.z, vectors, inputs.src, inputs.dst

    with torch.enable_grad():
        inputs = arguments(next(examples(energies, elements)))
        traced = torch.jit.trace(energies, (inputs[0], inputs[1].requires_grad_(), *inputs[2:]), check_trace=False)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `export.StructureModel`, by the derivatives that an engine takes."""
        pos = inputs[1].clone().requires_grad_()
        per_atom, direct = traced(*arguments(Inputs(*inputs)._replace(pos=pos)))
        energy = per_atom.sum()
        if energies.potential.force_mode == "gradient":
            direct = -torch.autograd.grad(energy, pos)[0]
        return energy.detach(), direct.detach()

    check_exported(run, energies, elements)
    return traced
