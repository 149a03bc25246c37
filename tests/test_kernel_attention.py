"""Attention kernels on packed keys and values against the plain path of modeling/attention_turboquant.py."""

import pytest
import torch
from kernel_cases import DEVICE, HEAD_DIMS, LENGTHS, SHARES, WIDTHS, poisoned, rms_ratio

from msa_hf import kernels
from msa_hf.kernels.registration import interpreted
from msa_hf.modeling import ops
from msa_hf.modeling.attention_turboquant import turboquant_attention
from msa_hf.modeling.kernel_attention import DECODE_ROWS, kernel_attention, unserved
from msa_hf.modeling.packed_states import ExactTokens, HeadCodes, LayerView, PackedStates
from msa_hf.modeling.turboquant import Transform, VectorQuantizer, quantize

FULL_PRECISION = 1e-5
HALF_PRECISION = 6e-3  # half-precision products of rotated queries, weights and centroids
TOLERANCE = FULL_PRECISION if interpreted() else HALF_PRECISION
MEAN_GROUP = 64
RECENT = 19
EXACT = 3


def head_codes(vectors, bits, heads=None, scale_bits=8, seed=0) -> HeadCodes:
    """Codes of vectors [B, G, P, D] for some heads, with a gain of 2 where scales have 8 bits.

    `bits` are those of all channels, or (channels, bits) of each part.
    """
    dim = vectors.shape[-1]
    parts = ((dim, bits),) if isinstance(bits, int) else bits
    quantizer = VectorQuantizer(parts, scale_rule="matched_norm", scale_bits=scale_bits)
    transform = Transform.rotation("hadamard", (dim,), seed)
    index = None if heads is None else torch.tensor(heads, device=vectors.device)
    chosen = vectors if index is None else vectors[:, index]
    gain = None
    if scale_bits == 8:
        gain = torch.full((*chosen.shape[:2], 1, 1), 2.0, device=vectors.device)
        chosen = chosen / 2
    return HeadCodes(quantize(chosen, quantizer, transform), transform, index, None, gain, heads)


def layer_view(batch, groups, packed, dim, key_bits, value_bits, *, recent=RECENT, exact=EXACT, means=True,
               dtype=torch.float32, parts=((None, None),), scale_bits=8) -> LayerView:  # fmt: skip
    """A layer with random tokens; `parts` names the heads of each pair of key and value codes."""
    generator = torch.Generator().manual_seed(packed + dim)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    exact_tokens = None
    if exact:
        places = torch.stack(
            [torch.randperm(packed + 2, generator=generator)[:exact] for _ in range(batch * groups)]
        )
        positions = torch.where(places < packed, places, -1).view(batch, groups, -1).int().to(DEVICE)
        exact_tokens = ExactTokens(
            random(batch, groups, exact, dim), random(batch, groups, exact, dim), positions, positions.float()
        )
    keys, values = random(batch, groups, packed, dim), random(batch, groups, packed, dim)
    group_means = random(batch, groups, -(-packed // MEAN_GROUP), dim).bfloat16() if means else None
    return LayerView(
        key_codes=tuple(head_codes(keys, key_bits, own[0], scale_bits, 1) for own in parts),
        value_codes=tuple(head_codes(values, value_bits, own[1], scale_bits, 2) for own in parts),
        means=group_means,
        mean_group=MEAN_GROUP if means else 0,
        exact=exact_tokens,
        keys=random(batch, groups, recent, dim),
        values=random(batch, groups, recent, dim),
        packed_length=packed,
    )


def both(view: LayerView, share: int, tokens: int = 1, mask=None, softcap=None):
    """(kernel, plain) attention of random queries, with poisoned memory for the kernel."""
    batch, groups, _, dim = view.keys.shape
    query = torch.randn(batch, groups * share, tokens, dim, generator=torch.Generator().manual_seed(1))
    query = query.to(DEVICE, view.keys.dtype)
    assert not unserved(view, mask, True, None)
    with poisoned():
        ours = kernel_attention(kernels, query, view, mask, dim**-0.5, softcap)
    with ops.override(code_scores=ops.plain_code_scores, code_sums=ops.plain_code_sums):
        plain, _ = turboquant_attention(
            torch.nn.Module(),
            query,
            PackedStates(view, "keys"),
            PackedStates(view, "values"),
            mask,
            softcap=softcap,
        )
    return ours, plain


def left_padding(view: LayerView, padding: list[int]) -> torch.Tensor:
    return torch.arange(view.length, device=DEVICE) >= torch.tensor(padding, device=DEVICE)[:, None]


@pytest.mark.parametrize("packed", LENGTHS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_decoding_equals_the_plain_path(bits, dim, share, packed):
    """Two rows, one of them padded on the left; values have another width than keys."""
    view = layer_view(2, 1, packed, dim, bits, 5 - bits)
    ours, plain = both(view, share, mask=left_padding(view, [0, packed // 2]))
    assert rms_ratio(ours, plain) < TOLERANCE


@pytest.mark.parametrize("packed", LENGTHS)
@pytest.mark.parametrize(("share", "tokens"), ((1, 17), (4, 5), (8, 3)))
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_prompts_equal_the_plain_path(bits, dim, share, tokens, packed):
    """As above with more rows than a decode step has."""
    view = layer_view(2, 1, packed, dim, bits, 5 - bits)
    assert share * tokens > DECODE_ROWS
    ours, plain = both(view, share, tokens, left_padding(view, [0, packed // 2]))
    assert rms_ratio(ours, plain) < TOLERANCE


@pytest.mark.parametrize("tokens", (2, 5, 17))
@pytest.mark.parametrize("dim", (64, 96))
def test_several_tokens_see_only_what_is_before_them(dim, tokens):
    view = layer_view(2, 2, 129, dim, 4, 4)
    ours, plain = both(view, 2, tokens, left_padding(view, [0, 140]))
    assert rms_ratio(ours, plain) < TOLERANCE


@pytest.mark.parametrize("bits", WIDTHS)
def test_prompts_against_a_packed_prefix(bits, monkeypatch):
    """Tokens first and rows first, as on the devices that have few and many registers."""
    view = layer_view(1, 1, 129, 64, bits, bits, recent=70)
    for rows in (32, 128):
        monkeypatch.setitem(
            kernels.launch.PARAMETERS["prefill_attention"], (0, 0),
            {"ROWS": rows, "TOKENS": 32, "num_warps": 4, "num_stages": 1},
        )  # fmt: skip
        ours, plain = both(view, 4, 45)
        assert rms_ratio(ours, plain) < TOLERANCE


@pytest.mark.parametrize("change", (
    {"exact": 0}, {"means": False}, {"scale_bits": 16}, {"recent": 1}, {"exact": 20},
    {"dtype": torch.bfloat16}, {"dtype": torch.float16},
), ids=str)  # fmt: skip
def test_every_part_may_be_absent(change):
    view = layer_view(2, 2, 129, 64, 4, 3, **change)
    ours, plain = both(view, 2)
    assert rms_ratio(ours, plain) < (TOLERANCE if view.keys.dtype == torch.float32 else HALF_PRECISION)


@pytest.mark.parametrize("bits", (5, 6))
def test_wider_codes(bits):
    ours, plain = both(layer_view(1, 1, 63, 80, bits, bits), 4)
    assert rms_ratio(ours, plain) < TOLERANCE


@pytest.mark.parametrize(("keys", "values"), (
    (((16, 4), (48, 1)), 2), (3, ((8, 6), (56, 2))), (((24, 3), (40, 1)), ((8, 5), (56, 3))),
    (((32, 6), (32, 2)), ((8, 3), (56, 1))),
), ids=str)  # fmt: skip
@pytest.mark.parametrize("scale_bits", (8, 16))
def test_two_parts(keys, values, scale_bits):
    """The widths and bits that calibrations choose."""
    view = layer_view(2, 1, 129, 64, keys, values, scale_bits=scale_bits)
    for tokens in (1, 9):
        ours, plain = both(view, 4, tokens, left_padding(view, [0, 77]))
        assert rms_ratio(ours, plain) < TOLERANCE


def test_heads_that_are_coded_apart():
    """Key and value codes divide the heads differently, so three launches fill one output."""
    view = layer_view(2, 4, 129, 64, 4, 2, parts=(((0, 2), (1, 2, 3)), ((3, 1), (0,))))
    ours, plain = both(view, 2)
    assert rms_ratio(ours, plain) < TOLERANCE


def test_soft_capping():
    view = layer_view(1, 2, 129, 64, 4, 4)
    ours, plain = both(view, 2, 3, softcap=2.0)
    assert rms_ratio(ours, plain) < TOLERANCE
    assert rms_ratio(ours, both(view, 2, 3)[1]) > 0.05


def test_holes_in_the_mask_and_rows_that_see_nothing():
    view = layer_view(3, 1, 129, 64, 4, 4)
    mask = torch.rand(3, view.length, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    mask[2] = False
    ours, plain = both(view, 4, mask=mask)
    assert rms_ratio(ours, plain) < TOLERANCE
    assert not ours[2].any()


@pytest.mark.parametrize("window", (1, 20, 100))
def test_sliding_window(window):
    """Against a softmax over everything decoded, with the window in the mask."""
    view, tokens, dim = layer_view(2, 2, 129, 64, 4, 4), 3, 64
    query = torch.randn(2, 4, tokens, dim, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ours = torch.empty(2, tokens, 4, dim, device=DEVICE)
    kernels.decode_attention(*operator_arguments(ours, query, view), window)
    position = torch.arange(view.length, device=DEVICE)
    own = position[-tokens:, None]
    allowed = (position <= own) & (position > own - window)
    keys, values = (states.repeat_interleave(2, dim=1) for states in (view.dense_keys(), view.dense_values()))
    oracle = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=allowed)
    assert rms_ratio(ours.transpose(1, 2), oracle) < TOLERANCE


def operator_arguments(out, query, view: LayerView) -> tuple:
    """All arguments of `decode_attention` but the window."""
    noted = []
    recorder = type("Recorder", (), {"decode_attention": lambda self, *args: noted.append(args)})()
    kernel_attention(recorder, query, view, None, query.shape[-1] ** -0.5, None)
    [arguments] = noted
    return (out, query, *arguments[2:-3])


def test_nothing_packed_is_plain_attention():
    view, dim = layer_view(1, 1, 63, 64, 4, 4), 64
    query = torch.randn(1, 4, 1, dim, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    out = torch.empty(1, 1, 4, dim, device=DEVICE)
    arguments = list(operator_arguments(out, query, view))
    for place in (3, 4, 8, 9):  # codes and scales
        arguments[place] = arguments[place][:, :, :0]
    arguments[14:20] = [None, 0, None, None, None, arguments[19]]
    kernels.decode_attention(*arguments, 0)
    keys, values = view.keys.expand(1, 4, -1, -1), view.values.expand(1, 4, -1, -1)
    oracle = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    assert rms_ratio(out.transpose(1, 2), oracle) < TOLERANCE


def test_what_cannot_be_read_is_refused():
    view = layer_view(1, 1, 63, 64, 4, 4)
    query = torch.randn(1, 4, 1, 64, device=DEVICE)
    out = torch.full((1, 1, 4, 64), 7.0, device=DEVICE)
    arguments = operator_arguments(out, query, view)
    for place, change, message in (
        (3, lambda codes: codes[..., :-1], "key_codes must be uint8 with 32 bytes"),
        (3, lambda codes: codes[:, :, ::2], "key_codes must lie token after token"),
        (5, lambda table: table[:-1], "key_codes must have 2 to 64 centroids"),
        (8, lambda codes: codes.int(), "value_codes must be uint8"),
        (
            9,
            lambda scales: scales[:, :, :-1],
            "value_codes must lie token after token, with a scale for each part",
        ),
    ):
        wrong = list(arguments)
        wrong[place] = change(wrong[place])
        with pytest.raises(ValueError, match=message):
            kernels.decode_attention(*wrong, 0)
    assert (out == 7).all()


def test_compiles_as_one_graph():
    view = layer_view(1, 1, 63, 64, 4, 4)
    query = torch.randn(1, 4, 1, 64, device=DEVICE)

    def step(query):
        out = torch.empty(1, 1, 4, 64, device=DEVICE)
        kernels.decode_attention(*operator_arguments(out, query, view), 0)
        return out * 2

    arguments = operator_arguments(torch.empty(1, 1, 4, 64, device=DEVICE), query, view)

    def compiled(query, *rest):
        out = torch.empty_like(query.transpose(1, 2))
        kernels.decode_attention(out, query, *rest, 0)
        return out * 2

    graph = torch.compile(compiled, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(query, *arguments[2:]), step(query))
