"""One cache layer: bytes depend on the tokens of a row alone, and every operation on them is exact."""

import copy
from dataclasses import replace
from math import lcm

import pytest
import torch
from cache_twin import TwinLayer
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_hf.modeling.cache_settings import CacheSettings
from msa_hf.modeling.growing_tensor import GrowingTensor
from msa_hf.modeling.layer_turboquant import TurboQuantLayer
from msa_hf.modeling.turboquant import VectorQuantizer

G, D = 2, 12
SMALL = {"window": 8, "block": 4, "mean_group": 16, "sinks": 2, "extremes": 2, "code_search": 2}
BITS = st.sampled_from([1, 2, 3, 4, "1/2x4+1/2x2", [[2, 4]], [["1/3x4+2/3x3", 1]]])


@st.composite
def cache_settings(draw):
    block = draw(st.sampled_from([1, 3, 4, 8]))
    return CacheSettings(
        key_bits=draw(BITS),
        value_bits=draw(BITS),
        window=draw(st.sampled_from([0, 1, 5, 8])),
        window_grows_from=draw(st.sampled_from([None, 8, 20])),
        block=block,
        mean_group=block * draw(st.sampled_from([0, 1, 2, 4])),
        sinks=draw(st.sampled_from([0, 1, 3])),
        extremes=draw(st.sampled_from([0, 1, 3, 40])),
        key_scale_bits=draw(st.sampled_from([8, 16])),
        value_scale_bits=draw(st.sampled_from([8, 16])),
        code_search=draw(st.sampled_from([1, 2, 9])),
    )


def tokens(rows, count, seed=0, coarse=False, dtype=torch.float32):
    """Random keys and values [B, G, T, D]: channels of their own size and offset, some tokens far out.

    Coarse ones are small whole numbers, among which everything ties with something.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(2, 1, G, 1, D, generator=generator) * 2 + 0.2
    offset = 3 * torch.randn(2, 1, G, 1, D, generator=generator)
    far = 1 + 4 * (torch.rand(2, rows, G, count, 1, generator=generator) < 0.1)
    states = torch.randn(2, rows, G, count, D, generator=generator) * size * far + offset
    return tuple((states.round().clamp(-2, 2) if coarse else states).to(dtype))


def filled(layer_settings, states, padding=None, cuts=()):
    """A layer that was given keys and values in chunks that end at `cuts`."""
    layer = TurboQuantLayer(layer_settings, 0, padding)
    ends = [*sorted(set(cuts)), states[0].shape[2]]
    for begin, end in zip([0, *ends], ends):
        layer.update(*(s[:, :, begin:end] for s in states))
    return layer


def contents(layer):
    """Everything a layer holds, by name: tensors [B, ...]."""
    found = {"keys": layer.recent.view()[0], "values": layer.recent.view()[1]}
    for kind, parts in (("keys", layer.packed_keys), ("values", layer.packed_values)):
        for i, part in enumerate(parts):
            stored = {"order": part.order, "gain": part.gain}
            if layer.packed_length:
                stored |= {"codes": part.codes.view(), "scales": part.scales.view()}
            found |= {f"{kind} {i} {name}": tensor for name, tensor in stored.items()}
    if layer.means.length:
        found["means"] = layer.means.view()
    if layer.exact is not None:
        found |= dict(zip(("exact keys", "exact values", "positions", "scores"), layer.exact.tensors()))
    found |= {"norms": layer.norms, "starts": layer.starts}
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def select(stored, rows):
    return {name: tensor[torch.tensor(rows)] for name, tensor in stored.items()}


paddings = st.lists(st.integers(0, 30), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(
    cache_settings(), paddings, st.integers(1, 60), st.lists(st.integers(1, 59)), st.booleans(), st.booleans()
)
def test_chunks_do_not_show_in_the_bytes(chosen, padding, count, cuts, coarse, half):
    states = tokens(3, count, coarse=coarse, dtype=torch.bfloat16 if half else torch.float32)
    cuts = [cut for cut in cuts if cut < count]
    together, apart = (filled(chosen, states, padding, some) for some in ((), cuts))
    same(contents(together), contents(apart))
    same(contents(together), contents(filled(chosen, states, padding, range(1, count))))


@settings(max_examples=40, deadline=None)
@given(cache_settings(), paddings, st.integers(1, 50), st.booleans())
def test_rows_do_not_know_of_each_other(chosen, padding, count, coarse):
    states = tokens(3, count, coarse=coarse)
    stored = contents(filled(chosen, states, padding))
    for row in range(3):
        alone = filled(chosen, [s[row : row + 1] for s in states], padding[row : row + 1])
        same(contents(alone), select(stored, [row]))


@settings(max_examples=40, deadline=None)
@given(cache_settings(), paddings, st.integers(31, 60))
def test_padding_decides_nothing(chosen, padding, count):
    """Other padding, same tokens: the bytes of real tokens and all that they are read with stay the same."""
    first, other = tokens(3, count), tokens(3, count, seed=1)
    pad = torch.arange(count) < torch.tensor(padding)[:, None]
    second = [torch.where(pad[:, None, :, None], 7 * b, a) for a, b in zip(first, other)]
    layers = [filled(chosen, states, padding) for states in (first, second)]
    views = [(layer.view().dense_keys(), layer.view().dense_values()) for layer in layers]
    for one, changed in zip(*views):
        assert torch.equal(
            one.masked_fill(pad[:, None, :, None], 0), changed.masked_fill(pad[:, None, :, None], 0)
        )
    if chosen.exact_tokens and layers[0].packed_length:
        assert torch.equal(layers[0].exact.positions, layers[1].exact.positions)
        started = torch.tensor(padding) < layers[0].packed_length
        assert torch.equal(layers[0].norms[started], layers[1].norms[started])


@settings(max_examples=40, deadline=None)
@given(cache_settings(), st.integers(1, 3), st.integers(1, 40))
def test_padding_by_whole_groups_only_moves_the_tokens(chosen, groups, count):
    chosen = replace(chosen, window_grows_from=None)  # padding counts towards the length
    padding = groups * lcm(chosen.block, chosen.mean_group or 1)
    states, junk = tokens(1, count), tokens(1, padding, seed=1)
    plain = filled(chosen, states)
    moved = filled(chosen, [torch.cat(pair, dim=2) for pair in zip(junk, states)], [padding])
    for kind in ("dense_keys", "dense_values"):
        one, other = (getattr(layer.view(), kind)() for layer in (plain, moved))
        assert torch.allclose(one, other[:, :, padding:], rtol=1e-5, atol=1e-5)


indices = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(cache_settings(), paddings, st.integers(1, 50), indices, st.integers(1, 3), st.permutations(range(3)))
def test_rows_are_selected_byte_by_byte(chosen, padding, count, chosen_rows, repeats, beams):
    """Against selecting in the stored tensors, and against a layer that was given these rows all along."""
    states, later = tokens(3, count), tokens(3, 25, seed=1)
    operations = {
        tuple(beams): lambda layer: layer.reorder_cache(torch.tensor(beams)),
        tuple(chosen_rows): lambda layer: layer.batch_select_indices(torch.tensor(chosen_rows)),
        tuple(i for i in range(3) for _ in range(repeats)): lambda layer: layer.batch_repeat_interleave(
            repeats
        ),
    }
    for rows, operation in operations.items():
        layer = filled(chosen, states, padding)
        expected = select(contents(layer), rows)
        operation(layer)
        same(contents(layer), expected)
        assert layer.batch_size == len(rows)
        layer.update(*(s[list(rows)] for s in later))
        whole = [torch.cat([a, b], dim=2)[list(rows)] for a, b in zip(states, later)]
        same(contents(layer), contents(filled(chosen, whole, [padding[row] for row in rows])))


@settings(max_examples=40, deadline=None)
@given(cache_settings(), paddings, st.integers(1, 50), st.integers(0, 60))
def test_crop_takes_bytes_away_and_changes_none(chosen, padding, count, removed):
    layer = filled(chosen, tokens(3, count), padding)
    before, packed = contents(layer), layer.packed_length
    layer.crop(-removed)
    left = max(0, count - removed)
    assert layer.get_seq_length() == left and layer.get_mask_sizes(5) == (left + 5, 0)
    if left == 0:
        assert layer.batch_size == -1 and not layer.is_initialized
        return
    kept = min(packed, left)
    expected = {}
    for name, tensor in before.items():
        if name in ("keys", "values"):
            tensor = tensor[:, :, : left - kept]
        elif name.endswith(("codes", "scales")):
            tensor = tensor[:, :, :kept]
        elif name == "means":
            tensor = tensor[:, :, : -(-kept // chosen.mean_group)]
        elif name == "positions":
            tensor = tensor.masked_fill(tensor >= kept, -1)
        elif name == "scores":
            tensor = tensor.masked_fill(before["positions"] >= kept, -torch.inf)
        expected[name] = tensor
    same(contents(layer), expected)


step = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 25)),
    st.tuples(st.just("append"), st.integers(1, 3)),
    st.tuples(st.just("crop"), st.integers(0, 30)),
    st.tuples(st.just("reorder"), st.permutations(range(2))),
    st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
    st.tuples(st.just("reset"), st.none()),
)


@settings(max_examples=40, deadline=None)
@given(cache_settings(), st.tuples(st.integers(0, 20), st.integers(0, 20)), st.lists(step, max_size=12))
def test_any_sequence_of_operations_reads_as_the_twin(chosen, padding, steps):
    """Crop into packed tokens, go on, reorder between, start again: attention reads what the twin does."""
    layer, twin = TurboQuantLayer(chosen, 0, list(padding)), TwinLayer(chosen, 0, list(padding))
    for number, (name, argument) in enumerate(steps):
        for cache in (layer, twin):
            if name == "append":
                states = tokens(2, argument, seed=number)
                read = cache.update(*states)
                if cache is layer:
                    decoded = [handle.dense() for handle in read]
                else:
                    for one, expected in zip(decoded, read):
                        for row, row_read, row_expected in zip(twin.rows, one, expected):
                            real = slice(row.padding, None)
                            assert torch.allclose(
                                row_read[:, real], row_expected[:, real], rtol=1e-5, atol=1e-5
                            )
            elif name == "crop":
                cache.crop(-argument)
            elif name == "reset":
                cache.reset()
            elif cache.get_seq_length():
                operation = cache.reorder_cache if name == "reorder" else cache.batch_select_indices
                operation(torch.tensor(argument))
        assert layer.get_seq_length() == twin.get_seq_length()


def test_the_twin_itself_by_hand():
    """The oracle's own first principles: what is exact, what is recent, what comes from a code."""
    chosen = CacheSettings(**{**SMALL, "extremes": 1, "mean_group": 4})
    keys, values = tokens(1, 21)
    keys[0, 0, 6] *= 50
    twin = TwinLayer(chosen, 0)
    twin.update(keys, values)
    read_keys, read_values = twin.update(keys[:, :, :0], values[:, :, :0])
    [row] = twin.rows
    assert row.packed == 12 and 6 in row.exact[0] and all({0, 1} < set(tokens) for tokens in row.exact)
    for head, exact in enumerate(row.exact):
        assert len(exact) == 3
        for position in range(21):
            whole = position >= 12 or position in exact
            assert torch.equal(read_keys[0, head, position], keys[0, head, position]) == whole
            assert torch.equal(read_values[0, head, position], values[0, head, position]) == whole
    mean = keys[:, :, 4:8].double().mean(dim=2).bfloat16()[0]
    assert torch.equal(row.means[1], keys[:, :, 4:8].double().mean(dim=2).bfloat16()[0]), mean


@pytest.mark.parametrize("batch", [1, 3])
def test_an_empty_layer_takes_every_operation(batch):
    layer = TurboQuantLayer(CacheSettings(**SMALL))
    for operation in (
        lambda: layer.crop(0),
        lambda: layer.crop(-7),
        lambda: layer.reorder_cache(torch.tensor([0])),
        lambda: layer.batch_select_indices(torch.tensor([0])),
        lambda: layer.batch_repeat_interleave(3),
        layer.reset,
        layer.offload,
        layer.prefetch,
    ):
        operation()
        assert (layer.get_seq_length(), layer.batch_size, layer.get_max_length()) == (0, -1, -1)
        assert layer.get_mask_sizes(4) == (4, 0)
    states = tokens(batch, 30)
    layer.update(*states)
    same(contents(layer), contents(filled(CacheSettings(**SMALL), states)))


def test_no_token_and_one_token():
    layer = TurboQuantLayer(CacheSettings(**{**SMALL, "window": 0, "block": 1, "mean_group": 1}))
    keys, values = tokens(2, 1)
    for handle in layer.update(keys[:, :, :0], values[:, :, :0]):
        assert handle.shape == (2, G, 0, D) and handle.dense().shape == (2, G, 0, D)
    read = layer.update(keys, values)
    assert layer.packed_length == 1 and torch.equal(read[0].dense(), keys)
    before = contents(layer)
    read = layer.update(keys[:, :, :0], values[:, :, :0])
    assert torch.equal(read[0].dense(), keys) and torch.equal(read[1].dense(), values)  # a sink
    same(contents(layer), before)


def test_places_without_a_token_need_no_recent_token():
    """A view of packed tokens alone, with fewer exact tokens than places."""
    layer = filled(CacheSettings(**{**SMALL, "window": 0}), tokens(2, 8), padding=[8, 7])
    view = layer.view()
    assert (view.packed_length, view.keys.shape[2]) == (8, 0) and (view.exact.positions < 0).any()
    assert torch.equal(view.dense_keys()[1, :, 7], tokens(2, 8)[0][1, :, 7])


def test_crop_and_reset_leave_room_for_another_batch():
    layer = filled(CacheSettings(**SMALL), tokens(2, 30))
    for start_again in (lambda: layer.crop(-30), lambda: layer.crop(-99), layer.reset):
        start_again()
        states = tokens(3, 30, seed=2)
        layer.update(*states)
        same(contents(layer), contents(filled(CacheSettings(**SMALL), states)))
    with pytest.raises(ValueError, match="crop takes minus the number of tokens to remove; got 3"):
        layer.crop(3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("before", [0, 9, 30])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_lost(before, which, bad):
    layer = (
        filled(CacheSettings(**SMALL), tokens(2, before))
        if before
        else TurboQuantLayer(CacheSettings(**SMALL))
    )
    stored = contents(layer) if before else None
    states = tokens(2, 24, seed=1)
    broken = [s.clone() for s in states]
    broken[which == "values"][1, 0, 5, 3] = bad
    with pytest.raises(ValueError, match=f"the {which} of layer 0 hold NaN or infinity: nothing was packed"):
        layer.update(*broken)
    assert layer.get_seq_length() == before
    if before:
        same(contents(layer), stored)
    layer.update(*states)
    whole = [torch.cat([a, b], dim=2) for a, b in zip(tokens(2, before), states)] if before else states
    same(contents(layer), contents(filled(CacheSettings(**SMALL), whole)))


def test_infinity_in_the_window_can_be_cropped_away():
    """It is kept as it came until it would be packed; every update is refused then, until it is cropped."""
    states = tokens(1, 20)
    layer, expected = filled(CacheSettings(**SMALL), states), filled(CacheSettings(**SMALL), states)
    keys, values = tokens(1, 20, seed=1)
    layer.update(keys[:, :, :1] * torch.inf, values[:, :, :1])
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN or infinity"):
            layer.update(keys, values)
    layer.crop(-1)
    for each in (layer, expected):
        each.update(keys, values)
    same(contents(layer), contents(expected))


@pytest.mark.parametrize("call", range(8))
def test_an_interrupted_update_never_happened(call, monkeypatch):
    """Memory may run out, or the user press ^C, between any two packings: of keys, values, of one group or
    the next."""
    chosen = CacheSettings(**SMALL, key_bits=[[3, 4]], value_bits="1/2x4+1/2x2")
    states, later = tokens(2, 18), tokens(2, 40, seed=1)
    layer = filled(chosen, states, [0, 14])
    before, encode, calls = contents(layer), VectorQuantizer.encode, []

    def interrupted(self, rotated):
        calls.append(rotated)
        if len(calls) > call:
            raise KeyboardInterrupt
        return encode(self, rotated)

    monkeypatch.setattr(VectorQuantizer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.update(*later)
    monkeypatch.undo()
    same(contents(layer), before)
    layer.update(*later)
    whole = [torch.cat(pair, dim=2) for pair in zip(states, later)]
    same(contents(layer), contents(filled(chosen, whole, [0, 14])))


def test_shapes_that_do_not_fit_are_refused_before_anything_is_stored():
    layer = filled(CacheSettings(**SMALL), tokens(2, 30))
    before, (keys, values) = contents(layer), tokens(3, 4)
    for wrong in ((keys, values), (keys[:2, :1], values[:2, :1]), (keys[:2], values[:2, ..., :4])):
        with pytest.raises(ValueError, match=r"layer 0 holds \w+ \[B, G, T, D\] = \[2, 2, T, 12\]; got"):
            layer.update(*wrong)
        same(contents(layer), before)
    odd = torch.zeros(1, G, 20, 7)
    with pytest.raises(ValueError, match="head_dim must be even to be rotated; got 7"):
        TurboQuantLayer(CacheSettings(**SMALL)).update(odd, odd)
    with pytest.raises(ValueError, match="left_padding names 2 rows, which do not divide a batch of 3"):
        TurboQuantLayer(CacheSettings(**SMALL), 0, [0, 3]).update(keys, values)
    widened = TurboQuantLayer(CacheSettings(**SMALL), 0, [0, 3])
    widened.update(*tokens(4, 4))
    assert widened.starts.tolist() == [0, 0, 3, 3]


def test_sinks_are_the_first_real_tokens_and_extremes_the_longest():
    keys, values = tokens(2, 60)
    keys[0, 0, 20] *= 30
    values[1, 1, 33] *= 30
    layer = filled(CacheSettings(**SMALL), (keys, values), [0, 11])
    positions = [[set(head) for head in row] for row in layer.exact.positions.tolist()]
    assert all(head >= {0, 1} for head in positions[0]) and all(head >= {11, 12} for head in positions[1])
    assert 20 in positions[0][0] and 33 in positions[1][1]
    assert all(len(head) == 4 for row in positions for head in row)
    assert not any(position < 11 for head in positions[1] for position in head)


@pytest.mark.parametrize("first", ["inference_mode", "no_grad"])
def test_filled_in_inference_mode_and_used_without(first):
    states, later = tokens(2, 30), tokens(2, 3, seed=1)
    with getattr(torch, first)():
        layer = filled(CacheSettings(**SMALL), states)
    with torch.no_grad():
        for begin in range(3):
            layer.update(*(s[:, :, begin : begin + 1] for s in later))
        layer.update(*tokens(2, 30, seed=2))
    whole = [torch.cat(parts, dim=2) for parts in zip(states, later, tokens(2, 30, seed=2))]
    same(contents(layer), contents(filled(CacheSettings(**SMALL), whole)))


def test_a_view_outlives_what_comes_after_it():
    layer = filled(CacheSettings(**SMALL), tokens(2, 30))
    handles = layer.update(*tokens(2, 1, seed=1))
    expected = [handle.dense() for handle in handles]
    for seed in range(40):
        layer.update(*tokens(2, 1, seed=seed))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(handle.dense(), dense) for handle, dense in zip(handles, expected))


def test_a_copy_goes_its_own_way():
    layer = filled(CacheSettings(**SMALL), tokens(2, 30), [0, 5])
    before, other = contents(layer), copy.deepcopy(layer)
    other.update(*tokens(2, 30, seed=1))
    other.crop(-40)
    other.reorder_cache(torch.tensor([1, 0]))
    same(contents(layer), before)


def test_a_long_prompt_leaves_no_buffer_behind():
    """What stays in model precision is the window's buffer and the exact tokens, not the prompt's memory."""
    chosen = CacheSettings(**SMALL)
    layer = filled(chosen, tokens(1, 3000))
    layer.update(*tokens(1, 1, seed=1))
    room = chosen.window_at(3001 + 2 * chosen.block) + chosen.block
    assert room == 11 + 4
    for tensor in (layer.recent.keys, layer.recent.values, layer.exact.keys, layer.exact.values):
        assert tensor.untyped_storage().nbytes() <= G * room * D * 4


def test_the_window_grows_with_the_square_root_of_the_context():
    chosen = CacheSettings()
    assert [chosen.window_at(n) for n in (0, 100, 1024, 1536)] == [128] * 4
    assert [chosen.window_at(4**n * 1536) for n in range(1, 9)] == [128 * 2**n for n in range(1, 9)]
    assert {CacheSettings(window_grows_from=None).window_at(n) for n in (1, 10**8)} == {128}
    steep = CacheSettings(window=8, window_grows_from=8)
    steps = [steep.window_at(n + 1) - steep.window_at(n) for n in range(3000)]
    assert [CacheSettings(window=2000).window_at(n) for n in (1536, 2000, 8000)] == [2000, 2000, 4000]
    assert set(steps) == {0, 1}  # never faster than the context: nothing that was packed should be dense


@torch.no_grad()
@pytest.mark.parametrize("start", [None, 8, 30])
def test_a_growing_window_moves_only_when_a_block_leaves(start):
    """Token by token: as many dense tokens as the rule says, and a new buffer once a block at most."""
    chosen, buffers = CacheSettings(**SMALL, window_grows_from=start), []
    layer = TurboQuantLayer(chosen)
    keys, values = tokens(1, 400)
    for n in range(400):
        layer.update(keys[:, :, n : n + 1], values[:, :, n : n + 1])
        buffers.append(layer.recent.keys.data_ptr())
        window = chosen.window_at(n + 1)
        assert min(n + 1, window) <= layer.recent.length < window + chosen.block
    moves = sum(old != new for old, new in zip(buffers, buffers[1:]))
    assert moves <= layer.packed_length // chosen.block


@torch.no_grad()
def test_growing_tensor_is_concatenation_without_copying_every_time():
    growing, oracle, buffers = GrowingTensor(), torch.empty(2, 3, 0, 4), []
    generator = torch.Generator().manual_seed(0)
    early = None
    for length in [200, *torch.randint(0, 3, (1500,), generator=generator).tolist()]:
        rows = torch.randn(2, 3, length, 4, generator=generator)
        growing.append(rows)
        oracle = torch.cat([oracle, rows], dim=2)
        early = growing.view() if early is None else early
        buffers.append(growing.buffer)
        assert growing.reserved_bytes <= growing.view().nbytes / 8
    assert torch.equal(growing.view(), oracle) and torch.equal(early, oracle[:, :, :200])
    assert len({id(buffer) for buffer in buffers}) < 25
    growing.crop(150)
    growing.map(lambda tensor: tensor[[1, 1]])
    assert torch.equal(growing.view(), oracle[[1, 1], :, :150]) and growing.reserved_bytes == 0
