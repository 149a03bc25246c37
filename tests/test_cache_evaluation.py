"""The measurement of quantised caches, against closed forms and tiny models; nothing here is timed."""

import ast
import base64
import json
import math
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from backbones import tiny_backbone
from rounded_cache import RoundedCache, rounded
from transformers import DynamicCache

from msa_hf.evaluation import (
    arrow_stream,
    cache_benchmark,
    cache_environments,
    cache_evaluation,
    cache_mmlu,
    cache_needle,
    cache_peers,
    cache_protocol,
    cache_quality,
    cache_speed,
    cache_systems,
    cache_texts,
    decode_speed,
    held_bytes,
)
from msa_hf.evaluation.cache_quality import Protocol
from msa_hf.evaluation.cache_systems import CacheSystem, dense_system
from msa_hf.evaluation.cache_texts import Text
from msa_hf.modeling.errors import DataUnavailableError

SHORT = Protocol(prefill=24, decoded=20, block=8)
SMALL = {"window": 8, "block": 4, "mean_group": 8, "sinks": 2, "extremes": 1}

# Streams written by pyarrow, deflated: text, integers and lists in two batches; a float; a null.
ARROW_COLUMNS = (
    "eNqNUTFuwzAMPFlyagQaPBiFhwx5gseMGTv2AV3SIkOBJpOH9B99Qpb+IVvWvqkqKdGAQKiwCcjkiWeSOoYQAgzQgm0NjxVq"
    "NBSRGUcYhBr6OvkCls6VzovgC9eA8R3FG7mjkugkPh3On1zug3jXxK25Xy95iH8fjyeOv4jzk3hVm9WE1D3HmTydhzgTX+/B"
    "b+gIr+jWR5TelHptVK/xeBlT7CKmdmFn0sxsHo+ihI/VYF2c9xmTrQn7qAprdUPSsAIyxv/mxbfia/G94vXKDyo/qHp7lZ+w"
    "6IQn8TbjODU3FmBTeFOV8e7fh9e3jPcbkllVwyic/lq+j93MPszCfTTKW7UfKNzM7GvKb1V+q/Y1FPR1BX3ncFV4k830tAWu"
    "yWKhRd3Z/wEzgT9G"
)
ARROW_FLOATS = (
    "eNp1jsEKAjEMRF93ay1LD3tYxI9Z8Jc8+gl+src4CZEVwYGmkzCZjJnZHVhxLAwaJ7qYUKp61HXVmlVjvS12Ns0a51Ct6VFm"
    "/6+pJfUP6VzbYjKhs/ZMH8fgkpdHuDHX8Oh8sKgfkcKz7Zm5cGDiP/oXLz97B143z+XsDadrEPw="
)
ARROW_NULLS = (
    "eNpdTkEOhEAI68zOqjEcPBjjwad48Fk+YX/NFlKjsQkUGKbU3f0EMCEwwtDhi4EVURp7sBuYmzLHjDn/zJx16HNrkkapwZt2"
    "of0zdYzRp06MDyae95/0AoZFDixV8WlYSSsujKwt3YTHXd4rbjzrItZNebzf6mvvzRfCZ/Af28kQRg=="
)


@pytest.fixture(scope="module")
def model():
    return tiny_backbone("llama").eval()


@pytest.fixture(scope="module")
def rows():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 259, (SHORT.length,), generator=draw).tolist() for _ in range(3)]


@pytest.fixture
def dense(model, rows, tmp_path):
    cache_quality.save_dense_logits(model, rows, tmp_path, SHORT)
    return tmp_path


def test_teacher_forcing_gives_the_logits_of_one_forward(model, rows):
    logits = torch.cat(list(cache_protocol.teacher_force(model, DynamicCache(), rows[0], 24, 8)))
    with torch.inference_mode():
        whole = model(torch.tensor([rows[0]])).logits[0, SHORT.prefill : -1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


def test_divergence_is_what_its_definition_says():
    dense = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    ours = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    result = cache_protocol.diverge(iter([ours[:1], ours[1:]]), dense, [1, 0])
    assert result.kl == pytest.approx([math.log(2) - 0.5 * math.log(3), 0.0], abs=1e-7)
    assert result.nll == pytest.approx([math.log(4), math.log(4 / 3)], abs=1e-6)
    assert result.dense_nll == pytest.approx([math.log(2), math.log(4 / 3)], abs=1e-6)
    assert result.agrees == [1.0, 1.0]


def test_logits_that_are_not_finite_or_too_few_are_errors():
    dense = torch.zeros(2, 3)
    with pytest.raises(FloatingPointError, match="0 to 2"):
        cache_protocol.diverge(iter([torch.tensor([[0.0, 1.0, math.nan]] * 2)]), dense, [0, 0])
    with pytest.raises(ValueError, match="1 positions"):
        cache_protocol.diverge(iter([torch.zeros(1, 3)]), dense, [0, 0])


def test_dense_cache_has_no_divergence_and_a_lossy_one_more_the_coarser_it_is(model, rows, dense):
    kl = []
    for system in (dense_system(), rounded(0.02), rounded(0.5)):
        results = cache_quality.measure_quality(model, system, rows, dense, SHORT)
        summary = cache_quality.summarize_quality(system.name, 16.0, results)
        kl.append(summary.kl.mean)
        assert len(results) == 3 and len(results[0].kl) == SHORT.decoded
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert 0 < kl[1] < kl[2]


def test_marginal_bits_of_dense_tensors_are_their_width(model, rows):
    states = cache_quality.measured_states(model, rows[0], SHORT)
    for system in (dense_system(), rounded(0)):
        assert cache_quality.measure_bits(model, system, states, SHORT) == 16.0


def test_a_report_that_is_not_what_is_held_is_refused(model, rows):
    class Report:
        total, reserved = 1, 0

    class Boasting(DynamicCache):
        def report(self):
            return Report

    system = CacheSystem("boasting", lambda config: Boasting(config=config))
    states = cache_quality.measured_states(model, rows[0], SHORT)
    with pytest.raises(RuntimeError, match="reports 1 bytes"):
        cache_quality.measure_bits(model, system, states, SHORT)


def test_held_bytes_counts_every_storage_once():
    class Slotted:
        __slots__ = ("tensor",)

    slotted = Slotted()
    slotted.tensor = torch.zeros(3)
    shared = torch.zeros(10)
    captured = torch.zeros(5)

    class Holder:
        def __init__(self):
            self.views = [shared[:2], shared[5:]]
            self.nested = {"a": (slotted, {"b": torch.zeros(4, dtype=torch.bfloat16)})}
            self.again = self
            self.function = lambda: captured

        def method(self):
            return None

    holder = Holder()
    assert held_bytes.held_bytes(holder) == 4 * 10 + 4 * 3 + 2 * 4 + 4 * 5
    assert held_bytes.held_bytes(holder, besides=[shared]) == 4 * 3 + 2 * 4 + 4 * 5

    class Outer:
        pass

    outer = Outer()
    outer.update = holder.method
    assert held_bytes.held_bytes(outer) == held_bytes.held_bytes(holder)


def test_held_bytes_of_a_dense_cache_are_its_numbers(model):
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 7, 8), torch.zeros(1, 2, 7, 8), layer)
    assert held_bytes.held_bytes(cache) == 3 * 2 * 2 * 7 * 8 * 4


def test_decode_speed_verifies_before_it_times(model, rows):
    ids = rows[0] + rows[1]
    states = decode_speed.dense_states(model, ids, 24)
    own = model.config._attn_implementation
    ratio = decode_speed.decode_speed(
        model, lambda: RoundedCache(model.config, 0.1), ids, states, context=24, groups=2, steps=3
    )
    assert 0 < ratio.kl < 1 and ratio.low <= ratio.median <= ratio.high
    assert ratio.layer_bytes == 2 * 2 * 24 * 8 * 4 and ratio.cache_bytes == 3 * ratio.layer_bytes
    assert ratio.step_bytes > 0 and model.config._attn_implementation == own
    with pytest.raises(RuntimeError, match="nothing is timed"):
        decode_speed.decode_speed(
            model,
            lambda: RoundedCache(model.config, 50.0),
            ids,
            states,
            context=24,
            groups=1,
            steps=3,
            largest_kl=1e-3,
        )


def test_step_memory_sees_a_decoded_copy(model, rows):
    """A cache that makes one more copy of all its layers in a step asks for that much more."""
    tokens = 96

    class Copying(DynamicCache):
        copies = ()

        def update(self, keys, values, layer, *args, **kwargs):
            if layer == 0:
                self.copies = [torch.zeros(1000, 1000) for _ in range(2)]
            return super().update(keys, values, layer, *args, **kwargs)

    peaks = []
    for kind in (DynamicCache, Copying):
        cache = kind(config=model.config)
        with torch.inference_mode():
            model(torch.tensor([(rows[0] * 3)[:tokens]]), past_key_values=cache)
        peaks.append(decode_speed.step_bytes(model, cache, [5, 6]))
    assert peaks[1] - peaks[0] == pytest.approx(2 * 4_000_000, rel=0.02)


def test_bytes_by_length(model):
    short, long = cache_speed.measure_bytes(model, [dense_system()], (8, 20), chunk=16)
    assert (short.tokens, long.tokens) == (8, 20)
    assert short.counted == short.bfloat16 == 2 * 2 * 3 * 2 * 8 * 8
    assert long.counted * 8 == short.counted * 20 and long.reported is None


def test_quantised_systems_by_name(model, rows, dense, tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"key_bits": 3, "value_bits": 2, "window": 8, "block": 4, "mean_group": 8}))
    systems = cache_systems.cache_systems(["dense", "4bit", "k1v2"], **SMALL)
    systems += cache_systems.cache_systems([str(file)])
    assert [system.name for system in systems] == ["dense", "4bit", "k1v2", "own"]
    kl, bits, protocol = {}, {}, Protocol(24, 16, 8)
    states = cache_quality.measured_states(model, rows[0], protocol)
    for system in systems:
        results = cache_quality.measure_quality(model, system, rows, dense, SHORT)
        kl[system.name] = cache_quality.summarize_quality(system.name, 0, results).kl.mean
        bits[system.name] = cache_quality.measure_bits(model, system, states, protocol)
    assert model.config._attn_implementation == "sdpa"
    assert kl["dense"] < kl["4bit"] < kl["k1v2"]
    assert bits["k1v2"] < bits["own"] < bits["4bit"] < bits["dense"]
    assert cache_speed.measure_bytes(model, systems[1:2], (40,))[0].reported
    with pytest.raises(ValueError, match="k4v3"):
        cache_systems.cache_systems(["5bit"])


def test_peer_comparison_takes_no_more_bits():
    def result(name, bits, kl, peer=False):
        return cache_quality.summarize_quality(
            name, bits, [cache_protocol.Divergence([kl], [1.0], [1.0], [1.0])] * 2, peer
        )

    quality = [
        result("4bit", 4.2, 0.01),
        result("3bit", 3.2, 0.03),
        result("hqq 4 bit", 4.5, 0.02, True),
        result("x 3 bit", 3.5, 0.05, True),
        result("y 1 bit", 1.1, 0.9, True),
    ]
    four, three, one = cache_evaluation.compare_with_peers(quality)
    assert (four.system, four.difference.mean) == ("4bit", pytest.approx(-0.01))
    assert (three.system, three.difference.mean) == ("3bit", pytest.approx(-0.02))
    assert one.system is None and one.difference is None


def test_needles_are_hidden_where_they_should_be(tiny_tokenizer):
    text = Text("prose", " ".join(f"Sentence number {i} tells of nothing." for i in range(60)))
    [stack] = cache_needle.haystacks(tiny_tokenizer, [text], [1200], [(0, 50, 100)])
    written = tiny_tokenizer.decode(stack.ids)
    places = [written.index(f"is: {number}") / len(written) for number in stack.numbers]
    assert places[0] < 0.06 and 0.4 < places[1] < 0.6 and places[2] > 0.94
    assert len(stack.ids) <= stack.length == 1200 and stack.depths == [0, 50, 100]
    assert cache_needle.haystacks(tiny_tokenizer, [text], [100_000]) == []
    again = cache_needle.haystacks(tiny_tokenizer, [text], [1200], [(0, 50, 100)])
    assert again == [stack]


def test_needle_answers_are_those_of_plain_generation(model, tiny_tokenizer):
    text = Text("prose", "A line. " * 40)
    [stack] = cache_needle.haystacks(tiny_tokenizer, [text], [200], [(50,)])
    ids = torch.tensor([stack.ids + stack.questions[0]])
    out = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    answer = tiny_tokenizer.decode(out[0, ids.shape[1] :])
    told = cache_needle.Haystack(200, stack.ids, [50], stack.questions, [answer])
    assert cache_needle.measure_needle(model, tiny_tokenizer, dense_system(), [told], 3) == [1.0]
    score = cache_needle.summarize_needle("x", [1.0], [told], [0.0])
    assert score.by_length == {200: 1.0} and score.by_depth == {50: 1.0} and score.difference.mean == 1.0


def test_mmlu_choices_are_those_of_the_whole_prompt(model, tiny_tokenizer, monkeypatch):
    class Letters:
        def __call__(self, text, **_):
            ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": ids[1:] if len(text) == 2 else ids}

    draw = torch.Generator().manual_seed(1)
    lines = torch.randint(3, 259, (4, 30), generator=draw).tolist()
    subject = cache_mmlu.Subject("s", lines[0], lines[1:], [0, 1, 2])
    choices, storage = cache_mmlu.measure_mmlu(model, Letters(), dense_system(), [subject])
    letters = [Letters()(f" {letter}")["input_ids"][0] for letter in "ABCD"]
    for line, choice in zip(lines[1:], choices):
        with torch.inference_mode():
            logits = model(torch.tensor([lines[0] + line])).logits[0, -1]
        assert choice == int(logits[letters].argmax())
    assert storage == [{"prefix_tokens": 30.0}]
    wrong = [(choice + 1) % 4 for choice in choices]
    score = cache_mmlu.summarize_mmlu("x", choices, [subject], storage, wrong)
    right = sum(a == b for a, b in zip(choices, [0, 1, 2]))
    assert score.same_answer == 0 and score.accuracy.mean == pytest.approx(right / 3)
    with pytest.raises(ValueError, match="as 2 tokens"):
        cache_mmlu.letter_token(tiny_tokenizer, "A")


def test_mmlu_prompt_is_the_released_one(monkeypatch):
    columns = {
        b"dev": {"question": ["1+1?"], "choices": [["1", "2", "3", "4"]], "answer": [1]},
        b"test": {"question": [" 2+2?", "1+2?"], "choices": [["1", "2", "3", "4"]] * 2, "answer": [3, 2]},
    }
    monkeypatch.setattr(cache_mmlu, "read_columns", columns.__getitem__)
    monkeypatch.setattr(cache_mmlu, "mmlu", lambda split, cache: {"high_school_math": split.encode()})

    def tokenizer(text, **_):
        return {"input_ids": text}

    [subject] = cache_mmlu.load_subjects(tokenizer, per_subject=1)
    assert subject.prefix == (
        "The following are multiple choice questions (with answers) about high school math.\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
    )
    assert subject.questions == ["2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"] and subject.answers == [3]
    [later] = cache_mmlu.load_subjects(tokenizer, per_subject=6, skip=1)
    assert later.questions == ["1+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"] and later.answers == [2]


def unpacked(text):
    return zlib.decompress(base64.b64decode(text))


def test_arrow_stream_as_pyarrow_writes_it():
    columns = {"text": ["é", "", "abc"], "n": [1, -2, 3], "many": [["a"], [], ["b", "c"]]}
    assert arrow_stream.read_columns(unpacked(ARROW_COLUMNS)) == columns
    with pytest.raises(ValueError, match="neither text"):
        arrow_stream.read_columns(unpacked(ARROW_FLOATS))
    with pytest.raises(ValueError, match="nulls"):
        arrow_stream.read_columns(unpacked(ARROW_NULLS))


def test_what_is_no_arrow_stream_is_refused():
    with pytest.raises(ValueError, match="no Arrow stream"):
        arrow_stream.read_columns(b"PAR1" + bytes(20))
    assert arrow_stream.read_columns(struct.pack("<Ii", 0xFFFFFFFF, 0)) == {}


@pytest.fixture
def here(monkeypatch):
    """Peers run with this process's own Python, which has none of their packages."""
    monkeypatch.setattr(cache_peers, "peer_python", lambda peer: Path(sys.executable))


def test_a_peer_that_does_not_install_or_fails_is_told_with_its_reason(here, model, rows, dense, monkeypatch):
    folder = dense / "model"
    model.save_pretrained(folder)
    task = cache_peers.PeerTask(folder, rows, dense, SHORT)
    absent = cache_environments.PeerPackage("turbokv", (), (4,))
    [run] = cache_peers.run_peers(task, [absent])
    assert run.quality is None and "turboquant" in run.reason

    def refuse(peer):
        raise DataUnavailableError("turbokv does not install: no wheel")

    monkeypatch.setattr(cache_peers, "peer_python", refuse)
    [run] = cache_peers.run_peers(task, [absent])
    assert run.reason == "turbokv does not install: no wheel"


def test_the_program_of_peers_measures_like_we_do(here, model, rows, dense, monkeypatch, tmp_path):
    """A module named like a peer's, with a dense cache in it, must give the dense cache's figures."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    package = tmp_path / "site"
    package.mkdir()
    (package / "turboquant.py").write_text(
        "from transformers import DynamicCache\ndef TurboQuantCache(bits):\n    return DynamicCache()\n"
    )
    starter = tmp_path / "python"
    starter.write_text(f'#!/bin/sh\nPYTHONPATH={package} exec {sys.executable} "$@"\n')
    starter.chmod(0o755)
    monkeypatch.setattr(cache_peers, "peer_python", lambda peer: starter)
    long = rows[0] + rows[1]
    task = cache_peers.PeerTask(folder, rows, dense, SHORT, long, (24,), groups=1, steps=2)
    peer = cache_environments.PeerPackage("turboquant", (), (3,))
    [run] = cache_peers.run_peers(task, [peer])
    assert run.reason is None
    assert run.name == "turboquant 3 bit" and run.bits == 16.0
    assert max(max(result.kl) for result in run.quality) < 1e-6
    assert run.speed[0].context == 24 and run.speed[0].kl < 1e-6


def test_what_peers_run_imports_nothing_of_this_package():
    folder = Path(cache_protocol.__file__).parent
    for name in ("cache_protocol", "held_bytes", "decode_speed", "cache_peer_program"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and not node.module.startswith("msa_hf"), name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("msa_hf") for alias in node.names), name


def test_report_of_all_parts(model, rows, dense, tiny_tokenizer, monkeypatch, tmp_path):
    """Every part on a tiny model whose texts are drawn here, down to the table, the JSON and the plot."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    texts = [Text(name, f"{name} tells of many things. " * 40) for name in ("one", "two", "three")]
    monkeypatch.setattr(cache_benchmark, "benchmark_texts", lambda: texts)
    monkeypatch.setattr(cache_benchmark, "long_texts", lambda: texts)
    monkeypatch.setattr(cache_texts, "benchmark_texts", lambda _: texts)
    monkeypatch.setattr(cache_texts, "long_texts", lambda _: texts)
    subject = cache_mmlu.Subject("s", rows[0], [rows[1], rows[2]], [0, 1])
    monkeypatch.setattr(cache_benchmark, "load_subjects", lambda *_: [subject])
    monkeypatch.setattr(cache_mmlu, "letter_token", lambda _, letter: ord(letter))
    task = cache_benchmark.CacheTask(
        cache_benchmark.PARTS,
        texts=2,
        long_texts=1,
        needle_lengths=(240,),
        needle_texts=1,
        held_tokens=(16,),
        contexts=(24,),
        groups=2,
        steps=2,
        protocol=SHORT,
        length_protocol=Protocol(16, 512, 32),
    )
    systems = [dense_system(), rounded(0.2), *cache_systems.cache_systems(["k4v3"], **SMALL)]

    def two_peers(given, _):
        yield cache_peers.PeerRun("absent 4 bit", "absent", reason="no wheel")
        found = cache_quality.measure_quality(model, dense_system(), given.texts, given.dense, given.protocol)
        yield cache_peers.PeerRun("peer 4 bit", "peer", "5", 16.0, found)

    monkeypatch.setattr(cache_benchmark, "run_peers", two_peers)
    *earlier, report = cache_benchmark.evaluate_cache(str(folder), systems, task, peers=[None])
    assert len(earlier) == len(cache_benchmark.PARTS) + 1
    assert earlier[0].quality == report.quality[:-1] and earlier[0].bytes == [] != report.bytes
    assert report.quality[-1].name == "peer 4 bit" and report.quality[-1].kl.mean < 1e-6
    assert earlier[-1].missing == report.missing == {"absent 4 bit": "no wheel"}
    text = cache_evaluation.render(report)
    for word in (
        "Quality over 2 texts",
        "Quality over length",
        "Needle",
        "MMLU",
        "Decode speed",
        "Bytes held",
    ):
        assert word in text
    kept = json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in kept["quality"]] == ["dense", "rounded 0.2", "k4v3", "peer 4 bit"]
    assert "tokens packed in" in text and kept["bytes"][2]["reported"] == kept["bytes"][2]["counted"]
    assert kept["mmlu"][0]["retained"] is None and kept["mmlu"][1]["same_answer"] is not None
    pytest.importorskip("matplotlib")
    cache_evaluation.save_plot(report, tmp_path / "kl.png")
    assert (tmp_path / "kl.png").read_bytes()[:4] == b"\x89PNG"


def test_length_takes_the_texts_that_are_long_enough(tiny_tokenizer, monkeypatch):
    sizes = {"short": 30, "just": 40, "long": 90}
    monkeypatch.setattr(
        cache_texts, "benchmark_texts", lambda _: [Text(n, "a" * sizes[n]) for n in ("short", "just")]
    )
    monkeypatch.setattr(cache_texts, "long_texts", lambda _: [Text("long", "b" * 90)] * 2)
    rows = cache_texts.tokenize_long(tiny_tokenizer, 40, count=2)
    assert [tiny_tokenizer.decode(row) for row in rows] == ["a" * 40, "b" * 40]
    assert len(cache_texts.tokenize_long(tiny_tokenizer, 40, count=9)) == 3


def test_question_texts_are_prompts_with_their_answers(monkeypatch):
    def prompt(number, label, choice):
        shots = "Question: Is ice cold?\n A. yes\n B. no\nAnswer: A\n\n"
        context = f"{shots}Question: What is {number}?\n A. a\n B. b\nAnswer:"
        return {
            "doc_id": number,
            "label": label,
            "request": {"context": context, "continuation": f" {choice}"},
        }

    prompts = [prompt(0, 1, "A"), prompt(0, 1, "B"), prompt(1, 0, "A"), prompt(1, 0, "B")]
    asked = []
    monkeypatch.setattr(cache_texts, "multiple_choice", lambda test, _: asked.append(test) or prompts)
    texts = cache_texts.question_texts()
    assert len(texts) == len(set(asked)) == 6 and not any("mmlu" in test for test in asked)
    assert texts[0] == (
        "The following are multiple choice questions (with answers).\n\n"
        "Is ice cold?\nA. yes\nB. no\nAnswer: A\n\n"
        "What is 0?\nA. a\nB. b\nAnswer: B\n\n"
        "What is 1?\nA. a\nB. b\nAnswer: A"
    )


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="got colour"):
        cache_benchmark.CacheTask(("quality", "colour"))
    with pytest.raises(ValueError, match="got none"):
        cache_benchmark.CacheTask(())
