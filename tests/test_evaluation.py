"""The evaluation against closed forms, hand-made cases and naive twins."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backbones import BACKBONES
from tiny_models import tiny_model
from transformers import BertConfig, BertModel

from msa_hf.evaluation import (
    answers,
    cached_memory,
    cost,
    hotpotqa,
    metrics,
    peak_memory,
    retrieval,
    sentence_encoder,
)
from msa_hf.modeling.lexical import LexicalIndex

RECORDS = [
    {
        "question": "Q1?",
        "answer": "yes",
        "supporting_facts": [["B", 0], ["A", 0], ["A", 1]],
        "context": [["A", ["First.", " Second. "]], ["X", ["Other."]], ["B", ["Third."]]],
    },
    {
        "question": "Q2?",
        "answer": "blue",
        "supporting_facts": [["A", 0], ["C", 0]],
        "context": [["C", ["C."]], ["A", ["First.", " Second. "]], ["X", ["Another one."]]],
    },
]


def test_benchmark_joins_paragraphs_and_shares_equal_ones():
    benchmark = hotpotqa.load_hotpotqa(questions=2, records=RECORDS)
    assert benchmark.documents == ("A\nFirst. Second.", "X\nOther.", "B\nThird.", "C\nC.", "X\nAnother one.")
    assert benchmark.gold == ((0, 2), (3, 0))
    assert benchmark.questions == ("Q1?", "Q2?") and benchmark.answers == ("yes", "blue")
    assert len(hotpotqa.load_hotpotqa(questions=1, records=RECORDS).documents) == 3
    assert hotpotqa.load_hotpotqa(questions=1, first=1, records=RECORDS).gold == ((0, 1),)
    cut = benchmark.first(1)
    assert len(cut) == 1 and cut.documents == benchmark.documents and cut.digest() == benchmark.digest()
    assert hotpotqa.document_digest(["ab", "c"]) != hotpotqa.document_digest(["a", "bc"])
    with pytest.raises(ValueError, match="questions must be >= 1"):
        hotpotqa.load_hotpotqa(questions=0, records=RECORDS)


def test_nearest_equals_a_sort():
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(300, 8, generator=generator), torch.randn(40, 8, generator=generator)
    expected = torch.sort(queries @ documents.T, dim=1, descending=True).indices[:, :5].tolist()
    assert sentence_encoder.nearest(queries, documents, 5) == expected
    assert all(sorted(row) == list(range(40)) for row in sentence_encoder.nearest(queries, documents, 99))


def test_sentence_encoder_is_mean_pooling_of_each_text_alone(tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    bert = BertModel(config).eval()
    bert.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    encoder = sentence_encoder.SentenceEncoder(tmp_path, max_tokens=12)
    texts = ["a longer text than twelve tokens", "short", "x", "middle one"]
    vectors = encoder.encode(texts, batch_tokens=24)
    for text, vector in zip(texts, vectors):
        ids = torch.tensor([list(tiny_tokenizer(text)["input_ids"])[:12]])
        with torch.no_grad():
            mean = bert(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=1e-5)
    assert encoder.encode([]).shape == (0, 16)
    assert encoder.fingerprint() == sentence_encoder.SentenceEncoder(tmp_path, max_tokens=12).fingerprint()
    assert encoder.fingerprint() != sentence_encoder.SentenceEncoder(tmp_path, max_tokens=11).fingerprint()


WORDS = "amber cedar dune ember fjord grove heath inlet jetty knoll lagoon marsh north oasis prairie".split()


def small_benchmark(count=6):
    """`count` questions, each naming the titles of its own two documents."""
    records = []
    for number in range(count):
        left, right = f"{WORDS[number]} hill", f"{WORDS[number]} river"
        records.append(
            {
                "question": f"Where do {left} and {right} meet?",
                "answer": WORDS[-1 - number],
                "supporting_facts": [[left, 0], [right, 0]],
                "context": [[left, [f"It is near {WORDS[-1 - number]}."]], [right, ["It is long."]]],
            }
        )
    return hotpotqa.load_hotpotqa(questions=count, records=records)


class StandInModel:
    """Ranks by known scores and answers from the documents that it is given: a report is then certain."""

    device = "cpu"
    config = SimpleNamespace(consensus_weights=[0.0, 1.0])

    def __init__(self, benchmark):
        self.benchmark = benchmark

    def layer_scores(self, layer, question):
        """Layer 1 puts the gold documents first, layer 2 last."""
        gold = self.benchmark.gold[self.benchmark.questions.index(question)]
        sign = 1.0 if layer == 1 else -1.0
        return torch.tensor([sign * (i in gold) - 0.001 * i for i in range(len(self.benchmark.documents))])

    def route_questions(self, questions, memory, tokenizer=None):
        return {layer: torch.stack([self.layer_scores(layer, q) for q in questions]) for layer in (1, 2)}

    def answer_from(self, questions, documents, tokenizer, max_new_tokens=16):
        assert len(questions) == len(documents)
        found = [re.search(r"near (\w+)", " ".join(texts)) for texts in documents]
        return [match.group(1) if match else "unknown" for match in found]

    def generate(self, input_ids, memory, tokenizer, mode, **kwargs):
        """Reads the first gold document of every other question, and nothing by routers alone."""
        chosen = [
            list(self.benchmark.gold[i][:1]) if i % 2 == 0 and mode != "router" else []
            for i in input_ids.tolist()
        ]
        texts = [[memory.documents[i] for i in row] for row in chosen]
        return SimpleNamespace(
            answers=self.answer_from(texts, texts, tokenizer),
            rounds=[[SimpleNamespace(documents=[SimpleNamespace(id=i)]) for i in row] for row in chosen],
        )


class NumberingTokenizer:
    """Stands for a tokenizer: a question becomes its number."""

    def __init__(self, benchmark):
        self.benchmark = benchmark

    def __call__(self, questions, **kwargs):
        class Inputs(dict):
            def to(self, device):
                return self

        return Inputs(input_ids=torch.tensor([self.benchmark.questions.index(q) for q in questions]))


def bank_of(benchmark):
    documents = list(benchmark.documents)
    return SimpleNamespace(
        documents=documents, num_tokens=99, router_layers=(1, 2), lexical=LexicalIndex(documents)
    )


def test_retrieval_report_tells_good_from_bad(tmp_path):
    benchmark = small_benchmark(9)
    report = retrieval.evaluate_retrieval(
        StandInModel(benchmark), None, benchmark, bank_of(benchmark), with_encoder=False, question_batch=4
    )
    names = [system.name for system in report.systems]
    assert names == ["routers", "fused", "lexical", "layer 1", "layer 2", "BM25 tuned", "BM25"]
    found = {metric: estimate.mean for metric, estimate in report.system("layer 1").metrics.items()}
    assert found == {"recall@1": 0.5, "recall@4": 1.0, "recall@16": 1.0, "both@16": 1.0, "MRR": 1.0}
    worst = report.system("layer 2").metrics
    assert worst["recall@16"].mean == 0.0 and worst["MRR"].mean == pytest.approx(1 / 17)
    assert report.system("routers").metrics == worst
    assert report.system("BM25").metrics["recall@4"].mean == 1.0  # the questions name the titles
    assert report.differences["routers - BM25"]["recall@4"].high == -1.0
    assert "fused - MiniLM-L6" not in report.differences
    text = retrieval.render(report)
    assert all(name in text for name in names) and "9 questions" in text
    written = json.loads(json.dumps(report.to_dict()))
    assert written["systems"][3]["metrics"]["recall@4"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    with pytest.raises(ValueError, match="benchmark's documents"):
        retrieval.evaluate_retrieval(None, None, small_benchmark(3), bank_of(benchmark))
    with pytest.raises(KeyError, match="no system 'x'"):
        report.system("x")


def test_retrieval_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    benchmark = small_benchmark(3)
    report = retrieval.evaluate_retrieval(
        StandInModel(benchmark), None, benchmark, bank_of(benchmark), with_encoder=False
    )
    retrieval.save_plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_answers_measure_the_way_from_closed_book_to_gold():
    benchmark = small_benchmark(6)
    model, tokenizer = StandInModel(benchmark), NumberingTokenizer(benchmark)
    report = answers.evaluate_answers(
        model, tokenizer, benchmark, bank_of(benchmark), questions=4, question_batch=3
    )
    assert report.questions == 4
    means = {name: estimate.mean for name, estimate in report.f1.items()}
    assert means == {"closed book": 0.0, "memory": 0.5, "routers alone": 0.0, "gold given": 1.0}
    assert report.gap_closed["memory"]["f1"].mean == report.gap_closed["memory"]["exact_match"].mean == 0.5
    assert report.gap_closed["routers alone"]["f1"].mean == 0.0
    assert report.documents_read == {"memory": 0.5, "routers alone": 0.0}
    assert report.gold_read == {"memory": 0.25, "routers alone": 0.0}
    assert [answer.answer for answer in report.answers["gold given"]] == list(benchmark.answers[:4])
    assert report.answers["memory"][2].documents == [benchmark.gold[2][0]]
    assert "25% of the gold" in answers.render(report)
    assert json.loads(json.dumps(report.to_dict()))["answers"]["memory"][1]["f1"] == 0.0


def test_embeddings_are_computed_once_per_label_and_texts(tmp_path):
    calls = []

    def encode(texts):
        calls.append(list(texts))
        return torch.arange(len(texts) * 2.0).view(-1, 2)

    first = cached_memory.cached_embeddings("one", ["a", "b"], encode, tmp_path)
    again = cached_memory.cached_embeddings("one", ["a", "b"], encode, tmp_path)
    assert torch.equal(first, again) and len(calls) == 1
    cached_memory.cached_embeddings("two", ["a", "b"], encode, tmp_path)
    cached_memory.cached_embeddings("one", ["ab"], encode, tmp_path)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 3


def test_alternating_timer_runs_each_function_equally_often():
    order = []
    timings = cost.alternate([lambda: order.append("a"), lambda: order.append("b")], repetitions=3)
    assert order == ["a", "b"] * 4
    assert all(t.repetitions == 3 and t.fastest <= t.median <= t.slowest for t in timings)
    assert cost.Timing.of([3.0, 1.0, 2.0]) == cost.Timing(2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError, match="repetitions must be >= 1"):
        cost.alternate([], 0)


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer):
    return tiny_model(answer_style="chat"), tiny_tokenizer


def test_retrieval_of_a_real_model_caches_its_memory(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    benchmark = small_benchmark(8)
    report = retrieval.evaluate_retrieval(
        model, tokenizer, benchmark, with_encoder=False, cache_dir=tmp_path, question_batch=3
    )
    assert report.tokens == sum(len(text.encode()) for text in benchmark.documents)
    assert report.router_layers == [1, 2]
    memory = model.encode_memory(list(benchmark.documents), tokenizer)
    scores = model.route_questions(list(benchmark.questions), memory, tokenizer=tokenizer)
    for layer in (1, 2):
        expected = metrics.recall_at(
            scores[layer].argsort(dim=1, descending=True).tolist(), benchmark.gold, 4
        )
        assert report.system(f"layer {layer}").metrics["recall@4"].mean == pytest.approx(expected.mean())
    for name, mode in (("routers", "router"), ("fused", "fused"), ("lexical", "lexical")):
        ranked = model.rank_documents(list(benchmark.questions), memory, k=16, mode=mode, tokenizer=tokenizer)
        ids = [[document.id for document in row] for row in ranked]
        expected = retrieval.score_rankings(ids, benchmark)
        for metric, estimate in report.system(name).metrics.items():
            assert estimate.mean == pytest.approx(expected[metric].mean())

    monkeypatch.setattr(type(model), "encode_memory", None)  # a second run must not encode
    again = retrieval.evaluate_retrieval(model, tokenizer, benchmark, with_encoder=False, cache_dir=tmp_path)
    assert [system.metrics for system in again.systems] == [system.metrics for system in report.systems]


def test_damaged_cached_memory_is_encoded_again(tiny, tmp_path):
    model, tokenizer = tiny
    texts = list(small_benchmark(2).documents)
    first = cached_memory.benchmark_memory(model, tokenizer, texts, tmp_path)
    (folder,) = tmp_path.iterdir()
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-7])
    again = cached_memory.benchmark_memory(model, tokenizer, texts, tmp_path)
    assert torch.equal(again.layers[1].keys.data, first.layers[1].keys.data)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_answers_of_a_real_model_share_prompt_and_decoding(tiny):
    model, tokenizer = tiny
    benchmark = small_benchmark(4)
    memory = model.encode_memory(list(benchmark.documents), tokenizer)
    report = answers.evaluate_answers(
        model, tokenizer, benchmark, memory, questions=3, max_new_tokens=4, question_batch=2, mode="lexical"
    )
    for answer in report.answers["memory"]:
        texts = [benchmark.documents[i] for i in answer.documents]
        alone = model.answer_from([answer.question], [texts], tokenizer, max_new_tokens=4)
        assert texts and [answer.answer] == alone
    assert report.documents_read["memory"] == np.mean([len(a.documents) for a in report.answers["memory"]])
    assert "memory" in answers.render(report)


@pytest.mark.parametrize("kind", BACKBONES)
def test_cost_compares_with_the_very_backbone(kind, tiny_tokenizer):
    model = tiny_model(kind)
    plain = cost.plain_backbone(model)
    assert plain.config.model_type == kind
    assert plain.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    report = cost.evaluate_cost(
        model, tiny_tokenizer, small_benchmark(3).documents, question="Where is it?", repetitions=2
    )
    assert report.logits_error <= 1e-5 and report.bank_error <= 1e-4 and report.process is None
    assert report.encoding_ratio == report.backbone.median / report.encoding.median
    assert report.prompt_tokens == len("Where is it?")
    layers, width = 2, 2 * 8 * 4  # of G * D float32
    chunks = sum(-(-len(text) // 8) * 2 + -(-len(text) // 4) for text in small_benchmark(3).documents)
    assert report.bank_bytes_per_token == pytest.approx(layers * width * chunks / report.memory_tokens)
    assert "ratio of speeds" in cost.render(report)


def test_cost_refuses_wrong_results(tiny):
    model, tokenizer = tiny
    plain = cost.plain_backbone(model)
    bank = model.encode_memory(list(small_benchmark(2).documents), tokenizer)
    bank.layers[2].values.data = bank.layers[2].values.data * 1.01
    with pytest.raises(RuntimeError, match="bank differs"):
        cost.check_bank(bank, plain.model, tokenizer)
    with torch.no_grad():
        plain.model.norm.weight = torch.nn.Parameter(plain.model.norm.weight * 1.01)
    with pytest.raises(RuntimeError, match="logits differ"):
        cost.check_logits(model, plain, tokenizer, "some text")


def test_peak_memory_is_that_of_a_process_of_its_own(tiny, tmp_path):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ballast = torch.ones(80_000_000)  # 320 MB that the other process must not report
    texts = list(small_benchmark(3).documents)
    measured = peak_memory.measure_encoding(tmp_path, texts, dtype="float32")
    assert measured.tokens == sum(map(len, texts)) and measured.bank_bytes > 0
    assert 50e6 < measured.loaded_bytes <= measured.peak_bytes
    assert peak_memory.peak_resident_bytes() > ballast.nbytes
    assert measured.peak_bytes < peak_memory.peak_resident_bytes() - ballast.nbytes // 2
    with pytest.raises(RuntimeError, match="process of its own failed"):
        peak_memory.measure_encoding(tmp_path / "absent", texts)
