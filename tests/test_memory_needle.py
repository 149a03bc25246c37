"""Needles in a memory: banks against those encoded whole, facts and answers against cases, ranks likewise."""

import json
import random

import pytest
import torch
from tiny_models import tiny_model

from msa_hf.asking import ask
from msa_hf.cli import main
from msa_hf.documents import Document
from msa_hf.evaluation import memory_needle, needle_map
from msa_hf.evaluation.haystack_memory import HaystackMemory
from msa_hf.evaluation.memory_needle import NeedleCell, NeedleProgress, needle_grid, summarize, wilson
from msa_hf.evaluation.needle_facts import KINDS, LONGEST, draw_fact, insert, tells, words
from msa_hf.modeling.memory_files import NAMES
from msa_hf.modeling.retrieval_msa import RankedDocument

TEXTS = [
    Document("a", "Trees", " ".join(f"Tree number {i} stands near house {i * 7}." for i in range(40))),
    "A short text without a title. It has two sentences.",
    Document(
        "b", "Rivers", "\n\n".join(f"River {i} is {i * 11} km long. It flows north." for i in range(30))
    ),
]
DOCUMENTS = [
    "One text.",
    "A second text that is a little longer.",
    "",
    "Third.",
    "The fourth one, longer again.",
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_position_embeddings=4096, retrieval="router")


def grid(model, tokenizer, texts=TEXTS, lengths=(300, 900), depths=3, **options):
    options = {"max_tokens": 160, "max_new_tokens": 4, **options}
    return list(needle_grid(model, tokenizer, texts, lengths, depths, **options))


def cells_of(events):
    return [event for event in events if isinstance(event, NeedleCell)]


def equal_banks(left, right):
    assert list(left.documents) == list(right.documents)
    assert torch.equal(left.token_counts, right.token_counts)
    assert torch.equal(left.chunk_counts, right.chunk_counts)
    assert left.layers.keys() == right.layers.keys() and left.layers
    for layer, memory in left.layers.items():
        for name in NAMES:
            own, other = (getattr(bank, name).tensors() for bank in (memory, right.layers[layer]))
            assert own.keys() == other.keys()
            for key in own:
                assert torch.equal(own[key], other[key]), (layer, name, key)


@pytest.mark.parametrize("bits", [None, 4, 2])
@pytest.mark.parametrize("prompt_format", ["chat", "msa"])
@pytest.mark.parametrize("count, place", [(5, 0), (5, 4), (5, 2), (3, 1), (1, 0)])
def test_a_bank_of_slices_is_the_bank_encoded_whole(tiny_tokenizer, bits, prompt_format, count, place):
    model = tiny_model(prompt_format=prompt_format)
    counts = model.encode_memory(DOCUMENTS, tiny_tokenizer).token_counts.tolist()
    haystack = HaystackMemory(model, tiny_tokenizer, DOCUMENTS, counts, bits)
    sizes = []
    while haystack.encoded < len(DOCUMENTS):
        sizes.append(haystack.encode_next(40, len(DOCUMENTS)))
    assert sum(sizes) == sum(counts) and len(sizes) > 1
    text = "Another text, with a fact that is new."
    whole = model.encode_memory([*DOCUMENTS[:place], text, *DOCUMENTS[place + 1 : count]], tiny_tokenizer)
    made = haystack.with_document(count, place, text)
    equal_banks(made, whole if bits is None else whole.pack(bits, bits, bits))
    assert made.numbers is None and made.head.keys() == whole.head.keys()
    question = "What is new?"
    replies = [
        ask(model, tiny_tokenizer, bank, question, retrieval="attention", max_new_tokens=3)
        for bank in (made, whole if bits is None else whole.pack(bits, bits, bits))
    ]
    assert replies[0].answer == replies[1].answer and replies[0].sources == replies[1].sources


def test_only_what_is_encoded_can_be_used(model, tiny_tokenizer):
    haystack = HaystackMemory(model, tiny_tokenizer, DOCUMENTS, [9, 38, 0, 6, 29], 4)
    assert haystack.encode_next(1, 5) == 9 and haystack.encoded == 1
    assert haystack.encode_next(1000, 4) == 44 and haystack.encoded == 4
    with pytest.raises(ValueError, match="place and count must be 0 <= place < count <= 4; got 0, 5"):
        haystack.with_document(5, 0, "x")


@pytest.mark.parametrize(
    "reply, answer, told",
    [
        ("48213", "48213", True),
        ("The code is 48,213.", "48213", True),
        ("the access code: [48213]!", "48213", True),
        ("148213", "48213", False),
        ("4821", "48213", False),
        ("48 213", "48213", False),
        ("1,48213", "48213", True),
        ("brendubek", "Brendubek", True),
        ("In BRENDUBEK's harbour", "Brendubek", True),
        ("Brendubekia", "Brendubek", False),
        ("It was truvisov\nzoroltifen.", "Truvisov Zoroltifen", True),
        ("Zoroltifen Truvisov", "Truvisov Zoroltifen", False),
        ("Truvisov and Zoroltifen", "Truvisov Zoroltifen", False),
        ("", "Truvisov", False),
    ],
)
def test_whether_an_answer_tells_the_fact(reply, answer, told):
    assert tells(reply, answer) is told


@pytest.mark.parametrize("kind", KINDS)
def test_facts(kind):
    facts = [draw_fact(kind, random.Random(seed)) for seed in range(200)]
    assert facts[3] == draw_fact(kind, random.Random(3)) and len(set(facts)) > 190
    for fact in facts:
        assert (
            fact.kind == kind and tells(fact.sentence, fact.answer) and not tells(fact.question, fact.answer)
        )
        assert len(fact.sentence) <= len(LONGEST)
    first = draw_fact(kind, random.Random(0))
    new = draw_fact(kind, random.Random(0), taken=set(words(first.answer)))
    assert not set(words(new.answer)) & set(words(first.answer))
    with pytest.raises(ValueError, match="kind must be one of number, place, person; got 'colour'"):
        draw_fact("colour", random.Random(0))


@pytest.mark.parametrize(
    "text, part, expected",
    [
        ("Title\nOne. Two. Three.", 0.0, "Title\nFACT. One. Two. Three."),
        ("Title\nOne. Two. Three.", 1.0, "Title\nOne. Two. Three. FACT."),
        ("Title\nOne. Two. Three.", 0.4, "Title\nOne. FACT. Two. Three."),
        ("Title\nOne.\n\nTwo.", 0.6, "Title\nOne.\n\nFACT. Two."),
        ("no end of a sentence", 0.2, "FACT. no end of a sentence"),
        ("no end of a sentence", 0.9, "no end of a sentence FACT."),
        ("", 0.5, "FACT."),
    ],
)
def test_where_a_fact_goes(text, part, expected):
    assert insert(text, "FACT.", part) == expected


def test_cells_and_progress(model, tiny_tokenizer):
    events = grid(model, tiny_tokenizer)
    cells = cells_of(events)
    assert [(cell.length, cell.depth) for cell in cells] == [
        (n, d) for n in (300, 900) for d in (0.0, 0.5, 1.0)
    ]
    progress = [event for event in events if isinstance(event, NeedleProgress)]
    assert progress[-1].tokens == progress[-1].total and [p.tokens for p in progress] == sorted(
        p.tokens for p in progress
    )
    assert events[0] == NeedleProgress(0, progress[-1].total)
    assert isinstance(events[1], NeedleProgress) and events[2:5] == cells[:3]
    assert {cell.kind for cell in cells} == set(KINDS)
    for cell in cells:
        assert cell.length <= cell.tokens <= cell.length + 160 + len(LONGEST) + 1
        assert cell.found == tells(cell.answer, cell.expected)
        assert cell.selected == (cell.rank is not None) and 1 <= cell.router_rank <= cell.documents
        json.dumps(cell.to_dict())
    for start in (0, 3):
        row = cells[start : start + 3]
        assert row[0].document == 0 and row[2].document == row[2].documents - 1
        assert 0 < row[1].document < row[1].documents - 1


def test_the_same_seed_gives_the_same_cells(model, tiny_tokenizer):
    def plain(**options):
        return [
            {name: value for name, value in cell.to_dict().items() if "seconds" not in name}
            for cell in cells_of(grid(model, tiny_tokenizer, lengths=(300,), **options))
        ]

    assert plain() == plain() and plain() != plain(seed=1)


def test_what_is_asked(model, tiny_tokenizer, monkeypatch):
    """The fact stands once in the memory, in its document; ranks are those of rank_documents."""
    asked = []

    def spy(model, tokenizer, bank, question, **options):
        asked.append((bank, question))
        return ask(model, tokenizer, bank, question, **options)

    monkeypatch.setattr(memory_needle, "ask", spy)
    cells = cells_of(grid(model, tiny_tokenizer, mode="router"))
    assert len(asked) == len(cells)
    for cell, (bank, question) in zip(cells, asked):
        assert question == cell.question and len(bank) == cell.documents and bank.num_tokens == cell.tokens
        holders = [i for i, text in enumerate(bank.documents) if cell.fact in text]
        assert holders == [cell.document]
        elsewhere = {
            word for i, text in enumerate(bank.documents) if i != cell.document for word in words(text)
        }
        assert not set(words(cell.expected)) & elsewhere
        ranked = model.rank_documents([question], bank, k=len(bank), mode="router", tokenizer=tiny_tokenizer)[
            0
        ]
        order = [document.id for document in ranked]
        assert isinstance(ranked[0], RankedDocument) and order[cell.router_rank - 1] == cell.document
        assert cell.tokens == sum(len(tiny_tokenizer(text)["input_ids"]) for text in bank.documents)
        assert max(bank.token_counts) <= 160
    text = "".join(asked[0][0].documents)
    assert text.index(cells[0].fact) <= len("Trees\n")
    assert asked[2][0].documents[-1].endswith(cells[2].fact)


def test_a_fact_takes_no_word_of_the_texts(model, tiny_tokenizer):
    """Texts that hold what would be drawn get other facts."""
    first = cells_of(grid(model, tiny_tokenizer, lengths=(300,)))
    planted = [f"{cell.fact} It is well known." for cell in first]
    again = cells_of(grid(model, tiny_tokenizer, [*planted, *TEXTS], lengths=(300,)))
    known = {word for text in planted for word in words(text)}
    assert len(again) == 3 and not any(set(words(cell.expected)) & known for cell in again)


def test_a_depth_between_two_documents_is_in_front_of_the_second(model, tiny_tokenizer):
    texts = ["The first has a text.", "The other has a text."]
    size = sum(map(len, texts))
    cells = cells_of(grid(model, tiny_tokenizer, texts, (size,), depths=[0.49, 0.5]))
    assert [(cell.documents, cell.document) for cell in cells] == [(2, 0), (2, 1)]


def test_a_fact_that_is_told_counts_as_found(model, tiny_tokenizer, monkeypatch):
    from dataclasses import replace

    def oracle(model, tokenizer, bank, question, **options):
        reply = ask(model, tokenizer, bank, question, **options)
        holder = next(text for text in bank.documents if question.split()[-1].rstrip("?") in text)
        return replace(reply, answer=holder if bank.num_tokens > 600 else "no idea")

    monkeypatch.setattr(memory_needle, "ask", oracle)
    cells = cells_of(grid(model, tiny_tokenizer, kinds=["number"]))
    assert [cell.found for cell in cells] == [False] * 3 + [True] * 3
    summary = summarize(cells)
    assert summary.asked == 6 and summary.found.mean == 0.5


@pytest.mark.parametrize("retrieval", ["attention", "generative"])
def test_other_retrievals(tiny_tokenizer, retrieval):
    model = tiny_model(max_position_embeddings=4096, prompt_format="msa")
    cells = cells_of(grid(model, tiny_tokenizer, lengths=(300,), depths=2, retrieval=retrieval))
    assert len(cells) == 2 and all(1 <= cell.router_rank <= cell.documents for cell in cells)


def test_a_length_below_one_document_and_one_depth(model, tiny_tokenizer):
    cells = cells_of(grid(model, tiny_tokenizer, ["A short text. It has two sentences."], (1, 5), depths=1))
    assert [(cell.documents, cell.document, cell.depth) for cell in cells] == [(1, 0, 0.5)] * 2
    assert all(cell.selected and cell.rank == 1 and cell.router_rank == 1 for cell in cells)
    ends = cells_of(grid(model, tiny_tokenizer, ["A short text."], (3,), depths=[1.0, 0.0]))
    assert [cell.depth for cell in ends] == [0.0, 1.0] and {cell.document for cell in ends} == {0}


@pytest.mark.parametrize("after", [0, 1, 4, 5, 8, 14, 30])
def test_stop(model, tiny_tokenizer, after):
    asked = []

    def stop():
        asked.append(len(asked))
        return len(asked) > after

    whole = cells_of(grid(model, tiny_tokenizer))
    cells = cells_of(grid(model, tiny_tokenizer, should_stop=stop))
    assert len(cells) < len(whole) and len(asked) <= after + 4
    assert [cell.answer for cell in cells] == [cell.answer for cell in whole[: len(cells)]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": []}, "lengths must name at least one; got none"),
        ({"lengths": [10, 0]}, "lengths must be at least 1; got 0"),
        ({"depths": 0}, "depths must be at least 1; got 0"),
        ({"depths": []}, "depths must name at least one; got none"),
        ({"depths": [0.5, 1.5]}, "depths must lie from 0.0 to 1.0; got 1.5"),
        ({"kinds": []}, "kinds must be one of number, place, person; got None"),
        ({"kinds": ["number", "x"]}, "kinds must be one of number, place, person; got 'x'"),
        ({"bits": 5}, "bits must be one of None, 1, 2, 3, 4; got 5"),
        ({"max_tokens": 60}, "max_tokens must be above [67]., which a fact may take; got 60"),
        ({"retrieval": "magic"}, "retrieval must be one of auto, .*got 'magic'"),
        ({"mode": "magic"}, "mode must be one of None, fused.*got 'magic'"),
        ({"k": 0}, "k must be at least 1; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(model, tiny_tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        needle_grid(model, tiny_tokenizer, TEXTS, **{"lengths": [10], **changes})


def test_texts_that_are_too_short(model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(HaystackMemory, "encode_next", None)
    with pytest.raises(ValueError, match="lengths must not exceed the 13 tokens of the texts; got 14"):
        grid(model, tiny_tokenizer, ["A short text."], (14,))


def test_wilson():
    """The interval's ends are where the share lies 1.96 standard errors away."""
    for successes, trials in ((1, 4), (5, 10), (48, 50)):
        estimate = wilson(successes, trials)
        for end in (estimate.low, estimate.high):
            distance = abs(estimate.mean - end) / (end * (1 - end) / trials) ** 0.5
            assert distance == pytest.approx(1.959964, rel=1e-6)
    assert wilson(0, 10).low == 0.0 and wilson(0, 10).high > 0.2 and wilson(10, 10).low < 0.8
    with pytest.raises(ValueError, match="cells must hold at least one"):
        summarize([])


def cell(length, depth, found, selected):
    rest = {"kind": "number", "fact": "", "question": "", "expected": "", "answer": "", "document": 0}
    numbers = {"tokens": length, "documents": 1, "rank": None, "router_rank": 1, "seconds": 0.0}
    return NeedleCell(length, depth, found=found, selected=selected, encoding_seconds=0.0, **numbers, **rest)


def test_the_map(tmp_path):
    cells = [cell(1000, 0.0, True, True), cell(20000, 0.0, False, True), cell(1000, 1.0, False, False)]
    lines = needle_map.render(cells).splitlines()
    assert lines[0].split() == ["depth", "\\", "tokens", "1,000", "20,000"]
    assert lines[1].split() == ["0%", needle_map.FOUND, needle_map.UNTOLD]
    assert lines[2].split() == ["100%", needle_map.LOST]
    assert "found 0.33 [" in lines[4] and "document read 0.67 [" in lines[4]
    assert needle_map.render([]) == "no needle was asked for"
    assert needle_map.to_dict(cells)["summary"]["asked"] == 3
    pytest.importorskip("matplotlib")
    needle_map.save_plot(cells, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_real_texts(monkeypatch):
    article = {"title": "Some_Town", "paragraphs": [{"context": "One."}, {"context": "Two."}]}
    records = [
        {"context": [["A", ["First.", " Second. "]], ["B", ["Third."]]]},
        {"context": [["B", ["Third."]]]},
    ]
    monkeypatch.setattr(memory_needle, "squad", lambda cache: {"data": [article]})
    monkeypatch.setattr(memory_needle, "hotpotqa", lambda cache: records)
    contents = [document.content for document in memory_needle.real_texts()]
    assert contents == ["Some Town\nOne.\n\nTwo.", "A\nFirst. Second.", "B\nThird."]


def test_command(capsys, tmp_path, tiny_tokenizer, model):
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "trees.txt").write_text(TEXTS[0].text * 2)
    arguments = ["eval", "needle", str(tmp_path / "model"), "--documents", str(tmp_path / "trees.txt")]
    arguments += ["--lengths", "300,600", "--depths", "2"]
    assert main([*arguments, "--json", "--out", str(tmp_path / "out.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["cells"]) == 4 and printed["summary"]["asked"] == 4
    assert printed == json.loads((tmp_path / "out.json").read_text())
    assert main(arguments) == 0
    assert "300" in capsys.readouterr().out.splitlines()[0]
    assert main([*arguments[:-4], "--lengths", "999999"]) == 1
    assert "lengths must not exceed" in capsys.readouterr().err
