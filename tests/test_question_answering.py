"""The pipeline "memory-question-answering": the answers and sources of `asking.ask`, however it is called."""

import threading

import pytest
import torch
from tiny_models import DOCUMENTS, QUESTIONS, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer, pipeline

from msa_hf import MemoryBank, MemoryStore
from msa_hf.asking import ask
from msa_hf.question_answering import SHOWN, TASK

NEW = 6


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model, tiny_tokenizer):
    """A checkpoint, a store of two namespaces, and a bank, as folders."""
    root = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    with MemoryStore.create(root / "store", model, tiny_tokenizer) as store:
        store.add(DOCUMENTS[:4], ["ada", "water", "none", "paris"], metadata=[{"n": i} for i in range(4)])
        store.add(DOCUMENTS[4:], ["x", "honey", "gold"], "other")
    model.encode_memory(DOCUMENTS, tiny_tokenizer).save_pretrained(root / "bank")
    return root


@pytest.fixture
def store(folders, model, tiny_tokenizer):
    with MemoryStore.open(folders / "store", model, tiny_tokenizer, read_only=True) as opened:
        yield opened


@pytest.fixture
def answerer(model, tiny_tokenizer, store):
    return pipeline(
        TASK, model=model, tokenizer=tiny_tokenizer, memory=store, max_new_tokens=NEW, device="cpu"
    )


def expected(model, tokenizer, bank, question, **options):
    reply = ask(model, tokenizer, bank, question, max_new_tokens=NEW, **options)
    return {
        "answer": reply.answer,
        "sources": [{name: getattr(source, name) for name in SHOWN} for source in reply.sources],
        "scores": [source.score for source in reply.sources],
        "retrieval": reply.retrieval,
    }


def test_an_answer_is_that_of_ask(answerer, model, tiny_tokenizer, store):
    found = answerer(question=QUESTIONS[0])
    assert found == expected(model, tiny_tokenizer, store.bank(), QUESTIONS[0])
    assert {source["namespace"] for source in found["sources"]} == {"default"}
    assert all(source["text"] in DOCUMENTS[:4] for source in found["sources"])


@pytest.mark.parametrize("retrieval", ["router", "attention", "generative"])
def test_every_retrieval_and_its_options(answerer, model, tiny_tokenizer, store, retrieval):
    found = answerer(question=QUESTIONS[1], namespaces="other", retrieval=retrieval, k=2)
    bank = store.bank("other")
    assert found == expected(model, tiny_tokenizer, bank, QUESTIONS[1], retrieval=retrieval, k=2)


def test_options_of_the_memory_and_of_ranking(answerer, model, tiny_tokenizer, store):
    found = answerer(question=QUESTIONS[0], where={"n": [1, 3]}, k=1, mode="lexical")
    assert [source["id"] for source in found["sources"]] == ["paris"]
    bank = store.bank(where={"n": [1, 3]})
    assert found == expected(model, tiny_tokenizer, bank, QUESTIONS[0], k=1, mode="lexical")


def test_lists_give_lists_and_batches_are_batches(answerer, model, tiny_tokenizer, store, monkeypatch):
    asked = [
        *QUESTIONS,
        {"question": QUESTIONS[0], "namespaces": "other"},
        {"question": QUESTIONS[1], "where": {"n": 3}},
        "Who?",
    ]
    banks = [store.bank(), store.bank(), store.bank("other"), store.bank(where={"n": 3}), store.bank()]
    texts = [one if isinstance(one, str) else one["question"] for one in asked]
    singles = [expected(model, tiny_tokenizer, bank, text) for bank, text in zip(banks, texts)]
    assert answerer(question=asked) == singles
    sizes, generate = [], type(model).generate

    def counted(self, *args, **kwargs):
        if kwargs.get("memory") is not None:
            sizes.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", counted)
    batched = answerer(question=asked, batch_size=5)
    assert sizes == [3, 1, 1]
    assert [one["answer"] for one in batched] == [one["answer"] for one in singles]
    assert [[s["id"] for s in one["sources"]] for one in batched] == [
        [s["id"] for s in one["sources"]] for one in singles
    ]
    assert answerer(question=[]) == []


class _Words(LogitsProcessor):
    """Every fourth token is a space, others are letters: streamers give a piece per word."""

    def __init__(self, tokenizer):
        self.space, *self.letters = tokenizer.convert_tokens_to_ids(["\u0120", *"abcdefghij"])
        self.step = 0

    def __call__(self, input_ids, scores):
        self.step += 1
        allowed = [self.space] if self.step % 4 == 0 else self.letters
        masked = torch.full_like(scores, -torch.inf)
        masked[:, allowed] = scores[:, allowed]
        return masked


def test_pieces_of_a_stream_are_the_answer(answerer, tiny_tokenizer):
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    results = []

    def ask_it():
        words = LogitsProcessorList([_Words(tiny_tokenizer)])
        results.append(
            answerer(question=QUESTIONS[0], streamer=streamer, logits_processor=words, max_new_tokens=15)
        )

    asking = threading.Thread(target=ask_it)
    asking.start()
    pieces = [piece for piece in streamer if piece]
    asking.join()
    assert len(pieces) == 4
    assert "".join(pieces).strip() == results[0]["answer"]


def test_from_folders_and_with_a_memory_per_call(folders, model, tiny_tokenizer):
    loaded = pipeline(TASK, model=str(folders / "model"), memory=folders / "store", device="cpu")
    loaded.model.generation_config.eos_token_id = None
    bank = MemoryBank.from_pretrained(folders / "bank")
    with MemoryStore.open(folders / "store", model, tiny_tokenizer) as writer:
        own = expected(model, tiny_tokenizer, writer.bank(), QUESTIONS[0])
        assert loaded(question=QUESTIONS[0], max_new_tokens=NEW) == own
        for memory in (bank, folders / "bank", str(folders / "bank")):
            found = loaded(question=QUESTIONS[0], memory=memory, max_new_tokens=NEW)
            assert found == expected(model, tiny_tokenizer, bank, QUESTIONS[0])
        writer.add(["Lemons are sour."], ["lemon"], "fruit")  # a folder is read as it is now
        assert loaded(question="sour?", namespaces="fruit")["sources"][0]["id"] == "lemon"
    loaded.close()


def test_what_a_pipeline_saves_is_the_checkpoint(answerer, tmp_path, tiny_tokenizer, model, store):
    answerer.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), memory=store, max_new_tokens=NEW, device="cpu")
    again.model.generation_config.eos_token_id = None
    assert again(question=QUESTIONS[0]) == answerer(question=QUESTIONS[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"question": ""}, "empty"),
        ({"question": "  \n"}, "empty"),
        ({}, "must be a text"),
        ({"question": 7}, "must be a text"),
        ({"question": ["What?", None]}, "must be a text"),
        ({"question": {"text": "What?"}}, "keys question"),
        ({"question": "What?", "memory": 7}, "must be a MemoryBank"),
        ({"question": "What?", "memory": "/nowhere"}, "nowhere"),
        ({"question": ["What?"], "streamer": object()}, "one question at a time"),
        ({"question": "What?", "namespaces": "*, x", "where": 3}, "where"),
        ({"question": "What?", "k": 0}, "at least 1"),
        ({"question": "What?", "mode": "magic"}, "mode"),
        ({"question": "What?", "retrieval": "magic"}, "retrieval"),
    ],
)
def test_wrong_calls_say_what_is_wrong(answerer, call, words):
    with pytest.raises((ValueError, OSError), match=words):
        answerer(**call)


def test_wrong_pipelines_say_what_is_wrong(model, tiny_tokenizer, folders):
    without = pipeline(TASK, model=model, tokenizer=tiny_tokenizer, device="cpu")
    with pytest.raises(ValueError, match="memory must be given"):
        without(question="What?")
    with pytest.raises(ValueError, match="MemoryStore"):
        without(question="What?", memory=MemoryBank.from_pretrained(folders / "bank"), namespaces="x")
