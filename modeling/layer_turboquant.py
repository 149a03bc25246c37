"""One layer of a TurboQuantCache: a dense recent window, and codes of everything that has left it.

Every token is packed once, when `block` tokens have gathered beyond the window, and never again, so the bytes
of a token do not depend on how the tokens arrived, and no error builds up with length. Axis letters: B batch,
T tokens, G key/value heads, D head dim, P packed tokens, L recent tokens.
"""

from collections.abc import Callable, Iterator
from copy import copy

import torch
from transformers.cache_utils import CacheLayerMixin

from .cache_settings import CacheSettings
from .fitted_transforms import FittedTransforms
from .growing_tensor import GrowingTensor, writable
from .kernel_encoding import kernel_encoding, unserved_encoding
from .ops import kernels_for, with_kernels
from .packed_heads import FirstTokens, PackedHeads
from .packed_states import ExactTokens, LayerView, PackedStates

PACKED_AT_ONCE = 512  # tokens, where keys keep their mean


class RecentWindow:
    """The newest tokens in model precision, [B, G, L, D], in a buffer with room for the next ones."""

    def __init__(self):
        self.length = 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, room: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens and returns all recent ones; a new buffer has `room` for that many, at least."""
        length = self.length + keys.shape[2]
        if self.keys is None or length > self.keys.shape[2]:
            room = max(room, length)
            self.keys, self.values = (self._moved(old, new, room) for old, new in self._pairs(keys, values))
        self.keys, self.values = writable(self.keys), writable(self.values)
        self.keys[:, :, self.length : length] = keys
        self.values[:, :, self.length : length] = values
        self.length = length
        return self.view()

    def view(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def drop(self, count: int, room: int) -> None:
        """Forgets the oldest `count` tokens. The rest moves to new buffers with `room` for that many, so that
        views stay valid."""
        rest = [states[:, :, count:] for states in self.view()]
        self.length -= count
        self.keys, self.values = (self._moved(states, states, room) for states in rest)

    def _pairs(self, keys, values):
        olds = (keys[:, :, :0], values[:, :, :0]) if self.keys is None else self.view()
        return zip(olds, (keys, values))

    @staticmethod
    def _moved(old: torch.Tensor, like: torch.Tensor, room: int) -> torch.Tensor:
        batch, heads, _, dim = like.shape
        buffer = like.new_zeros(batch, heads, room, dim)
        buffer[:, :, : old.shape[2]] = old
        return buffer


class TurboQuantLayer(CacheLayerMixin):
    """Keys and values of one attention layer; see `TurboQuantCache`.

    Args:
        settings: what all layers share. index: this layer's number, for its bit map, transforms and messages.
        left_padding: padding tokens before each row. They are no sinks, count for no mean, and decide nothing
            about the codes of real tokens.
        transforms: what a calibration fitted to the heads of the model; None for plain rotations.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        settings: CacheSettings,
        index: int = 0,
        left_padding: list[int] | None = None,
        transforms: FittedTransforms | None = None,
    ):
        super().__init__()
        self.transforms = transforms
        self.settings, self.index, self.left_padding = settings, index, left_padding
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.recent = RecentWindow()
        self.packed_keys: list[PackedHeads] = []
        self.packed_values: list[PackedHeads] = []
        self.means = GrowingTensor()
        self.norms: torch.Tensor | None = None  # [B, G, 2]: median squared length of the first keys, values
        self.exact: ExactTokens | None = None
        self.starts: torch.Tensor | None = None  # [B], number of the first real token, from `left_padding`
        self.packed_length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        heads, device = key_states.shape[1], key_states.device
        codings = [
            self.settings.codings(kind, self.index, heads, states.shape[-1], self.transforms)
            for kind, states in (("keys", key_states), ("values", value_states))
        ]
        self.packed_keys, self.packed_values = (
            [PackedHeads(coding, heads, device) for coding in group] for group in codings
        )
        if self.left_padding is not None:
            repeats, rest = divmod(key_states.shape[0], len(self.left_padding))
            if rest:
                raise ValueError(
                    f"left_padding names {len(self.left_padding)} rows, which do not divide a batch of "
                    f"{key_states.shape[0]}"
                )
            self.starts = torch.tensor(self.left_padding, device=device).repeat_interleave(repeats)
        self.dtype, self.device = key_states.dtype, device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Adds keys and values [B, G, T, D] and returns handles of all, for attention.

        Raises ValueError, before anything is stored, if the shapes differ from those of the tokens that are
        here.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        room = self.room(self.get_seq_length() + key_states.shape[2])
        keys, values = self.recent.append(key_states, value_states, room)
        view = self.view()
        if count := self._leaving():
            undo = self._undo(key_states.shape[2])
            try:
                self._pack(keys, values, count)
            except BaseException:
                undo()
                raise
            self.recent.drop(count, room)
        return PackedStates(view, "keys"), PackedStates(view, "values")

    def _undo(self, added: int) -> Callable[[], None]:
        """What takes this layer back to where it was before `added` tokens came, if they cannot be packed."""
        before = (self.packed_length, copy(self.means), self.norms, self.exact)
        decided = [(part, part.order, part.gain) for part in self._parts()]

        def undo():
            self.recent.length -= added
            self.packed_length, self.means, self.norms, self.exact = before
            for part, part.order, part.gain in decided:
                for stored in part.storage():
                    stored.crop(self.packed_length)
            if not self.get_seq_length():
                self._clear()

        return undo

    def _check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.recent.keys is None:
            return
        for name, new, old in (("keys", keys, self.recent.keys), ("values", values, self.recent.values)):
            if (*new.shape[:2], new.shape[3]) != (*old.shape[:2], old.shape[3]):
                raise ValueError(
                    f"layer {self.index} holds {name} [B, G, T, D] = [{old.shape[0]}, {old.shape[1]}, T, "
                    f"{old.shape[3]}]; got {list(new.shape)}. A kept cache is widened for beams or samples "
                    "with cache.batch_repeat_interleave(n)"
                )

    def _leaving(self) -> int:
        """How many recent tokens are to be packed: whole blocks, counted from the first token of all."""
        length, block = self.get_seq_length(), self.settings.block
        old = max(0, length - self.settings.window_at(length))
        return max(0, old // block * block - self.packed_length)

    def room(self, length: int) -> int:
        """As many tokens as will be recent until the next block leaves, when there are `length` now."""
        window, block = self.settings.window, self.settings.block
        return self.settings.window_at(max(length, window) + 2 * block) + block

    def view(self) -> LayerView:
        """What attention reads now."""
        keys, values = self.recent.view()
        packed = self.packed_length > 0
        return LayerView(
            key_codes=tuple(part.view() for part in self.packed_keys) if packed else (),
            value_codes=tuple(part.view() for part in self.packed_values) if packed else (),
            means=self.means.view() if packed and self.settings.mean_group else None,
            mean_group=self.settings.mean_group,
            exact=self.exact if packed else None,
            keys=keys,
            values=values,
            packed_length=self.packed_length,
        )

    @torch.no_grad()
    def _pack(self, keys: torch.Tensor, values: torch.Tensor, count: int) -> None:
        """Packs the oldest `count` of the recent keys and values [B, G, L, D], slice by slice."""
        for name, states in (("keys", keys), ("values", values)):
            if not states[:, :, :count].isfinite().all():
                raise ValueError(f"the {name} of layer {self.index} hold NaN or infinity: nothing was packed")
        size, done = self.settings.mean_group, 0
        expected = self.packed_length + count
        begins = self._begins()
        while done < count:
            position = self.packed_length
            taken = slice(done, min(count, done + self._slice_length(position, begins)))
            first = self._first_tokens(position, taken.stop - done, begins)
            states = keys[:, :, taken], values[:, :, taken]
            new_keys, new_values = (kind.double() for kind in states)
            if size:
                known = min(size, self.settings.window + self.settings.block)  # of a group, when it is begun
                self._set_mean(keys[:, :, done : done + known], position, first)
                new_keys = new_keys - self.means.view()[:, :, position // size, None].double()
            if self.settings.exact_tokens:
                self._keep_extremes(*states, new_keys, new_values, position, first)
            parts = [(part, new_keys) for part in self.packed_keys]
            parts += [(part, new_values) for part in self.packed_values]
            if first is not None:
                for part, vectors in parts:
                    part.decide(vectors, first)
            if not self._append_by_kernels(*states, expected):
                for part, vectors in parts:
                    part.append(vectors, expected)
            self.packed_length += taken.stop - taken.start
            done = taken.stop

    def _append_by_kernels(self, keys: torch.Tensor, values: torch.Tensor, expected: int) -> bool:
        """Whether kernels could code keys and values [B, G, T, D], and have appended what came out."""
        parts = self.packed_keys, self.packed_values
        if kernels_for(keys.device) is None or unserved_encoding(keys, values, *parts):
            return False
        size = self.settings.mean_group
        means = self.means.view() if size else None
        length = with_kernels(
            keys.device,
            lambda kernels: kernel_encoding(kernels, keys, values, *parts, means, size, expected),
        )
        return length is not None

    def _begins(self) -> list[int]:
        """Where the blocks begin that hold the first real token of a row."""
        block = self.settings.block
        return [0] if self.starts is None else [start // block * block for start in self.starts.tolist()]

    def _slice_length(self, position: int, begins: list[int]) -> int:
        """Tokens from `position` on that are packed together: they share a mean and no row begins among
        them."""
        size = self.settings.mean_group or PACKED_AT_ONCE
        return min([size - position % size, *(begin - position for begin in begins if begin > position)])

    def _first_tokens(self, position: int, length: int, begins: list[int]) -> FirstTokens | None:
        """The first tokens of rows that begin in this slice; None if there are no such rows."""
        block = self.settings.block
        if position and not any(begin <= position < begin + block for begin in begins):
            return None
        index = self._token_index(position, min(length, block - position % block))
        real = index >= 0
        rows = real.any(dim=1) & (index[:, 0] <= 0)
        return FirstTokens(rows, real | ~real.any(dim=1, keepdim=True))

    def _set_mean(self, keys: torch.Tensor, position: int, first: FirstTokens | None) -> None:
        """Keeps the mean of keys [B, G, T, D] for the group at `position`, in which a row may begin late."""
        group = position // self.settings.mean_group
        if self.means.length <= group:
            self.means.append(self._mean(keys, position))
        elif first is not None:
            mean = self._mean(keys, position)
            self.means.map(
                lambda old: torch.cat([old[:, :, :group], first.settle(old[:, :, group:], mean)], 2)
            )

    def _mean(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        """Mean [B, G, 1, D], bfloat16, over the tokens of each row that are neither padding nor sinks; over
        its sinks where no other is there, and over padding where nothing else is."""
        index = self._token_index(position, keys.shape[2])
        weights = index >= self.settings.sinks
        for others in (index >= 0, torch.ones_like(weights)):
            weights = weights | (others & ~weights.any(dim=1, keepdim=True))
        weights = weights.double()[:, None, :, None]
        return ((keys.double() * weights).sum(dim=2, keepdim=True) / weights.sum(2, keepdim=True)).bfloat16()

    def _token_index(self, position: int, length: int) -> torch.Tensor:
        """[1 or B, T], the number of each of `length` tokens in its row, negative for left padding."""
        index = torch.arange(position, position + length, device=self.recent.keys.device)[None]
        return index if self.starts is None else index - self.starts[:, None]

    def _keep_extremes(self, keys, values, centred_keys, centred_values, position: int, first) -> None:
        """Keeps the sinks and the tokens with the longest keys or values of each head as they are.

        A key's length is measured from the mean, both lengths relative to the first tokens packed, because
        the error of a code grows with it. The longest so far stay; what they push out is read from its code.
        """
        lengths = torch.stack([part.square().sum(dim=-1) for part in (centred_keys, centred_values)], dim=-1)
        if first is not None:
            typical = first.of(lengths).nanmedian(dim=2).values.clamp_min(1e-30)
            self.norms = first.settle(self.norms, typical)
        scores = (lengths / self.norms[:, :, None]).amax(dim=-1).float()
        index = self._token_index(position, keys.shape[2])[:, None]
        scores = scores.masked_fill(index < self.settings.sinks, torch.inf).masked_fill(index < 0, -torch.inf)
        positions = torch.arange(position, position + keys.shape[2], dtype=torch.int32, device=keys.device)
        positions = positions.expand(scores.shape).masked_fill(scores == -torch.inf, -1)
        candidates = (keys, values, positions, scores)
        if self.exact is not None:
            candidates = tuple(torch.cat(pair, dim=2) for pair in zip(self.exact.tensors(), candidates))
        order = candidates[3].argsort(dim=2, descending=True, stable=True)[..., : self.settings.exact_tokens]
        wide = order[..., None]
        self.exact = ExactTokens(
            candidates[0].gather(2, wide.expand(*order.shape, keys.shape[3])),
            candidates[1].gather(2, wide.expand(*order.shape, values.shape[3])),
            candidates[2].gather(2, order),
            candidates[3].gather(2, order),
        )

    def get_seq_length(self) -> int:
        return self.packed_length + self.recent.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.recent.keys is None else self.recent.keys.shape[0]

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest -`tokens_to_remove` tokens. Packed ones go byte by byte; none is coded anew."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove; got {tokens_to_remove}")
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if length == 0:
            self._clear()
            return
        self.recent.length = max(0, length - self.packed_length)
        if length >= self.packed_length:
            return
        self.packed_length = length
        for stored in self._storage():
            stored.crop(length)
        if self.settings.mean_group:
            self.means.crop(-(-length // self.settings.mean_group))
        if self.exact is not None:
            gone = self.exact.positions >= length
            self.exact = ExactTokens(
                self.exact.keys,
                self.exact.values,
                self.exact.positions.masked_fill(gone, -1),
                self.exact.scores.masked_fill(gone, -torch.inf),
            )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _parts(self) -> Iterator[PackedHeads]:
        yield from self.packed_keys
        yield from self.packed_values

    def _storage(self) -> Iterator[GrowingTensor]:
        for part in self._parts():
            yield from part.storage()

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies `change`, which acts on the batch or the device, to everything stored."""
        if self.recent.keys is None:
            return
        self.recent.keys, self.recent.values = change(self.recent.keys), change(self.recent.values)
        self.means.map(change)
        for part in self._parts():
            part.map(change)
        self.norms = None if self.norms is None else change(self.norms)
        self.starts = None if self.starts is None else change(self.starts)
        if self.exact is not None:
            self.exact = ExactTokens(*(change(tensor) for tensor in self.exact.tensors()))
