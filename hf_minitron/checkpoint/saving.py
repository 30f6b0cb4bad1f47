"""Saving: the small files of a model beside its weights, so that transformers 4 and 5 both read the same model from them.

Every config of a model that is written goes through `save_config`.
"""

import copy
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from hf_minitron.architecture.config import special_float, text_config
from hf_minitron.checkpoint.side_files import side_files

logger = logging.getLogger(__name__)

# Model types whose classes in transformers 4 have other names for entries of `rope_parameters`.
ROPE_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
# Names in transformers 4 of other entries of config.json.
OLDER_NAMES = {"qwen3_moe": {"num_experts": "num_local_experts"}}
# Model types whose heads, in transformers 4, together are as wide as the hidden states.
HEADS_ARE_HIDDEN = ("granitemoehybrid", "jamba", "qwen2_moe")
# Names in transformers 4 of the kinds of layers, which transformers 5 reads too.
OLDER_LAYER_TYPES = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
# Model types whose classes in transformers 4 take a `rope_scaling` of exactly these entries.
ROPE_SCALING = {
    "olmo": ("type", "factor"),
    "olmo2": ("type", "factor"),
    "phi3": ("type", "short_factor", "long_factor"),
}
# The first version of transformers that has a model type, where that is not long ago; of the newest, one that has it.
NEWEST = "5.24"
SINCE = {
    **dict.fromkeys((
        "afmoe", "apertus1p5_text", "axk1", "beam", "cohere2_moe", "cwm", "deepseek_v32", "exaone", "exaone_moe", "flint",
        "gemma4", "gemma4_text", "gemma4_unified_text", "mimo_v2_flash",
        "glm4_moe_lite", "granite_swa", "granitemoe_swa", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2",
        "kolibri1", "laguna", "mellum", "minicpm3", "minimax_m2", "minimax_m3_vl_text", "ministral3", "nanochat", "olmo_hybrid",
        "sarvam_mla", "sarvam_moe", "solar_open", "youtu", "axk2", "glm_moe_dsa", "lfm2_moe", "nemotron_h", "qwen3_5_moe_text",
        "qwen3_5_text",
    ), NEWEST),
    "apertus": "4.56", "bitnet": "4.52", "deepseek_v2": "4.54", "diffllama": "4.48", "doge": "4.54", "dots1": "4.53",
    "ernie4_5": "4.54", "ernie4_5_moe": "4.54", "exaone4": "4.54", "flex_olmo": "4.57", "glm": "4.46", "glm4_moe": "4.54",
    "granitemoe": "4.45", "granitemoeshared": "4.49", "helium": "4.49", "hunyuan_v1_dense": "4.56", "hunyuan_v1_moe": "4.56",
    "llama4_text": "4.51", "olmo3": "4.57", "olmoe": "4.45", "phimoe": "4.46", "seed_oss": "4.56",
    "bamba": "4.48", "falcon_h1": "4.53", "granitemoehybrid": "4.52", "lfm2": "4.54", "qwen3_next": "4.57",
    "minimax": "4.53", "modernbert-decoder": "4.54",
    "arcee": "4.53", "cohere2": "4.48", "deepseek_v3": "4.51", "gemma2": "4.42", "gemma3": "4.50", "gemma3_text": "4.50",
    "glm4": "4.52", "glm4v": "4.53", "glm46v": "5.0",
    "idefics3": "4.46", "internvl": "4.52", "llava_onevision": "4.45", "mistral3": "4.50", "qwen2_vl": "4.45",
    "qwen2_5_vl": "4.49", "qwen3_vl": "4.57", "qwen3_vl_moe": "5.0", "smolvlm": "4.50",
    "gpt_oss": "4.55", "granite": "4.45", "ministral": "4.57", "minitron_pruned": "5.15", "nemotron": "4.44", "olmo2": "4.47",
    "qwen3": "4.51", "qwen3_moe": "4.51", "smollm3": "4.53", "vaultgemma": "4.57",
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"


def save_config(config: PreTrainedConfig, folder: str | Path, **changes: Any) -> None:
    """Write `config.json` as transformers 5 writes it, with what transformers 4 and older tools read beside it.

    Args:
        config (`PreTrainedConfig`): The config; it stays unchanged.
        folder (`str` or `Path`): An existing folder.
        **changes: Values of the config that are written in place of its own.
    """
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    config.save_pretrained(folder)
    path = Path(folder) / CONFIG_NAME
    # infinity as Python's JSON has it: what Transformers writes in its place, transformers 4 does not read
    content = json.loads(path.read_text(encoding="utf-8"), object_hook=special_float)
    content |= legacy_rope(config) or {}
    if older := OLDER_LAYER_TYPES.get(config.model_type):
        content["layer_types"] = [older[kind] for kind in content["layer_types"]]
    for part in (part for part in config.sub_configs if content.get(part)):
        content[part] |= legacy_rope(getattr(config, part)) or {}
    content |= {older: content[name] for older, name in OLDER_NAMES.get(config.model_type, {}).items()}
    if content.get("dtype") is not None:
        content["torch_dtype"] = content["dtype"]
    path.write_text(json.dumps(_without_code(content, path.parent), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def legacy_rope(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return what transformers 4 reads in place of `rope_parameters`; `None` when it has no words for them.

    Transformers 5 reads both, so what it makes of them is compared.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    nested = list(rope) if any(isinstance(value, Mapping) for value in rope.values()) else []  # by layer type
    main = rope.get(FULL) or next(iter(rope[key] for key in nested if rope[key])) if nested else rope
    keys = {name: main[name] for name in ("rope_theta", "partial_rotary_factor") if main.get(name) is not None}
    scaling = {key: value for key, value in main.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") == "default":
        scaling = scaling if "mrope_section" in scaling else None
    elif config.model_type in ROPE_SCALING:
        scaling["type"] = scaling.pop("rope_type")
        if "original_max_position_embeddings" in scaling and hasattr(config, "original_max_position_embeddings"):
            del scaling["original_max_position_embeddings"]  # stands beside it
        if set(scaling) != set(ROPE_SCALING[config.model_type]):
            return None
    elif scaling["rope_type"] == "longrope" and not hasattr(config, "original_max_position_embeddings"):
        keys["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    local = rope.get(SLIDING) if SLIDING in nested and config.model_type.startswith("gemma3") else None
    if local and local.get("rope_type", "default") == "default":
        keys["rope_local_base_freq"] = local["rope_theta"]
    elif local or any(rope[key] not in (None, main) for key in nested):
        return None
    names = ROPE_NAMES.get(config.model_type, {})
    renamed = {names.get(key, key): value for key, value in keys.items()} | {"rope_scaling": scaling}
    again = type(config).from_dict({**copy.deepcopy(config.to_dict()), **copy.deepcopy(renamed)})
    return renamed if _plain(again.rope_parameters) == _plain(rope) else None


def minimum_transformers(config: PreTrainedConfig) -> str | None:
    """Return the first version of transformers that computes what a config says; `None` for model types of long ago."""
    since, config = SINCE.get(config.model_type), text_config(config)
    own_heads = False
    if config.model_type in HEADS_ARE_HIDDEN:
        size = getattr(config, "head_dim", None)  # of a head; left out, heads are as wide as hidden
        own_heads = size and size * config.num_attention_heads != config.hidden_size
    return "5.0" if (own_heads or legacy_rope(config) is None) and config.model_type != "minitron_pruned" else since


def _plain(rope: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return parameters without the older name of their type, which transformers 5 keeps."""
    return rope and {
        key: _plain(value) if isinstance(value, Mapping) else value for key, value in rope.items() if key != "type"
    }


def _without_code(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a small file's content without an `auto_map` to code that does not lie beside it: a stock class needs none."""
    places = [place for value in (content.get("auto_map") or {}).values() for place in _flat(value)]
    here = all((folder / f"{place.rpartition('--')[2].split('.')[0]}.py").is_file() for place in places)
    return content if here else {key: value for key, value in content.items() if key != "auto_map"}


def _flat(value: Any) -> list[str]:
    return [place for place in (value if isinstance(value, list | tuple) else [value]) if isinstance(place, str)]


def copy_side_files(source: Path, target: Path, processors: bool = True) -> None:
    """Copy tokenizer, generation config, chat template and licence files, so that transformers 4 and 5 load them alike.

    Those of the `processors` of images go along with a model that reads images.
    """
    for path in side_files(source):
        if processors or not path.name.endswith(PROCESSOR_NAME):
            shutil.copyfile(path, target / path.name)
    complete_side_files(target)


def complete_side_files(folder: Path) -> None:
    """Write small files of a saved model again in words that transformers 4 and 5 both know; what both know stays as it is."""
    for name, change in (
        (TOKENIZER_CONFIG_FILE, _tokenizer_config),
        (GENERATION_CONFIG_NAME, _generation_config),
        *((name, _as_it_is) for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)),
    ):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            changed = _without_code(change(content, folder), folder)
            if changed != content:
                path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_config(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a tokenizer's config in words that transformers 4 knows: the class by its older name, further special tokens."""
    content = dict(content)
    if content.get("tokenizer_class") == "TokenizersBackend" and (folder / "tokenizer.json").is_file():
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    return content


def _as_it_is(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    return content


def check_generation(folder: Path) -> None:
    """Refuse a model whose `generation_config.json` cannot be written beside its student."""
    path = folder / GENERATION_CONFIG_NAME
    if path.is_file():
        _generation_config(json.loads(path.read_text(encoding="utf-8")), folder)


def _generation_config(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a generation config that transformers saves again."""
    try:
        unset = repair_generation(GenerationConfig.from_dict(copy.deepcopy(content)))
    except ValueError as error:
        raise ValueError(f"{GENERATION_CONFIG_NAME} of the model is one that transformers does not save: "
                         f"{' '.join(str(error).split())} Mend it beside the model") from error  # fmt: skip
    return {key: value for key, value in content.items() if key not in unset}


def repair_generation(config: GenerationConfig) -> list[str]:
    """Unset what transformers loads but refuses to save, flags that it says have no effect, such as a temperature without
    sampling.

    Args:
        config (`GenerationConfig`): It is changed; what it generates stays the same.

    Returns:
        `list[str]`: What was unset; a warning says so too.

    Raises:
        ValueError: for a config that stays invalid.
    """
    try:
        config.validate(strict=True)
        return []
    except ValueError as error:
        unset = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
    for name in unset:
        setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(
            f"The generation config is one that transformers does not save: {' '.join(str(error).split())}"
        ) from error
    logger.warning("%s: %s has no effect there, and transformers would not save it; the student's leaves it out",
                   GENERATION_CONFIG_NAME, ", ".join(unset))  # fmt: skip
    return unset
