"""Matrices that a calibration fitted to the heads of a model, and the transforms that caches make of them.

Axis letters: G key/value heads of a layer, h of them that share their parts, D head dim.
"""

import torch

from .turboquant import Transform


class FittedTransforms:
    """One matrix per head, shared by every cache of a calibration.

    Args:
        matrices: "layers.3.keys" or "layers.3.values" -> [G, D, D] float16, x -> x @ matrix. Coordinates come
            in the order of the parts, and those of a part have a typical size near 1.
    """

    def __init__(self, matrices: dict[str, torch.Tensor]):
        self.matrices = dict(matrices)
        self._made: dict[tuple, Transform] = {}

    def __deepcopy__(self, memo: dict) -> "FittedTransforms":
        """Itself, like every `Transform`."""
        return self

    def has(self, kind: str, layer: int) -> bool:
        return f"layers.{layer}.{kind}" in self.matrices

    def transform(
        self,
        kind: str,
        layer: int,
        members: tuple[int, ...],
        widths: tuple[int, ...],
        rotation: str,
        seed: int,
    ) -> Transform:
        """The transform [h, D, D] of some heads of a layer: their matrices, then a random rotation of each
        part."""
        name = f"layers.{layer}.{kind}"
        key = (name, members, widths, rotation, seed)
        if key not in self._made:
            matrix = self.matrices[name][list(members)].double()
            encode = matrix @ Transform.rotation(rotation, widths, seed).encode.to(matrix.device)
            self._made[key] = Transform(encode, torch.linalg.inv(encode))
        return self._made[key]
