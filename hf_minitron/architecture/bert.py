"""BERT's line, as far as `is_decoder` makes it predict the next token. Tables only, no functions.

The head has a layer of its own, as wide as the hidden states. Their classes take `head_dim` to be hidden / heads, so that the
two must be cut together.
"""

from hf_minitron.architecture.gpt import GPT_NEOX_KEYS

EMBEDDINGS = {
    "word_embeddings.weight": "vocab hidden",
    "position_embeddings.weight": "positions hidden",
    "token_type_embeddings.weight": "types hidden",
}
PROJECTIONS = {
    "attention.self.query": "(heads head_dim)",
    "attention.self.key": "(heads head_dim)",
    "attention.self.value": "(heads head_dim)",
    "intermediate.dense": "ffn",
}
OUTPUTS = {"attention.output.dense": "(heads head_dim)", "output.dense": "ffn"}
# Before attention and MLP, or after them.
LAYER_NORMS = (
    "attention.ln",
    "attention.LayerNorm",
    "attention.self_attn_layer_norm",
    "attention.output.LayerNorm",
    "ln",
    "LayerNorm",
    "intermediate.LayerNorm",
    "output.LayerNorm",
)
HEAD_ROWS = {
    "cls.predictions.transform.dense.weight": "hidden hidden",
    "cls.predictions.transform.dense.bias": "hidden",
    "cls.predictions.transform.LayerNorm.weight": "hidden",
    "cls.predictions.transform.LayerNorm.bias": "hidden",
    "cls.predictions.decoder.weight": "vocab hidden",
    "cls.predictions.decoder.bias": "vocab",
    "cls.predictions.bias": "vocab",
    "lm_head.dense.weight": "hidden hidden",
    "lm_head.dense.bias": "hidden",
    "lm_head.layer_norm.weight": "hidden",
    "lm_head.layer_norm.bias": "hidden",
    "lm_head.decoder.weight": "vocab hidden",
    "lm_head.decoder.bias": "vocab",
    "lm_head.bias": "vocab",
}
# Embeddings, and what the head gives, of another width than the hidden states, which stays as it is.
NARROW_ROWS = {
    "electra": {
        "electra.embeddings.word_embeddings.weight": "vocab embedding",
        "electra.embeddings.position_embeddings.weight": "positions embedding",
        "electra.embeddings.token_type_embeddings.weight": "types embedding",
        "electra.embeddings.LayerNorm.weight": "embedding",
        "electra.embeddings.LayerNorm.bias": "embedding",
        "electra.embeddings_project.weight": "hidden embedding",
        "electra.embeddings_project.bias": "hidden",
        "generator_predictions.dense.weight": "embedding hidden",
        "generator_predictions.dense.bias": "embedding",
        "generator_predictions.LayerNorm.weight": "embedding",
        "generator_predictions.LayerNorm.bias": "embedding",
        "generator_lm_head.weight": "vocab embedding",
        "generator_lm_head.bias": "vocab",
    },
    "rembert": {
        "rembert.embeddings.word_embeddings.weight": "vocab embedding",
        "rembert.embeddings.position_embeddings.weight": "positions embedding",
        "rembert.embeddings.token_type_embeddings.weight": "types embedding",
        "rembert.embeddings.LayerNorm.weight": "embedding",
        "rembert.embeddings.LayerNorm.bias": "embedding",
        "rembert.encoder.embedding_hidden_mapping_in.weight": "hidden embedding",
        "rembert.encoder.embedding_hidden_mapping_in.bias": "hidden",
        "cls.predictions.dense.weight": "given hidden",
        "cls.predictions.dense.bias": "given",
        "cls.predictions.LayerNorm.weight": "given",
        "cls.predictions.LayerNorm.bias": "given",
        "cls.predictions.decoder.weight": "vocab given",
    },
}

# How tokens look and sound, beside the embedding of their own.
OTHER_ROWS = {
    "roc_bert": {
        "roc_bert.embeddings.pronunciation_embed.weight": "pronunciations pronunciation",
        "roc_bert.embeddings.shape_embed.weight": "shapes shape",
        "roc_bert.embeddings.map_inputs_layer.weight": "hidden hidden+shape+pronunciation",
        "roc_bert.embeddings.map_inputs_layer.bias": "hidden",
    },
}

# Model type to the name of the model without its head.
PREFIXES = {
    "bert": "bert",
    "bert-generation": "bert",
    "big_bird": "bert",
    "camembert": "roberta",
    "data2vec-text": "data2vec_text",
    "electra": "electra",
    "ernie": "ernie",
    "megatron-bert": "bert",
    "rembert": "rembert",
    "roc_bert": "roc_bert",
    "roberta": "roberta",
    "roberta-prelayernorm": "roberta_prelayernorm",
    "roformer": "roformer",
    "xlm-roberta": "roberta",
    "xlm-roberta-xl": "roberta",
}
NORMS = {
    name: (
        *([] if name in NARROW_ROWS else [f"{prefix}.embeddings.LayerNorm"]),
        *(f"{prefix}.encoder.layer.{{layers}}.{norm}" for norm in LAYER_NORMS),
        f"{prefix}.encoder.ln",
        f"{prefix}.encoder.LayerNorm",
        f"{prefix}.LayerNorm",
    )
    for name, prefix in PREFIXES.items()
}
# modernbert-decoder: the norm of the embeddings is the first layer's, too
MODERN_NORMS = (
    "model.embeddings.norm",
    "model.layers.{normed_layers}.attn_norm",
    "model.layers.{layers}.mlp_norm",
    "model.final_norm",
)
MODERN_MODULES = {
    "model.layers.{layers}.attn.q_proj": ("(heads head_dim)", "hidden"),
    "model.layers.{layers}.attn.k_proj": ("(heads head_dim)", "hidden"),
    "model.layers.{layers}.attn.v_proj": ("(heads head_dim)", "hidden"),
    "model.layers.{layers}.attn.Wo": ("hidden", "(heads head_dim)"),
    "model.layers.{layers}.mlp.Wi": ("ffn+ffn", "hidden"),
    "model.layers.{layers}.mlp.Wo": ("hidden", "ffn"),
    "lm_head.dense": ("hidden", "hidden"),
    "decoder": ("vocab", "hidden"),
}
MODERN_ROWS = (
    {"model.embeddings.tok_embeddings.weight": "vocab hidden"}
    | {f"{module}.weight": f"{given} {read}" for module, (given, read) in MODERN_MODULES.items()}
    | {f"{module}.bias": given for module, (given, _) in MODERN_MODULES.items()}
    | {f"{norm}.{kind}": "hidden" for norm in (*MODERN_NORMS, "lm_head.norm") for kind in ("weight", "bias")}
)
FIRST_NORM = "its first layer has no norm before attention, so that no other one can be the first"
TABLES = {
    name: {
        "rows": {f"{prefix}.embeddings.{embedding}": pattern for embedding, pattern in EMBEDDINGS.items()}
        | {f"{prefix}.encoder.layer.{{layers}}.{module}.weight": f"{given} hidden" for module, given in PROJECTIONS.items()}
        | {f"{prefix}.encoder.layer.{{layers}}.{module}.bias": given for module, given in PROJECTIONS.items()}
        | {f"{prefix}.encoder.layer.{{layers}}.{module}.weight": f"hidden {read}" for module, read in OUTPUTS.items()}
        | {f"{prefix}.encoder.layer.{{layers}}.{module}.bias": "hidden" for module in OUTPUTS}
        | {f"{norm}.{kind}": "hidden" for norm in NORMS[name] for kind in ("weight", "bias")}
        | {f"{prefix}.encoder.embed_positions.weight": "positions head_dim"}
        | {f"{prefix}.pooler.weight": "hidden hidden", f"{prefix}.pooler.bias": "hidden"}
        | HEAD_ROWS
        | NARROW_ROWS.get(name, {})
        | OTHER_ROWS.get(name, {}),
        "norms": NORMS[name],
        "config_keys": GPT_NEOX_KEYS,
        "follows": {"embedding_size": "hidden"} if name == "roformer" else {},
    }
    for name, prefix in PREFIXES.items()
} | {
    "modernbert-decoder": {
        "rows": MODERN_ROWS,
        "norms": MODERN_NORMS,
        "config_keys": GPT_NEOX_KEYS,
        "fixed": {"layers": FIRST_NORM},
    }
}
