"""Dense packing of codes of 1 to 6 bits into bytes: ceil(n * bits / 8) bytes for n codes.

The layout is what the GPU kernels read. Of n codes the first n8 = n // 8 * 8 are stored in planes: a plane of
width w holds 8 / w codes per byte, byte i of m holds codes i, i + m, i + 2m, ... from its low bits upwards,
so that unpacking is a broadcast shift whose result is already in order. Three bits are a plane of the low two
bits and a plane of the high bit; five and six are one of the low four and one of the rest. The last n - n8
codes are one little-endian number, code j at bit j * bits.
"""

import torch

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
MOST_BITS = max(PLANES)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits."""
    return (count * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes [..., n] (uint8, below 2**bits) into uint8 [..., ceil(n * bits / 8)]."""
    count = codes.shape[-1]
    body, parts, low = count // 8 * 8, [], 0
    for width in PLANES[bits]:
        plane = ((codes[..., :body] >> low) & (2**width - 1)).unflatten(-1, (8 // width, -1))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)[:, None]
        parts.append((plane << shifts).sum(dim=-2, dtype=torch.uint8))
        low += width
    if tail := count - body:
        shifts = torch.arange(tail, device=codes.device) * bits
        number = (codes[..., body:].long() << shifts).sum(dim=-1, keepdim=True)
        bytes_ = torch.arange(packed_bytes(tail, bits), device=codes.device) * 8
        parts.append(((number >> bytes_) & 255).to(torch.uint8))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The `count` codes, uint8 [..., count], of packed bytes [..., ceil(count * bits / 8)]."""
    body, start, low, codes = count // 8 * 8, 0, 0, None
    for width in PLANES[bits]:
        size = body * width // 8
        plane = packed[..., start : start + size]
        plane = torch.cat([(plane >> shift) & (2**width - 1) for shift in range(0, 8, width)], dim=-1)
        codes = plane if codes is None else codes | (plane << low)
        start, low = start + size, low + width
    if tail := count - body:
        bytes_ = torch.arange(packed.shape[-1] - start, device=packed.device) * 8
        number = (packed[..., start:].long() << bytes_).sum(dim=-1, keepdim=True)
        shifts = torch.arange(tail, device=packed.device) * bits
        rest = ((number >> shifts) & (2**bits - 1)).to(torch.uint8)
        codes = torch.cat([codes, rest], dim=-1)
    return codes
