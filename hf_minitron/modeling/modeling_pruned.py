"""`PrunedModel` and `PrunedForCausalLM`: the modules of a `PrunedConfig`.

Parameters have Llama's names, so that a stock state dict of the same sizes fits. Copied beside saved models, so it imports
nothing of hf_minitron; what layers share with Llama is Llama's, taken from transformers.
"""

import inspect

import torch
from torch import Tensor, nn

from .configuration_pruned import FULL, NO_ATTENTION, SLIDING, PrunedConfig, unusable  # noqa: TID252  as in configuration_pruned

try:
    from transformers import cache_utils
    from transformers.cache_utils import Cache, DynamicCache
    from transformers.generation import GenerationMixin
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
    from transformers.models.llama.modeling_llama import (
        LlamaMLP,
        LlamaRMSNorm,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
        eager_attention_forward,
    )
    from transformers.utils import can_return_tuple
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import capture_outputs
except ImportError as error:
    raise unusable(error) from error

# Transformers renamed `past_key_values` to `cache`; both are accepted, and the one that this version knows is passed on.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
# What these functions must take; they are not documented to stay as they are.
TAKES = {
    **dict.fromkeys(MASKS.values(), ("config", "inputs_embeds", "attention_mask", "position_ids", CACHE)),
    eager_attention_forward: ("module", "query", "key", "value", "attention_mask", "scaling", "dropout"),
    apply_rotary_pos_emb: ("q", "k", "cos", "sin"),
}
for function, parameters in TAKES.items():
    if lacking := set(parameters) - inspect.signature(function).parameters.keys():
        raise unusable(f"{function.__name__} takes no {min(lacking)}")


class PrunedAttention(nn.Module):
    """Attention with the heads of one layer: Llama's, with Qwen3's norms and SmolLM3's layers without positions if asked."""

    def __init__(self, config: PrunedConfig, layer_idx: int):
        super().__init__()
        heads, kv_heads = config.layer_num_attention_heads[layer_idx], config.layer_num_key_value_heads[layer_idx]
        hidden, width, kv_width = config.hidden_size, heads * config.head_dim, kv_heads * config.head_dim
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = heads // kv_heads
        self.scaling = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == SLIDING else None
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])
        self.q_proj = nn.Linear(hidden, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, hidden, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the heads add, of shape `(batch, seq, hidden)`, and the attention weights where they are kept."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if self.use_rope:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        heads, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(heads.flatten(2)), weights


class PrunedDecoderLayer(GradientCheckpointingLayer):
    """One layer; a sublayer that its config gives no size is absent, and so is its norm."""

    def __init__(self, config: PrunedConfig, layer_idx: int):
        super().__init__()
        sizes = config.per_layer_config[layer_idx]
        self.residual_multiplier = config.residual_multiplier
        self.self_attn = self.mlp = None
        if sizes.num_attention_heads:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = PrunedAttention(config, layer_idx)
        if sizes.intermediate_size:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(sizes)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> Tensor:
        """Return the residual stream, of shape `(batch, seq, hidden)`, after what the layer adds."""
        if self.self_attn is not None:
            cache = past_key_values if cache is None else cache
            normed = self.input_layernorm(hidden_states)
            added, _ = self.self_attn(normed, position_embeddings, attention_mask, cache, **kwargs)
            hidden_states = hidden_states + scaled(added, self.residual_multiplier)
        if self.mlp is not None:
            added = self.mlp(self.post_attention_layernorm(hidden_states))
            hidden_states = hidden_states + scaled(added, self.residual_multiplier)
        return hidden_states


class PrunedPreTrainedModel(PreTrainedModel):
    """What both models tell transformers about themselves."""

    config: PrunedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PrunedDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PrunedDecoderLayer, "attentions": PrunedAttention}


class PrunedModel(PrunedPreTrainedModel):
    """The layers of a nonuniform model, without its head."""

    def __init__(self, config: PrunedConfig):
        super().__init__(config)
        if {NO_ATTENTION, FULL, SLIDING} <= set(config.layer_types) and not hasattr(cache_utils, "DummyLayer"):
            raise unusable("the cache is measured wrongly where some layers slide, some do not and some have no attention")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(PrunedDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states, of shape `(batch, seq, hidden)`; arguments as for `LlamaModel`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        hidden_states = scaled(inputs_embeds, self.config.embedding_multiplier)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        types, masks = self.config.layer_types, attention_mask
        if not isinstance(masks, dict):  # `generate` may have made them
            given = {"inputs_embeds": hidden_states, "attention_mask": attention_mask, "position_ids": position_ids}
            given |= {"config": self.config, CACHE: cache}
            masks = {kind: make(**given) for kind, make in MASKS.items() if kind in types}
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=None if types[index] == NO_ATTENTION else masks[types[index]],
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


class PrunedForCausalLM(PrunedPreTrainedModel, GenerationMixin):
    """A nonuniform causal language model.

    Example:

    ```python
    >>> config = PrunedConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, layer_intermediate_size=[128, 0])
    >>> PrunedForCausalLM(config).save_pretrained("nonuniform")
    >>> model = PrunedForCausalLM.from_pretrained("nonuniform")  # or AutoModelForCausalLM, once hf_minitron is imported
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: PrunedConfig):
        super().__init__(config)
        self.model = PrunedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return the logits, of shape `(batch, seq, vocab)`, and the loss of labels; arguments as for `LlamaForCausalLM`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


def scaled(states: Tensor, factor: float) -> Tensor:
    """Return states times a factor; themselves when it is 1, as in all families but Granite."""
    return states if factor == 1.0 else states * factor


PrunedModel.register_for_auto_class("AutoModel")
PrunedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
