"""The packed training form of the reference: template head, documents, question and response in one row
(paper section 3.3).

`doc_ids` labels the tokens: documents 1..n, question 0, template -2, response and its marker -1. The row is
unpacked into
what the model runs anyway: documents as rows of their own, pooled into a bank with gradients, and one active
row that reads it. Lengths of documents are free. Axis letters: B samples, T packed tokens, N documents of
all samples.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from .cache_memory import MemoryReader
from .memory_bank import LayerMemory, MemoryBank
from .memory_encoding import DenseRecorder


def packed_forward(model, input_ids, attention_mask, position_ids, doc_ids, inputs_embeds=None, **kwargs):
    """Runs `MSAModel` on packed rows.

    Args:
        input_ids: [B, T], or inputs_embeds: [B, T, E]. doc_ids: [B, T]. attention_mask: [B, T], 0 = padding.
        position_ids: [B, T] as written by the data set: from 0 in every document; used if
            `config.rewrite_positions`.

    Returns:
        MSAModelOutput with last_hidden_state [B, T, E] (0 at padding) and document_scores [B, n + 1], where
        column i is document i of the sample and -inf where it has none (column 0 always).
    """
    if (input_ids is None) ^ (inputs_embeds is not None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    if any(_recomputes_alone(layer) for layer in model.layers):
        # A layer's pooled vectors leave it beside its output, where such a checkpoint passes no gradient.
        raise ValueError(
            'gradient checkpointing of packed rows must have "use_reentrant" False (the default); got True'
        )
    embeddings = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    batch, tokens, _ = embeddings.shape
    if doc_ids.shape != (batch, tokens):
        raise ValueError(
            f"doc_ids must have the shape of input_ids {(batch, tokens)}; got {tuple(doc_ids.shape)}"
        )
    real = torch.ones_like(doc_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if position_ids is None or not model.config.rewrite_positions:
        position_ids = torch.arange(tokens, device=embeddings.device).expand(batch, -1)
    labels = [(b, int(i)) for b in range(batch) for i in doc_ids[b][real[b]].unique() if i > 0]
    if not labels:
        raise ValueError("doc_ids must hold at least one document (a label of 1 or more); got none")
    owners, numbers = torch.tensor(labels).unbind(1)
    documents = [(doc_ids[b] == i) & real[b] for b, i in labels]

    def rows(masks, samples):
        parts = [(embeddings[b][mask], position_ids[b][mask]) for mask, b in zip(masks, samples)]
        return [pad_sequence(list(part), batch_first=True) for part in zip(*parts)]

    lengths = torch.stack([mask.sum() for mask in documents]).cpu()
    recorder = DenseRecorder(model, lengths)
    document_rows, document_positions = rows(documents, owners.tolist())
    document_states = model.run_rows(document_rows, document_positions, recorder, full=True)
    layers = {layer: LayerMemory(*recorder.vectors[layer]) for layer in model.config.router_layers}
    bank = MemoryBank([""] * len(documents), lengths, model.config.memory_settings, layers)

    active = [(doc_ids[b] < 1) & real[b] for b in range(batch)]
    active_rows, active_positions = rows(active, range(batch))
    active_lengths = torch.stack([mask.sum() for mask in active])
    inside = torch.arange(active_rows.shape[1], device=embeddings.device) < active_lengths[:, None]
    roles = pad_sequence([doc_ids[b][active[b]] for b in range(batch)], batch_first=True, padding_value=-1)
    first_document = torch.stack([(doc_ids[b] > 0).float().argmax() for b in range(batch)])
    places = pad_sequence([active[b].nonzero().squeeze(1) for b in range(batch)], batch_first=True)
    visible = owners[None] == torch.arange(batch)[:, None]
    outputs = model(
        inputs_embeds=active_rows,
        attention_mask=inside,
        position_ids=active_positions,
        use_cache=False,
        memory=MemoryReader(bank, model.config, visible.to(embeddings.device)),
        question_mask=(roles == 0) & inside,
        memory_mask=places > first_document[:, None],
        **kwargs,
    )
    states = torch.zeros_like(embeddings)
    for masks, samples, rows_of, sizes in (
        (documents, owners.tolist(), document_states, lengths),
        (active, range(batch), outputs.last_hidden_state, active_lengths),
    ):
        for mask, b, row, size in zip(masks, samples, rows_of, sizes):
            states = states.index_put((torch.tensor(b), mask.nonzero().squeeze(1)), row[:size])
    outputs.last_hidden_state = states
    outputs.document_scores = {
        layer: _by_number(scores, visible.to(scores.device), numbers.to(scores.device))
        for layer, scores in outputs.document_scores.items()
    }
    outputs.selected_documents = {
        layer: [numbers.to(ids.device)[ids] for ids in selected]
        for layer, selected in outputs.selected_documents.items()
    }
    return outputs


def _recomputes_alone(layer) -> bool:
    """Whether a layer is checkpointed the reentrant way: that sees its arguments and its output alone."""
    if not (layer.training and layer.gradient_checkpointing):
        return False
    return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is True


def _by_number(scores: torch.Tensor, visible: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """[B, N] over all documents -> [B, n + 1] over the numbers that documents have inside their own
    sample."""
    batch = scores.shape[0]
    table = scores.new_full((batch, int(numbers.max()) + 1), -torch.inf)
    rows, columns = visible.nonzero(as_tuple=True)
    return table.index_put((rows, numbers[columns]), scores[rows, columns])
