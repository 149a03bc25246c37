"""Codes of some heads of a cache layer, and the first tokens, which decide how all later ones are coded.

Axis letters: B batch, G key/value heads, h of them that are coded alike, T tokens, F first ones, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cache_settings import HeadCoding
from .growing_tensor import GrowingTensor
from .packed_states import HeadCodes
from .turboquant import PackedVectors


@dataclass(frozen=True)
class FirstTokens:
    """Tokens that decide for all later ones of their rows, at the beginning of a slice [B, G, T, D].

    Args:
        rows: [B or 1], the rows whose first real tokens are in the slice.
        real: [B or 1, F], which of its first F tokens are not padding; all, in rows with nothing but padding.
    """

    rows: torch.Tensor
    real: torch.Tensor

    def of(self, vectors: torch.Tensor) -> torch.Tensor:
        """[B, G, F, D], NaN where there is padding."""
        chosen = vectors[:, :, : self.real.shape[1]]
        return chosen.masked_fill(~self.real[:, None, :, None], torch.nan)

    def settle(self, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """What now holds: [B, ...], `new` for `rows` and for those that had nothing."""
        return new if old is None else torch.where(self.rows.view(-1, *[1] * (new.ndim - 1)), new, old)


class PackedHeads:
    """Growing storage of some heads' codes."""

    def __init__(self, coding: HeadCoding, heads: int, device: torch.device):
        self.coding, self.codes, self.scales = coding, GrowingTensor(), GrowingTensor()
        everything = coding.heads == tuple(range(heads))
        self.heads = None if everything else torch.tensor(coding.heads, device=device)
        self.order: torch.Tensor | None = None
        self.gain: torch.Tensor | None = None

    def decide(self, vectors: torch.Tensor, first: FirstTokens) -> None:
        """Lets the `first` of vectors [B, G, T, D] float64 of all heads decide gain and order of channels."""
        chosen = first.of(self._own(vectors))
        if self.coding.quantizer.scale_dtype == torch.uint8:
            self.gain = first.settle(self.gain, _typical_scale(chosen))
            chosen = chosen / self.gain
        if self.coding.sort_channels:
            energy = chosen.square().nanmean(dim=2)
            self.order = first.settle(self.order, energy.argsort(dim=-1, descending=True, stable=True))

    def append(self, vectors: torch.Tensor, expected: int = 0) -> None:
        """Packs vectors [B, G, T, D] float64 of all heads. There will be `expected` tokens at least."""
        vectors = self._own(vectors)
        if self.gain is not None:
            vectors = vectors / self.gain
        if self.order is not None:
            vectors = vectors.gather(-1, self.order[:, :, None].expand_as(vectors))
        transform = self.coding.transform.to(vectors.device)
        packed = self.coding.quantizer.encode(vectors @ transform.encode)
        self.codes.append(packed.codes, expected)
        self.scales.append(packed.scales, expected)

    def extend(self, states: torch.Tensor, expected: int = 0) -> None:
        """Makes room for the codes of states [B, G, T, D], which somebody writes into the buffers."""
        quantizer, (batch, _, tokens, _) = self.coding.quantizer, states.shape
        shape = batch, len(self.coding.heads), 0
        codes = states.new_empty(*shape, quantizer.code_bytes, dtype=torch.uint8)
        scales = states.new_empty(*shape, quantizer.scale_count, dtype=quantizer.scale_dtype)
        self.codes.extend(tokens, codes, expected)
        self.scales.extend(tokens, scales, expected)

    def _own(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if self.heads is None else vectors.index_select(1, self.heads)

    def view(self) -> HeadCodes:
        packed = PackedVectors(self.codes.view(), self.scales.view(), self.coding.quantizer)
        numbers = None if self.heads is None else self.coding.heads
        return HeadCodes(packed, self.coding.transform, self.heads, self.order, self.gain, numbers)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `change`, which acts on the batch or the device, to everything stored."""
        for stored in self.storage():
            stored.map(change)
        self.order = None if self.order is None else change(self.order)
        self.gain = None if self.gain is None else change(self.gain)

    def storage(self) -> tuple[GrowingTensor, GrowingTensor]:
        return self.codes, self.scales


def _typical_scale(vectors: torch.Tensor) -> torch.Tensor:
    """[B, h, 1, 1] float32: the power of 2 nearest to the median size of a coordinate of vectors [B, h, T,
    D]."""
    size = vectors.square().mean(dim=-1).nanmedian(dim=2).values.sqrt().clamp(1e-30, 1e30)
    return size.log2().round().exp2().float()[..., None, None]
