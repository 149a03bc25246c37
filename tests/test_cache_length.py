"""What length costs a cache: every passage in every place against a forward made here from its definition."""

import pytest
import torch
from backbones import tiny_backbone
from rounded_cache import RoundedCache, rounded

from msa_hf.evaluation import cache_length, cache_protocol
from msa_hf.evaluation.cache_quality import Protocol
from msa_hf.evaluation.cache_systems import CacheSystem, dense_system

LONG = Protocol(prefill=12, decoded=32, block=8)


@pytest.fixture(scope="module")
def model():
    return tiny_backbone("llama").eval()


@pytest.fixture(scope="module")
def rows():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 259, (LONG.length,), generator=draw).tolist() for _ in range(3)]


def test_no_divergence_without_loss(model, rows):
    [same] = cache_length.measure_length(model, [dense_system()], rows, LONG, edge=8)
    for part in (same.last, same.first, same.closing, same.opening, same.closing_in_one_piece):
        assert part.kl.mean == pytest.approx(0, abs=1e-9)


def test_passages_change_places(model, rows):
    """Opening: inputs 12..19, closing: 36..43, each after its own twelve tokens alone or after everything."""
    _, found = cache_length.measure_length(model, [dense_system(), rounded(0.5)], rows, LONG, edge=8)

    def passage(given, prefill):
        """(KL, dense NLL) of the last 8 inputs of `given`, the dense model by one forward."""
        cache = rounded(0.5).make(model.config)
        ours = torch.cat(list(cache_protocol.teacher_force(model, cache, given, prefill, 8)))[-8:]
        with torch.inference_mode():
            dense = model(torch.tensor([given])).logits[0, -9:-1]
        kl = torch.nn.functional.kl_div(ours.log_softmax(-1), dense.softmax(-1), reduction="none").sum(-1)
        return kl.mean(), torch.nn.functional.cross_entropy(dense, torch.tensor(given[-8:]))

    for number, ids in enumerate(rows):
        opening_last = passage(ids[21:] + ids[:21], 12)
        closing_last = passage(ids, 12)
        opening_first, closing_first = passage(ids[:21], 12), passage(ids[24:], 12)
        for part, places in (
            (found.last, (opening_last, closing_last)),
            (found.first, (opening_first, closing_first)),
            (found.closing, (closing_last,)),
            (found.opening, (opening_first,)),
            (found.closing_in_one_piece, (passage(ids, 36),)),
        ):
            kl, nll = (sum(map(float, figures)) / len(places) for figures in zip(*places))
            assert part.kl_by_text[number] == pytest.approx(kl, rel=1e-2, abs=1e-6)
            assert part.dense_nll_by_text[number] == pytest.approx(nll, rel=1e-4)
    assert found.last.kl.mean > 1e-4
    for difference, after, before in (
        (found.over_first, found.last, found.first),
        (found.over_one_piece, found.closing, found.closing_in_one_piece),
        (found.as_it_stands, found.closing, found.opening),
    ):
        assert difference.mean == pytest.approx(after.kl.mean - before.kl.mean, abs=1e-12)


def test_both_places_have_the_same_words_before_them(model, rows):
    """A cache that holds no more than the first places have cannot tell them from the last."""

    class Near(RoundedCache):
        """Forgets what is more than twelve tokens older than the block that arrives."""

        def update(self, keys, values, layer, *args, **kwargs):
            keys, values = super().update(keys, values, layer, *args, **kwargs)
            return keys[:, :, -20:], values[:, :, -20:]

        def get_mask_sizes(self, query_length, layer):
            length = min(self.get_seq_length(layer) + query_length, 20)
            return length, self.get_seq_length(layer) + query_length - length

    deaf = tiny_backbone("llama", num_hidden_layers=1).eval()
    near = CacheSystem("near", lambda config: Near(config, 0))
    twice = cache_length.compare_places(deaf, [near], rows[0], LONG, 8)[0]
    for passage in ("opening", "closing"):
        first, last = twice[f"{passage}_first"].nll, twice[f"{passage}_last"].nll
        assert first == pytest.approx(last, rel=1e-3)


def test_finds_a_cache_that_decays(model, rows):
    """Rounded only once it holds more than the first passages need: all of its KL is the length's."""

    class Decaying(RoundedCache):
        def update(self, keys, values, layer, *args, **kwargs):
            self.step = 0.5 if self.get_seq_length(layer) + keys.shape[2] > 12 + 8 else 0
            return super().update(keys, values, layer, *args, **kwargs)

    decaying = CacheSystem("decaying", lambda config: Decaying(config, 0))
    [found] = cache_length.measure_length(model, [decaying], rows, LONG, edge=8)
    assert found.first.kl.mean == pytest.approx(0, abs=1e-9)
    assert found.over_first.low > 1e-4 and found.as_it_stands.low > 1e-4


def test_needs_passages_of_whole_blocks(model, rows):
    for protocol, edge in ((LONG, 9), (LONG, 24), (Protocol(12, 33, 8), 8)):
        with pytest.raises(ValueError, match="multiples of 8"):
            cache_length.measure_length(model, [dense_system()], rows, protocol, edge)
