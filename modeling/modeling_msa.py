"""MSAModel and MSAForCausalLM: a Llama-shaped decoder whose router layers read a memory.

Memory Sparse Attention, arXiv 2603.23516. Without memory the model is exactly its backbone (Llama, Mistral,
Qwen2, Qwen3).
Axis letters: B batch, T tokens, E hidden size, H query heads, G key/value heads, D head dim, N documents, P
memory prefix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_msa import MSAAttention, MSADecoderLayer
from .attention_turboquant import NAME as TURBOQUANT_ATTENTION
from .cache_memory import MemoryCache
from .configuration_msa import MSAConfig
from .fingerprint_msa import hash_weights
from .generation_msa import MSAGenerationMixin
from .losses_msa import document_loss, recall_metrics
from .packed_msa import packed_forward
from .reading_msa import (
    additive_mask,
    check_question_mask,
    default_positions,
    memory_attention_mask,
    memory_reader,
)


@dataclass
class MSAModelOutput(ModelOutput):
    """`document_scores` [B, N] and `selected_documents` (per sample, best first) by router layer, where
    memory was read."""

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    document_scores: dict[int, torch.Tensor] | None = None
    selected_documents: dict[int, list[torch.Tensor]] | None = None


@dataclass
class MSACausalLMOutput(ModelOutput):
    """`loss` is the weighted sum of the four that follow; see the loss weights of `MSAConfig`."""

    loss: torch.FloatTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    answer_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    document_scores: dict[int, torch.Tensor] | None = None
    selected_documents: dict[int, list[torch.Tensor]] | None = None
    router_metrics: dict[str, float] | None = None


class MSAPreTrainedModel(PreTrainedModel):
    config: MSAConfig
    config_class = MSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MSADecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "memory", "memory_prefix"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MSADecoderLayer, "attentions": MSAAttention}
    # The reference saves its constant loss temperature; here it is `MSAConfig.aux_temperature`.
    _keys_to_ignore_on_load_unexpected = [r"^temperature$"]

    @classmethod
    def from_pretrained(cls, *args, revision: str = "main", **kwargs):
        """As every model's. The configuration notes the revision: calibrations come from it, too."""
        loaded = super().from_pretrained(*args, revision=revision, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if getattr(model.config, "_commit_hash", None) is None:  # older releases note it themselves
            model.config._commit_hash = revision
        return loaded

    @property
    def device(self) -> torch.device:
        """Where inputs and memories go. Embeddings that `device_map` keeps on a disk are nowhere themselves;
        then it is where they are used."""
        device = super().device
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None) if device.type == "meta" else None
        place = getattr(hook, "execution_device", None)
        return device if place is None else torch.device(place)


class MSAModel(MSAPreTrainedModel):
    """The decoder without its language-model head."""

    def __init__(self, config: MSAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            MSADecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        memory=None,
        question_mask: torch.Tensor | None = None,
        prefill_chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MSAModelOutput:
        """
        Args:
            memory: `MemoryBank` or `MemoryReader` to read; None for the plain backbone.
            question_mask: [B, T] bool, tokens that route; by default every token that is not padding.
            prefill_chunk_size: with memory, tokens run through a layer at once; routing still sees the whole
                question.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if memory is not None or getattr(past_key_values, "is_memory_cache", False):
            return self._forward_with_memory(
                inputs_embeds,
                attention_mask,
                position_ids,
                past_key_values,
                use_cache,
                memory,
                question_mask,
                prefill_chunk_size,
                **kwargs,
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MSAModelOutput(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _forward_with_memory(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool | None,
        memory,
        question_mask: torch.Tensor | None,
        chunk_size: int | None,
        memory_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> MSAModelOutput:
        """`forward` with memory. memory_mask: [B, T] bool, tokens that may read it (all by default)."""
        if self.config._attn_implementation not in ("sdpa", "eager", TURBOQUANT_ATTENTION):
            raise ValueError(
                "memory is read with sdpa, eager or turboquant attention; got "
                f"{self.config._attn_implementation!r}. "
                'Call model.set_attn_implementation("sdpa").'
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be [B, T] with memory; got {attention_mask.ndim} dimensions"
            )
        past_key_values = self._memory_cache(memory, past_key_values, use_cache)
        cached = past_key_values is not None
        reader = past_key_values.reader if cached else memory_reader(memory, self.config)
        past = past_key_values.get_seq_length() if cached else 0
        batch, tokens, _ = hidden_states.shape
        if position_ids is None:
            position_ids = default_positions(attention_mask, batch, tokens, past, hidden_states.device)
            position_ids = position_ids + reader.position_offset
        routing = not (cached and past_key_values.has_read)
        if routing:
            question_mask = check_question_mask(
                question_mask, attention_mask, batch, tokens, hidden_states.device
            )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        bounds = range(0, tokens, chunk_size or max(tokens, 1))
        eager = self.config._attn_implementation == "eager"
        spans = [(start, min(tokens, start + bounds.step)) for start in bounds]
        for index, layer in enumerate(self.layers):
            prefix = None
            if routing and reader.reads(index):
                if index in reader.bank.layers:
                    normalised = layer.input_layernorm(hidden_states)
                    queries = layer.self_attn.router_queries(normalised, position_embeddings)
                    reader.select(index, queries, question_mask)
                prefix = reader.prefix(index, batch, hidden_states)
                if cached:
                    past_key_values.layers[index].set_prefix(prefix)
            prefix_mask = past_key_values.layers[index].prefix_mask if cached else prefix and prefix.mask
            outputs = []
            for start, stop in spans:
                mask = memory_attention_mask(
                    prefix_mask, memory_mask, attention_mask, past, start, stop, hidden_states, not eager
                )
                if eager:
                    mask = additive_mask(mask, hidden_states.dtype)
                outputs.append(
                    layer(
                        hidden_states[:, start:stop],
                        attention_mask=mask,
                        position_embeddings=tuple(part[:, start:stop] for part in position_embeddings),
                        past_key_values=past_key_values,
                        memory_prefix=None if cached else prefix,
                        **kwargs,
                    )
                )
            hidden_states = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return MSAModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            document_scores=dict(reader.scores),
            selected_documents=dict(reader.selected),
        )

    def _memory_cache(self, memory, past_key_values: Cache | None, use_cache: bool) -> MemoryCache | None:
        """The cache to read memory through; None to read it without one."""
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                raise ValueError("past_key_values must be None while training with gradient checkpointing")
            return None
        if getattr(past_key_values, "is_memory_cache", False):
            return past_key_values
        if past_key_values is not None and past_key_values.get_seq_length():
            raise ValueError(
                "past_key_values must be empty when a memory is first read; it already holds tokens"
            )
        if not use_cache:
            return None
        return MemoryCache(memory_reader(memory, self.config), past_key_values)

    def encode(
        self, input_ids: torch.LongTensor, recorder: Callable, full: bool = False
    ) -> torch.Tensor | None:
        """Runs rows of tokens, each alone and with positions from 0, up to the last router layer.

        Args:
            input_ids: [B, T], padded on the right. Causal attention never looks right, so no mask is needed.
            recorder: called once per router layer as recorder(layer, hidden, keys, values), with the
                normalised attention input [B, T, E], K after RoPE and V [B, G, T, D]. In the last router
                layer nothing else is computed.
            full: run all layers and return the last hidden state [B, T, E].
        """
        hidden_states = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.run_rows(hidden_states, positions, recorder, full=full)

    def run_rows(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        recorder: Callable,
        full: bool,
        every_layer: bool = False,
    ) -> torch.Tensor | None:
        """The layers over embedded rows that see only themselves; see `encode`.

        Args:
            every_layer: record all layers, not only router layers.
        """
        position_embeddings = self.rotary_emb(hidden_states, position_ids=positions)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None
        )
        routers = set(range(len(self.layers))) if every_layer else set(self.config.router_layers)
        last = max(routers, default=-1)
        for index, layer in enumerate(self.layers):
            if not full and index >= last:
                if index == last:
                    normalised = layer.input_layernorm(hidden_states)
                    recorder(index, normalised, *layer.self_attn.keys_values(normalised, position_embeddings))
                return None
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                recorder=recorder if index in routers else None,
            )
        return self.norm(hidden_states)


class MSAForCausalLM(MSAPreTrainedModel, MSAGenerationMixin):
    """Language model with memory: `encode_memory`, then `generate(memory=...)`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MSAConfig):
        super().__init__(config)
        self.model = MSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.aux_loss_method == "BCE":
            self.b = nn.Parameter(torch.tensor(-20.0))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self and hasattr(self, "b"):
            init.constant_(self.b, -20.0)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        memory=None,
        question_mask: torch.Tensor | None = None,
        prefill_chunk_size: int | None = None,
        doc_ids: torch.LongTensor | None = None,
        batch_aux_labels: list[list[int]] | None = None,
        batch_answer_labels: torch.LongTensor | None = None,
        batch_reconstruction_labels: torch.LongTensor | None = None,
        train_qa_samples: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MSACausalLMOutput:
        """
        Args:
            memory, question_mask, prefill_chunk_size: see `MSAModel.forward`.
            doc_ids: [B, T] labels of packed training rows (paper section 3.3, specs of `packed_msa`):
                template -2, question 0, documents 1..n, response -1. The documents of a row are its memory.
            batch_aux_labels: per sample one 0/1 per document: the positives of the auxiliary loss.
            batch_answer_labels, batch_reconstruction_labels: [B, T] further labels, as `labels`.
            train_qa_samples: [B], 1 for the samples whose answer labels count (all by default).
        """
        if doc_ids is not None:
            outputs = packed_forward(
                self.model, input_ids, attention_mask, position_ids, doc_ids, inputs_embeds, **kwargs
            )
        else:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                memory=memory,
                question_mask=question_mask,
                prefill_chunk_size=prefill_chunk_size,
                **kwargs,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        result = MSACausalLMOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            document_scores=outputs.document_scores,
            selected_documents=outputs.selected_documents,
        )
        if labels is not None:
            result.lm_loss = self._token_loss(logits, labels, **kwargs)
            result.loss = self.config.lm_loss_weight * result.lm_loss
        if batch_reconstruction_labels is not None:
            result.reconstruction_loss = self._token_loss(logits, batch_reconstruction_labels, **kwargs)
            result.loss = self._add(
                result.loss, self.config.reconstruction_loss_weight, result.reconstruction_loss
            )
        if batch_answer_labels is not None:
            rows = (
                torch.ones(len(logits), dtype=torch.bool)
                if train_qa_samples is None
                else train_qa_samples == 1
            )
            if rows.any():
                result.answer_loss = self._token_loss(logits[rows], batch_answer_labels[rows], **kwargs)
                result.loss = self._add(result.loss, self.config.answer_loss_weight, result.answer_loss)
        if batch_aux_labels is not None:
            if not outputs.document_scores:
                raise ValueError(
                    "batch_aux_labels needs document scores; give memory or doc_ids, and router_layers"
                )
            result.aux_loss = document_loss(
                self.config, outputs.document_scores, batch_aux_labels, getattr(self, "b", None)
            )
            result.router_metrics = recall_metrics(self.config, outputs.document_scores, batch_aux_labels)
            result.loss = self._add(result.loss, self.config.aux_loss_weight, result.aux_loss)
        return result

    def _token_loss(self, logits, labels, **kwargs) -> torch.Tensor:
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

    @staticmethod
    def _add(total: torch.Tensor | None, weight: float, loss: torch.Tensor) -> torch.Tensor:
        return weight * loss if total is None else total + weight * loss

    def weights_key(self) -> tuple:
        """Changes whenever a weight is replaced or written to; for caches of what the weights determine."""
        return tuple((tensor.data_ptr(), tensor._version) for tensor in self.parameters())

    def fingerprint(self) -> dict[str, str]:
        """Short hashes of the weights that a memory's vectors depend on: the backbone's and the routers'
        separately.

        Values are rounded to bfloat16 and sampled, so the same checkpoint loaded in another precision agrees.
        """
        key = self.weights_key()
        if getattr(self, "_fingerprint", (None,))[0] != key:
            self._fingerprint = (key, hash_weights(self.model, self.config.router_layers))
        return dict(self._fingerprint[1])
