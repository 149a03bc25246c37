"""A cache layer whose codes come from the kernel: the same bytes however tokens arrive, and those of plain
PyTorch up to ties."""

import logging

import pytest
import torch
from kernel_cases import DEVICE, poisoned, rms_ratio

from msa_hf import kernels
from msa_hf.modeling import ops
from msa_hf.modeling.cache_settings import CacheSettings
from msa_hf.modeling.kernel_encoding import unserved_encoding
from msa_hf.modeling.layer_turboquant import TurboQuantLayer

B, G, T, D = 2, 2, 45, 32
SMALL = {"window": 8, "block": 4, "mean_group": 16, "sinks": 2, "extremes": 2, "code_search": 2}
# One number in 10,000 lies so near a boundary that float32 and float64 choose different codes.
DECODED_ERROR = 0.01
CODES_THAT_DIFFER = 0.002
CASES = {
    "four bits": {},
    "padding": {"padding": [0, 21]},
    "heads of their own": {"key_bits": [[3, 4]], "value_bits": [[2, 2]], "padding": [5, 0]},
    "more codings of values": {"key_bits": 1, "value_bits": [[4, 3]], "code_search": 1},
    "nothing but codes": {"mean_group": 0, "sinks": 0, "extremes": 0, "padding": [0, 9]},
    "scales in 16 bits": {"key_scale_bits": 16, "value_scale_bits": 16, "rotation": "haar"},
}


@pytest.fixture(autouse=True)
def any_kernels():
    yield
    ops.use_kernels(None)


@pytest.fixture
def launches(monkeypatch):
    """Numbers of tokens that the kernel was given, launch after launch."""
    counts, encode = [], kernels.encode

    def counted(codings, *arguments):
        counts.append(codings[0].states.shape[2])
        return encode(codings, *arguments)

    monkeypatch.setattr(kernels, "encode", counted)
    return counts


def tokens(count=T, seed=0, dtype=torch.bfloat16):
    """Random keys and values [B, G, T, D], keys with an offset, some of both far out."""
    generator = torch.Generator().manual_seed(seed)
    far = 1 + 4 * (torch.rand(2, B, G, count, 1, generator=generator) < 0.1)
    states = torch.randn(2, B, G, count, D, generator=generator) * far
    states[0] += 3 * torch.randn(1, G, 1, D, generator=generator)
    return tuple(states.to(DEVICE, dtype))


def filled(states, triton, size=T, padding=None, **changes):
    """A layer that was given keys and values in blocks of `size`, and codes with kernels or without."""
    ops.use_kernels(triton)
    layer = TurboQuantLayer(CacheSettings(**(SMALL | changes)), 0, padding)
    with poisoned():
        for blocks in zip(*(kind.split(size, dim=2) for kind in states)):
            layer.update(*blocks)
    return layer


def parts(layer):
    return *layer.packed_keys, *layer.packed_values


def contents(layer):
    """Everything that the packed tokens are read with, as bytes."""
    stored = [growing.view() for part in parts(layer) for growing in part.storage()]
    stored += [part.gain for part in parts(layer) if part.gain is not None]
    stored += [] if layer.exact is None else layer.exact.tensors()
    stored += [layer.means.view()] if layer.means.length else []
    return [tensor.contiguous().view(torch.uint8) for tensor in stored]


def same(one, other):
    one, other = contents(one), contents(other)
    return len(one) == len(other) and all(map(torch.equal, one, other))


def check(layer, plain):
    """Against a layer of plain PyTorch: everything but codes is equal, and few codes differ."""
    assert layer.packed_length == plain.packed_length > 0
    for ours, twin in zip(parts(layer), parts(plain)):
        assert all(stored.length == layer.packed_length for stored in ours.storage())
        assert (ours.gain is None) == (twin.gain is None)
        assert ours.gain is None or torch.equal(ours.gain, twin.gain)
        assert (ours.codes.view() != twin.codes.view()).double().mean() <= CODES_THAT_DIFFER
    if plain.exact is not None:
        assert all(map(torch.equal, layer.exact.tensors(), plain.exact.tensors()))
    for kind in ("dense_keys", "dense_values"):
        ours, twin = (getattr(each.view(), kind)() for each in (layer, plain))
        assert rms_ratio(ours, twin) <= DECODED_ERROR


@pytest.mark.parametrize("case", CASES)
def test_bytes_do_not_show_how_tokens_came(case, launches):
    states = tokens()
    layer = filled(states, True, **CASES[case])
    pairs = max(len(layer.packed_keys), len(layer.packed_values))
    assert sum(launches) == layer.packed_length * pairs
    for size in (7, 1) if "padding" in CASES[case] else (7,):
        assert same(layer, filled(states, True, size, **CASES[case]))
    check(layer, filled(states, False, **CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_precisions(dtype, launches):
    states = tokens(dtype=dtype)
    layer = filled(states, True, 7)
    assert launches
    check(layer, filled(states, False))


def test_rows_do_not_know_of_each_other():
    states = tokens()
    layer = filled(states, True, padding=[0, 21])
    layer.batch_select_indices(torch.tensor([1]))
    assert same(layer, filled([kind[1:] for kind in states], True, padding=[21]))


def test_packing_goes_on_behind_what_was_cropped_and_widened(launches):
    """A buffer with room, cut into the middle of a group, and rows that are others than before."""
    states, later = tokens(), tokens(40, seed=1)
    layers = []
    for triton in (True, False):
        layer = filled(states, triton, 7)
        layer.crop(-20)
        layer.reorder_cache(torch.tensor([1, 0]))
        for blocks in zip(*(kind.split(9, dim=2) for kind in later)):
            layer.update(*blocks)
        layers.append(layer)
    assert sum(launches) > T
    check(*layers)


def failing_after(calls, error):
    """`kernels.encode` for some calls; then it writes garbage and raises."""
    encode, count = kernels.encode, iter(range(1000))

    def failing(codings, position, *arguments):
        encode(codings, position, *arguments)
        if next(count) >= calls:
            for coding in codings:
                coding.codes[:, :, position:] = 0xFF
            raise error

    return failing


@pytest.mark.parametrize("calls", [0, 1, 4, 5])
def test_plain_pytorch_goes_on_where_a_kernel_failed(calls, monkeypatch, caplog):
    """It codes the very slice of which a part was written, and all later ones."""
    changes = {"key_bits": [[3, 4]], "padding": [0, 9]}
    monkeypatch.setattr(kernels, "encode", failing_after(calls, RuntimeError("no such launch")))
    with caplog.at_level(logging.WARNING):
        layer = filled(tokens(), True, 7, **changes)
    assert [record.message for record in caplog.records if record.name == ops.logger.name] == [
        "plain PyTorch goes on without Triton kernels, because of RuntimeError: no such launch"
    ]
    plain = filled(tokens(), False, 7, **changes)
    check(layer, plain)
    assert calls or same(layer, plain)


@pytest.mark.parametrize("calls", [0, 1])
def test_an_interrupted_launch_never_happened(calls, monkeypatch):
    changes = {"key_bits": [[3, 4]], "padding": [0, 9]}
    states, later = tokens(24), tokens(T - 24, seed=1)
    layer = filled(states, True, **changes)
    before = [tensor.clone() for tensor in contents(layer)]
    monkeypatch.setattr(kernels, "encode", failing_after(calls, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        layer.update(*later)
    assert all(map(torch.equal, before, contents(layer)))
    monkeypatch.undo()
    layer.update(*later)
    whole = [torch.cat(pair, dim=2) for pair in zip(states, later)]
    assert same(layer, filled(whole, True, **changes))


@pytest.mark.parametrize(
    "changes, dtype, dim, reason",
    [
        ({"key_bits": "1/2x4+1/2x2"}, torch.bfloat16, D, "several parts"),
        ({"value_bits": 5}, torch.bfloat16, D, "1 to 4 bits; they have 5"),
        ({"form": "polar"}, torch.bfloat16, D, "another form"),
        ({}, torch.bfloat16, 12, "from 16 to 256; it is 12"),
        ({}, torch.float64, D, "they are torch.float64"),
    ],
)
def test_what_the_kernel_does_not_code_is_plain_pytorch(changes, dtype, dim, reason, launches):
    states = [kind[..., :dim] for kind in tokens(dtype=dtype)]
    layer, plain = (filled(states, triton, **changes) for triton in (True, False))
    assert not launches and same(layer, plain)
    assert reason in unserved_encoding(*layer.recent.view(), layer.packed_keys, layer.packed_values)
    # What stays exact is what came, also where no precision is lost by computing with it.
    places = layer.exact.positions.long()[..., None].expand(*layer.exact.positions.shape, dim)
    assert torch.equal(layer.exact.keys, states[0].gather(2, places))


def test_no_kernel_runs_on_a_cpu_unless_it_is_asked_for(launches):
    states = [kind.cpu() for kind in tokens()]
    assert same(filled(states, None), filled(states, False)) and not launches


def test_filled_in_inference_mode_and_used_without():
    states, later = tokens(), tokens(30, seed=1)
    with torch.inference_mode():
        layer = filled(states, True)
    layer.update(*(kind.requires_grad_() for kind in later))
    whole = [torch.cat(pair, dim=2) for pair in zip(states, later)]
    assert same(layer, filled(whole, True))
