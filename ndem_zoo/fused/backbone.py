"""The fused plan of TorchMD-NET's Equivariant Transformer: the same numbers as `TorchMDNet`, in less time.

The module's own `forward` is the definition; here the same pass is run with hand-written derivatives, as one node of
autograd, in native code. Training on forces needs the gradient, by the weights, of

    J = f(x, vec) + <v, dE/dpos>        (f: what the heads make of the features; v: from the loss of the forces)

and <v, dE/dpos> is the derivative of E along v. So four passes give everything, and nothing is differentiated twice:

    forward    features of the atoms
    backward   dE/dpos; the adjoint of every value on the way is kept
    tangent    derivative of every value along v
    reverse    adjoints of all values in J. Those of the tangents need no computing: they are the adjoints of
               `backward`.

A pair of atoms is visited once for both directions, and its filters are made once together with their derivative by the
distance, so that no adjoint of an edge has channels. `source/network.h` has the passes, `autograd.py` makes them known to
autograd, `heads.py` has those of the heads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ndem_zoo.errors import ConfigError
from ndem_zoo.fused import autograd, native

if TYPE_CHECKING:
    from ndem_zoo.graph import Batch
    from ndem_zoo.models.torchmd_net import ExpNormalBasis, TorchMDNet

#: Weights in the order of network.h.
_LAYER_PARAMETERS = (
    "layernorm.weight", "layernorm.bias", "q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias",
    "v_proj.weight", "v_proj.bias", "o_proj.weight", "o_proj.bias", "vec_proj.weight", "dk_proj.weight",
    "dk_proj.bias", "dv_proj.weight", "dv_proj.bias",
)  # fmt: skip
_OTHER_PARAMETERS = (
    "embedding.weight", "neighbor_embedding.embedding.weight", "neighbor_embedding.distance_proj.weight",
    "neighbor_embedding.distance_proj.bias", "neighbor_embedding.combine.weight", "neighbor_embedding.combine.bias",
    "out_norm.weight", "out_norm.bias",
)  # fmt: skip


_LAYER_PATHS = [tuple(path.split(".")) for path in _LAYER_PARAMETERS]
_OTHER_PATHS = [(path.split(".")[:-1], path.split(".")[-1]) for path in _OTHER_PARAMETERS]


def features(backbone: TorchMDNet, batch: Batch, vec: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Scalars (N, C) and vectors (N, 3, C); None where the plan does not apply, for the caller to do it the plain way.

    It does not on a GPU, without a compiler, with trainable radial functions, inside `torch.func` transformations, for
    edges that lack their other direction, and where there are no layers or atoms.

    Parameters
    ----------
    backbone
        The network.
    batch
        Structures.
    vec : (N, 3, C), optional
        Vectors before the first layer; None for zeros.
    """
    layers, basis, pos = backbone.attention_layers, backbone.distance_expansion, batch.pos
    if pos.device.type != "cpu" or pos.dtype not in native.DTYPES or not layers or batch.z.shape[0] == 0:
        return None
    if basis.means.requires_grad or torch._C._are_functorch_transforms_active():
        return None
    library = native.library()
    if library is None:
        return None
    parameters = _parameters(backbone)
    if not native.can_read([*parameters, basis.means, basis.betas], pos.dtype):
        return None
    kernels = native.Kernels(library, pos.dtype)
    pairs = find_pairs(kernels, batch, backbone.cutoff, backbone.max_z)
    if pairs is None:  # for unknown elements, the embedding raises the error
        return None
    needs_forces = torch.is_grad_enabled() and pos.requires_grad
    pairs.add_geometry(kernels, backbone.cutoff, layers[0].vector_cutoff, basis, needs_forces)
    sizes = len(layers), layers[0].num_heads, backbone.out_norm.eps
    passes = BackbonePasses(kernels, pairs, batch.z, pos, parameters, *sizes)
    scalars, vectors = autograd.run(passes, (pos, vec))
    scalars.passes = passes  # tells heads that their plan can follow
    return scalars, vectors


def _parameters(backbone: TorchMDNet) -> list[Tensor]:
    """All weights, in the order of network.h."""
    # Attributes of modules are looked up in three places each; here it is known where they are.
    found = []
    for layer in backbone.attention_layers:
        modules = layer._modules
        found += [modules[owner]._parameters[name] for owner, name in _LAYER_PATHS]
    for owners, name in _OTHER_PATHS:
        module: nn.Module = backbone
        for owner in owners:
            module = module._modules[owner]
        found.append(module._parameters[name])
    return found


# -------------------------------------------------------------------------------------------------------------- pairs


@dataclass(slots=True)
class Pairs:
    """Pairs {i, j} within the cutoff; each stands for both directions.

    Attributes
    ----------
    n : int
        How many there are: P. Arrays over pairs may have room for more.
    first, second : (P,) int32
        Atoms i and j: by structure, and there by distance.
    edge : (P, 3)
        Vectors from i to j in Å.
    pair_ptr, atom_ptr : (R + 1,) int64
        Ranges of pairs and atoms that can be worked on at the same time.
    geometry : (P, 8)
        Distance, unit vector, cutoff function and its derivative, and those of vector messages.
    rbf : (P + 1, K)
        Radial functions times the cutoff function; the last row is that of an atom and itself.
    rbf_r : (P, K) or None
        Their derivatives by the distance.
    active : (P + 1,) int32
        Radial functions from this one on are 0 at the distance.
    """

    n: int
    first: Tensor
    second: Tensor
    active: Tensor
    edge: Tensor
    pair_ptr: Tensor
    atom_ptr: Tensor
    geometry: Tensor | None = None
    rbf: Tensor | None = None
    rbf_r: Tensor | None = None

    def add_geometry(
        self, kernels: native.Kernels, cutoff: float, vector_cutoff: bool, basis: ExpNormalBasis, derivative: bool
    ) -> None:
        """Set `geometry`, `rbf`, `rbf_r` and `active`."""
        p, k = self.n, basis.means.shape[0]
        self.geometry, self.rbf = kernels.empty(p, 8), kernels.empty(p + 1, k)
        self.rbf_r = kernels.empty(p, k) if derivative else None
        arguments = (self.edge, basis.means, basis.betas, self.geometry, self.rbf, self.rbf_r, self.active)
        kernels.call("radial", p, k, float(cutoff), int(vector_cutoff), *arguments)


def find_pairs(kernels: native.Kernels, batch: Batch, cutoff: float, max_z: int) -> Pairs | None:
    """Pairs within the cutoff in Å; None if the edges do not hold both directions of each, or an element is unknown."""
    edges = batch.src.shape[0]
    room = edges // 2 + 1
    first, second, active = torch.empty(3, room, dtype=torch.int32).unbind()
    edge = kernels.empty(room, 3)
    tensors = (batch.src, batch.dst, batch.shift, batch.pos.detach(), batch.system, batch.z)
    arguments = [tensor.contiguous() for tensor in tensors]
    found = kernels.call(
        "find_pairs", edges, batch.z.shape[0], max_z, *arguments, float(cutoff), room, first, second, edge
    )
    if found < 0:
        return None
    return Pairs(found, first, second, active, edge, *_ranges(first[:found], batch.system, torch.get_num_threads()))


def _ranges(first: Tensor, system: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    """Pairs and atoms cut into ranges of whole structures, several for each thread: (R + 1,) each."""
    n, p = system.shape[0], first.shape[0]
    ends = torch.tensor([0, n]), torch.tensor([0, p])
    if threads == 1 or n == 0:
        return ends[1], ends[0]
    # First atom of each structure.
    begins = torch.cat([ends[0][:1], (system[1:] != system[:-1]).nonzero().flatten() + 1])
    wanted = torch.arange(1, 4 * threads) * n // (4 * threads)
    inner = begins[torch.searchsorted(begins, wanted).clamp(max=len(begins) - 1)].unique()
    atom_ptr = torch.cat([ends[0][:1], inner[inner > 0], ends[0][1:]])
    pair_ptr = torch.searchsorted(system[first.long()], system[atom_ptr[1:-1]])
    return torch.cat([ends[1][:1], pair_ptr, ends[1][1:]]), atom_ptr


# ----------------------------------------------------------------------------------------------------------- passes


class _Description(ctypes.Structure):
    """`Description` of network.h."""

    _fields_: ClassVar[list] = [
        *((name, ctypes.c_int64) for name in ("n", "p", "channels", "heads", "n_rbf", "layers", "has_vec0", "threads")),
        ("n_ranges", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("pair_ptr", "atom_ptr", "z", "first", "second", "active")),
        *((name, ctypes.c_void_p) for name in ("geometry", "rbf", "rbf_r", "weights", "values")),
        ("eps", ctypes.c_double),
    ]


class BackbonePasses(autograd.Passes):
    """One evaluation of the network, from (positions, first vectors or None) to (scalars, vectors), in one call a pass."""

    def __init__(
        self, kernels: native.Kernels, pairs: Pairs, z: Tensor, pos: Tensor, weights: list[Tensor], n_layers: int,
        heads: int, eps: float,
    ) -> None:  # fmt: skip
        super().__init__(pos, weights)
        self.kernels, self._n = kernels, pos.shape[0]
        self._channels = weights[1].shape[0]
        self._width = native.lanes(self._channels // heads)
        self._kept = pairs, z  # whose addresses the description holds
        self._addresses = native.addresses(weights)
        self._description = _Description(
            pos.shape[0], pairs.n, self._channels, heads, pairs.rbf.shape[1], n_layers, 0, torch.get_num_threads(),
            pairs.atom_ptr.shape[0] - 1,
            *(t.data_ptr() for t in (pairs.pair_ptr, pairs.atom_ptr, z, pairs.first, pairs.second, pairs.active)),
            *(None if t is None else t.data_ptr() for t in (pairs.geometry, pairs.rbf, pairs.rbf_r)),
            ctypes.addressof(self._addresses), None, eps,
        )  # fmt: skip

    def _call(self, name: str, *arguments: Tensor | int | None) -> None:
        self.kernels.call(name, self._width, ctypes.addressof(self._description), *arguments)

    def _memory(self, kind: int) -> Tensor:
        size = self.kernels.call("network_size", ctypes.addressof(self._description), kind)
        return self.kernels.empty(size)

    def forward(self, _: Tensor, vec: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scalars (N, C) and vectors (N, 3, C) of the atoms."""
        vec = None if vec is None else vec.detach().contiguous()
        self._description.has_vec0 = int(vec is not None)
        values = self._memory(0)
        self._description.values = values.data_ptr()
        x, out = values.new_empty(self._n, self._channels), values.new_empty(self._n, 3, self._channels)
        self._call("network_forward", vec, x, out)
        native.count_written(x, out)
        return x, out

    def backward(self, g_x: Tensor, g_vec: Tensor, *, keep: bool) -> tuple[tuple[Tensor, None], Tensor | None]:
        """Adjoints of the positions, from those of the features."""
        adjoints, g_pos = self._memory(1) if keep else None, g_x.new_empty(self._n, 3)
        self._call("network_backward", g_x, g_vec, adjoints, g_pos)
        return (g_pos, None), adjoints

    def tangent(self, pos_t: Tensor, _: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Derivatives of the features along a displacement (N, 3) of the atoms."""
        tangents = self._memory(2)
        x_t, vec_t = pos_t.new_empty(self._n, self._channels), pos_t.new_empty(self._n, 3, self._channels)
        self._call("network_tangent", pos_t, tangents, x_t, vec_t)
        native.count_written(x_t, vec_t)
        return (x_t, vec_t), tangents

    def gradient(
        self, m_x: Tensor, m_vec: Tensor, *, second: tuple[Tensor, Tensor] | None, wanted: tuple[bool, ...],
        into: list[Tensor],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Adjoints of positions (first order only) and first vectors; gradients by all weights are added to `into`."""
        adjoints, tangents = (None, None) if second is None else second
        g_pos = m_x.new_empty(self._n, 3) if wanted[0] and second is None else None
        g_vec0 = torch.empty_like(m_vec) if self._description.has_vec0 else None
        native.count_written(*into)
        out = native.addresses(into)
        self._call("network_gradient", m_x, m_vec, adjoints, tangents, ctypes.addressof(out), g_pos, g_vec0)
        return g_pos, g_vec0

    def unused(self) -> tuple[int, ...]:
        """The projection of the vectors before the first layer, if they are zero."""
        return () if self._description.has_vec0 else (_LAYER_PARAMETERS.index("vec_proj.weight"),)

    def check_second_order(self) -> None:
        """Adjoints of positions are known to first order only.

        Raises
        ------
        ConfigError
            Always.
        """
        raise ConfigError(
            "the fused plan gives no second derivatives by positions; train with loss.backward(inputs=[weights]), or "
            "set backbone.plan = 'eager' for Hessians"
        )
