"""Storage that tokens are appended to without copying what is there each time."""

from collections.abc import Callable

import torch


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it must not be written to: autograd may have saved it for a backward pass,
    or it was made in inference mode and that is over."""
    frozen = tensor.is_inference() and not torch.is_inference_mode_enabled()
    return tensor.clone() if frozen or torch.is_grad_enabled() else tensor


class GrowingTensor:
    """Rows [B, G, T, ...] in a buffer that is enlarged by an eighth when it is full.

    The first append allocates exactly what it is told to expect, so a prefilled cache holds no reserve.
    `view()`
    stays valid after later appends: rows are never moved or changed, a larger buffer is a new one.
    """

    def __init__(self):
        self.buffer: torch.Tensor | None = None
        self.length = 0

    def append(self, rows: torch.Tensor, expected: int = 0) -> None:
        """Adds rows [B, G, T, ...]; `expected` is how many rows there will be at least, if that is known."""
        begin = self.length
        self.extend(rows.shape[2], rows, expected)
        self.buffer[:, :, begin : self.length] = rows

    def extend(self, count: int, like: torch.Tensor, expected: int = 0) -> None:
        """Adds `count` rows such as `like` [B, G, any, ...] has, for the caller to write: until then, they
        hold anything."""
        length = self.length + count
        if self.buffer is None or length > self.buffer.shape[2]:
            batch, heads, _, *rest = like.shape
            room = max(length, expected, self.length * 9 // 8)
            grown = like.new_empty(batch, heads, room, *rest)
            if self.length:
                grown[:, :, : self.length] = self.view()
            self.buffer = grown
        self.buffer = writable(self.buffer)
        self.length = length

    def view(self) -> torch.Tensor:
        """The rows so far, [B, G, T, ...], without a copy."""
        return self.buffer[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Keeps the first `length` rows."""
        self.length = min(self.length, length)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces the rows by `change(rows)`, which may alter the batch but not the number of rows."""
        if self.buffer is not None:
            self.buffer = change(self.view()).contiguous()

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the buffer beyond its rows."""
        return 0 if self.buffer is None else self.buffer.nbytes - self.view().nbytes
