"""The benchmark of stores measures what it says."""

import json

import pytest
from test_evaluation import small_benchmark
from tiny_models import tiny_model

from msa_hf.evaluation import store_costs


@pytest.fixture(scope="module")
def checkpoint(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return model, tiny_tokenizer, folder


def test_report(checkpoint, tmp_path):
    model, tokenizer, folder = checkpoint
    benchmark = small_benchmark(4)
    memory = model.encode_memory(list(benchmark.documents), tokenizer)
    report = store_costs.evaluate_store(
        model, tokenizer, benchmark, memory, folder, large_documents=450, edits=2, folder=tmp_path
    )
    assert report.equal_selections and report.questions == 4 and report.large_documents == 450
    assert report.vector_bytes["4 bits"] < report.vector_bytes["dense"]
    assert report.folder_bytes["dense"] > report.vector_bytes["dense"]
    for name in store_costs.EDITED:
        assert len(report.written[name]) == len(report.edit_seconds[name]) == 2
        assert all(0 < size < report.large_bytes for size in report.written[name])
    assert max(report.written["delete"]) < min(report.written["add"])
    copies, rest = divmod(450, len(memory))
    chunks = memory.router_chunk_counts
    # The edits have added two documents and made two longer.
    assert report.search.router_chunks > copies * int(chunks.sum()) + int(chunks[:rest].sum())
    assert 0 < report.search.loaded_bytes <= report.search.peak_bytes and len(report.search.seconds) == 4
    text = store_costs.render(report)
    assert "the same selections as the packed bank" in text and "450 documents" in text
    assert json.loads(json.dumps(report.to_dict()))["questions"] == 4
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_fails_says_why(checkpoint, tmp_path):
    with pytest.raises(RuntimeError, match="no store in"):
        store_costs.measure_search(checkpoint[2], tmp_path, ["question?"])
