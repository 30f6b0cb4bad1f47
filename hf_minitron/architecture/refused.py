"""What stands in the way of a table for the decoders of Transformers that none is for. A table only."""

HYPER = "hyper-connections carry several streams between its layers, each mixed of all"
DELTA = "latent attention, and one with a decay for every channel, have the same names in its layers and other shapes"
RESIDUALS = "attention over what earlier layers gave stands in place of the residual stream"
DRAFTS = "it drafts for a Gemma 4 whose keys and values it reads, and is no model of its own"
PARTS = "encoders of images and sounds are parts of it, in the module of its embedding"

# Model type to what its classes have that no table can say, or none says yet.
MISSING = {
    "bailing_hybrid": DELTA,
    "blt": "it is three stacks of layers, for bytes, for patches of bytes, and for bytes again",
    "cpmant": "all heads of all layers read one table of biases, by positions and segments, in place of positions",
    "dbrx": "all experts of a layer lie in one matrix, whose sizes stand in parts of its config (ffn_config, attn_config)",
    "deepseek_v4": f"{HYPER}, and its attention compresses keys and values of several tokens into one",
    "dory": "its stream stays on a sphere, on which layers turn it, at a rate for every channel, in place of adding to it",
    "dots3_note_text": "its latent attention has gates for heads, a norm of rotated keys alone, and an indexer in some layers",
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
    "git": "an image encoder is a part of it, whose states its layers read before those of the text",
    "hrm_text": "two stacks of layers run in turn on the same text, several times over",
    "hy_v4": HYPER,
    "inkling_text": "its attention adds a learned logit for every distance, and short convolutions stand in all of its layers",
    "inkling2_text": RESIDUALS,
    "inkling2_loop_text": f"{RESIDUALS}, and some layers run several times over",
    "jetmoe": "the queries and outputs of its attention are experts as well, chosen token by token",
    "kimi_linear": DELTA,
    "longcat_flash": "each of its layers has two attentions and two MLPs, and some of its experts compute nothing",
    "moshi": "its embedding has a token more than its vocabulary, and its projections may have a matrix for every codebook",
    "phi4_multimodal": PARTS,
    "qwen4_exp_text": f"{HYPER}, and embeddings of n-grams go into some",
    "recurrent_gemma": "its recurrent layers (RG-LRU) have gates of blocks of channels, and its MLPs half its config's width",
    "reformer": "its attention hashes tokens into buckets, and its reversible layers carry two streams",
    "rwkv": "it has no attention, but a decay of its own for every channel (RWKV-4)",
    "trocr": "its layers read the states of an image encoder by cross-attention",
    "xlm": "attentions, norms and MLPs of all layers stand in lists beside each other, not in layers",
    "xlnet": "its attention has two streams, of content and of positions, for texts whose tokens are permuted",
    "xlstm": "its layers keep a matrix as memory (mLSTM), with gates for every head",
    "xmod": "an adapter for every language stands in each of its layers, under the name of the language",
    "zamba": "each head of its Mamba layers has projections of its own, in one tensor for all heads",
    "zaya": "convolutions over heads make its queries and keys, and its routers hand a state from layer to layer",
}
