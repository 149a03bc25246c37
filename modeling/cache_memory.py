"""Reading a memory: what one batch selects (MemoryReader) and how it stands in the cache (MemoryCache).

Axis letters: B batch, T tokens, G key/value heads, D head dim, N documents, K selected, P memory vectors in
the prefix.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .ops import with_kernels


def top_documents(scores: torch.Tensor, k: int) -> list[torch.Tensor]:
    """The k best documents of each row of scores [B, N], best first; equal scores by lower number; never a
    score of -inf."""
    best = with_kernels(scores.device, lambda kernels: kernels.top_documents(scores, k))
    if best is not None:
        values, documents = best
        return [own[kept] for own, kept in zip(documents, values > -torch.inf)]
    if scores.shape[1] > 4 * k:
        threshold = scores.topk(k, dim=1).values[:, -1:]
        candidates = scores >= threshold
    else:
        candidates = torch.ones_like(scores, dtype=torch.bool)
    selected = []
    for row, keep in zip(scores, candidates & (scores > -torch.inf)):
        ids = keep.nonzero().squeeze(1)
        selected.append(ids[row[ids].sort(descending=True, stable=True).indices[:k]])
    return selected


@dataclass
class MemoryPrefix:
    """What stands before the local keys and values of a layer: keys and values [B, G, P, D], mask [B, P] of
    the real ones."""

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor


class MemoryReader:
    """One batch's view of a memory: routes once in every router layer and keeps the selection and its scores.

    Args:
        bank: `MemoryBank`. config: the model's `MSAConfig`.
        visible: [B, N] bool, documents that each sample may see; None for all.
        top_k: documents that each router layer selects; `config.top_k_documents` by default.
    """

    def __init__(self, bank, config, visible: torch.Tensor | None = None, top_k: int | None = None):
        self.bank, self.config, self.visible = bank, config, visible
        self.top_k = config.top_k_documents if top_k is None else top_k
        if self.top_k < 1:
            raise ValueError(f"top_k_documents must be at least 1; got {self.top_k}")
        self.scores: dict[int, torch.Tensor] = {}
        self.selected: dict[int, list[torch.Tensor]] = {}

    @property
    def position_offset(self) -> int:
        """First position of the tokens that read: after the template head and k documents ("global RoPE")."""
        return self.bank.head_length + self.top_k

    def reads(self, layer: int) -> bool:
        return layer in self.bank.layers or layer in self.bank.head

    def select(self, layer: int, queries: torch.Tensor, question_mask: torch.Tensor) -> None:
        """Routes `queries` [B, H, T, D] and keeps the scores [B, N] and the k best documents of each
        sample."""
        config = self.config
        scores = self.bank.route(
            layer,
            queries,
            question_mask,
            head_reduction=config.head_reduction,
            query_reduction=config.query_reduction,
            chunk_reduction=config.chunk_reduction,
        )
        if self.visible is not None:
            scores = scores.masked_fill(~self.visible.to(scores.device), -torch.inf)
        self.scores[layer], self.selected[layer] = scores, top_documents(scores, self.top_k)

    def prefix(self, layer: int, batch: int, like: torch.Tensor) -> MemoryPrefix:
        """Template head, then the selected documents' pooled K/V, with the dtype and device of `like`."""
        parts = []
        if layer in self.bank.head:
            keys, values = (states[None].expand(batch, -1, -1, -1) for states in self.bank.head[layer])
            parts.append(
                (keys, values, torch.ones(batch, keys.shape[2], dtype=torch.bool, device=keys.device))
            )
        if layer in self.selected:
            parts.append(self.bank.gather(layer, self.selected[layer]))
        keys, values = (torch.cat([part[i] for part in parts], dim=2).to(like) for i in (0, 1))
        return MemoryPrefix(keys, values, torch.cat([part[2] for part in parts], dim=1).to(like.device))


class MemoryLayer(CacheLayerMixin):
    """A cache layer that begins with a memory prefix and leaves everything else to `local`.

    The prefix is the first thing `local` stores; lengths and masks count only the tokens after it.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, local: CacheLayerMixin):
        self.local = local
        self.prefix_mask: torch.Tensor | None = None

    keys = property(lambda self: self.local.keys)
    values = property(lambda self: self.local.values)
    is_initialized = property(lambda self: self.local.is_initialized)
    is_croppable = property(lambda self: self.local.is_croppable)

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix_mask is None else self.prefix_mask.shape[1]

    def set_prefix(self, prefix: MemoryPrefix) -> None:
        if self.local.get_seq_length():
            raise ValueError(
                "a memory prefix must be set before the first token; this cache layer already holds tokens"
            )
        self.prefix_mask = prefix.mask
        if self.prefix_length:
            self.local.update(prefix.keys, prefix.values)

    def lazy_initialization(self, key_states, value_states):
        self.local.lazy_initialization(key_states, value_states)

    def update(self, key_states, value_states, *args, **kwargs):
        return self.local.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.local.get_seq_length() - self.prefix_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.local.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        self.local.crop(tokens_to_remove)

    def reset(self) -> None:
        self.local.reset()
        self.prefix_mask = None

    def _map_mask(self, change) -> None:
        if self.prefix_mask is not None:
            self.prefix_mask = change(self.prefix_mask)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.local.reorder_cache(beam_idx)
        self._map_mask(lambda mask: mask.index_select(0, beam_idx.to(mask.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.local.batch_repeat_interleave(repeats)
        self._map_mask(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.local.batch_select_indices(indices)
        self._map_mask(lambda mask: mask[indices])

    def offload(self) -> None:
        self.local.offload()

    def prefetch(self) -> None:
        self.local.prefetch()


class MemoryCache(Cache):
    """A cache whose layers begin with what `reader` selects from its memory.

    Args:
        local: the cache to build on (its layers are taken over); by default a new dense one.
    """

    is_memory_cache = True

    def __init__(self, reader: MemoryReader, local: Cache | None = None):
        self.reader, self.local_is_given = reader, local is not None
        locals_ = local.layers if local is not None and local.layers else None
        if locals_ is None:
            locals_ = [DynamicLayer() for _ in range(reader.config.num_hidden_layers)]
        super().__init__(layers=[MemoryLayer(layer) for layer in locals_])

    @property
    def has_read(self) -> bool:
        """Whether the question has been routed, so that the prefixes stand."""
        return any(layer.prefix_mask is not None for layer in self.layers)
