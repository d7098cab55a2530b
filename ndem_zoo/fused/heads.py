"""The passes of TorchMD-NET's heads: gated equivariant blocks, one after the other, in native code.

With a = W1 v, b = W2 v, n = |a|, h = A [s; n], t = silu(h), u = B t = [out | gate], a block maps scalars s and vectors v to
silu(out) (the last block: out) and b gate. `GatedEquivariantBlock` is the definition, `source/head.h` has the passes.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ndem_zoo.fused import autograd, native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ndem_zoo.models.base import Features
    from ndem_zoo.models.torchmd_net import GatedEquivariantBlock


#: MAX_BLOCKS of head.h.
_MAX_BLOCKS = 8
#: BLOCK_WEIGHTS of head.h.
_BLOCK_WEIGHTS = 6


def run(blocks: Sequence[GatedEquivariantBlock], features: Features, vectors: bool) -> tuple[Tensor, ...] | None:
    """Scalars (N, O) of the last block and, if wanted, vectors (N, 3, O).

    None if the features were not made by the fused plan, for the caller to do it the plain way.
    """
    backbone = getattr(features.scalars, "passes", None)
    if backbone is None or len(blocks) > _MAX_BLOCKS or torch._C._are_functorch_transforms_active():
        return None
    parameters = []  # in the order of head.h
    for block in blocks:
        hidden, out = block.update_net[0], block.update_net[2]
        parameters += [block.vec1_proj.weight, block.vec2_proj.weight]
        parameters += [hidden.weight, hidden.bias, out.weight, out.bias]
    if not native.can_read(parameters, features.scalars.dtype):
        return None
    passes = HeadPasses(backbone.kernels.like(), backbone.pos, blocks, parameters, vectors)
    return autograd.run(passes, (features.scalars, features.vectors))


class _Description(ctypes.Structure):
    """`HeadDescription` of head.h."""

    _fields_: ClassVar[list] = [
        *((name, ctypes.c_int64) for name in ("n", "blocks", "threads")),
        *((name, ctypes.c_void_p) for name in ("sizes", "weights", "v", "values")),
    ]


class HeadPasses(autograd.Passes):
    """One evaluation of a head, from (scalars, vectors) to scalars, or scalars and vectors, of its last block."""

    def __init__(
        self, kernels: native.Kernels, pos: Tensor, blocks: Sequence[GatedEquivariantBlock], weights: list[Tensor],
        vectors: bool,
    ) -> None:  # fmt: skip
        super().__init__(pos, weights)
        self.kernels, self._n, self._vectors = kernels, pos.shape[0], vectors
        self._in_channels, self._out_channels = blocks[0].vec1_proj.in_features, blocks[-1].out_channels
        last = len(blocks) - 1
        sizes = [
            int(value)
            for i, block in enumerate(blocks)
            for value in (block.vec1_proj.in_features, block.out_channels, block.activate, vectors or i < last)
        ]
        self._arrays = (ctypes.c_int64 * len(sizes))(*sizes), native.addresses(weights)
        addresses = [ctypes.addressof(array) for array in self._arrays]
        self._description = _Description(self._n, len(blocks), torch.get_num_threads(), *addresses, None, None)

    def _call(self, name: str, *arguments: Tensor | int | None) -> None:
        self.kernels.call(name, ctypes.addressof(self._description), *arguments)

    def _memory(self, kind: int) -> Tensor:
        return self.kernels.empty(self.kernels.call("head_size", ctypes.addressof(self._description), kind))

    def _outputs(self, like: Tensor) -> tuple[Tensor, ...]:
        scalars = like.new_empty(self._n, self._out_channels)
        return (scalars, like.new_empty(self._n, 3, self._out_channels)) if self._vectors else (scalars,)

    def _inputs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shapes = (self._n, self._in_channels), (self._n, 3, self._in_channels)
        return tuple(like.new_empty(shape) for shape in shapes)

    @staticmethod
    def _padded(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        return outputs if len(outputs) == 2 else (*outputs, None)

    def forward(self, scalars: Tensor, vectors: Tensor) -> tuple[Tensor, ...]:
        """Scalars and, if wanted, vectors of the last block."""
        scalars, self._features = scalars.detach().contiguous(), vectors.detach().contiguous()
        self._description.v = self._features.data_ptr()
        self._description.values = self._memory(0).data_ptr()
        outputs = self._outputs(scalars)
        self._call("head_forward", scalars, *self._padded(outputs))
        native.count_written(*outputs)
        return outputs

    def backward(self, *g_outputs: Tensor, keep: bool) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Adjoints of scalars and vectors."""
        adjoints, g_inputs = self._memory(1) if keep else None, self._inputs(g_outputs[0])
        self._call("head_backward", *self._padded(g_outputs), adjoints, *g_inputs)
        native.count_written(*g_inputs)
        return g_inputs, adjoints

    def tangent(self, s_t: Tensor, v_t: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """Derivatives of the outputs along a change of the features."""
        tangents, outputs = self._memory(2), self._outputs(s_t)
        self._call("head_tangent", s_t, v_t, tangents, *self._padded(outputs))
        native.count_written(*outputs)
        return outputs, (tangents, v_t)

    def gradient(
        self, *m_outputs: Tensor, second: tuple[Tensor, tuple[Tensor, Tensor]] | None, wanted: tuple[bool, ...],
        into: list[Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Adjoints of scalars and vectors; gradients by all weights are added to `into`."""
        adjoints, (tangents, v_t) = (None, (None, None)) if second is None else second
        out, m_inputs = native.addresses(into), self._inputs(m_outputs[0])
        self._call("head_gradient", *self._padded(m_outputs), adjoints, tangents, v_t, ctypes.addressof(out), *m_inputs)
        native.count_written(*into, *m_inputs)
        return m_inputs

    def unused(self) -> tuple[int, ...]:
        """The projection of the last block's vectors, if they were not made."""
        return () if self._vectors else (len(self.weights) - _BLOCK_WEIGHTS + 1,)
