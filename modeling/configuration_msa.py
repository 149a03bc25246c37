"""MSAConfig: a decoder backbone (Llama, Mistral, Qwen2, Qwen3) plus where and how it reads memory.

Memory Sparse Attention, arXiv 2603.23516. (Transformers itself uses "MSA" for MiniMax Sparse Attention.)
"""

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from .checkpoint_code import complete_code
from .errors import ConversionError

logger = logging.get_logger(__name__)

CHOICES = {
    "backbone_type": ("llama", "mistral", "qwen2", "qwen3"),
    "score_normalization": ("cosine", "key", "dot"),
    "head_reduction": ("mean", "max"),
    "query_reduction": ("max", "mean", "last", "maxsim"),
    "chunk_reduction": ("max", "mean"),
    "aux_loss_method": ("INFONCE", "INFONCE_DECOUPLE", "INFONCE_FOCAL", "INFONCE_DECOUPLE_FOCAL", "BCE"),
    "retrieval": ("attention", "router", "generative"),
    "prompt_format": ("chat", "msa"),
    "answer_style": ("chat", "examples"),
}
SMALL_HIDDEN_SIZE = (
    1024  # below it, frozen backbones retrieve with a lexical prior and answer after worked examples
)
_BACKBONE_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings rope_parameters attention_dropout dtype"
).split()


@dataclass(frozen=True)
class MemorySettings:
    """What the vectors of a memory depend on besides the weights; two models share a memory only if these
    agree."""

    router_layers: tuple[int, ...]
    chunk_size: int
    router_chunk_size: int
    score_normalization: str
    separate_router: bool
    num_key_value_heads: int
    head_dim: int
    prompt_format: str

    def differences(self, other: "MemorySettings") -> list[str]:
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]


@strict
class MSAConfig(PreTrainedConfig):
    r"""Configuration of [`MSAModel`] and [`MSAForCausalLM`].

    The backbone's fields are those of Llama; `qk_norm`, `attention_bias` (q, k, v), `attention_out_bias` and
    `mlp_bias` cover Mistral, Qwen2 and Qwen3. The memory's fields:

    Args:
        router_layers (`list[int]`): layers that route and read memory; empty list means none. Default: the
            upper half (paper section 3.2).
        chunk_size (`int`): tokens averaged into one memory K/V vector (P = 64 in the paper).
        router_chunk_size (`int`, *optional*): tokens averaged into one router key; divides `chunk_size`, its
            default.
        top_k_documents (`int`): documents that each router layer selects.
        separate_router (`bool`): own router projections; if false, q and k themselves route.
        score_normalization (`str`): "cosine" (both sides), "key" (only keys; the query's length weighs its
            tokens) or "dot" (neither, times head_dim ** -0.5).
        head_reduction, query_reduction, chunk_reduction (`str`): how scores over heads, question tokens and
            chunks become one score per document. "maxsim": best chunk of the document for every question
            token, then the mean over tokens.
        consensus_weights (`list[float]`, *optional*): weight of each router layer in the documents'
            consensus.
        routers_trained (`bool`): False for a fresh conversion, whose routing is at chance.
        retrieval (`str`): what `generate(retrieval="auto")` means for this checkpoint.
        lexical_prior (`bool`): fuse the routers with BM25 by reciprocal rank when retrieving original text.
        prompt_format (`str`): "chat" (documents and questions as they are) or "msa" (markers of MSA-4B, see
            `prompts_msa`).
        answer_style (`str`): how original text is put before the model: its "chat" template, or after worked
            "examples".
        calibrated_presets (`list[str]`, *optional*): presets of `TurboQuantCache` that a calibration lies
            beside the checkpoint for; written by `save_pretrained`.
    """

    model_type = "memory_sparse_attention"
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "document_scores", "selected_documents"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_dropout: int | float | None = 0.0
    backbone_type: str = "llama"
    qk_norm: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False

    router_layers: list[int] | None = None
    chunk_size: int = 64
    router_chunk_size: int | None = None
    top_k_documents: int = 16
    separate_router: bool = True
    score_normalization: str = "cosine"
    head_reduction: str = "mean"
    query_reduction: str = "max"
    chunk_reduction: str = "max"
    consensus_weights: list[float] | None = None
    routers_trained: bool = False
    retrieval: str = "router"
    lexical_prior: bool = False
    prompt_format: str = "chat"
    answer_style: str = "chat"
    calibrated_presets: list[str] | None = None

    aux_loss_method: str = "INFONCE_DECOUPLE"
    aux_temperature: float = 0.1
    lm_loss_weight: float = 1.0
    aux_loss_weight: float = 0.1
    reconstruction_loss_weight: float = 0.0
    answer_loss_weight: float = 1.0
    rewrite_positions: bool = True

    def __post_init__(self, **kwargs):
        if (reference := kwargs.pop("msa_config", None)) is not None:
            self._read_reference(reference)
        _refuse_sliding_window(self.backbone_type, kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.router_layers is None:
            self.router_layers = list(range(self.num_hidden_layers // 2, self.num_hidden_layers))
        if self.router_chunk_size is None:
            self.router_chunk_size = self.chunk_size
        super().__post_init__(**kwargs)
        self._validate_memory_fields()

    def _read_reference(self, reference: dict) -> None:
        """Translates the `msa_config` of the reference implementation's checkpoints (Qwen3 backbones)."""
        layers = str(reference.get("router_layer_idx", "all"))
        method = reference.get("aux_loss_method", "INFONCE")
        self.backbone_type, self.qk_norm = "qwen3", True
        self.attention_out_bias = self.attention_bias
        self.router_layers = (
            list(range(self.num_hidden_layers))
            if layers == "all"
            else [int(layer) for layer in layers.split(",")]
        )
        self.chunk_size = self.router_chunk_size = reference.get("pooling_kernel_size", 64)
        self.top_k_documents = reference.get("top_k_docs", 16)
        self.separate_router = reference.get("decouple_router", False)
        self.head_reduction = reference.get("head_reduce_method", "max")
        self.query_reduction = reference.get("query_reduce_method", "max")
        self.chunk_reduction = reference.get("chunk_reduce_method", "max")
        self.score_normalization = "cosine" if "INFONCE" in method else "dot"
        self.aux_loss_method = method
        self.aux_temperature = reference.get("infonce_loss_temp", 0.1)
        self.lm_loss_weight = reference.get("lmloss_weight", reference.get("lmloss_weigth", 1.0))
        self.aux_loss_weight = reference.get("auxloss_weight", 0.1)
        self.reconstruction_loss_weight = reference.get("recloss_weight", 0.0)
        self.answer_loss_weight = reference.get("ansloss_weight", 1.0)
        self.rewrite_positions = reference.get("rewrite_position", True)
        self.routers_trained, self.retrieval, self.lexical_prior = True, "generative", False
        self.prompt_format = "msa"
        chosen = reference.get("score_normalization") is not None
        if method != "INFONCE" and self.score_normalization == "cosine" and not chosen:
            logger.warning(
                f"This checkpoint was trained with {method} on cosine scores, which is what is used "
                "here; the reference "
                'infers with raw dot products. Pass score_normalization="dot" to from_pretrained to '
                "do the same."
            )

    def _validate_memory_fields(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("chunk_size", "router_chunk_size", "top_k_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.chunk_size % self.router_chunk_size:
            raise ValueError(
                f"router_chunk_size must divide chunk_size ({self.chunk_size}); got {self.router_chunk_size}"
            )
        layers = self.router_layers
        if layers != sorted(set(layers)) or (
            layers and not 0 <= layers[0] <= layers[-1] < self.num_hidden_layers
        ):
            raise ValueError(
                "router_layers must be different, ascending and below "
                f"num_hidden_layers={self.num_hidden_layers}; got {layers}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({self.num_attention_heads}); "
                f"got {self.num_key_value_heads}"
            )
        if self.head_reduction == "max" and self.query_reduction == "maxsim":
            raise ValueError('query_reduction="maxsim" needs head_reduction="mean"; got "max"')
        if self.aux_temperature <= 0:
            raise ValueError(f"aux_temperature must be positive; got {self.aux_temperature}")
        weights = self.consensus_weights
        if weights is not None and (len(weights) != len(layers) or min(weights, default=0) < 0):
            raise ValueError(
                f"consensus_weights must be one weight >= 0 per router layer ({len(layers)}); got {weights}"
            )

    @property
    def score_scale(self) -> float:
        """Factor on every routing score; the reference scales all but separate cosine routers by head_dim **
        -0.5."""
        scaled = self.score_normalization == "dot" or not self.separate_router
        return self.head_dim**-0.5 if scaled else 1.0

    @property
    def memory_settings(self) -> MemorySettings:
        return MemorySettings(
            router_layers=tuple(self.router_layers),
            chunk_size=self.chunk_size,
            router_chunk_size=self.router_chunk_size,
            score_normalization="dot" if self.score_normalization == "dot" else "cosine",
            separate_router=self.separate_router,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            prompt_format=self.prompt_format,
        )

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """As every configuration's; beside the models' code, which is copied before, it completes this."""
        complete_code(save_directory, self)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_backbone(cls, backbone: PreTrainedConfig, **memory_fields) -> "MSAConfig":
        """The config of `backbone` (Llama, Mistral, Qwen2 or Qwen3) with memory; `memory_fields` as in the
        class.

        Raises:
            ConversionError: another architecture, or a sliding window in use.
        """
        kind = backbone.model_type
        if kind not in CHOICES["backbone_type"]:
            raise ConversionError(
                f"model_type must be one of {', '.join(CHOICES['backbone_type'])} to be converted; "
                f"got {kind!r}"
            )
        _refuse_sliding_window(kind, backbone.to_dict())
        fields = {name: getattr(backbone, name) for name in _BACKBONE_FIELDS if hasattr(backbone, name)}
        bias = bool(getattr(backbone, "attention_bias", False))
        small = fields["hidden_size"] < SMALL_HIDDEN_SIZE
        fields.update(
            lexical_prior=small,
            answer_style="examples" if small else "chat",
            backbone_type=kind,
            qk_norm=kind == "qwen3",
            attention_bias=kind == "qwen2" or bias,
            attention_out_bias=kind != "qwen2" and bias,
            mlp_bias=bool(getattr(backbone, "mlp_bias", False)),
        )
        return cls(**{**fields, **memory_fields})


class MSAReferenceConfig(MSAConfig):
    """Reads config.json of the reference implementation (model_type "msa"); what comes out is a plain
    `MSAConfig`."""

    model_type = "msa"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        fields = {**config_dict, "model_type": MSAConfig.model_type}
        if "msa_config" in fields and (chosen := kwargs.get("score_normalization")) is not None:
            # The value itself is set from `kwargs`; here it keeps from warning of what was just decided.
            fields["msa_config"] = {**fields["msa_config"], "score_normalization": chosen}
        return MSAConfig.from_dict(fields, **kwargs)


def _refuse_sliding_window(backbone_type: str, fields: dict) -> None:
    """Removes the sliding-window fields of Mistral and Qwen configs; an error if a window is really in
    use."""
    window = fields.pop("sliding_window", None)
    switched_on = fields.pop("use_sliding_window", backbone_type == "mistral")
    kinds = fields.pop("layer_types", None) or []
    fields.pop("max_window_layers", None)
    if (window and switched_on) or any("sliding" in kind for kind in kinds):
        raise ConversionError(
            "sliding_window must be off: memory is read by full attention layers; got "
            f"sliding_window={window}, "
            f"layer_types={sorted(set(kinds))}. Set sliding_window=None if the context never exceeds "
            "the window."
        )
