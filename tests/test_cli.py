"""The commands, run in this process on a tiny random model: results, files, messages, exit codes."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny_models import tiny_model

from msa_hf import commands, packages
from msa_hf.asking import ask
from msa_hf.cli import build_parser, main
from msa_hf.evaluation import cache_benchmark, cache_texts, cost
from msa_hf.model_loading import load_model
from msa_hf.modeling.errors import DataUnavailableError
from msa_hf.modeling.memory_bank import MemoryBank

CITIES = {
    "Paris": "France",
    "Rome": "Italy",
    "Oslo": "Norway",
    "Lima": "Peru",
    "Bern": "Switzerland",
    "Kyiv": "Ukraine",
}


def records(count=8):
    """HotpotQA records in the published layout."""
    found = []
    for number in range(count):
        context = [
            [f"{city} {number}", [f"{city} is the capital", f" of {land}."]] for city, land in CITIES.items()
        ]
        gold = [[f"Paris {number}", 0], [f"Rome {number}", 0]]
        question = f"Which land has Paris {number}?"
        found.append({"question": question, "answer": "France", "context": context, "supporting_facts": gold})
    return found


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(retrieval="router", max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "long.md").write_text(
        "# Cities\n\n" + "\n\n".join(f"{c} lies in {n}." for c, n in CITIES.items())
    )
    (folder / "short.txt").write_text("Honey never spoils.")
    (folder / "broken.pdf").write_text("no pdf")
    return folder


@pytest.fixture(scope="module")
def memory_folder(tmp_path_factory, model_folder, files):
    out = tmp_path_factory.mktemp("memory") / "library"
    arguments = ["ingest", model_folder, files, "--out", out, "--max-tokens", "60", "--keep-going"]
    assert main([str(item) for item in arguments]) == 0
    return out


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ingest_splits_and_remembers_sources(memory_folder, model_folder, files):
    memory = MemoryBank.from_pretrained(memory_folder)
    assert memory.metadata["model"] == str(model_folder.resolve())
    known = memory.metadata["documents"]
    assert len(known) == len(memory) > 3 and known[-1]["source"] == str(files / "short.txt")
    assert memory.documents[-1] == "short\nHoney never spoils."
    assert all(text.startswith("Cities\n") for text in memory.documents[:-1])
    assert max(memory.token_counts) <= 60
    assert not memory_folder.with_name("library.partial").exists()


def test_ingest_json_and_replacing(capsys, tmp_path, model_folder, files):
    out = tmp_path / "m"
    for _ in range(2):
        code, text, _ = run(capsys, "ingest", model_folder, files / "short.txt", "--out", out, "--json")
        assert code == 0 and json.loads(text)["documents"] == json.loads(text)["files"] == 1


def test_ingest_resumes(capsys, tmp_path, model_folder, files, monkeypatch):
    arguments = [
        "ingest",
        model_folder,
        files / "long.md",
        "--out",
        tmp_path / "m",
        "--max-tokens",
        40,
        "--batch-tokens",
        80,
    ]
    import msa_hf.modeling.memory_encoding as encoding

    monkeypatch.setattr(encoding, "PORTION_TOKENS", 80)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(
            MemoryBank, "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert run(capsys, *arguments)[0] == 130
    kept = sorted((tmp_path / "m.partial").rglob("*.safetensors"))
    assert len(kept) > 1
    encoded = []
    original = encoding._Portions.save
    monkeypatch.setattr(encoding._Portions, "save", lambda *a: encoded.append(1) or original(*a))
    assert run(capsys, *arguments, "--resume")[0] == 0 and not encoded
    assert run(capsys, *arguments)[0] == 0 and len(encoded) == len(kept)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda t, f: [f / "broken.pdf", "--out", t / "m"], "broken.pdf cannot be read as PDF"),
        (lambda t, f: [t / "nothing", "--out", t / "m"], "nothing does not exist"),
        (lambda t, f: [t, "--out", t / "m"], "no text was found"),
        (lambda t, f: [f / "short.txt", "--out", f], "is no memory"),
    ],
    ids=["pdf", "missing", "empty", "occupied"],
)
def test_ingest_errors_are_one_line(capsys, tmp_path, model_folder, files, make, message):
    code, out, err = run(capsys, "ingest", model_folder, *make(tmp_path, files))
    assert code == 1 and not out and message in err
    assert [line for line in err.splitlines() if line.startswith("msa-hf: ")] == err.splitlines()[-1:]


def test_ask_prints_answer_and_sources(capsys, memory_folder):
    code, out, err = run(capsys, "ask", memory_folder, "Which city lies in Peru?", "--max-new-tokens", 3)
    assert code == 0 and out.startswith("Q: Which city lies in Peru?\nA: ") and "Lima lies in Peru." in out
    assert "routers alone: " in out and "long.md" in out and "untrained" not in err


def test_ask_json_equals_the_library(capsys, memory_folder, model_folder):
    arguments = [
        "ask",
        memory_folder,
        "Lima?",
        "What spoils?",
        "--k",
        2,
        "--rounds",
        1,
        "--max-new-tokens",
        3,
        "--json",
    ]
    code, out, _ = run(capsys, *arguments)
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and second["question"] == "What spoils?"
    assert 1 <= len(first["sources"]) <= 2 and first["retrieval"] == "router" and first["routers_trained"]
    model, tokenizer = load_model(str(model_folder), "cpu")
    memory = MemoryBank.from_pretrained(memory_folder, model=model)
    reply = ask(model, tokenizer, memory, "Lima?", k=2, rounds=1, max_new_tokens=3)
    expected = json.loads(json.dumps(reply.to_dict()))
    assert {**first, "seconds": 0} == {**expected, "seconds": 0}
    source = first["sources"][0]
    assert source["text"] == memory.documents[source["document"]] and source["round"] == source["rank"] == 1


@pytest.mark.parametrize("retrieval", ["attention", "generative"])
def test_ask_other_retrievals(capsys, memory_folder, retrieval):
    arguments = [
        "ask",
        memory_folder,
        "Lima?",
        "--retrieval",
        retrieval,
        "--k",
        2,
        "--max-new-tokens",
        3,
        "--json",
    ]
    code, out, _ = run(capsys, *arguments, "--rounds", 1)
    assert code == 0 and json.loads(out)["retrieval"] == retrieval


def test_ask_reads_questions_from_a_pipe(capsys, memory_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Lima?\n\nWhat spoils?\n"))
    code, out, _ = run(capsys, "ask", memory_folder, "--json", "--max-new-tokens", 2)
    assert code == 0 and [json.loads(line)["question"] for line in out.splitlines()] == [
        "Lima?",
        "What spoils?",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(capsys, "ask", memory_folder)[0] == 2


def test_ask_loops_in_a_terminal(capsys, memory_folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("Lima?\n\nnever asked\n"))
    code, out, _ = run(capsys, "ask", memory_folder, "--max-new-tokens", 2)
    assert code == 0 and out.count("Q: ") == 1 and "question (empty line to leave)" in out


def test_ask_warns_of_untrained_routers(capsys, tmp_path, memory_folder, tiny_tokenizer):
    folder = tmp_path / "untrained"
    model = tiny_model(retrieval="router", max_position_embeddings=2048, routers_trained=False)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    options = ["--model", folder, "--max-new-tokens", 2, "--json"]
    code, out, err = run(capsys, "ask", memory_folder, "Lima?", *options)
    reply = json.loads(out)
    assert code == 0 and "not trained" in err and reply["routers_trained"] is False
    # What chance says about rank must not displace what words say.
    assert all(s["score"] >= (s["lexical"] or 0.0) > -1 for s in reply["sources"])
    assert reply["sources"][0]["score"] == reply["sources"][0]["lexical"]  # nothing passes what mentions it
    code, out, _ = run(capsys, "ask", memory_folder, "Lima?", *options, "--mode", "router")
    assert {s["lexical"] for s in json.loads(out)["sources"]} == {None}


def test_ask_refuses_a_memory_of_another_model(capsys, tmp_path, memory_folder, tiny_tokenizer):
    tiny_model(seed=5, retrieval="router", max_position_embeddings=2048).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    code, _, err = run(capsys, "ask", memory_folder, "Lima?", "--model", tmp_path / "other")
    assert code == 1 and "another model" in err


def test_what_a_memory_names_is_never_fetched(capsys, tmp_path, model_folder, files):
    out = tmp_path / "m"
    assert run(capsys, "ingest", model_folder, files / "short.txt", "--out", out)[0] == 0
    index = json.loads((out / "memory.json").read_text())
    index["metadata"]["model"] = "someone/else"
    (out / "memory.json").write_text(json.dumps(index))
    code, _, err = run(capsys, "ask", out, "What spoils?")
    assert code == 1 and "someone/else" in err and "--model" in err


def test_missing_memory_and_model_are_named(capsys, tmp_path, files):
    code, _, err = run(capsys, "ask", tmp_path / "nowhere", "x?")
    assert code == 1 and "no memory in" in err and "Traceback" not in err
    code, _, err = run(capsys, "ingest", tmp_path / "nowhere", files, "--out", tmp_path / "m")
    assert code == 1 and "no folder of a model" in err


def test_convert(capsys, tmp_path, tiny_tokenizer):
    from backbones import tiny_backbone

    tiny_backbone("llama").save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    arguments = ["--router-layers", "1,2", "--router-chunk-size", 16, "--top-k", 5, "--json"]
    code, out, err = run(capsys, "convert", tmp_path / "llama", tmp_path / "msa", *arguments)
    result = json.loads(out)
    assert code == 0 and result["router_layers"] == [1, 2] and result["router_chunk_size"] == 16
    assert "untrained" in err and not result["routers_trained"]
    code, _, err = run(capsys, "convert", tmp_path / "llama", tmp_path / "msa")
    assert code == 1 and "exists" in err
    code, _, err = run(capsys, "ingest", tmp_path / "llama", tmp_path, "--out", tmp_path / "m")
    assert code == 1 and "msa-hf convert first" in err


def test_train_router(capsys, tmp_path, model_folder):
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"question": f"Where is {c}?", "positives": [f"{c} is in {n}."]} for c, n in CITIES.items()]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "routers"
    settings = ["--steps", 2, "--batch-size", 2, "--eval-every", 1, "--held-out", 1, "--seed", 3, "--json"]
    code, text, _ = run(capsys, "train-router", model_folder, pairs, "--out", out, *settings)
    assert code == 0 and "consensus" in json.loads(text) and list(out.glob("*.safetensors"))
    lora = ["--lora-rank", 2, "--lora-steps", 1, "--held-out", 1, "--limit", 9]
    pairs.write_text("\n".join(map(json.dumps, lines * 2)))
    code, text, _ = run(
        capsys, "train-router", model_folder, pairs, "--out", tmp_path / "lora", *settings, *lora
    )
    assert code == 0 and (tmp_path / "lora" / "lora.jsonl").is_file()
    code, _, err = run(capsys, "train-router", model_folder, pairs, "--out", out, "--temperature", 0)
    assert code == 1 and "temperature" in err
    pairs.write_text("{")
    code, _, err = run(capsys, "train-router", model_folder, pairs, "--out", out)
    assert code == 1 and "line 1" in err


def test_calibrate_cache(capsys, tmp_path, model_folder, monkeypatch):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(" ".join(f"{name} {number} of them." for number in range(120)))
    texts = ["--texts", tmp_path / "one.txt", tmp_path / "two.txt"]
    out = tmp_path / "calibration"
    arguments = ["calibrate-cache", model_folder, "--average-bits", 3.5, "--out", out]
    code, text, _ = run(capsys, *arguments, *texts, "--no-transforms", "--json")
    assert code == 0 and json.loads(text)["bits"] <= 3.5
    assert [path.name for path in out.iterdir()] == ["calibration.json"]
    code, text, _ = run(capsys, *arguments, *texts, "--seed", 1)
    assert code == 0 and "bits (keys" in text and (out / "calibration.safetensors").is_file()
    questions = [f"Question {number}? " * 200 for number in range(13)]
    monkeypatch.setattr(cache_texts, "question_texts", lambda: questions)
    code, text, _ = run(capsys, *arguments, *texts, "--questions", "--no-transforms", "--json")
    assert code == 0 and len(json.loads(text)["text_tokens"]) == 15  # one of every text
    code, _, err = run(capsys, *arguments, "--texts", tmp_path / "one.txt")
    assert code == 1 and "at least two segments of 1536 tokens" in err


def test_eval_cache_keeps_what_was_measured(capsys, tmp_path, monkeypatch):
    def cut_off(*args, **options):
        yield SimpleNamespace(to_dict=lambda: {"quality": [1]})
        raise DataUnavailableError("no MMLU here")

    monkeypatch.setattr(cache_benchmark, "evaluate_cache", cut_off)
    code, _, err = run(capsys, "eval", "cache", "smollm2-135m", "--out", tmp_path / "report.json")
    assert code == 1 and "no MMLU here" in err
    assert json.loads((tmp_path / "report.json").read_text()) == {"quality": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    code, _, err = run(capsys, "eval", "cache", "smollm2-135m", "--out", tmp_path / "none" / "report.json")
    assert code == 1 and "--out must be a file in a folder that exists" in err


@pytest.mark.parametrize("suite", ["retrieval", "answers", "cost"])
def test_eval(capsys, tmp_path, model_folder, monkeypatch, suite):
    monkeypatch.setattr(packages, "hotpotqa", lambda cache=None: records())
    monkeypatch.setattr(cost, "measure_encoding", lambda *a, **k: None)
    report = tmp_path / "report.json"
    options = [
        "--no-encoder",
        "--memory-questions",
        4,
        "--questions",
        2,
        "--cache",
        tmp_path,
        "--out",
        report,
    ]
    code, out, _ = run(capsys, "eval", suite, model_folder, *options, "--json")
    assert code == 0 and json.loads(out) == json.loads(report.read_text())
    code, out, _ = run(capsys, "eval", suite, model_folder, *options)
    assert code == 0 and len(out.splitlines()) > 3


@pytest.mark.parametrize(
    "command",
    "|convert|ingest|ask|train-router|calibrate-cache|eval|add|update|delete|undo|redo|forget|history|list|search|"
    "verify|compact|stats|export|import|reencode".split("|"),
)
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"examples:\n  msa-hf {command}".rstrip() in out


def test_examples_parse():
    """Every example in the help is a command line that the parser takes."""
    import shlex

    def parsers(parser):
        yield parser
        for action in parser._actions:
            for below in action.choices.values() if isinstance(action.choices, dict) else ():
                yield from parsers(below)

    parser = build_parser()
    helps = list(parsers(parser))
    lines = [line.strip() for p in helps for line in p.epilog.splitlines() if line.startswith("  msa-hf")]
    assert len(lines) > 12
    for line in lines:
        parser.parse_args(shlex.split(line.split(" < ")[0], comments=True)[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["ask"],
        ["ask", "m", "q", "--k", "0"],
        ["ingest", "m", "p"],
        ["eval", "speed", "m"],
        ["ask", "--bad"],
    ],
)
def test_wrong_usage_is_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: msa-hf" in capsys.readouterr().err


def test_interrupt_is_130_and_debug_shows_the_place(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    def broken(options):
        raise ValueError("two\nlines")

    monkeypatch.setattr(commands, "convert", interrupted)
    assert run(capsys, "convert", "a", "b") == (130, "", "interrupted\n")
    monkeypatch.setattr(commands, "convert", broken)
    assert run(capsys, "convert", "a", "b") == (1, "", "msa-hf: two lines\n")
    with pytest.raises(ValueError, match="two"):
        main(["convert", "a", "b", "--debug"])


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "msa_hf.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("msa-hf ")
