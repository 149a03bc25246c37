"""Caches side by side against generate(), forwards without a cache, and the caches' own reports."""

import json

import pytest
import torch
from tiny_models import DOCUMENTS, QUESTIONS, tiny_model
from transformers import DynamicCache

from msa_hf.cli import main
from msa_hf.evaluation import cache_comparison
from msa_hf.evaluation.cache_comparison import CacheAnswer, compare_caches, render
from msa_hf.evaluation.cache_curves import cache_curves, shipped_results
from msa_hf.evaluation.cache_systems import CacheSystem, cache_systems, using_attention
from msa_hf.evaluation.comparison_prompt import filled_prompt, ranked_texts, token_ids
from msa_hf.modeling.cache_turboquant import TurboQuantCache

TEXT = " ".join(f"Sentence {i} tells that tree {i * i} is {i + 3} metres high." for i in range(14))


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_position_embeddings=4096)


def compare(model, tokenizer, systems, **options):
    options = {"max_new_tokens": 6, "forced_tokens": 9, **options}
    return list(compare_caches(model, tokenizer, QUESTIONS[0], TEXT, systems, **options))


def logits_of(model, tokenizer, tokens, forced=9):
    """[N, V] by one forward without a cache: after the last `forced` tokens, and along the answer."""
    ids = tokenizer(TEXT)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([ids + tokens]), use_cache=False).logits[0]
    return logits[len(ids) - 1 - forced : -1]


def greedy(model, tokenizer, cache=None, count=6):
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    options = {} if cache is None else {"past_key_values": cache}
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)[0, ids.shape[1] :].tolist()


def test_the_dense_cache_comes_first_and_answers_as_generate(model, tiny_tokenizer):
    dense, packed = compare(model, tiny_tokenizer, ["4bit"])
    assert (dense.system, packed.system) == ("dense", "4bit")
    assert dense.kl == 0.0 and dense.agreement == 1.0 and dense.same_answer and dense.speed == 1.0
    assert (
        dense.answer == tiny_tokenizer.decode(greedy(model, tiny_tokenizer), skip_special_tokens=True).strip()
    )
    assert dense.compared == packed.compared == 9 + 6
    assert (
        dense.bits == 32.0
        and dense.packed_tokens == 0
        and dense.bytes["total"] == 2 * dense.bytes["bfloat16"]
    )
    assert packed.kl > 0.0 and packed.packed_tokens > 0 and 4.0 < packed.bits < 8.0
    assert all(row.seconds_per_token > 0 and row.prefill_seconds > 0 for row in (dense, packed))
    assert packed.speed == dense.seconds_per_token / packed.seconds_per_token
    assert json.loads(json.dumps(packed.to_dict()))["bytes"] == packed.bytes
    assert len(render([dense, packed]).splitlines()) == 4


@pytest.mark.parametrize("name", ["k1v1", "4bit"])
def test_kl_is_that_of_forced_logits(model, tiny_tokenizer, name):
    """Even where the answers part: all positions are those of the dense answer."""
    system = cache_systems([name])[0]
    _, row = compare(model, tiny_tokenizer, [system])
    answer = greedy(model, tiny_tokenizer)
    ids = tiny_tokenizer(TEXT)["input_ids"]
    tokens = torch.tensor([ids + answer])
    start, ours = len(ids) - 10, []
    with using_attention(model, system.attention), torch.inference_mode():
        cache = system.make(model.config)
        model(tokens[:, :start], past_key_values=cache, use_cache=True)
        for i in range(start, tokens.shape[1] - 1):
            ours.append(model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, 0])
    theirs = logits_of(model, tiny_tokenizer, answer).double().log_softmax(-1)
    ours = torch.stack(ours).double().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    assert row.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert row.agreement == pytest.approx(float((theirs.argmax(-1) == ours.argmax(-1)).double().mean()))
    if name == "k1v1":
        assert not row.same_answer  # else the forced part has not been tried
        with using_attention(model, system.attention), torch.inference_mode():
            cache = system.make(model.config)
            for first, last in [(0, start), *((i, i + 1) for i in range(start, len(ids) - 1))]:
                model(tokens[:, first:last], past_key_values=cache, use_cache=True)
            own = greedy(model, tiny_tokenizer, cache)
        assert row.answer == tiny_tokenizer.decode(own, skip_special_tokens=True).strip()


def test_a_wide_window_gives_the_dense_answer(model, tiny_tokenizer):
    wide = cache_systems(["k1v1"], window=8192)[0]
    dense, row = compare(model, tiny_tokenizer, [wide])
    assert row.same_answer and row.answer == dense.answer and row.kl < 1e-9 and row.agreement == 1.0
    assert row.packed_tokens == 0 and row.bits is None


def test_bytes_are_those_of_the_report(model, tiny_tokenizer):
    _, row = compare(model, tiny_tokenizer, ["3bit"])
    system = cache_systems(["3bit"])[0]
    ids = tiny_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    cache = system.make(model.config)
    with using_attention(model, system.attention), torch.inference_mode():
        model(ids[:, :-10], past_key_values=cache, use_cache=True)
        for i in range(ids.shape[1] - 10, ids.shape[1] - 1):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    report = cache.report()
    assert row.bytes["total"] == report.total and row.bytes["bfloat16"] == report.dense
    assert (
        row.bytes["codes"] == report.key_codes + report.value_codes and row.bytes["window"] == report.window
    )
    assert row.bytes["scales"] == report.key_scales + report.value_scales
    assert sum(size for name, size in row.bytes.items() if name not in ("total", "bfloat16")) == report.total
    assert row.bits == report.bits and row.packed_tokens == report.packed_tokens


def test_one_cache_at_a_time_and_the_models_own_attention_between(model, tiny_tokenizer):
    import gc
    import weakref

    made = []

    def make(config):
        assert all(known() is None for known in made)
        cache = TurboQuantCache(config)
        made.append(weakref.ref(cache))
        return cache

    own = model.config._attn_implementation
    systems = [CacheSystem(name, make, "turboquant") for name in ("one", "two")]
    for row in compare_caches(model, tiny_tokenizer, "", TEXT, systems, max_new_tokens=3, forced_tokens=3):
        assert isinstance(row, CacheAnswer) and model.config._attn_implementation == own
        gc.collect()
    assert len(made) == 2


@pytest.mark.parametrize("after", [0, 1, 5, 12, 17, 30])
def test_stop_ends_between_steps(model, tiny_tokenizer, after):
    asked = []

    def stop():
        asked.append(len(asked))
        return len(asked) > after

    rows = compare(model, tiny_tokenizer, ["4bit"], should_stop=stop)
    steps = 1 + 9 + 6 + 1  # prefill, forced, answer, and once more before what was cut short is believed
    assert len(rows) == min(after // steps, 2) and len(asked) <= after + 2
    assert model.config._attn_implementation == tiny_model().config._attn_implementation


def test_the_prompt_is_filled_with_ranked_texts(model, tiny_tokenizer):
    bank = model.encode_memory(DOCUMENTS, tiny_tokenizer)
    question = QUESTIONS[0]
    ranked = [d.id for d in model.rank_documents([question], bank, k=7, tokenizer=tiny_tokenizer)[0]]
    order = [5, *(i for i in ranked if i != 5)]
    order += [i for i in range(7) if i not in order]
    texts = [DOCUMENTS[i] for i in order if DOCUMENTS[i]]
    assert list(ranked_texts(model, tiny_tokenizer, question, bank, 4096, found=[5])) == texts
    for room in (60, 200, 300, 4096):
        style, prompt = filled_prompt(tiny_tokenizer, "chat", question, texts, room)
        used = [text for text in texts if f"Document: {text}" in prompt]
        assert style == "chat" and used == texts[: len(used)] and used
        assert len(used) == 1 or len(token_ids(tiny_tokenizer, prompt)) <= room
        if len(used) < len(texts):
            longer = len(token_ids(tiny_tokenizer, prompt)) + len(
                f"Document: {texts[len(used)]}\n\n".encode()
            )
            assert longer > room
    assert len(used) == len(texts) == 6
    with pytest.raises(ValueError, match="found must hold numbers of the memory's 7 documents; got 7"):
        ranked_texts(model, tiny_tokenizer, question, bank, 100, found=[7])


def test_the_answer_is_what_ask_answers(tiny_tokenizer):
    """With worked examples, which end an answer at its line, and documents of a memory."""
    model = tiny_model(max_position_embeddings=16384, answer_style="examples")
    bank = model.encode_memory(DOCUMENTS[:2], tiny_tokenizer)
    texts = list(ranked_texts(model, tiny_tokenizer, QUESTIONS[0], bank, 9000))
    expected = model.answer_from([QUESTIONS[0]], [texts], tiny_tokenizer, max_new_tokens=5)[0]
    options = {"context_tokens": 9000, "max_new_tokens": 5, "forced_tokens": 1}
    assert next(compare_caches(model, tiny_tokenizer, QUESTIONS[0], bank, **options)).answer == expected
    assert next(compare_caches(model, tiny_tokenizer, QUESTIONS[0], texts, **options)).answer == expected


@pytest.mark.parametrize("style, tokens", [("examples", 2), ("chat", 5)])
def test_worked_examples_end_an_answer_at_its_line(tiny_tokenizer, monkeypatch, style, tokens):
    class SecondToken(cache_comparison.StopAtNewline):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] - self.start >= 2])

    monkeypatch.setattr(cache_comparison, "StopAtNewline", SecondToken)
    model = tiny_model(max_position_embeddings=16384, answer_style=style)
    options = {"context_tokens": 9000, "max_new_tokens": 5, "forced_tokens": 3}
    assert (
        next(compare_caches(model, tiny_tokenizer, QUESTIONS[0], DOCUMENTS[:1], **options)).compared
        == 3 + tokens
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"forced_tokens": 0}, "forced_tokens must be at least 1; got 0"),
        ({"context_tokens": -1}, "context_tokens must be at least 1; got -1"),
        ({"systems": ["5bits"]}, "a system is one of dense.*got '5bits'"),
        ({"systems": ["4bit", "4bit"]}, "systems must have different names; got 4bit, 4bit"),
        ({"context": "a"}, "the prompt must have 3 to 4064 tokens.*got 1"),
        ({"context": "a" * 4065}, "the prompt must have 3 to 4064 tokens.*got 4065"),
        ({"context": [], "question": " "}, "question must not be empty; got ' '"),
    ],
)
def test_bad_arguments_are_refused_at_once(model, tiny_tokenizer, changes, message):
    arguments = {"question": "Who?", "context": TEXT, "systems": ["4bit"], **changes}
    with pytest.raises(ValueError, match=message):
        compare_caches(model, tiny_tokenizer, **arguments)


def test_curves_hold_every_measured_row():
    results = shipped_results()
    curves = cache_curves(results)
    assert [curve.name for curve in curves][0] == "msa_hf" and len({curve.name for curve in curves}) == len(
        curves
    )
    points = [point for curve in curves for point in curve.points]
    assert sorted(p.system for p in points) == sorted(row["name"] for row in results["quality"])
    by_name = {curve.name: curve for curve in curves}
    assert [(p.system, p.bits) for p in by_name["hqq"].points] == [("hqq 2 bit", 2.5), ("hqq 4 bit", 4.5)]
    assert [p.system for p in by_name["msa_hf"].points] == ["1.8bit", "k2v2", "2.7bit", "3bit", "4bit"]
    assert set(by_name) == {
        "msa_hf",
        "hqq",
        "quanto",
        "turbokv",
        "turboquant",
        "turboquant-vllm",
        "turboquant-kv",
    }
    assert all(point.low <= point.kl <= point.high for point in points)
    assert curves[0].to_dict()["points"][0]["system"] == "1.8bit"
    with pytest.raises(ValueError, match='results must have the part "quality"'):
        cache_curves({"quality": []})


def test_shipped_figures_are_those_of_the_table():
    """Every row of the table in BENCHMARKS.md, digit for digit."""
    from pathlib import Path

    table = (Path(__file__).parent.parent / "BENCHMARKS.md").read_text().split("### KL to the dense cache")[1]
    rows = [
        line.split("|")
        for line in table.split("hqq 3 bit fails")[0].splitlines()
        if "[" in line and line[0] == "|"
    ]
    shipped = shipped_results()["quality"]
    assert len(rows) == len(shipped)
    for (_, name, bits, kl, *_), own in zip(rows, shipped):
        assert name.replace("(calibrated)", "").strip(" *") == own["name"] and float(bits) == own["bits"]
        mean, low, high = (float(part.strip("[],")) for part in kl.split())
        assert own["kl"] == {"mean": mean, "low": low, "high": high}
        assert own["peer"] == ("**" not in name)


def test_command(capsys, tmp_path, tiny_tokenizer, model):
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").write_text(TEXT)
    arguments = ["eval", "compare", str(tmp_path / "model"), "--documents", str(tmp_path / "notes.txt")]
    arguments += ["--systems", "4bit"]
    out = tmp_path / "report.json"
    assert main([*arguments, "--ask", "How high is tree 9?", "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["system"] for row in printed["answers"]] == ["dense", "4bit"]
    assert printed == json.loads(out.read_text())
    assert main(arguments) == 1
    assert "compare needs --documents PATH and --ask TEXT" in capsys.readouterr().err


def test_dense_bytes_are_those_of_its_tensors(model, tiny_tokenizer):
    dense = compare(model, tiny_tokenizer, [])[0]
    cache = DynamicCache(config=model.config)
    ids = tiny_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
    assert dense.bytes["total"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
