"""The physical limit: matrix products that the mathematics needs, over the machine's measured sgemm rate.

Counted on paper, not on an implementation: filters once for each unordered pair and their derivative in the distance
carried forward, weights of equal input joined, nothing computed that has no effect. What the pair kernels, norms and
the optimizer cost comes on top, so no step can reach it.
"""

from __future__ import annotations

from typing import Any

#: Passes over the products of the atoms and over those of the filters. A product y = x W of the atoms costs one unit
#: forward and one in the force pass (g W^T); the gradient of both needs two more each. A filter costs a value and a
#: derivative in r, and a weight gradient of each. The noisy branch has no force pass.
PASSES = {"train": (6, 4), "inference": (2, 2), "noisy branch": (3, 2)}


def units(n_atoms: int, n_edges: int, options: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of one pass over the products of the atoms, and over the filters; `n_edges` are directed.

    Vectors count three times; before the first layer there are none.
    """
    c, layers, k = options["hidden_channels"], options["num_layers"], options["num_rbf"]
    pairs = n_edges // 2 + 1  # and one row for an atom with itself
    attention = n_atoms * c * (5 + 3) * c * layers + 3 * n_atoms * c * 3 * c * (layers - 1)
    embedding = n_atoms * 2 * c * c
    half = c // 2
    head = 3 * n_atoms * c * (c + half) + n_atoms * (2 * c * c + c * c)
    head += 3 * n_atoms * half * half + n_atoms * (c * half + half)
    filters = pairs * k * 4 * c * layers + pairs * k * c
    return 2 * (attention + embedding + head), 2 * filters


def required_flops(work: str, n_atoms: int, n_edges: int, options: dict[str, Any]) -> int:
    """FLOPs of the matrix products of ``"train"``, ``"inference"`` or ``"ndem"`` (a training step with a noisy branch)."""
    atoms, filters = units(n_atoms, n_edges, options)
    passes = ["train", "noisy branch"] if work == "ndem" else [work]
    return sum(PASSES[name][0] * atoms + PASSES[name][1] * filters for name in passes)
