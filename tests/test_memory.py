"""What must hold for every memory: encoding, selection, reading, files."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import DOCUMENTS, MEMORY, QUESTIONS, tiny_model

from msa_hf import MemoryBank
from msa_hf.modeling.errors import MemoryFormatError, MemoryMismatchError
from msa_hf.modeling.memory_encoding import length_batches

KINDS = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ask(model, tokenizer, memory, questions=QUESTIONS, **options):
    batch = tokenizer(questions, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**batch, memory=memory, use_cache=False, **options)


def rows_of(bank, document, layer):
    first = int(bank.chunk_counts[:document].sum())
    start = int(bank.router_chunk_counts[:document].sum())
    memory = bank.layers[layer]
    return (
        memory.keys.slice(first, first + int(bank.chunk_counts[document])),
        memory.values.slice(first, first + int(bank.chunk_counts[document])),
        memory.router_keys.slice(start, start + int(bank.router_chunk_counts[document])),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("separate", [True, False])
def test_bank_rows_equal_pooled_states_of_the_document_alone(kind, separate, tiny_tokenizer):
    """The oracle is the model's own cache: K and V of the document run alone through the backbone."""
    model = tiny_model(kind, separate_router=separate)
    bank = model.encode_memory(DOCUMENTS, tiny_tokenizer, batch_tokens=64)
    for number, text in enumerate(DOCUMENTS):
        ids = tiny_tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert bank.token_counts[number] == ids.shape[1]
        if not text:
            continue
        with torch.no_grad():
            output = model(ids, use_cache=True, output_hidden_states=True)
        for layer in MEMORY["router_layers"]:
            local = output.past_key_values.layers[layer]
            keys, values, router = rows_of(bank, number, layer)
            for stored, states in ((keys, local.keys), (values, local.values)):
                chunks = states[0].transpose(0, 1).flatten(1).split(8)
                torch.testing.assert_close(
                    stored, torch.stack([c.mean(0) for c in chunks]), atol=1e-5, rtol=1e-5
                )
            attention = model.model.layers[layer].self_attn
            if separate:
                normalised = model.model.layers[layer].input_layernorm(output.hidden_states[layer])
                states = attention.router_k_proj(normalised)[0].detach()
            else:
                states = local.keys[0].transpose(0, 1).flatten(1)
            expected = torch.stack([c.mean(0) for c in states.split(4)]).unflatten(1, (2, 8))
            expected = torch.nn.functional.normalize(expected, dim=-1).flatten(1)
            torch.testing.assert_close(router, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(len(DOCUMENTS))), budget=st.sampled_from([1, 40, 200, 8192]))
def test_a_documents_rows_do_not_depend_on_batch_order_or_neighbours(model, tiny_tokenizer, order, budget):
    bank = model.encode_memory([DOCUMENTS[i] for i in order], tiny_tokenizer, batch_tokens=budget)
    for place, original in enumerate(order):
        if DOCUMENTS[original]:
            alone = model.encode_memory([DOCUMENTS[original]], tiny_tokenizer)
            for layer in MEMORY["router_layers"]:
                for mine, expected in zip(rows_of(bank, place, layer), rows_of(alone, 0, layer)):
                    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_reading_equals_a_naive_reader(kind, attention, tiny_tokenizer):
    """A naive twin of the layer: selects by hand and attends to one long list of keys, token by token."""
    model = tiny_model(kind, top_k_documents=2)
    model.set_attn_implementation(attention)
    bank = model.encode_memory(DOCUMENTS, tiny_tokenizer)
    output = ask(model, tiny_tokenizer, bank, QUESTIONS)
    for row, question in enumerate(QUESTIONS):
        ids = tiny_tokenizer(question, return_tensors="pt")["input_ids"]
        expected = naive_logits(model, ids, bank)
        torch.testing.assert_close(output.logits[row, -ids.shape[1] :], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def naive_logits(model, ids, bank):
    config, tokens = model.config, ids.shape[1]
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(tokens)[None] + config.top_k_documents
    embeddings = model.model.rotary_emb(hidden, positions)
    for index, layer in enumerate(model.model.layers):
        attention, normalised = layer.self_attn, layer.input_layernorm(hidden)
        queries = attention.queries(normalised, embeddings)[0]
        keys, values = (states[0] for states in attention.keys_values(normalised, embeddings))
        if index in config.router_layers:
            routing = torch.nn.functional.normalize(
                attention.router_q_proj(normalised)[0].view(tokens, -1, config.head_dim), dim=-1
            )
            scores = []
            for number in range(len(bank)):
                chunks = rows_of(bank, number, index)[2].unflatten(1, (-1, config.head_dim))
                repeated = chunks.repeat_interleave(attention.num_key_value_groups, dim=1)
                table = torch.einsum("thd,chd->tch", routing, repeated).mean(-1)
                scores.append(float(table.max()) if len(chunks) else float("-inf"))
            best = sorted(sorted(range(len(bank)), key=lambda i: -scores[i])[: config.top_k_documents])
            for side, states in ((0, keys), (1, values)):
                pooled = torch.cat([rows_of(bank, number, index)[side] for number in best])
                joined = torch.cat(
                    [pooled.unflatten(1, (-1, config.head_dim)).transpose(0, 1), states], dim=1
                )
                keys, values = (joined, values) if side == 0 else (keys, joined)
        memory = keys.shape[1] - tokens
        out = torch.zeros(tokens, config.num_attention_heads, config.head_dim)
        for t in range(tokens):
            for head in range(config.num_attention_heads):
                group = head // attention.num_key_value_groups
                weights = torch.softmax(
                    keys[group, : memory + t + 1] @ queries[head, t] * config.head_dim**-0.5, dim=0
                )
                out[t, head] = weights @ values[group, : memory + t + 1]
        hidden = hidden + attention.o_proj(out.flatten(1))[None]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))[0]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(extra=st.lists(st.text("abc xyz.", max_size=30), min_size=1, max_size=6))
def test_documents_that_are_not_selected_change_no_bit(model, tiny_tokenizer, extra):
    alone = {"batch_tokens": 1}  # a batch of other documents may round a row differently
    before = ask(model, tiny_tokenizer, model.encode_memory(DOCUMENTS, tiny_tokenizer, **alone))
    after = ask(model, tiny_tokenizer, model.encode_memory(DOCUMENTS + extra, tiny_tokenizer, **alone))
    chosen = {int(i) for ids in after.selected_documents.values() for row in ids for i in row}
    assume(max(chosen) < len(DOCUMENTS))
    for layer in MEMORY["router_layers"]:
        for old, new in zip(before.selected_documents[layer], after.selected_documents[layer]):
            assert torch.equal(old, new)
    assert torch.equal(before.logits, after.logits)


def test_k_beyond_the_memory_selects_every_document_with_text(tiny_tokenizer):
    model = tiny_model(top_k_documents=16)
    output = ask(model, tiny_tokenizer, model.encode_memory(DOCUMENTS, tiny_tokenizer))
    for layer in MEMORY["router_layers"]:
        for ids in output.selected_documents[layer]:
            assert sorted(ids.tolist()) == [i for i, text in enumerate(DOCUMENTS) if text]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("documents", [DOCUMENTS, ["x"], ["a fact"], [], ["", ""]])
def test_a_batch_of_one_equals_its_row_in_a_batch(tiny_tokenizer, attention, documents):
    model = tiny_model()
    model.set_attn_implementation(attention)
    bank = model.encode_memory(documents, tiny_tokenizer)
    together = ask(model, tiny_tokenizer, bank)
    for row, question in enumerate(QUESTIONS):
        alone = ask(model, tiny_tokenizer, bank, [question])
        length = alone.logits.shape[1]
        torch.testing.assert_close(together.logits[row, -length:], alone.logits[0], atol=1e-5, rtol=1e-5)
        for layer in MEMORY["router_layers"]:
            assert torch.equal(together.selected_documents[layer][row], alone.selected_documents[layer][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(tiny_tokenizer, dtype):
    outputs = []
    for kind in (torch.float32, dtype):
        model = tiny_model(dtype=kind, top_k_documents=16)  # everything is read, so selection cannot differ
        outputs.append(
            ask(model, tiny_tokenizer, model.encode_memory(DOCUMENTS, tiny_tokenizer)).logits.float()
        )
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert error < 0.05


def test_gradients_reach_routers_and_backbone_and_survive_checkpointing(tiny_tokenizer):
    norms = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        bank = model.encode_memory(DOCUMENTS, tiny_tokenizer)
        batch = tiny_tokenizer(QUESTIONS, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        positives = [[int(i == 3) for i, text in enumerate(DOCUMENTS) if text]] * 2
        output = model(
            **batch, memory=bank, labels=labels, batch_aux_labels=positives, use_cache=not checkpointing
        )
        output.loss.backward()
        norms.append({n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None})
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0]["model.layers.2.self_attn.router_q_proj.0.weight"] > 0


def test_a_saved_memory_is_the_same_memory(model, tiny_tokenizer, tmp_path):
    bank = model.encode_memory(DOCUMENTS, tiny_tokenizer, metadata={"made": "by a test"})
    bank.save_pretrained(tmp_path)
    again = MemoryBank.from_pretrained(tmp_path, model=model)
    assert (again.documents, again.metadata, again.fingerprint) == (
        DOCUMENTS,
        {"made": "by a test"},
        model.fingerprint(),
    )
    assert again.stats() == bank.stats()
    assert torch.equal(ask(model, tiny_tokenizer, again).logits, ask(model, tiny_tokenizer, bank).logits)
    model.encode_memory(DOCUMENTS[:2], tiny_tokenizer).save_pretrained(tmp_path)
    assert MemoryBank.from_pretrained(tmp_path).documents == DOCUMENTS[:2]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
@pytest.mark.parametrize("bits", [None, 4])
def test_copies_of_a_memory_that_was_searched(again, bits, model, tiny_tokenizer):
    bank = model.encode_memory(DOCUMENTS, tiny_tokenizer)
    bank = bank if bits is None else bank.pack(bits, bits, bits)
    found = bank.lexical.search("Paris", 3)
    other = again(bank)
    assert other.lexical.search("Paris", 3) == found and other.documents == DOCUMENTS
    assert torch.equal(ask(model, tiny_tokenizer, other).logits, ask(model, tiny_tokenizer, bank).logits)


def test_a_memory_of_another_model_is_refused_with_what_differs(model, tiny_tokenizer, tmp_path):
    model.encode_memory(DOCUMENTS, tiny_tokenizer).save_pretrained(tmp_path)
    for other, difference in (
        (tiny_model(seed=5), "backbone"),
        (tiny_model(chunk_size=4), "chunk_size: 8 != 4"),
        (tiny_model(router_layers=[2]), "router_layers"),
    ):
        with pytest.raises(MemoryMismatchError, match=difference):
            MemoryBank.from_pretrained(tmp_path, model=other)
        with pytest.raises(MemoryMismatchError, match=difference):
            other.rank_documents(QUESTIONS, MemoryBank.from_pretrained(tmp_path), tokenizer=tiny_tokenizer)
    rerouted = copy.deepcopy(model)
    rerouted.model.layers[1].self_attn.router_k_proj[0].weight.data.neg_()
    with pytest.raises(MemoryMismatchError, match="routers") as error:
        MemoryBank.from_pretrained(tmp_path, model=rerouted)
    assert "backbone" not in str(error.value)
    assert MemoryBank.from_pretrained(tmp_path, model=tiny_model(dtype=torch.bfloat16)).documents == DOCUMENTS


def test_every_cut_and_every_flipped_index_byte_is_a_format_error(model, tiny_tokenizer, tmp_path):
    model.encode_memory(DOCUMENTS, tiny_tokenizer).save_pretrained(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        for cut in {0, 1, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:cut])
            with pytest.raises(MemoryFormatError):
                MemoryBank.from_pretrained(tmp_path)
        path.write_bytes(content)
    documents = next(tmp_path.glob("documents-*"))
    content = documents.read_bytes()
    documents.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    with pytest.raises(MemoryFormatError, match="SHA-256"):
        MemoryBank.from_pretrained(tmp_path)
    documents.write_bytes(content)
    index = json.loads((tmp_path / "memory.json").read_text())
    for change in (
        {"format_version": 99},
        {"settings": {}},
        {"files": {"documents": {"name": "../x", "bytes": 1}}},
    ):
        (tmp_path / "memory.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(MemoryFormatError):
            MemoryBank.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no memory"):
        MemoryBank.from_pretrained(tmp_path / "nowhere")


def test_swapped_vectors_are_refused(model, tiny_tokenizer, tmp_path):
    for name, documents in (("a", DOCUMENTS), ("b", DOCUMENTS[::-1][:5])):
        model.encode_memory(documents, tiny_tokenizer).save_pretrained(tmp_path / name)
    mine, other = (next((tmp_path / name).glob("vectors-*")) for name in "ab")
    mine.write_bytes(other.read_bytes())
    index = json.loads((tmp_path / "a" / "memory.json").read_text())
    index["files"]["vectors"]["bytes"] = mine.stat().st_size
    (tmp_path / "a" / "memory.json").write_text(json.dumps(index))
    with pytest.raises(MemoryFormatError, match="token_counts"):
        MemoryBank.from_pretrained(tmp_path / "a")


def test_an_interrupted_encoding_goes_on_where_it_stopped(model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("msa_hf.modeling.memory_encoding.PORTION_TOKENS", 1)
    expected = model.encode_memory(DOCUMENTS, tiny_tokenizer, batch_tokens=32)
    calls = []
    original = type(model.model).encode

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        model.encode_memory(DOCUMENTS, tiny_tokenizer, batch_tokens=32, resume_dir=tmp_path)
    bank = model.encode_memory(DOCUMENTS, tiny_tokenizer, batch_tokens=32, resume_dir=tmp_path)
    batches = len(list(length_batches(expected.token_counts.tolist(), 32)))
    assert batches > 3 and len(calls) == batches + 1
    for layer in MEMORY["router_layers"]:
        assert torch.equal(bank.layers[layer].keys.data, expected.layers[layer].keys.data)
        assert torch.equal(bank.layers[layer].router_keys.data, expected.layers[layer].router_keys.data)


def test_bad_input_is_refused_before_any_work(model, tiny_tokenizer):
    for documents, message in (([1], "documents must be texts"), (["x" * 300], "max_position_embeddings")):
        with pytest.raises(ValueError, match=message):
            model.encode_memory(documents, tiny_tokenizer)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1; got 0"):
        model.encode_memory(DOCUMENTS, tiny_tokenizer, batch_tokens=0)
    with pytest.raises(ValueError, match="router_layers"):
        tiny_model(router_layers=[]).encode_memory(DOCUMENTS, tiny_tokenizer)
    bank = model.encode_memory(DOCUMENTS, tiny_tokenizer)
    with pytest.raises(ValueError, match="at least one question token"):
        ask(model, tiny_tokenizer, bank, question_mask=torch.zeros(2, 29, dtype=torch.bool))
    with pytest.raises(ValueError, match="question_mask must have shape"):
        ask(model, tiny_tokenizer, bank, question_mask=torch.ones(2, 3))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 50), max_size=30), budget=st.integers(1, 120))
def test_batches_hold_every_document_once_within_the_budget(lengths, budget):
    batches = list(length_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == [i for i, length in enumerate(lengths) if length]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
