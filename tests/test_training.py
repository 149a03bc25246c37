"""Router training: a tiny random backbone, and the model's own routing as the oracle for every score."""

import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msa_hf.configs import routers_folder
from msa_hf.modeling.configuration_msa import MSAConfig
from msa_hf.modeling.losses_msa import decoupled_infonce
from msa_hf.modeling.memory_encoding import encode_documents
from msa_hf.modeling.modeling_msa import MSAForCausalLM
from msa_hf.training import (
    RouterPair,
    RouterTrainingConfig,
    encode_features,
    hotpotqa_pairs,
    load_router,
    read_pairs,
    save_router_adapter,
    train_router,
    write_pairs,
)
from msa_hf.training.adapter import SETTINGS_FILE, router_weights
from msa_hf.training.layer_router import DocumentBatch, LayerRouter, contrastive_loss, whitening
from msa_hf.training.recall import consensus_weights, document_ranks, recall_figures

PLACES = (
    "Oslo Lima Cairo Quito Accra Dhaka Hanoi Minsk Turin Perth Tunis Bergen Leeds Malmo Izmir Kyoto".split()
)
THINGS = "museum harbour library bridge theatre garden market castle station school".split()
VERBS = {"opened": "start", "closed": "end", "burned": "fire", "moved": "relocate"}
QUICK = RouterTrainingConfig(
    steps=100, batch_size=16, held_out=30, eval_every=50, learning_rate=3e-3, hard_negatives=2
)


@pytest.fixture(scope="module")
def pairs() -> list[RouterPair]:
    """Facts about places; questions name the event by another word, so that matching words is not enough."""
    draw = random.Random(0)
    facts = [(place, thing, verb) for place in PLACES for thing in THINGS for verb in VERBS]
    draw.shuffle(facts)

    def text(place, thing, verb):
        year = draw.randrange(1800, 2000)
        return f"The old {thing} of the town of {place} , it is said , {verb} in the year {year} at last ."

    texts = {fact: text(*fact) for fact in facts}
    return [
        RouterPair(
            f"In which year was there a {VERBS[verb]} of the {thing} in the town of {place} ?",
            (texts[place, thing, verb],),
            tuple(texts[place, thing, other] for other in VERBS if other != verb),
        )
        for place, thing, verb in facts[:200]
    ]


@pytest.fixture(scope="module")
def tokenizer(pairs) -> PreTrainedTokenizerFast:
    texts = [text for pair in pairs for text in (pair.question, *pair.positives, *pair.negatives)]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def tiny_model(vocabulary: int, **fields) -> MSAForCausalLM:
    torch.manual_seed(0)
    settings = dict(
        router_layers=[0, 2],
        chunk_size=8,
        router_chunk_size=4,
        score_normalization="key",
        query_reduction="maxsim",
    )
    sizes = dict(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    return MSAForCausalLM(MSAConfig(**{**sizes, **settings, **fields})).eval()


@pytest.fixture(scope="module")
def trained(pairs, tokenizer, tmp_path_factory):
    """(model, result, folder) of one training run."""
    model, folder = tiny_model(len(tokenizer)), tmp_path_factory.mktemp("trained")
    return model, train_router(model, tokenizer, pairs, QUICK, folder), folder


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def routing_scores(model, tokenizer, questions: list[str], documents: list[str]) -> dict[int, torch.Tensor]:
    """Document scores of every router layer as the model computes them, one question at a time."""
    config, scores = model.config, {}
    bank = encode_documents(model, documents, tokenizer)
    names = ("head_reduction", "query_reduction", "chunk_reduction")
    reductions = {name: getattr(config, name) for name in names}

    def record(layer, hidden, keys, values):
        queries = model.model.layers[layer].self_attn.router_queries(hidden, None)
        mask = torch.ones(1, hidden.shape[1], dtype=torch.bool)
        scores.setdefault(layer, []).append(bank.route(layer, queries, mask, **reductions))

    with torch.inference_mode():
        for question in questions:
            ids = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
            model.model.encode(ids, record)
    return {layer: torch.cat(rows) for layer, rows in scores.items()}


def test_loss_falls_and_recall_rises(trained):
    _, result, folder = trained
    for layer in (0, 2):
        lines = [line for line in read_log(folder) if line.get("layer") == layer]
        assert lines[-1]["loss"] < 0.7 * lines[1]["loss"]
        assert result.layers[layer]["recall@1"] > lines[0]["recall@1"] + 0.1
    assert result.consensus["recall@4"] > 0.8


def test_figures_are_those_of_the_models_own_routing(trained, pairs, tokenizer):
    model, result, _ = trained
    held_out = np.sort(np.random.default_rng(QUICK.seed).permutation(len(pairs))[: QUICK.held_out])
    documents = list(dict.fromkeys(text for pair in pairs for text in (*pair.positives, *pair.negatives)))
    positives = [np.array([documents.index(text) for text in pairs[index].positives]) for index in held_out]
    scores = routing_scores(model, tokenizer, [pairs[index].question for index in held_out], documents)
    for layer, expected in result.layers.items():
        found = recall_figures(document_ranks([scores[layer]], [1.0]), positives)
        assert found == pytest.approx(expected, abs=0.04)  # bfloat16 products in training
    found = recall_figures(document_ranks(list(scores.values()), result.consensus_weights), positives)
    assert found == pytest.approx(result.consensus, abs=0.04)


@pytest.mark.parametrize("normalization", ["cosine", "key", "dot"])
@pytest.mark.parametrize("query", ["max", "mean", "last", "maxsim"])
@pytest.mark.parametrize("chunk", ["max", "mean"])
def test_training_scores_equal_routing(pairs, tokenizer, tmp_path, normalization, query, chunk):
    model = tiny_model(
        len(tokenizer),
        score_normalization=normalization,
        query_reduction=query,
        chunk_reduction=chunk,
        router_layers=[1],
    )
    questions, documents = [pair.question for pair in pairs[:5]], [pair.positives[0] for pair in pairs[:20]]
    documents[3], documents[7] = "old", documents[7] + " " + documents[8]
    features = encode_features(model, tokenizer, questions, documents, tmp_path)
    router = LayerRouter(model.config, whitening(features.chunks[1], 0), 0).eval()
    with torch.no_grad():
        for weight, value in zip(router_weights(model).values(), router.weights()):
            weight.copy_(value)
        batch = DocumentBatch.of(np.arange(20), features.chunk_offsets)
        chunks = torch.from_numpy(features.chunks[1].astype(np.float32)[batch.rows]) @ router.white.T
        tokens = torch.from_numpy(features.tokens[1].astype(np.float32)) @ router.white.T
        scores = torch.empty(5, 20)
        scores[:, batch.documents] = router.scores(
            chunks, batch, tokens, np.diff(features.question_offsets).tolist()
        )
    expected = routing_scores(model, tokenizer, questions, documents)[1]
    assert torch.allclose(scores, expected, rtol=0, atol=1e-2 * float(expected.std() + expected.abs().mean()))


def test_batched_loss_is_the_mean_of_the_models_loss():
    scores = torch.randn(6, 9, requires_grad=True)
    positives = torch.rand(6, 9) < 0.3
    positives[:, 0] = True
    expected = torch.stack([decoupled_infonce(row, mark, 0.1) for row, mark in zip(scores, positives)]).mean()
    assert torch.allclose(contrastive_loss(scores, positives, 0.1), expected, atol=1e-5)
    everything = contrastive_loss(scores, torch.ones_like(positives), 0.1)
    everything.backward()
    assert everything == 0 and torch.isfinite(scores.grad).all()


def test_seeds_reproduce_and_differ(pairs, tokenizer, tmp_path):
    short = RouterTrainingConfig(steps=6, batch_size=8, held_out=20, eval_every=3, mining_rounds=2)
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model = tiny_model(len(tokenizer))
        config = RouterTrainingConfig(**{**short.__dict__, "seed": seed})
        train_router(model, tokenizer, pairs, config, tmp_path / name, features_dir=tmp_path / "features")
        weights.append(torch.cat([weight.flatten() for weight in router_weights(model).values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_features_are_kept_and_do_not_depend_on_batches(pairs, tokenizer, tmp_path, monkeypatch):
    model = tiny_model(len(tokenizer))
    questions, documents = [pair.question for pair in pairs[:4]], [pair.positives[0] for pair in pairs[:9]]
    large = encode_features(model, tokenizer, questions, documents, tmp_path / "a")
    small = encode_features(model, tokenizer, questions, documents, tmp_path / "b", batch_tokens=1)
    for layer in model.config.router_layers:
        assert np.abs(large.chunks[layer].astype(np.float32) - small.chunks[layer]).max() < 5e-3
        assert np.abs(large.tokens[layer].astype(np.float32) - small.tokens[layer]).max() < 5e-3
    monkeypatch.setattr(model.model, "encode", None)
    again = encode_features(model, tokenizer, questions, documents, tmp_path / "a")
    assert np.array_equal(again.chunks[2], large.chunks[2])
    with pytest.raises(TypeError):
        encode_features(model, tokenizer, questions, documents[:-1], tmp_path / "a")


def test_adapter_round_trips(trained, pairs, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model, _, folder = trained
    questions, documents = [pair.question for pair in pairs[:3]], [pair.positives[0] for pair in pairs[:12]]
    expected = routing_scores(model, tokenizer, questions, documents)

    def check(other):
        found = routing_scores(other, tokenizer, questions, documents)
        assert all(torch.equal(found[layer], expected[layer]) for layer in expected)

    elsewhere = tiny_model(len(tokenizer), router_layers=[1], chunk_size=16)
    elsewhere.load_state_dict(tiny_model(len(tokenizer)).state_dict(), strict=False)
    loaded = load_router(elsewhere, folder)
    assert loaded.config.routers_trained and loaded.config.router_layers == [0, 2]
    assert loaded.config.consensus_weights == model.config.consensus_weights
    check(loaded)
    wrapped = peft.PeftModel.from_pretrained(tiny_model(len(tokenizer)), str(folder))
    check(wrapped.get_base_model())
    check(wrapped.merge_and_unload())
    native = tiny_model(len(tokenizer))
    native.load_adapter(str(folder))
    check(native)
    loaded.save_pretrained(tmp_path / "merged")
    check(MSAForCausalLM.from_pretrained(tmp_path / "merged"))


def test_adapter_of_another_backbone_or_damaged_is_refused(trained, tokenizer, tmp_path):
    _, _, folder = trained
    other = tiny_model(len(tokenizer), head_dim=8)
    with pytest.raises(ValueError, match="another backbone"):
        load_router(other, folder)
    with pytest.raises(ValueError, match=SETTINGS_FILE):
        load_router(tiny_model(len(tokenizer)), tmp_path)
    save_router_adapter(tiny_model(len(tokenizer)), tmp_path)
    (tmp_path / SETTINGS_FILE).write_text("{}")
    with pytest.raises(ValueError, match="exactly"):
        load_router(tiny_model(len(tokenizer)), tmp_path)


def test_the_backbone_is_not_changed(trained, tokenizer):
    model, fresh = trained[0].state_dict(), tiny_model(len(tokenizer)).state_dict()
    assert all(torch.equal(model[name], fresh[name]) for name in fresh if "router_" not in name)


def test_pairs_round_trip_and_bad_lines_are_named(pairs, tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, pairs[:3])
    assert read_pairs(path) == pairs[:3]
    for line, message in (
        ("{", "line 2"),
        ("[]", "expected an object"),
        ('{"question": " ", "positives": ["a"]}', "question"),
        ('{"question": "q", "positives": []}', "at least one"),
        ('{"question": "q", "positives": ["a", 3]}', "positives must be a list"),
    ):
        path.write_text('{"question": "q", "positives": ["a"]}\n' + line + "\n")
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no pairs"):
        read_pairs(path)


def test_hotpotqa_pairs_keep_the_benchmark_out():
    def record(question, gold, others):
        context = [[title, [f"About {title}.", " More."]] for title in (*gold, *others)]
        return {"question": question, "context": context, "supporting_facts": [[title, 0] for title in gold]}

    records = [
        record("held out", ["A", "B"], ["C"]),
        record("kept", ["D", "E"], ["A", "C"]),
        record("dropped", ["A"], ["F"]),
    ]
    (pair,) = hotpotqa_pairs(records, held_out=1)
    assert pair.question == "kept" and pair.positives == ("D\nAbout D. More.", "E\nAbout E. More.")
    assert pair.negatives == ("C\nAbout C. More.",)
    assert hotpotqa_pairs(records, 1, distractors_of=0) == [RouterPair(pair.question, pair.positives)]


def test_bad_settings_are_refused(pairs, tokenizer, tmp_path):
    for fields in (
        {"steps": 0},
        {"temperature": 0.0},
        {"consensus": "best"},
        {"dtype": "int8"},
        {"hard_negatives": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            RouterTrainingConfig(**fields)
    model = tiny_model(len(tokenizer))
    with pytest.raises(ValueError, match="at least 4 questions"):
        train_router(model, tokenizer, pairs[:3], QUICK, tmp_path)
    with pytest.raises(ValueError, match="router_layers"):
        train_router(tiny_model(len(tokenizer), router_layers=[]), tokenizer, pairs, QUICK, tmp_path)
    with pytest.raises(ValueError, match="head_reduction"):
        bad = tiny_model(len(tokenizer), head_reduction="max", query_reduction="max")
        train_router(bad, tokenizer, pairs, QUICK, tmp_path)


def test_consensus_weights_favour_the_better_layer():
    torch.manual_seed(0)
    positives = [np.array([index % 50]) for index in range(40)]
    noise, good = torch.randn(40, 50), torch.randn(40, 50)
    for index, ids in enumerate(positives):
        good[index, ids] += 4
    weights = consensus_weights([noise, good], positives)
    assert weights[1] > 4 * weights[0] >= 0 and sum(weights) == pytest.approx(2, abs=1e-3)
    assert recall_figures(document_ranks([noise, good], weights), positives)["recall@16"] > 0.95


def test_lora_and_routers_train_together_and_round_trip(trained, pairs, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    from msa_hf.training.lora_training import LoraTrainingConfig, train_lora

    model = load_router(tiny_model(len(tokenizer)), trained[2])
    questions, documents = [pair.question for pair in pairs[:3]], [pair.positives[0] for pair in pairs[:12]]
    before = routing_scores(model, tokenizer, questions, documents)
    config = LoraTrainingConfig(rank=4, steps=30, batch_size=8, learning_rate=5e-3, log_every=10)
    wrapped = train_lora(model, tokenizer, pairs[:40], config, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "lora.jsonl").read_text().splitlines()[1:]]
    assert losses[-1] < losses[0]
    after = routing_scores(wrapped.get_base_model(), tokenizer, questions, documents)
    assert torch.isfinite(after[2]).all() and not torch.allclose(after[2], before[2], atol=1e-3)
    again = peft.PeftModel.from_pretrained(tiny_model(len(tokenizer)), str(tmp_path)).get_base_model()
    assert torch.equal(routing_scores(again, tokenizer, questions, documents)[2], after[2])
    merged = load_router(tiny_model(len(tokenizer)), tmp_path)
    assert torch.allclose(routing_scores(merged, tokenizer, questions, documents)[2], after[2], atol=1e-4)
    assert merged.config.routers_trained and not any("lora" in name for name in merged.state_dict())


def test_shipped_routers_are_complete_and_small():
    folder = routers_folder("smollm2-135m")
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    config = MSAConfig(
        vocab_size=32, hidden_size=576, intermediate_size=32, num_hidden_layers=9, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64,
    )  # fmt: skip
    loaded = load_router(MSAForCausalLM(config).eval(), folder)
    assert {name: getattr(loaded.config, name) for name in settings} == settings
    assert loaded.config.routers_trained and loaded.config.router_layers == [4, 8]
    weights = router_weights(loaded)
    assert all(torch.isfinite(weight).all() and weight.std() > 0 for weight in weights.values())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
