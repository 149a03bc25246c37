"""The measurements of benchmark.py, one function for each kernel, by name in MEASUREMENTS.

Geometry is that of Llama-3.1-8B: 32 query heads, 8 key/value heads of 128 channels.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial

import torch
from end_to_end import Model, step_time
from operands import Attention, Bits, Encoding, Gathering, Pooling, Ranking, Routing, attention_calls
from peers import (
    attention_twin,
    decoded_attention,
    dense_attention,
    encoding_twin,
    gathering_twin,
    gemm_and_max,
    pooling_twin,
    ranking_twin,
    reference_routing,
    routing_twin,
)
from results import Bar, Result
from timing import Ceilings, Stopwatch, measure_ceilings

from msa_hf import kernels
from msa_hf.modeling.turboquant import PackedVectors

ATTENTION_TOLERANCE = 1e-2  # outputs are bfloat16
ROUTING_TOLERANCE = 5e-3  # questions are rounded to 16 bits
GATHERING_TOLERANCE = 5e-3  # packed rows are bfloat16 with products in TensorFloat-32; dense ones are copies
POOLING_TOLERANCE = 8e-3  # means are bfloat16, which an interpreter cuts off where a GPU rounds
ENCODING_TOLERANCE = 1e-3  # a number that lies between two codes may get either
TINY = {"heads": 4, "groups": 2, "packed": 96, "dim": 64, "recent": 20, "mean_group": 64}


def coding(bits: float, dim: int) -> tuple[Bits, Bits]:
    """Bits of keys and values that are no fewer than `bits` on average, scales included: parts below 4."""
    half, quarter = dim // 2, dim // 4
    return {
        4.0: (4, 4),
        2.7: (((half, 4), (half, 2)), ((quarter, 3), (dim - quarter, 2))),
        1.8: (((half, 3), (half, 1)), ((half, 2), (half, 1))),
    }[bits]


class Session:
    """The device of a run and what it can do at most."""

    def __init__(self, device: torch.device):
        self.device, self.stopwatch = device, Stopwatch(device)

    @property
    def rehearses(self) -> bool:
        return self.stopwatch.rehearses

    @cached_property
    def ceilings(self) -> Ceilings:
        return measure_ceilings(self.stopwatch)

    def sized(self, shape, **tiny):
        """The shape, with some fields made tiny in a rehearsal."""
        return replace(shape, **tiny) if self.rehearses else shape


def rms_ratio(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """Root mean square of the difference over that of the oracle; infinite where ours holds NaN."""
    ratio = float((ours.float() - oracle.float()).norm() / oracle.float().norm().clamp_min(1e-30))
    return ratio if ratio == ratio else float("inf")


def decode(session: Session) -> Iterator[Result]:
    """Decode steps against SDPA in bfloat16, and against decoding the layer first."""
    for batch, context, bits, wanted in (
        (1, 32, 4.0, 2.0),
        (1, 128, 4.0, 2.5),
        (32, 32, 4.0, 2.5),
        (1, 128, 2.7, 3.4),
        (1, 128, 1.8, 4.7),
    ):
        shape = Attention(batch=batch, packed=context * 1024)
        shape = session.sized(shape, batch=min(batch, 2), **TINY)
        shape = replace(shape, bits=(coding(bits, shape.dim),))
        result = _attention(
            "decode_attention", f"decode, {batch} x {context}k, {bits:g} bits", shape, session
        )
        result.note = f"{shape.average_bits:.2f} bits with scales"
        if result.right:
            ratio, share = result.ratio("SDPA"), result.of_copy(session.ceilings)
            result.bars = [
                Bar(f"{result.name}: speed over bfloat16 SDPA", ratio, wanted),
                Bar(f"{result.name}: packed bytes/s over copy bytes/s", share, 0.6),
            ]
        yield result


def prefill(session: Session) -> Iterator[Result]:
    """512 new tokens against a packed prefix."""
    for batch, context, queries in ((1, 32, 512), (4, 8, 512)):
        shape = Attention(batch=batch, packed=context * 1024, queries=queries, recent=queries + 160)
        shape = session.sized(shape, batch=1, queries=9, **TINY)
        name = f"prefill, {queries} tokens behind {batch} x {context}k, 4 bits"
        yield _attention("prefill_attention", name, shape, session)


def attention_sets(shape: Attention, stopwatch: Stopwatch) -> list[list[dict]]:
    """Arguments of the calls of one attention, with operands of different seeds."""
    sets = []
    for seed in range(stopwatch.buffers(shape.code_bytes)):
        query = shape.query(stopwatch.device, seed)
        out = query.new_empty(shape.batch, shape.queries, shape.heads, shape.dim)
        sets.append(attention_calls(shape.view(stopwatch.device, seed), query, out))
    return sets


def run_all(operator: Callable, calls: list[dict]) -> None:
    for arguments in calls:
        operator(**arguments)


def _attention(operator: str, name: str, shape: Attention, session: Session) -> Result:
    stopwatch = session.stopwatch
    view = shape.view(session.device)  # of the first set
    result = Result(name, tolerance=ATTENTION_TOLERANCE, nbytes=shape.code_bytes, flops=shape.product_flops)
    run = getattr(kernels, operator)
    sets = attention_sets(shape, stopwatch)
    run_all(run, sets[0])
    query, ours = sets[0][0]["query"], sets[0][0]["out"]
    result.error = rms_ratio(ours, attention_twin(query, view))
    if not result.right:
        return result
    result.ours = stopwatch.time([partial(run_all, run, calls) for calls in sets])
    del sets
    _dense_peers(result, shape, session)
    result.peers["decode the layer, then SDPA"] = stopwatch.time(
        [lambda: decoded_attention(query, view)], graph=False
    )
    return result


def _dense_peers(result: Result, shape: Attention, session: Session) -> None:
    states = (shape.batch, shape.groups, shape.packed + shape.recent, shape.dim)
    peers: dict[str, list[Callable]] = {}
    nbytes = 2 * shape.dtype.itemsize * torch.Size(states).numel()
    for seed in range(session.stopwatch.buffers(nbytes)):
        keys, values = (torch.randn(states, device=session.device, dtype=shape.dtype) for _ in range(2))
        for name, call in dense_attention(shape.query(session.device, seed), keys, values).items():
            peers.setdefault(name, []).append(call)
    if fastest := session.stopwatch.fastest(peers):
        result.peers[fastest[0]] = fastest[1]


def route(session: Session) -> Iterator[Result]:
    """One router layer over the chunks of 100 million tokens, MSA-4B's geometry, 32 question tokens."""
    for bits in (4, 0):
        shape = session.sized(Routing(chunks=1_562_500, bits=bits), chunks=77, groups=2, dim=64, tokens=5)
        arguments = shape.arguments(session.device)
        name = f"route, {shape.chunks:,} chunks, {f'{bits} bits' if bits else 'bfloat16'}"
        result = Result(name, tolerance=ROUTING_TOLERANCE, nbytes=shape.nbytes, flops=shape.product_flops)
        result.error = rms_ratio(kernels.route_scores(**arguments), routing_twin(arguments, bits))
        if result.right:
            result.ours = session.stopwatch.time(
                [
                    partial(kernels.route_scores, **arguments | {"folded": arguments["folded"] + seed})
                    for seed in range(3)
                ]
            )
            del arguments
            _routing_peers(result, shape, session)
            if bits:
                result.bars = [
                    Bar(f"{name}: milliseconds", result.ours.median, 1.0, at_most=True),
                    Bar(f"{name}: speed over the reference's formula", result.ratio("reference"), 10.0),
                ]
        yield result


def _routing_peers(result: Result, shape: Routing, session: Session) -> None:
    device, heads = session.device, 4 * shape.groups
    numbers = {"dtype": torch.bfloat16, "device": device}
    keys = torch.randn(shape.chunks, shape.groups * shape.dim, **numbers)
    folded = [torch.randn(shape.tokens, shape.groups * shape.dim, **numbers) for _ in range(3)]
    result.peers["bfloat16 GEMM, then max"] = session.stopwatch.time(
        [partial(gemm_and_max, states, keys) for states in folded]
    )
    queries = torch.randn(heads, shape.tokens, shape.dim, **numbers)
    per_chunk = heads * (shape.dim + 2 * shape.tokens) * 2  # repeated keys and the scores of every head
    room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else per_chunk * shape.chunks
    at_once = min(shape.chunks, room // per_chunk)
    whole = "" if at_once == shape.chunks else f", {at_once:,} chunks at once"
    result.peers[f"reference's formula, scores of every head{whole}"] = session.stopwatch.time(
        [lambda: reference_routing(queries, keys.unflatten(1, (shape.groups, -1)), at_once)], graph=False
    )


def rank(session: Session) -> Iterator[Result]:
    """The 16 best of 100,000 documents by their best chunks."""
    shape = session.sized(Ranking(chunks=1_562_500, documents=100_000), chunks=300, documents=20, best=4)
    sets = [shape.arguments(session.device, seed) for seed in range(3)]

    def run(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.top_documents(kernels.document_maxima(**arguments), shape.best)

    name = f"rank, {shape.chunks:,} chunks of {shape.documents:,} documents"
    result = Result(name, nbytes=4 * shape.chunks)  # no tolerance: scores are compared, not computed
    result.error = rms_ratio(run(sets[0])[0], ranking_twin(sets[0], shape.best)[0])
    if result.right:
        result.ours = session.stopwatch.time([partial(run, one) for one in sets])
        result.peers["plain PyTorch"] = session.stopwatch.time(
            [partial(ranking_twin, one, shape.best) for one in sets], graph=False
        )
    yield result


def encode(session: Session) -> Iterator[Result]:
    """Keys and values of one layer, 32k tokens, at 4 bits with 8 bit scales."""
    for search in (1, 9):
        shape = session.sized(
            Encoding(tokens=32768, search=search), groups=2, tokens=70, dim=64, mean_group=64
        )
        device = session.device
        states = [shape.states(device, seed) for seed in range(session.stopwatch.buffers(shape.nbytes))]
        calls = [shape.arguments(*one) for one in states]
        kernels.encode(**calls[0])
        result = Result(
            f"encode, 1 x 32k, 4 bits, search {search}", tolerance=ENCODING_TOLERANCE, nbytes=shape.nbytes
        )
        wanted = encoding_twin(shape, *states[0])
        result.error = max(
            rms_ratio(PackedVectors(coding.codes, coding.scales, twin.quantizer).decode(), twin.decode())
            for coding, twin in zip(calls[0]["codings"], wanted)
        )
        if result.right:
            result.ours = session.stopwatch.time([partial(kernels.encode, **call) for call in calls])
            result.peers["plain PyTorch"] = session.stopwatch.time(
                [lambda states=states, shape=shape: encoding_twin(shape, *states[0])], graph=False
            )
            share = result.of_copy(session.ceilings)
            result.bars = [Bar(f"{result.name}: bytes/s over copy bytes/s", share, 0.5)]
        yield result


def gather(session: Session) -> Iterator[Result]:
    """The pooled keys and values of 16 documents of 100 chunks each for 8 questions."""
    for bits in (0, 4):
        shape = session.sized(
            Gathering(chunks=200_000, bits=bits), samples=2, places=40, chunks=99, groups=2, dim=64
        )
        operator, device = getattr(kernels, shape.operator), session.device
        sets = [shape.arguments(device, seed) for seed in range(session.stopwatch.buffers(shape.nbytes))]
        result = Result(
            f"gather, 8 x 1600 chunks, {f'{bits} bits' if bits else 'bfloat16'}",
            tolerance=GATHERING_TOLERANCE if bits else 0.0,
            nbytes=shape.nbytes,
        )
        pairs = zip(operator(**sets[0]), gathering_twin(shape, sets[0]))
        result.error = max(rms_ratio(ours, twin) for ours, twin in pairs)
        if result.right:
            result.ours = session.stopwatch.time([partial(operator, **arguments) for arguments in sets])
            result.peers["plain PyTorch"] = session.stopwatch.time(
                [partial(gathering_twin, shape, arguments) for arguments in sets], graph=not bits
            )
        yield result


def pool(session: Session) -> Iterator[Result]:
    """Keys, values and router keys of 16 documents of 4,096 tokens, in chunks of 64."""
    shape = session.sized(Pooling(), documents=2, tokens=70, groups=2, dim=64)
    device = session.device
    sets = [shape.arguments(device, seed) for seed in range(session.stopwatch.buffers(shape.nbytes))]
    result = Result("pool, 16 x 4096 tokens", tolerance=POOLING_TOLERANCE, nbytes=shape.nbytes)
    pairs = zip(kernels.pool_chunks(**sets[0]), pooling_twin(sets[0]))
    result.error = max(rms_ratio(ours, twin) for ours, twin in pairs)
    if result.right:
        result.ours = session.stopwatch.time([partial(kernels.pool_chunks, **one) for one in sets])
        result.peers["plain PyTorch"] = session.stopwatch.time(
            [partial(pooling_twin, one) for one in sets], graph=False
        )
    yield result


def end_to_end(session: Session) -> Iterator[Result]:
    """Decode steps of a random Llama of 8B geometry behind 32k tokens."""
    sizes = Model()
    if session.rehearses:
        sizes = Model(layers=2, hidden=64, heads=4, groups=2, inner=64, vocabulary=100)
    context, steps = (512, 2) if session.rehearses else (32768, 64)
    model = sizes.build(session.device, context + 8 * steps)
    for batch, wanted in ((1, 1.0), (16, 1.5)):
        batch = min(batch, 2) if session.rehearses else batch
        runs = 1 if session.rehearses else 3
        result = Result(f"decode of a model, {batch} x 32k, TurboQuantCache", note=f"{sizes.layers} layers")
        result.ours = step_time(model, "4bit", batch, context, steps, runs)
        result.peers["DynamicCache, SDPA"] = step_time(model, "dense", batch, context, steps, runs)
        ratio = result.ratio("DynamicCache")
        result.bars = [Bar(f"{result.name}: tokens/s over DynamicCache", ratio, wanted)]
        yield result


def _freed(measurement: Callable[[Session], Iterator[Result]]) -> Callable[[Session], Iterator[Result]]:
    """The measurement, with the memory of each result given back before the next one."""

    def run(session: Session) -> Iterator[Result]:
        for result in measurement(session):
            yield result
            gc.collect()
            if session.device.type == "cuda":
                torch.cuda.empty_cache()

    return run


MEASUREMENTS = {
    function.__name__: _freed(function)
    for function in (decode, prefill, route, rank, encode, gather, pool, end_to_end)
}
