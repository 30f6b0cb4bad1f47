"""Which model types llama.cpp holds, in which architecture, and which metadata this reads. Tables only."""

from dataclasses import dataclass

FORMATS = ("gguf", "mlx")
GGUF_TYPES = ("F16", "Q8_0", "Q4_K_M")
MLX = "mlx"  # the folder


@dataclass(frozen=True)
class Layout:
    """How llama.cpp holds a model type.

    Args:
        architecture (`str`): Its architecture, of `gguf.MODEL_ARCH_NAMES`.
        activation (`str`, *optional*, defaults to `"silu"`): The one that its MLPs have.
        paired (`bool`, *optional*, defaults to `False`): Whether rotary embeddings turn neighbouring channels of a head, so
            that the rows of query and key projections stand in another order.
        norm_offset (`float`, *optional*, defaults to 0.0): What Transformers adds to the weights of norms.
        factors (`bool`, *optional*, defaults to `False`): Whether it reads a factor for every rotary frequency.
        window (`bool`, *optional*, defaults to `False`): Whether it has layers of sliding-window attention.
        head_scale_at (`int`, *optional*): The number of layers at which it scales attention by hidden / heads, not by the size
            of a head.
        square (`bool`, *optional*, defaults to `False`): Whether it takes all heads together to be as wide as hidden.
        rope_every (`int`, *optional*): Which layers have no rotary embedding: every so many-th.
    """

    architecture: str
    activation: str = "silu"
    paired: bool = False
    norm_offset: float = 0.0
    factors: bool = False
    window: bool = False
    head_scale_at: int | None = None
    square: bool = False
    rope_every: int | None = None


GELU = "gelu_pytorch_tanh"
LLAMA = Layout("llama", paired=True, factors=True)
LAYOUTS = {
    "arcee": Layout("arcee", "relu2", paired=True, factors=True),
    "gemma": Layout("gemma", GELU, norm_offset=1.0),
    "gemma2": Layout("gemma2", GELU, norm_offset=1.0, window=True, head_scale_at=46),
    "gemma3_text": Layout("gemma3", GELU, norm_offset=1.0, window=True, head_scale_at=62),
    "granite": Layout("granite", paired=True, factors=True),
    "llama": LLAMA,
    "mistral": LLAMA,
    "nemotron": Layout("nemotron", "relu2", norm_offset=1.0, square=True),
    "olmo2": Layout("olmo2", square=True),
    "olmo3": Layout("olmo2", window=True, square=True),
    "phi3": Layout("phi3", square=True),
    "qwen2": Layout("qwen2", square=True),
    "qwen3": Layout("qwen3"),
    "qwen3_moe": Layout("qwen3moe"),
    "seed_oss": Layout("seed_oss"),
    "smollm3": Layout("smollm3", paired=True, rope_every=4),
}
# The one whose layers may differ in heads, KV heads and FFN, and the model types that it computes, uniform ones too.
NONUNIFORM = Layout("deci", paired=True, factors=True)
NONUNIFORM_TYPES = ("llama", "mistral", "qwen2")

# Keys of `config.json`, and of the metadata, after the architecture's name.
KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "norm_eps": "attention.layer_norm_epsilon",
    "vocab_size": "vocab_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
# The lists that nonuniform models have in their place.
LAYER_KEYS = {
    "layer_num_attention_heads": "attention.head_count",
    "layer_num_key_value_heads": "attention.head_count_kv",
    "layer_intermediate_size": "feed_forward_length",
}
