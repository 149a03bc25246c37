"""The demo script on a tiny model: what it prints, what it keeps, what its memory holds."""

import importlib.util
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model

from msa_hf import packages


@pytest.fixture
def demo(tmp_path, tiny_tokenizer, monkeypatch):
    """The script as a module, with a tiny model and six records in HotpotQA's layout."""
    path = Path(__file__).resolve().parent.parent / "scripts" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny_model(retrieval="router", max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    facts = [f"Town {i} lies in Land {i} by the river." for i in range(6)]
    records = [
        {
            "question": f"Where is Town {i}?",
            "answer": f"Land {i}",
            "context": [[f"Town {i}", [fact]], ["Same", ["text"]]],
        }
        for i, fact in enumerate(facts)
    ]
    monkeypatch.setattr(packages, "hotpotqa", lambda cache=None: records)
    monkeypatch.setattr(module, "converted_model", lambda folder, cache: tmp_path / "model")
    monkeypatch.setattr(module, "QUESTIONS", (4, 2, 0))
    return module


def run(demo, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
    assert demo.main() == 0
    return capsys.readouterr().out


def test_demo_answers_three_questions_and_keeps_the_memory(demo, capsys, monkeypatch, tmp_path):
    out = run(demo, capsys, monkeypatch, "--tokens", 10_000, "--cache", tmp_path)
    assert "7 paragraphs" in out and "encoded in" in out and "bytes per token" in out
    for number in (4, 2, 0):
        assert f"Q: Where is Town {number}?" in out and f"(expected: Land {number})" in out
    assert out.count("routers alone") >= 3 and "of 3 answers as expected" in out
    again = run(demo, capsys, monkeypatch, "--tokens", 10_000, "--cache", tmp_path)
    assert "from an earlier run" in again
    assert "encoded in" in run(demo, capsys, monkeypatch, "--tokens", 10_000, "--cache", tmp_path, "--fresh")


def test_corpus_starts_with_what_the_questions_need(demo, tiny_tokenizer):
    records = packages.hotpotqa()
    small = demo.corpus(records, tiny_tokenizer, 50)
    assert [document.title for document in small] == ["Town 4", "Same"]
    whole = demo.corpus(records, tiny_tokenizer, 10_000)
    assert len(whole) == 7 and len({document.id for document in whole}) == 7
