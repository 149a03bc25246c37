"""Entropy coding of a cache's bytes for archives, with the range coder of `constriction`.

Codes of a Lloyd-Max quantiser are not uniform: their entropy is 3.77, 2.83 and 1.91 bits at 4, 3 and 2 bits
(a search over lengths evens them out at 4), and less where a rotated channel is shifted or narrow. A channel
of a head is one row of symbols. All rows of an archive with symbols of the same width share a few frequency
tables, found by Lloyd's algorithm with coding length as the distance, and every row names the table that
codes it in the fewest bits.

Axis letters: B batch, G key/value heads, P packed tokens, N bytes of a vector, R rows, S symbols of a row, K
tables.
"""

import torch

from .bit_packing import pack, packed_bytes, unpack

Parts = tuple[tuple[int, int], ...]  # (symbols, bits of each) of consecutive runs of a vector's bytes

MOST_TABLES = 32
_TABLE_SHARE = 200  # tables take at most this part of the raw bytes
_ROUNDS = 8
_AT_ONCE = 1 << 22  # symbols counted at once


def encode_streams(
    streams: dict[str, tuple[torch.Tensor, Parts]],
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Codes uint8 tensors [B, G, P, N] on the CPU.

    Returns:
        The streams that became shorter, each uint8: the number of every row's table, then the coded symbols;
        and the tables int32 [K, 2^bits] that they need, by bits.

    Raises:
        ImportError: constriction is not installed.
    """
    coders = _constriction()
    counts: dict[int, list[torch.Tensor]] = {}
    for tensor, parts in streams.values():
        for symbols, bits in _rows(tensor, parts):
            counts.setdefault(bits, []).append(_histograms(symbols, 1 << bits))
    tables = {bits: _fit_tables(torch.cat(rows), bits) for bits, rows in counts.items()}
    counted = {bits: iter(rows) for bits, rows in counts.items()}
    coded = {}
    for name, (tensor, parts) in streams.items():
        encoder, chosen = coders.queue.RangeEncoder(), []
        for symbols, bits in _rows(tensor, parts):
            index = _cheapest(next(counted[bits]).double(), tables[bits])
            for number, model in enumerate(_models(coders, tables[bits])):
                run = symbols[index == number].flatten()
                if run.numel():
                    encoder.encode(run.int().numpy(), model)
            chosen.append(index.to(torch.uint8))
        words = encoder.get_compressed().astype("<u4")
        stream = torch.cat([*chosen, torch.from_numpy(words.view("uint8"))])
        if stream.numel() < tensor.numel():
            coded[name] = stream
    return coded, tables if coded else {}


def decode_stream(
    stream: torch.Tensor, tables: dict[int, torch.Tensor], shape: tuple[int, ...], parts: Parts
) -> torch.Tensor:
    """The uint8 tensor [B, G, P, N] that `encode_streams` was given.

    Raises:
        ImportError: constriction is not installed.
    """
    coders = _constriction()
    batch, heads, tokens, _ = shape
    rows = heads * sum(width for width, _ in parts)
    decoder = coders.queue.RangeDecoder(stream[rows:].numpy().view("<u4").astype("uint32"))
    decoded, start = [], 0
    for width, bits in parts:
        index = stream[start : start + heads * width]
        start += heads * width
        symbols = torch.empty(heads * width, batch * tokens, dtype=torch.uint8)
        for number, model in enumerate(_models(coders, tables[bits])):
            chosen = index == number
            if count := int(chosen.sum()) * batch * tokens:
                run = torch.from_numpy(decoder.decode(model, count))
                symbols[chosen] = run.to(torch.uint8).view(-1, batch * tokens)
        symbols = symbols.view(heads, width, batch, tokens).permute(2, 0, 3, 1)
        decoded.append(symbols if bits == 8 else pack(symbols, bits))
    return torch.cat(decoded, dim=-1)


def _rows(tensor: torch.Tensor, parts: Parts):
    """(symbols uint8 [R, S], bits) of each part: a row for each head and channel, over batch and tokens."""
    start = 0
    for width, bits in parts:
        size = width if bits == 8 else packed_bytes(width, bits)
        part = tensor[..., start : start + size]
        symbols = part if bits == 8 else unpack(part, bits, width)
        yield symbols.permute(1, 3, 0, 2).flatten(2).flatten(0, 1), bits
        start += size


def _histograms(symbols: torch.Tensor, levels: int) -> torch.Tensor:
    """int32 [R, levels]: how often each symbol occurs in each row."""
    rows, length = symbols.shape
    counts = torch.zeros(rows, levels, dtype=torch.int32)
    step = max(1, _AT_ONCE // max(1, length))
    for start in range(0, rows if length else 0, step):
        some = symbols[start : start + step].long()
        place = some + torch.arange(len(some))[:, None] * levels
        flat = torch.bincount(place.flatten(), minlength=len(some) * levels)
        counts[start : start + step] = flat.view(len(some), levels).int()
    return counts


def _fit_tables(counts: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [K, 2^bits] frequencies, all at least 1, that code rows with these counts [R, 2^bits] well."""
    levels = counts.shape[1]
    room = int(counts.sum()) * bits // 8 // _TABLE_SHARE // (4 * levels)
    number = max(1, min(MOST_TABLES, len(counts) // 4, room))
    counts = counts.double()
    centre = counts @ torch.arange(levels, dtype=torch.float64) / counts.sum(dim=1).clamp_min(1)
    index = torch.empty(len(counts), dtype=torch.long)
    index[centre.argsort(stable=True)] = torch.arange(len(counts)) * number // max(1, len(counts))
    tables = torch.ones(number, levels, dtype=torch.int32)
    for _ in range(_ROUNDS):
        total = torch.zeros(number, levels, dtype=torch.float64).index_add_(0, index, counts)
        share = total / total.sum(dim=1, keepdim=True).clamp_min(1)
        tables = (share * (1 << 16)).round().clamp_min(1).int()
        index = _cheapest(counts, tables)
    return tables


def _cheapest(counts: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """[R], the table that codes each row in the fewest bits."""
    share = tables.double() / tables.sum(dim=1, keepdim=True)
    return (-counts.double() @ share.log2().mT).argmin(dim=1)


def _models(coders, tables: torch.Tensor) -> list:
    # Whole numbers below 2^24 are exact in float32, so that every platform builds the same models.
    return [coders.model.Categorical(table.float().numpy(), perfect=False) for table in tables]


def _constriction():
    try:
        from constriction import stream
    except ImportError as error:
        raise ImportError(
            "entropy coding of a cache needs the package constriction: pip install constriction"
        ) from error
    return stream
