"""Tiny vision-language models of every type that can be pruned, with sizes as in `tiny`, and their inputs."""

import tiny
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT = {
    "num_hidden_layers": 3, "hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3}
WIDE = {"hidden_size": 16, "intermediate_size": 20, "out_hidden_size": 40}
MROPE = {"rope_type": "default", "rope_theta": 3e4}
# The text model's class takes head_dim to be hidden / heads.
EIGHT = {"head_dim": 10}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
# Model type to its text model's settings, its vision model's, and its own.
SETTINGS = {
    "gemma3": (
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 7, "sliding_window": 5, "sliding_window_pattern": 2},
        {"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False},
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END},
    ),
    "gemma4": (
        {"model_type": "gemma4_text", **tiny.CHANGES["gemma4_text"]},
        {**CLIP, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 2, "pooling_kernel_size": 2,
         "position_embedding_size": 8},
        {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 94, "boi_token_id": START, "eoi_token_id": END,
         "boa_token_id": 95, "eoa_token_index": 96},
    ),
    "glm4v": (
        {**EIGHT, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.6}},
        {**QWEN, **WIDE, "image_size": 8},
        {**QWEN_IDS, "image_start_token_id": START, "image_end_token_id": END},
    ),
    "glm46v": (
        {**EIGHT, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.6}},
        {**QWEN, **WIDE, "image_size": 8},
        {**QWEN_IDS, "image_start_token_id": START, "image_end_token_id": END},
    ),
    "idefics3": (
        {"model_type": "llama"},
        {**CLIP},
        {"scale_factor": 2, "image_token_id": IMAGE},
    ),
    "internvl": (
        {"model_type": "qwen2"},
        {**CLIP, "image_size": [8, 8], "patch_size": [4, 4]},
        {"image_token_id": IMAGE, "downsample_ratio": 0.5, "image_seq_length": 1},
    ),
    "llava": (
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", **CLIP},
        {"image_token_index": IMAGE, "image_seq_length": 4},
    ),
    "llava_next": (
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", **CLIP},
        {"image_token_index": IMAGE, "image_seq_length": 4, "image_grid_pinpoints": [[8, 8]]},
    ),
    "llava_onevision": (
        {"model_type": "qwen2"},
        {"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False},
        {"image_token_index": IMAGE, "video_token_index": VIDEO, "image_grid_pinpoints": [[8, 8]]},
    ),
    "vipllava": (
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", **CLIP},
        {"image_token_index": IMAGE, "image_seq_length": 4, "vision_feature_layers": [-1, -2]},
    ),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", **CLIP, "head_dim": 8, "image_size": 16},
        {"image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1},
    ),
    "qwen2_vl": (
        {**EIGHT, "rope_parameters": {**MROPE, "mrope_section": [1, 2, 2]}},
        {**QWEN, "embed_dim": 16, "hidden_size": 40, "mlp_ratio": 2},
        QWEN_IDS,
    ),
    "qwen2_5_vl": (
        {**EIGHT, "rope_parameters": {**MROPE, "mrope_section": [1, 2, 2]}},
        {**QWEN, **WIDE, "window_size": 8, "fullatt_block_indexes": [1]},
        QWEN_IDS,
    ),
    "qwen3_vl": (
        {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 1]}},
        {**QWEN, **WIDE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        QWEN_IDS,
    ),
    "qwen3_vl_moe": (
        {**tiny.NARROW, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 1]}, "mlp_only_layers": [1]},
        {**QWEN, **WIDE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        QWEN_IDS,
    ),
    "qwen3_5": (
        {**tiny.DELTA, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 1], "partial_rotary_factor": 1.0}},
        {**QWEN, **WIDE, "num_position_embeddings": 16},
        QWEN_IDS,
    ),
    "qwen3_5_moe": (
        {**tiny.DELTA, **tiny.ROUTER, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 28},
        {**QWEN, **WIDE, "num_position_embeddings": 16},
        QWEN_IDS,
    ),
    "smolvlm": (
        {"model_type": "llama"},
        {**CLIP},
        {"scale_factor": 2, "image_token_id": IMAGE},
    ),
}  # fmt: skip
# Ropes that are not those of their class's defaults, which a config may lose.
THETAS = {
    "gemma3": {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
                                   "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}},
    **dict.fromkeys(("idefics3", "internvl", "llava", "mistral3", "smolvlm"), {"rope_parameters": MROPE | {"rope_theta": 5e4}}),
}  # fmt: skip


def config(model_type, **changes):
    text, vision, own = SETTINGS[model_type]
    values = {**own, "tie_word_embeddings": changes.pop("tie_word_embeddings", False)}
    text = {**TEXT, **text, **changes, "tie_word_embeddings": values["tie_word_embeddings"]}
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **values)


def model(model_type, dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    made = AutoModelForImageTextToText.from_config(config(model_type, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():  # gemma3's projector is made of zeros
                parameter.normal_(0, 0.02)
    tiny.shake(made)
    return made


def images(model_type, dtype=torch.float64):
    """Inputs of one picture between words."""
    generator = torch.Generator().manual_seed(1)
    tokens = {"gemma3": 4, "llava": 4, "llava_next": 10, "llava_onevision": 10, "mistral3": 4, "vipllava": 4}.get(model_type, 1)
    ids = torch.tensor([[5, 6, START, *[IMAGE] * tokens, END, 7, 8, 9]])
    size = 4 if model_type.startswith(("qwen", "glm")) else 16 if model_type == "mistral3" else 8
    pixels = torch.randn(1, 3, size, size, generator=generator, dtype=dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model_type.startswith(("qwen", "glm")):
        return inputs | {
            "pixel_values": pixels.view(4, 12),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    if model_type == "gemma4":
        places = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
        kinds = (ids == IMAGE).int()
        return inputs | {"pixel_values": pixels[..., :4, :4].reshape(1, 4, 12), "image_position_ids": places,
                         "mm_token_type_ids": kinds}  # fmt: skip
    if model_type in ("llava_next", "llava_onevision"):
        return inputs | {"pixel_values": pixels[None].expand(1, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]])}
    if model_type == "mistral3":
        return inputs | {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 16]])}
    if model_type in ("idefics3", "smolvlm"):
        return inputs | {"pixel_values": pixels[None]}
    return inputs | {"pixel_values": pixels} | ({"token_type_ids": (ids == IMAGE).int()} if model_type == "gemma3" else {})
