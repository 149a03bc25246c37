"""What a TurboQuant cache layer hands to attention: codes, exact tokens and recent window, as one tensor.

Axis letters: B batch, T tokens, G key/value heads, D head dim, P packed tokens, E exact tokens, M groups of
tokens with a mean of their own.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map

from .turboquant import PackedVectors, Transform

logger = logging.getLogger(__name__)
_warned: set[str] = set()


@dataclass(frozen=True)
class HeadCodes:
    """The packed tokens of some heads that are coded alike: packed [B, h, P, D].

    Args:
        heads: their indices [h] in the layer, None for all heads.
        order: [B, h, D], the channels in the order in which they were coded; None if as they came.
        gain: [B, h, 1, 1], a power of 2 by which the vectors were divided; None for 1.
        head_numbers: `heads` as numbers, None for all heads.
    """

    packed: PackedVectors
    transform: Transform
    heads: torch.Tensor | None = None
    order: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    head_numbers: tuple[int, ...] | None = None

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """The rows [B, h, ...] of these heads of states [B, G, ...]."""
        return states if self.heads is None else states.index_select(1, self.heads)

    def rotate_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """[B, G, R, D] -> [B, h, R, D] in the basis of the codes, so that scores need no decoding."""
        queries = self.select(queries)
        if self.order is not None:
            queries = queries.gather(-1, self.order[:, :, None].expand_as(queries))
        queries = queries @ self.transform.to(queries.device).decode.mT
        return queries if self.gain is None else queries * self.gain

    def restore(self, rotated: torch.Tensor) -> torch.Tensor:
        """Vectors [B, h, R, D] in the basis of the codes, back in the model's basis."""
        vectors = rotated @ self.transform.to(rotated.device).decode
        if self.gain is not None:
            vectors = vectors * self.gain
        if self.order is None:
            return vectors
        index = self.order[:, :, None].expand_as(vectors)
        return torch.empty_like(vectors).scatter_(-1, index, vectors)


@dataclass(frozen=True)
class ExactTokens:
    """Tokens that stay in model precision: keys, values [B, G, E, D], positions [B, G, E] (-1: no token).

    `scores` [B, G, E] float32 says how extreme each is; attention sinks are infinitely so.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values, self.positions, self.scores


@dataclass(frozen=True)
class LayerView:
    """One layer's tokens at one moment: P packed ones, then the dense recent ones.

    Args:
        key_codes, value_codes: the heads of the layer, grouped by how they are coded.
        means: [B, G, M, D], what was taken from the keys of each group of `mean_group` tokens; None if
            nothing.
        exact: the packed tokens that are also kept as they are and are read from there.
        keys, values: [B, G, T - P, D], the recent tokens.
    """

    key_codes: tuple[HeadCodes, ...]
    value_codes: tuple[HeadCodes, ...]
    means: torch.Tensor | None
    mean_group: int
    exact: ExactTokens | None
    keys: torch.Tensor
    values: torch.Tensor
    packed_length: int

    @property
    def length(self) -> int:
        return self.packed_length + self.keys.shape[2]

    def dense_keys(self) -> torch.Tensor:
        """All keys, decoded: [B, G, T, D] in model precision."""
        return self._dense(self.key_codes, self.keys, self.exact and self.exact.keys, self.means)

    def dense_values(self) -> torch.Tensor:
        """All values, decoded: [B, G, T, D] in model precision."""
        return self._dense(self.value_codes, self.values, self.exact and self.exact.values, None)

    def _dense(self, codes, recent, exact, means):
        if not self.packed_length:
            return recent
        batch, heads, _, dim = recent.shape
        decoded = recent.new_empty(batch, heads, self.packed_length, dim)
        for part in codes:
            states = part.restore(part.packed.decode())
            if means is not None:
                group = torch.arange(self.packed_length, device=recent.device) // self.mean_group
                states = states + part.select(means).float().index_select(2, group)
            if part.heads is None:
                decoded = states.to(recent.dtype)
            else:
                decoded.index_copy_(1, part.heads, states.to(recent.dtype))
        if exact is not None:
            # A place behind the last token takes what holds no token.
            decoded = torch.cat([decoded, decoded[:, :, :1]], dim=2)
            positions = self.exact.positions
            place = torch.where(positions < 0, self.packed_length, positions).long()
            decoded.scatter_(2, place[..., None].expand_as(exact), exact)
            decoded = decoded[:, :, : self.packed_length]
        return torch.cat([decoded, recent], dim=2)


class PackedStates(torch.Tensor):
    """Keys or values [B, G, T, D] of a layer that stay packed until somebody computes with them.

    The "turboquant" attention reads `packed_view`. Any other operation gets dense tensors, so every attention
    implementation is right; a warning says once that this is slower.
    """

    packed_view: LayerView
    attention: Callable  # the attention function of the same copy of this code

    @staticmethod
    def __new__(cls, view: LayerView, kind: str):
        batch, heads, _, dim = (view.keys if kind == "keys" else view.values).shape
        handle = torch.Tensor._make_wrapper_subclass(
            cls, (batch, heads, view.length, dim), dtype=view.keys.dtype, device=view.keys.device
        )
        handle.packed_view, handle.kind = view, kind
        return handle

    def __repr__(self, **_) -> str:
        return (
            f"PackedStates({self.kind}, {list(self.shape)}, {self.packed_view.packed_length} tokens packed)"
        )

    def dense(self) -> torch.Tensor:
        """The decoded tensor [B, G, T, D]."""
        return self.packed_view.dense_keys() if self.kind == "keys" else self.packed_view.dense_values()

    # What comes out of an operation is an ordinary tensor, not another handle.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if "dense" not in _warned:
            _warned.add("dense")
            logger.warning(
                "this attention implementation does not read packed keys and values, so the cache is decoded "
                'at every step: right, but slower. model.set_attn_implementation("turboquant") reads codes.'
            )
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)
