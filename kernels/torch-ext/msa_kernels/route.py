"""Routing scores: for every chunk the best token of each question, for every document its best chunk.

Queries are summed over heads before (the mean over heads is linear), so a chunk costs one product of length W
per question token. No tensor has both chunks and question tokens. Axis letters: B questions, T question
tokens, G key/value heads, D head dim, W = G * D, C chunks, N documents (of codes: bytes of a vector), J =
next power of 2 of D, R rows of a tile of question tokens.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from .codes import CODES_PER_BYTE, centroid_table, check_packed, joined_channels, load_centroids, load_scales
from .launch import launch_parameters
from .lookup import assembly_for, byte_tables
from .registration import TRITON_TYPES, interpreted, operator

DENSE_STEP = 64  # channels of a dense key in one product
MOST_QUESTION_NUMBERS = 1 << 14  # of a tile of question tokens and the channels of one product: 32 KB


@triton.jit
def prepare_questions_kernel(
    folded_ptr,  # [B, T, W]
    mask_ptr,  # [B, T] uint8
    channel_ptr,  # [J], not read for dense keys
    prepared_ptr,  # [question tiles, token tiles, R, PADDED]
    affine_ptr,  # [2, rows of prepared]: what a product is multiplied with, and what is added
    question_stride,
    token_stride,
    questions,
    tokens,
    rows,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    JOINED: tl.constexpr,
    PADDED: tl.constexpr,
    QUESTIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Question tokens in the order of the tiles that routing reads, divided by their largest number."""
    SPAN: tl.constexpr = triton.next_power_of_2(PADDED)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = row // (QUESTIONS * TOKENS)
    question = tile // TOKEN_TILES * QUESTIONS + row // TOKENS % QUESTIONS
    token = tile % TOKEN_TILES * TOKENS + row % TOKENS
    real = (question < questions) & (token < tokens)
    place = tl.arange(0, SPAN)
    if JOINED > 0:
        channel = tl.load(channel_ptr + place % JOINED)
        ok = (place < PADDED) & (channel >= 0)
        source = place // JOINED * HEAD_DIM + channel
    else:
        ok = place < WIDTH
        source = place
    start = folded_ptr + question.to(tl.int64) * question_stride + token.to(tl.int64) * token_stride
    states = tl.load(start[:, None] + source[None, :], mask=real[:, None] & ok[None, :], other=0.0)
    states = states.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(states), axis=1), 1e-30)
    asks = tl.load(mask_ptr + question * tokens + token, mask=real, other=0) != 0
    target = prepared_ptr + row[:, None] * PADDED + place[None, :]
    tl.store(target, states / largest[:, None], mask=(row < rows)[:, None] & (place < PADDED)[None, :])
    tl.store(affine_ptr + row, largest, mask=row < rows)
    tl.store(affine_ptr + rows + row, tl.where(asks, 0.0, -float("inf")), mask=row < rows)


@triton.jit
def _as_operand(keys, BLOCK: tl.constexpr, JOINED: tl.constexpr):
    """Permutes centroids [BLOCK, J]: rows as `_operand_rows`, channels as `operand_channels` says.

    Loads deal rows out to 8 quads of threads, then to 4 warps; a tensor core wants 16 rows in a warp, and two
    neighbouring channels from each thread of a quad, again and again. Each thread has loaded what it needs,
    and the permutation says so; without it the tile would go through shared memory.
    """
    parts = tl.reshape(keys, (BLOCK // 64, 2, 4, 8, 4, JOINED // 8, 2))
    return tl.reshape(tl.permute(parts, (0, 2, 1, 3, 5, 4, 6)), (BLOCK, JOINED))


@triton.jit
def _operand_rows(BLOCK: tl.constexpr):
    """[BLOCK], the row of the loaded tile that lies at each row of an operand."""
    row = tl.arange(0, BLOCK)
    return (row & 7) | ((row >> 1) & 24) | ((row << 2) & 32) | (row & -64)


@triton.jit
def _best_tokens(
    products, affine_ptr, row, rows, QUESTIONS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK, R] products of chunks with question tokens -> [BLOCK, QUESTIONS], the best of each."""
    scores = products * tl.load(affine_ptr + row)[None, :] + tl.load(affine_ptr + rows + row)[None, :]
    return tl.max(tl.reshape(scores, (BLOCK, QUESTIONS, TOKENS)), axis=2)


@triton.jit
def _store_scores(out_ptr, best, chunk, chunks, questions, QUESTIONS: tl.constexpr):
    question = tl.program_id(1) * QUESTIONS + tl.arange(0, QUESTIONS)
    target = out_ptr + question[None, :].to(tl.int64) * chunks + chunk[:, None]
    tl.store(target, best, mask=(question < questions)[None, :] & (chunk < chunks)[:, None])


@triton.jit
def route_dense_kernel(
    prepared_ptr,  # [question tiles, TOKEN_TILES, R, PADDED]
    affine_ptr,  # [2, rows]
    keys_ptr,  # [C, W]
    out_ptr,  # [B, C] float32
    questions,
    chunks,
    rows,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    QUESTIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    R: tl.constexpr = QUESTIONS * TOKENS
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key_start = keys_ptr + chunk * WIDTH
    inside = chunk < chunks
    place = tl.arange(0, STEP)
    best = tl.full((BLOCK, QUESTIONS), -float("inf"), tl.float32)
    for tile in range(TOKEN_TILES):
        row = (tl.program_id(1) * TOKEN_TILES + tile) * R + tl.arange(0, R)
        products = tl.zeros((BLOCK, R), tl.float32)
        for start in range(0, PADDED, STEP):
            ok = inside[:, None] & (start + place < WIDTH)[None, :] if PADDED != WIDTH else inside[:, None]
            keys = tl.load(key_start[:, None] + (start + place)[None, :], mask=ok, other=0.0).to(DOT_TYPE)
            asked = tl.load(prepared_ptr + row[None, :] * PADDED + (start + place)[:, None])
            products = tl.dot(keys, asked, products, input_precision=PRECISION)
        best = tl.maximum(best, _best_tokens(products, affine_ptr, row, rows, QUESTIONS, TOKENS, BLOCK))
    _store_scores(out_ptr, best, chunk, chunks, questions, QUESTIONS)


@triton.jit
def route_packed_kernel(
    prepared_ptr,  # [question tiles, TOKEN_TILES, R, G * J]
    affine_ptr,  # [2, rows]
    codes_ptr,  # [C, G, N] uint8
    scales_ptr,  # [C, G]
    table_ptr,  # [2**BITS]
    word0,
    word1,
    word2,
    word3,  # `byte_tables`
    level_ptr,  # [256], not read unless LEVELS
    out_ptr,  # [B, C] float32
    questions,
    chunks,
    rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    QUESTIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    R: tl.constexpr = QUESTIONS * TOKENS
    JOINED: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    BYTES: tl.constexpr = HEAD_DIM * BITS // 8
    first = tl.program_id(0).to(tl.int64) * BLOCK
    loaded = first + tl.arange(0, BLOCK)
    chunk = first + _operand_rows(BLOCK)
    place = tl.arange(0, JOINED)
    best = tl.full((BLOCK, QUESTIONS), -float("inf"), tl.float32)
    for tile in range(TOKEN_TILES):
        row = (tl.program_id(1) * TOKEN_TILES + tile) * R + tl.arange(0, R)
        products = tl.zeros((BLOCK, R), tl.float32)
        scale = load_scales(scales_ptr + chunk * HEADS, chunk < chunks, level_ptr, LEVELS)
        for head in range(HEADS):
            code_ptr = tl.multiple_of(codes_ptr + (loaded * HEADS + head) * BYTES, VECTOR)
            keys = load_centroids(
                code_ptr, loaded < chunks, table_ptr, word0, word1, word2, word3,
                HEAD_DIM, BITS, DOT_TYPE, ASSEMBLY,
            )  # fmt: skip
            keys = _as_operand(keys, BLOCK, JOINED)
            asked = tl.load(prepared_ptr + (row * (HEADS * JOINED) + head * JOINED)[None, :] + place[:, None])
            # The next scales are on their way while this head's product runs.
            more = (chunk < chunks) & (head + 1 < HEADS)
            following = load_scales(scales_ptr + chunk * HEADS + head + 1, more, level_ptr, LEVELS)
            products += tl.dot(keys, asked, input_precision="ieee") * scale[:, None]
            scale = following
        best = tl.maximum(best, _best_tokens(products, affine_ptr, row, rows, QUESTIONS, TOKENS, BLOCK))
    _store_scores(out_ptr, best, chunk, chunks, questions, QUESTIONS)


@cache
def operand_channels(width: int, bits: int, device: torch.device) -> torch.Tensor:
    """The channel at each of the J places of a tile of keys, -1 for padding: int32 [J].

    Of four threads each loads a quarter of `joined_channels`, and they contribute two in turn.
    """
    order = torch.tensor(joined_channels(width, bits), dtype=torch.int32)
    return order.view(4, -1, 2).transpose(0, 1).flatten().to(device)


def question_tile(questions: int, tokens: int, most: int) -> tuple[int, int]:
    """(questions, tokens) of a tile, powers of 2 with a product of 16 to `most`.

    Chunks are read once per tile, so a tile holds as many questions as fit.
    """
    token_rows = min(triton.next_power_of_2(tokens), most)
    question_rows = min(triton.next_power_of_2(questions), most // token_rows)
    return question_rows, max(token_rows, 16 // question_rows)


def _empty_scores(folded, question_mask, keys, scales=None, centroids=None, levels=None):
    return folded.new_empty(folded.shape[0], keys.shape[0], dtype=torch.float32)


@operator(fake=_empty_scores)
def route_scores(
    folded: torch.Tensor,
    question_mask: torch.Tensor,
    keys: torch.Tensor,
    scales: torch.Tensor | None = None,
    centroids: Sequence[float] | None = None,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Chunk scores [B, C] float32: the largest <folded[b, t], key[c]> over the tokens of question b.

    Args:
        folded: [B, T, W] queries summed over the heads of a group; for packed keys in the rotated basis, with
            gains applied.
        question_mask: [B, T] bool. A question without any token scores -inf.
        keys: contiguous [C, W] in bfloat16, float16 or float32 (queries are rounded to the same type), or
            codes uint8 [C, G, N] with `scales` [C, G, 1], `centroids` (2 to 16 numbers, ascending and
            symmetric) and, if the scales are uint8, the meaning of their `levels` [256] float32.

    Raises:
        ValueError: for packed keys of another layout.
    """
    out = torch.empty(folded.shape[0], keys.shape[0], dtype=torch.float32, device=folded.device)
    if not keys.is_contiguous():
        raise ValueError(f"router keys must be contiguous; got strides {keys.stride()}")
    if out.numel() and keys.dtype == torch.uint8:
        _route_packed(out, folded, question_mask, keys, scales, tuple(centroids or ()), levels)
    elif out.numel():
        _route_dense(out, folded, question_mask, keys)
    return out


def _route_dense(out, folded, question_mask, keys):
    chunks, width = keys.shape
    kind = torch.float32 if interpreted() else keys.dtype
    padded = triton.cdiv(width, DENSE_STEP) * DENSE_STEP
    settings = launch_parameters("route_dense", folded.device)
    most = settings.pop("ROWS")
    prepared, affine, tile = _prepare_questions(folded, question_mask, None, 0, padded, kind, most)
    if keys.dtype == torch.float32:
        settings["BLOCK"] //= 2
    grid = (triton.cdiv(chunks, settings["BLOCK"]), prepared.shape[0])
    route_dense_kernel[grid](
        prepared, affine, keys, out, folded.shape[0], chunks, affine.shape[1],
        WIDTH=width, PADDED=padded, STEP=DENSE_STEP, QUESTIONS=tile[0], TOKENS=tile[1],
        TOKEN_TILES=prepared.shape[1], DOT_TYPE=TRITON_TYPES[kind],
        PRECISION="ieee" if interpreted() or kind != torch.float32 else "tf32x3",
        **settings,
    )  # fmt: skip


def _route_packed(out, folded, question_mask, codes, scales, centroids, levels):
    (chunks, heads, _), dim = codes.shape, folded.shape[2] // codes.shape[1]
    check_packed("router keys", codes, scales, centroids, dim, folded.device)
    bits = len(centroids).bit_length() - 1
    if bits > 4 or not scales.is_contiguous():
        raise ValueError(f"router keys must have 1 to 4 bits and contiguous scales; got {bits} bits")
    device, interpreting, joined = folded.device, interpreted(), triton.next_power_of_2(dim)
    channels = operand_channels(dim, bits, device)
    kind = torch.float32 if interpreting else torch.float16
    settings = launch_parameters("route_packed", device)
    most = max(16, min(settings.pop("ROWS"), MOST_QUESTION_NUMBERS // joined))
    prepared, affine, tile = _prepare_questions(
        folded, question_mask, channels, dim, heads * joined, kind, most
    )
    settings["BLOCK"] = max(64, settings["BLOCK"] // max(1, joined // 128, tile[0] * tile[1] // 64))
    grid = (triton.cdiv(chunks, settings["BLOCK"]), prepared.shape[0])
    route_packed_kernel[grid](
        prepared, affine, codes, scales, centroid_table(centroids, device),
        *byte_tables(centroids, torch.float16),
        affine if levels is None else levels, out, folded.shape[0], chunks, affine.shape[1],
        HEADS=heads, HEAD_DIM=dim, BITS=bits, LEVELS=scales.dtype == torch.uint8,
        ASSEMBLY=assembly_for(bits, device),
        QUESTIONS=tile[0], TOKENS=tile[1], TOKEN_TILES=prepared.shape[1],
        VECTOR=_bytes_at_once(codes, joined, bits), DOT_TYPE=TRITON_TYPES[kind],
        **settings,
    )  # fmt: skip


def _bytes_at_once(codes, joined: int, bits: int) -> int:
    """Bytes of a row that a thread loads: a quarter of a plane, as `operand_channels` wants it, if aligned
    like that; at least the 4 that can be copied to shared memory without registers."""
    aligned = codes.shape[2] | codes.data_ptr()
    return min(max(4, joined // CODES_PER_BYTE[bits] // 4), aligned & -aligned)


def _prepare_questions(folded, question_mask, channels, dim: int, padded: int, dtype: torch.dtype, most: int):
    """What `prepare_questions_kernel` writes ([question tiles, token tiles, R, padded], [2, rows]), and the
    `question_tile`."""
    questions, tokens, width = folded.shape
    if folded.stride(2) != 1:
        folded = folded.contiguous()
    tile = question_tile(questions, tokens, most)
    shape = (triton.cdiv(questions, tile[0]), triton.cdiv(tokens, tile[1]), tile[0] * tile[1], padded)
    prepared = torch.empty(shape, dtype=dtype, device=folded.device)
    rows = prepared.numel() // padded
    affine = torch.empty(2, rows, dtype=torch.float32, device=folded.device)
    settings = launch_parameters("prepare_questions", folded.device)
    prepare_questions_kernel[(triton.cdiv(rows, settings["BLOCK"]),)](
        folded, question_mask.contiguous().view(torch.uint8), affine if channels is None else channels,
        prepared, affine, folded.stride(0), folded.stride(1), questions, tokens, rows,
        WIDTH=width, HEAD_DIM=dim, JOINED=0 if channels is None else len(channels), PADDED=padded,
        QUESTIONS=tile[0], TOKENS=tile[1], TOKEN_TILES=shape[1],
        **settings,
    )  # fmt: skip
    return prepared, affine, tile


@triton.jit
def document_maxima_kernel(
    scores_ptr,  # [B, C]
    offsets_ptr,  # [N + 1] int64
    out_ptr,  # [B, N], -inf before
    chunks,
    documents,
    steps,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    """Each chunk finds its document by bisection, and RUN chunks of one document count once.

    Documents may have one chunk or 100,000, and neither programs nor writes to one place may be as many. A
    maximum does not depend on the order of writes. Grid: (blocks of chunks, B).
    """
    run = tl.arange(0, BLOCK // RUN)
    place = tl.program_id(0) * BLOCK + run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    question = tl.program_id(1).to(tl.int64)
    chunk = tl.minimum(place, chunks - 1)
    owner, above = chunk * 0, chunk * 0 + documents
    for _ in range(steps):
        middle = (owner + above) // 2
        begun = tl.load(offsets_ptr + middle) <= chunk
        owner, above = tl.where(begun, middle, owner), tl.where(begun, above, middle)
    scores = tl.load(scores_ptr + question * chunks + place, mask=place < chunks, other=-float("inf"))
    scores = tl.where(scores == 0, 0.0, scores)  # as a whole number -0 lies below all others
    first = tl.min(owner, axis=1)
    alike = first == tl.max(owner, axis=1)
    out_ptr += question * documents
    tl.atomic_max(out_ptr + first, tl.max(scores, axis=1), mask=alike, sem="relaxed")
    tl.atomic_max(out_ptr + owner, scores, mask=(place < chunks) & (alike == 0)[:, None], sem="relaxed")


@triton.jit
def document_means_kernel(scores_ptr, offsets_ptr, out_ptr, chunks, documents, BLOCK: tl.constexpr):
    """Grid: (N, B): a sum in a fixed order, so that it does not differ from run to run."""
    document, question = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(offsets_ptr + document), tl.load(offsets_ptr + document + 1)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        sums += tl.load(scores_ptr + question * chunks + chunk, mask=chunk < end, other=0.0)
    mean = tl.sum(sums, axis=0) / tl.maximum(end - first, 1).to(tl.float32)
    tl.store(out_ptr + question * documents + document, tl.where(end > first, mean, -float("inf")))


def _empty_documents(chunk_scores, offsets):
    return chunk_scores.new_empty(chunk_scores.shape[0], offsets.shape[0] - 1)


@operator(fake=_empty_documents)
def document_maxima(chunk_scores: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The best chunk score of every document: [B, C] float32 -> [B, N], -inf for a document without chunks.

    `offsets` [N + 1] int64 says where the chunks of each document begin, and where the last ones end: at C.
    """
    (questions, chunks), documents = chunk_scores.shape, offsets.shape[0] - 1
    out = torch.full((questions, documents), -torch.inf, dtype=torch.float32, device=chunk_scores.device)
    if out.numel() and chunks:
        settings = launch_parameters("document_maxima", chunk_scores.device)
        document_maxima_kernel[(triton.cdiv(chunks, settings["BLOCK"]), questions)](
            chunk_scores.contiguous(), offsets.contiguous(), out, chunks, documents, documents.bit_length(),
            **settings,
        )  # fmt: skip
    return out


@operator(fake=_empty_documents)
def document_means(chunk_scores: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The mean chunk score of every document; otherwise like `document_maxima`."""
    (questions, chunks), documents = chunk_scores.shape, offsets.shape[0] - 1
    out = torch.empty(questions, documents, dtype=torch.float32, device=chunk_scores.device)
    if out.numel():
        document_means_kernel[(documents, questions)](
            chunk_scores.contiguous(), offsets.contiguous(), out, chunks, documents,
            **launch_parameters("document_means", chunk_scores.device),
        )  # fmt: skip
    return out
