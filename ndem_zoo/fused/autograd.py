"""How autograd meets passes with hand-written derivatives, such that forces can be trained on.

A part of the network (backbone, head) is one node. Asked for forces, the node runs its adjoint pass as a second node,
whose own derivative is the tangent pass. The gradient by the weights then needs adjoints, tangents and the adjoints of
the loss: the node does that last pass when all three have come in, once.

A network has a hundred weights, and handing each one's gradient to autograd takes longer than computing it for a small
batch. Within `gradients_in_place` the passes add to them themselves.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ndem_zoo.errors import ConfigError

_here = threading.local()


@contextlib.contextmanager
def gradients_in_place(anchor: Tensor, places: Mapping[int, Tensor]) -> Iterator[None]:
    """Forward passes made in here add the gradients of weights that have a place for it there, past autograd.

    Only for ``loss.backward(inputs=[anchor, ...])``: hooks of the weights do not run, and ``torch.autograd.grad`` by them
    finds nothing.

    Parameters
    ----------
    anchor
        A leaf that requires a gradient, and gets none from here: how autograd knows that there is something to do.
    places
        By ``id(weight)``, a tensor of the weight's shape, contiguous.
    """
    before, _here.now = getattr(_here, "now", None), (anchor, places)
    try:
        yield
    finally:
        _here.now = before


class Passes(ABC):
    """One evaluation of a part of the network: its values, and the passes over them.

    Attributes
    ----------
    pos : (N, 3)
        The positions that forces are taken by; `physics.forces_from_energy` marks them while it does, and `Potential`
        those that are known to nobody else.
    weights : list
        What gradients are wanted of.
    pending : list
        What `backward` and `tangent` left for `gradient`, for each scalar that forces were taken of.
    """

    def __init__(self, pos: Tensor, weights: list[Tensor]) -> None:
        self.pos, self.weights = pos, weights
        self.pending: list[tuple[Any, Any]] = []
        self.second_order = False

    @abstractmethod
    def forward(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Outputs."""

    @abstractmethod
    def backward(self, *g_outputs: Tensor, keep: bool) -> tuple[tuple[Tensor | None, ...], Any]:
        """Adjoints of the inputs; with `keep`, also those on the way that `gradient` needs."""

    @abstractmethod
    def tangent(self, *inputs_t: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """Derivatives of the outputs along a change of the inputs, and those on the way that `gradient` needs."""

    @abstractmethod
    def gradient(
        self, *m_outputs: Tensor, second: tuple[Any, Any] | None, wanted: tuple[bool, ...], into: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Adjoints of inputs and weights in (a scalar of the outputs) + (derivative of a second scalar).

        Parameters
        ----------
        m_outputs
            Adjoints of the outputs.
        second
            Adjoints of the second scalar and tangents along the displacement, as `backward` and `tangent` kept them;
            None if there is none.
        wanted
            Which of the inputs need adjoints.
        into
            One tensor for each of the weights, whose adjoints are added to it.
        """

    def unused(self) -> tuple[int, ...]:
        """Positions of weights that the values do not depend on."""
        return ()

    def check_second_order(self) -> None:  # noqa: B027 (most parts have nothing to refuse)
        """Refuse (ConfigError) adjoints of the inputs that include a second derivative, if they are not known."""


def run(passes: Passes, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Outputs of a part of the network, connected to its inputs and weights."""
    if not torch.is_grad_enabled():
        return passes.forward(*inputs)
    first = inputs[0]
    if first.requires_grad:
        first = _Guard.apply(first, passes)
    anchor, places = getattr(_here, "now", None) or (None, {})
    sums = _places_of(passes.weights, places) if places else None
    parameters = [anchor]
    if sums is None:
        parameters = passes.weights if any(weight.requires_grad for weight in passes.weights) else []
    return _Values.apply(passes, len(inputs), sums, first, *inputs[1:], *parameters)[:-1]


def _places_of(weights: Sequence[Tensor], places: Mapping[int, Tensor]) -> list[Tensor | None] | None:
    """Where the gradients are added; None for frozen weights, or for all if one that is not has no place."""
    found = []
    for weight in weights:
        place = places.get(id(weight))
        if place is None and weight.requires_grad:
            return None
        found.append(place)
    return found


class _Guard(torch.autograd.Function):
    """The first input, unchanged; only there to notice that its adjoint is used."""

    @staticmethod
    def forward(ctx, x, passes):
        ctx.passes = passes
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g_x):
        if ctx.passes.second_order and not getattr(ctx.passes.pos, "is_private", False):
            ctx.passes.check_second_order()
        return g_x, None


class _Values(torch.autograd.Function):
    """Inputs and weights to outputs, and a token that every force pass is tied to, so that this node comes last."""

    @staticmethod
    def forward(ctx, passes, n_inputs, sums, *tensors):
        ctx.passes, ctx.n_inputs, ctx.n_parameters = passes, n_inputs, len(tensors) - n_inputs
        ctx.sums = sums
        outputs = passes.forward(*tensors[:n_inputs])
        token = outputs[0].new_zeros(())
        ctx.save_for_backward(token)
        return *outputs, token

    @staticmethod
    def backward(ctx, *g_outputs):
        passes, g_outputs = ctx.passes, tuple(g.contiguous() for g in g_outputs[:-1])
        if getattr(passes.pos, "forces_only", False):  # set by physics.forces_from_energy
            if torch.is_grad_enabled():
                g_inputs = _Adjoints.apply(passes, *ctx.saved_tensors, *g_outputs)
            else:
                g_inputs, _ = passes.backward(*g_outputs, keep=False)
            return None, None, None, *g_inputs, *[None] * ctx.n_parameters
        if torch.is_grad_enabled():
            raise ConfigError(
                "the fused plan differentiates twice only through ndem_zoo.physics.forces_from_energy; use it, or set "
                "backbone.plan = 'eager'"
            )
        pending, passes.pending = passes.pending, []
        passes.second_order = bool(pending)
        wanted = ctx.needs_input_grad[3 : 3 + ctx.n_inputs]
        sums = [None] * len(passes.weights) if ctx.sums is None else ctx.sums
        into = [
            torch.zeros_like(w, requires_grad=False) if s is None else s
            for w, s in zip(passes.weights, sums, strict=True)
        ]
        g_inputs = passes.gradient(*g_outputs, second=pending[0] if pending else None, wanted=wanted, into=into)
        for second in pending[1:]:
            nothing = [torch.zeros_like(g) for g in g_outputs]
            more = passes.gradient(*nothing, second=second, wanted=wanted, into=into)
            g_inputs = [a if b is None else b if a is None else a + b for a, b in zip(g_inputs, more, strict=True)]
        if ctx.sums is not None or not ctx.n_parameters:
            return None, None, None, *g_inputs, *[None] * ctx.n_parameters
        unused = passes.unused()
        gradients = [None if place in unused else gradient for place, gradient in enumerate(into)]
        return None, None, None, *g_inputs, *gradients


class _Adjoints(torch.autograd.Function):
    """Adjoints of the outputs to adjoints of the inputs."""

    @staticmethod
    def forward(ctx, passes, token, *g_outputs):
        ctx.passes = passes
        # Pitfall: the result must not be reachable from ctx, or node and result keep each other alive.
        g_inputs, ctx.adjoints = passes.backward(*g_outputs, keep=True)
        return g_inputs

    @staticmethod
    def backward(ctx, *inputs_t):
        inputs_t = tuple(None if t is None else t.contiguous() for t in inputs_t)
        outputs_t, tangents = ctx.passes.tangent(*inputs_t)
        ctx.passes.pending.append((ctx.adjoints, tangents))
        return None, outputs_t[0].new_zeros(()), *outputs_t
