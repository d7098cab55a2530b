"""EquiformerV2: `so3` (rotations, grids), `passes` (the heavy steps), `attention` (layers), `model` (backbone, heads)."""
