"""generate(memory=...): every decoding mode equals a naive loop without cache; interleave does what it
says."""

import copy
import logging
from threading import Thread

import pytest
import torch
from tiny_models import DOCUMENTS, QUESTIONS, tiny_model
from transformers import DynamicCache, TextIteratorStreamer

from msa_hf.modeling.cache_memory import MemoryCache, MemoryReader
from msa_hf.modeling.interleave_msa import named_documents

NEW = 7


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    model = tiny_model("qwen3")
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture(scope="module")
def bank(model, tiny_tokenizer):
    return model.encode_memory(DOCUMENTS, tiny_tokenizer)


@pytest.fixture
def batch(tiny_tokenizer):
    return tiny_tokenizer(QUESTIONS, return_tensors="pt", padding=True)


def naive_greedy(model, batch, bank, steps=NEW):
    return naive_decode(model, batch, bank, lambda logits: logits.argmax(-1, keepdim=True), steps)


@torch.no_grad()
def naive_decode(model, batch, bank, choose, steps=NEW):
    """Runs the whole sequence again for every token, without a cache, routing with the question alone."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    question = mask.bool()
    for _ in range(steps):
        extra = ids.shape[1] - question.shape[1]
        routes = torch.nn.functional.pad(question, (0, extra))
        logits = model(ids, attention_mask=mask, memory=bank, question_mask=routes, use_cache=False).logits
        ids = torch.cat([ids, choose(logits[:, -1].float())], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


def generate(model, batch, bank, **options):
    defaults = {"retrieval": "attention", "max_new_tokens": NEW, "do_sample": False}
    return model.generate(**batch, memory=bank, **{**defaults, **options})


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 1}])
def test_greedy_equals_the_naive_loop(model, bank, batch, options):
    assert torch.equal(generate(model, batch, bank, **options), naive_greedy(model, batch, bank))


def test_prompt_lookup_and_assisted_decoding_equal_greedy(model, bank, tiny_tokenizer):
    single = tiny_tokenizer("the Seine the Seine the Seine", return_tensors="pt")
    expected = naive_greedy(model, single, bank)
    assert torch.equal(generate(model, single, bank, prompt_lookup_num_tokens=3), expected)


def test_beam_search_equals_scoring_every_beam_by_hand(model, bank, batch):
    """Oracle: the best of the returned beams has the highest log-likelihood under the model without a
    cache."""
    beams = generate(model, batch, bank, num_beams=3, num_return_sequences=3, length_penalty=0.0)
    scores = likelihood(model, batch, bank, beams, 3)
    assert torch.equal(scores, scores.sort(descending=True, dim=1).values)
    greedy = likelihood(model, batch, bank, naive_greedy(model, batch, bank), 1)
    assert (scores[:, :1] >= greedy - 1e-4).all()
    for row in range(2):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        single = generate(model, alone, bank, num_beams=3, length_penalty=0.0)
        assert torch.equal(single[0], beams[3 * row])


@torch.no_grad()
def likelihood(model, batch, bank, sequences, repeats):
    mask = batch["attention_mask"].repeat_interleave(repeats, 0)
    start = mask.shape[1]
    full = torch.nn.functional.pad(mask, (0, sequences.shape[1] - start), value=1)
    routes = torch.nn.functional.pad(mask.bool(), (0, sequences.shape[1] - start))
    logits = model(sequences, attention_mask=full, memory=bank, question_mask=routes, use_cache=False).logits
    chosen = logits.log_softmax(-1)[:, start - 1 : -1].gather(2, sequences[:, start:, None])
    return chosen.sum((1, 2)).view(-1, repeats)


def test_sampling_draws_from_the_naive_distribution(model, bank, batch):
    """Same seed, same draws: the cached sampler must see the logits that the naive loop sees."""
    torch.manual_seed(3)
    sampled = generate(model, batch, bank, do_sample=True, top_k=0)
    torch.manual_seed(3)

    def draw(logits):
        return torch.multinomial(logits.softmax(-1), num_samples=1)

    assert torch.equal(sampled, naive_decode(model, batch, bank, draw))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(dtype, batch, tiny_tokenizer):
    model = tiny_model(dtype=dtype)
    memory = model.encode_memory(DOCUMENTS, tiny_tokenizer)
    assert memory.layers[1].keys.dtype == dtype
    assert generate(model, batch, memory).shape == (2, batch["input_ids"].shape[1] + NEW)


def test_streaming_gives_the_same_text(model, bank, tiny_tokenizer):
    single = tiny_tokenizer(QUESTIONS[0], return_tensors="pt")
    expected = generate(model, single, bank)[0, single["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True)
    thread = Thread(target=generate, args=(model, single, bank), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tiny_tokenizer.decode(expected)


def test_a_kept_cache_continues_the_conversation(model, bank, tiny_tokenizer):
    single = tiny_tokenizer(QUESTIONS[0], return_tensors="pt")
    cache = MemoryCache(MemoryReader(bank, model.config), DynamicCache())
    first = generate(model, single, bank, past_key_values=cache, max_new_tokens=3)
    both = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    second = generate(model, both, bank, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(second, naive_greedy(model, single, bank, 7))


def test_the_output_names_documents_layers_and_scores(model, bank, batch):
    output = generate(model, batch, bank, return_dict_in_generate=True)
    assert output.retrieval == "attention"
    for row, rounds in enumerate(output.rounds):
        (only,) = rounds
        assert set(only.selected) == {1, 2}
        for layer, selected in only.selected.items():
            with torch.no_grad():
                expected = model(**batch, memory=bank).document_scores[layer][row]
            assert [score for _, score in selected] == pytest.approx(
                [float(expected[i]) for i, _ in selected]
            )
        assert {d.id for d in only.documents} == {i for chosen in only.selected.values() for i, _ in chosen}


def test_top_k_documents_of_one_call(model, bank, batch):
    output = generate(model, batch, bank, top_k_documents=1, return_dict_in_generate=True)
    assert all(len(chosen) == 1 for (step,) in output.rounds for chosen in step.selected.values())
    one = tiny_model("qwen3", top_k_documents=1)
    one.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(output.sequences, generate(one, batch, bank))


def test_memory_none_is_the_backbone(model, batch):
    from_backbone = super(type(model), model).generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(
        model.generate(**batch, memory=None, max_new_tokens=NEW, do_sample=False), from_backbone
    )


def router(model, bank, questions, tokenizer, **options):
    batch = tokenizer(questions, return_tensors="pt", padding=True)
    options = {"retrieval": "router", "max_new_tokens": NEW, "return_dict_in_generate": True, **options}
    return model.generate(**batch, memory=bank, tokenizer=tokenizer, **options), batch


def test_router_interleave_answers_from_the_texts_it_reports(model, bank, tiny_tokenizer):
    output, batch = router(
        model, bank, QUESTIONS, tiny_tokenizer, max_rounds=3, documents_per_round=1, mode="router"
    )
    for row, rounds in enumerate(output.rounds):
        ids = [document.id for step in rounds for document in step.documents]
        assert 1 <= len(ids) == len(set(ids)) <= 3
        assert rounds[0].query == QUESTIONS[row]
        titles = [DOCUMENTS[step.documents[0].id].split("\n")[0] for step in rounds]
        assert [step.query for step in rounds[1:]] == [f"{QUESTIONS[row]}\n{title}" for title in titles[:-1]]
        ranked = model.rank_documents([QUESTIONS[row]], bank, k=1, mode="router", tokenizer=tiny_tokenizer)[0]
        assert [d.id for d in rounds[0].documents] == [d.id for d in ranked]
        assert rounds[0].documents[0].per_layer == pytest.approx(ranked[0].per_layer, abs=1e-5)
        expected = model.answer_from(
            [QUESTIONS[row]], [[DOCUMENTS[i] for i in ids]], tiny_tokenizer, max_new_tokens=NEW
        )
        assert [output.answers[row]] == expected
        assert output.sequences[row, : batch["input_ids"].shape[1]].equal(batch["input_ids"][row])


def test_router_interleave_stops_when_nothing_new_is_found(model, tiny_tokenizer):
    bank = model.encode_memory(["only one"], tiny_tokenizer)
    output, _ = router(model, bank, QUESTIONS, tiny_tokenizer, max_rounds=5)
    assert [[d.id for r in rounds for d in r.documents] for rounds in output.rounds] == [[0], [0]]


def test_router_interleave_over_an_empty_memory_is_closed_book(model, tiny_tokenizer):
    output, _ = router(model, model.encode_memory([], tiny_tokenizer), QUESTIONS, tiny_tokenizer)
    assert output.rounds == [[], []]
    assert output.answers == model.answer_from(QUESTIONS, [[], []], tiny_tokenizer, max_new_tokens=NEW)


def test_texts_too_long_for_the_model_are_left_out_from_the_end(model, tiny_tokenizer):
    texts = ["first " * 8, "second " * 12, "third " * 300]
    answers = model.answer_from([QUESTIONS[1]], [texts], tiny_tokenizer, max_new_tokens=4)
    assert answers == model.answer_from([QUESTIONS[1]], [texts[:1]], tiny_tokenizer, max_new_tokens=4)


def test_worked_examples_share_one_cached_prefix(tiny_tokenizer):
    model = tiny_model(answer_style="examples", seed=2)
    model.config.max_position_embeddings = 8192
    documents = [DOCUMENTS[3:4], DOCUMENTS[:2]]
    cached = model.answer_from(QUESTIONS, documents, tiny_tokenizer, max_new_tokens=5)
    again = model.answer_from(QUESTIONS, documents, tiny_tokenizer, max_new_tokens=5)
    plain = model.answer_from(
        QUESTIONS, documents, tiny_tokenizer, max_new_tokens=5, num_beams=1, use_cache=False
    )
    assert cached == again == plain


def test_untrained_routers_say_so_on_every_use(tiny_tokenizer, monkeypatch):
    model = tiny_model(routers_trained=False)
    bank = model.encode_memory(DOCUMENTS, tiny_tokenizer)
    batch = tiny_tokenizer(QUESTIONS[:1], return_tensors="pt")
    said = []
    monkeypatch.setattr(logging.getLogger("msa_hf.modeling.generation_msa"), "warning", said.append)
    for _ in range(2):
        generate(model, batch, bank, max_new_tokens=1)
    assert len(said) == 2 and "routers of this model are not trained" in said[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"retrieval": "magic"}, "retrieval must be one of auto, attention, router, generative; got 'magic'"),
        ({"retrieval": "router", "max_rounds": 0}, "max_rounds must be at least 1; got 0"),
        ({"retrieval": "router", "tokenizer": None}, "tokenizer must be given"),
        ({"use_cache": False}, "use_cache must not be False"),
    ],
)
def test_bad_options_are_refused(model, bank, batch, options, message):
    memory = copy.copy(bank)
    memory.tokenizer = bank.tokenizer if "tokenizer" not in options else None
    with pytest.raises(ValueError, match=message):
        generate(model, batch, memory, **options)
    with pytest.raises(ValueError, match="memory must come from encode_memory"):
        generate(model, batch, "a path")


class _Numbered:
    """As much of a memory as `named_documents` looks at."""

    def __init__(self, count, numbers=None):
        self.count, self.numbers = count, numbers

    def __len__(self):
        return self.count


def test_named_documents():
    text = "[2][0] see [11] and [2] or [x] [-1] [99999999999999]"
    assert named_documents(text, _Numbered(3)) == [0, 2]
    assert named_documents(text, _Numbered(3, [7, 11, 2])) == [1, 2]
    assert named_documents("", _Numbered(5)) == []
