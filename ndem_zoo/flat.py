"""The weights that an optimizer changes: one by one, or all of them as one piece of memory.

A network has a hundred weights. An optimizer that sees one tensor needs one launch instead of lists of a hundred, and
gradients that have a place need not be handed around: on a CPU that is more than a millisecond of every step. It pays where
passes add to the gradients themselves (`fused.gradients_in_place`); autograd leaves a gradient where it made it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ndem_zoo import checkpoint as files
from ndem_zoo.fused import gradients_in_place

#: Choice: every weight begins at a multiple of so many numbers, at a cache line.
_ALIGNED = 16


class Weights:
    """Weights one by one.

    Parameters
    ----------
    groups
        Groups of an optimizer, with weights under ``"params"``.

    Attributes
    ----------
    groups : list of dict
        What the optimizer gets.
    tensors : list
        What it changes; each has its gradient under ``grad``, or None.
    inputs : list
        What ``backward`` is asked to find gradients of.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups
        self.tensors: list[Tensor] = [tensor for group in groups for tensor in group["params"]]
        self.inputs = self.tensors

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Where forward passes are made whose gradients are wanted."""
        return contextlib.nullcontext()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for tensor in self.tensors:
            tensor.grad = None

    def release(self) -> None:
        """Leave the weights as they were found, but for their numbers."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """State of the optimizer of these groups, weight by weight: see `checkpoint.flatten_optimizer`."""
        return files.flatten_optimizer(optimizer.state_dict())

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `optimizer_state` gave, whichever way the weights were kept."""
        optimizer.load_state_dict(files.unflatten_optimizer(tensors, optimizer.state_dict()))


class FlatWeights(Weights):
    """Weights as slices of long tensors, one for each group; their gradients likewise.

    Until `release`, nothing may replace ``weight.data`` or ``weight.grad``; changing the numbers in place is what they are
    there for. The weights of a group are of one dtype and device.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._weights = [group["params"] for group in groups]
        super().__init__([{**group, "params": [_joined(group["params"])]} for group in groups])
        weights = [weight for group in self._weights for weight in group]
        self.inputs = [*self.tensors, *weights]
        self._places = {id(weight): weight.grad for weight in weights}

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """See `gradients_in_place`."""
        return gradients_in_place(self.tensors[0], self._places)

    def zero_grad(self) -> None:
        """Set the gradients to 0."""
        for tensor in self.tensors:
            tensor.grad.zero_()

    def release(self) -> None:
        """Give every weight memory of its own again, and no gradient."""
        for group in self._weights:
            for weight in group:
                weight.data, weight.grad = weight.data.clone(), None

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """See `Weights.optimizer_state`: a checkpoint does not tell how the weights were kept."""
        found, first = {}, 0
        for tensor, group in zip(self.tensors, self._weights, strict=True):
            for name, value in optimizer.state.get(tensor, {}).items():
                parts = _slices(value, group) if value.dim() else [value] * len(group)
                found |= {f"{first + number}.{name}": part.clone() for number, part in enumerate(parts)}
            first += len(group)
        return found

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """See `Weights.load_optimizer_state`; a weight that had no gradient yet has no state, which is zeros."""
        found, first = {}, 0
        for place, group in enumerate(self._weights):
            numbers = range(first, first + len(group))
            for name in sorted({key.partition(".")[2] for key in tensors if int(key.partition(".")[0]) in numbers}):
                parts = [tensors.get(f"{number}.{name}") for number in numbers]
                known = [part for part in parts if part is not None]
                if known[0].dim() == 0:
                    found[f"{place}.{name}"] = torch.stack(known).amax()  # steps
                    continue
                whole = torch.zeros_like(self.tensors[place], dtype=known[0].dtype, requires_grad=False)
                for target, part in zip(_slices(whole, group), parts, strict=True):
                    if part is not None:
                        target.copy_(part)
                found[f"{place}.{name}"] = whole
            first += len(group)
        super().load_optimizer_state(optimizer, found)


def _slices(joined: Tensor, weights: list[Tensor]) -> Iterator[Tensor]:
    """The part of each weight, in its shape."""
    begin = 0
    for weight in weights:
        yield joined[begin : begin + weight.numel()].view(weight.shape)
        begin += _length(weight)


def _length(weight: Tensor) -> int:
    return -(-weight.numel() // _ALIGNED) * _ALIGNED


def _joined(weights: list[Tensor]) -> nn.Parameter:
    """One tensor that the weights become slices of, with a gradient of zeros that theirs are slices of."""
    joined = nn.Parameter(weights[0].new_zeros(sum(map(_length, weights)), requires_grad=False))
    joined.grad = torch.zeros_like(joined, requires_grad=False)
    parts = zip(weights, _slices(joined.detach(), weights), _slices(joined.grad, weights), strict=True)
    for weight, value, gradient in parts:
        value.copy_(weight.detach())
        weight.data, weight.grad = value, gradient
    return joined
