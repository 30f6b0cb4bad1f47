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
# Model type to the name of the model without its head.
PREFIXES = {
    "bert": "bert",
    "bert-generation": "bert",
    "data2vec-text": "data2vec_text",
    "ernie": "ernie",
    "megatron-bert": "bert",
    "roberta": "roberta",
    "roberta-prelayernorm": "roberta_prelayernorm",
    "xlm-roberta-xl": "roberta",
}
NORMS = {
    name: (
        f"{prefix}.embeddings.LayerNorm",
        *(f"{prefix}.encoder.layer.{{layers}}.{norm}" for norm in LAYER_NORMS),
        f"{prefix}.encoder.ln",
        f"{prefix}.encoder.LayerNorm",
        f"{prefix}.LayerNorm",
    )
    for name, prefix in PREFIXES.items()
}
TABLES = {
    name: {
        "rows": {f"{prefix}.embeddings.{embedding}": pattern for embedding, pattern in EMBEDDINGS.items()}
        | {f"{prefix}.encoder.layer.{{layers}}.{module}.weight": f"{given} hidden" for module, given in PROJECTIONS.items()}
        | {f"{prefix}.encoder.layer.{{layers}}.{module}.bias": given for module, given in PROJECTIONS.items()}
        | {f"{prefix}.encoder.layer.{{layers}}.{module}.weight": f"hidden {read}" for module, read in OUTPUTS.items()}
        | {f"{prefix}.encoder.layer.{{layers}}.{module}.bias": "hidden" for module in OUTPUTS}
        | {f"{norm}.{kind}": "hidden" for norm in NORMS[name] for kind in ("weight", "bias")}
        | HEAD_ROWS,
        "norms": NORMS[name],
        "config_keys": GPT_NEOX_KEYS,
    }
    for name, prefix in PREFIXES.items()
}
