"""What a model's folder holds, by its small files: what is no plain causal language model is refused in one line that says what
it is and what to do instead.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from hf_minitron.architecture.vision import TOWERS
from hf_minitron.checkpoint.side_files import check_config_file
from hf_minitron.errors import one_line
from hf_minitron.json_files import read_json

GGUF = "GGUF; load it with from_pretrained(folder, gguf_file=...), save_pretrained it, and name that folder"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of `config.json`; nothing where it cannot be read."""
    return read_json(folder / CONFIG_NAME)


def check_config(folder: Path, model: str) -> None:
    """Refuse what is no causal language model of a stock class, in one line that says what it is and what to do.

    Args:
        folder (`Path`): A folder.
        model (`str`): Its name in the message.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(_no_config(folder, model))
    content = check_config_file(folder / CONFIG_NAME)
    kind, known = content.get("model_type"), "Name a causal language model of a class in Transformers"
    if not isinstance(kind, str):
        raise ValueError(f'{folder / CONFIG_NAME} has no model_type; add one, such as "llama", or download it again')
    if kind not in CONFIG_MAPPING:
        remote = content.get("auto_map")
        what = "needs code of its own (auto_map), which is not run here" if remote else "is in no class of Transformers"
        raise ValueError(f"{model} of model type {kind!r} {what}. {known}, or convert it to one, such as llama")
    try:
        config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(content))
    except Exception as error:  # config classes raise their own kinds
        raise ValueError(f"{folder / CONFIG_NAME} is no config of a {kind}: {one_line(error)}") from error
    if kind in TOWERS:
        _check_compressed(content.get("quantization_config") or content.get("compression_config"), model)
        return
    if "vision_config" in content or "audio_config" in content or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"{model} is a multimodal model ({kind}). {_text_part(config, model)}")
    if content.get("is_encoder_decoder"):
        raise ValueError(f"{model} is an encoder-decoder ({kind}), which holds no causal language model. {known}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{model} of model type {kind!r} is not a causal language model. {known}")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not content.get("is_decoder"):
        raise ValueError(f"{model} is an encoder ({kind}), which does not predict the next token. {known}")
    _check_compressed(content.get("quantization_config") or content.get("compression_config"), model)


def _text_part(config: PreTrainedConfig, model: str) -> str:
    """Say how to get a multimodal model's text part, where that is a causal language model of its own."""
    text = config.get_text_config()
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or text is config:
        return "Its text part is no causal language model of its own in Transformers; name one that is"
    return (f"Save its text part as a model of its own: m = AutoModelForImageTextToText.from_pretrained({model!r}); c = "
            "m.config.get_text_config(); c.tie_word_embeddings = m.config.tie_word_embeddings; t = AutoModelForCausalLM."
            "from_config(c, dtype=m.dtype); t.model, t.lm_head = m.get_decoder(), m.lm_head; t.save_pretrained(folder); and "
            "its tokenizer beside it")  # fmt: skip


def _check_compressed(settings: Any, model: str) -> None:
    """Refuse a compressed checkpoint that cannot be loaded here, such as for want of a package."""
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    try:
        AutoHfQuantizer.from_config(settings).validate_environment(device_map=None, dtype=torch.bfloat16)
    except Exception as error:  # each method raises its own kinds
        raise ValueError(f"{model} is compressed with {method}, which cannot be loaded here: {one_line(error)}. Name the "
                         "checkpoint in bfloat16, float16 or float32 that it was made from") from error  # fmt: skip


def _no_config(folder: Path, model: str) -> str:
    """Say what lies where there is no `config.json`."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        base = adapter_base(folder)
        return (f"{model} is a PEFT adapter of {base}, not a model; merge it: PeftModel.from_pretrained(AutoModelForCausalLM."
                f"from_pretrained({base!r}), {model!r}).merge_and_unload().save_pretrained(folder)")  # fmt: skip
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf"))):
        return f"{model} is {GGUF}"
    if folder.is_dir():
        return f"{folder} has no config.json: not a model folder"
    if folder.is_file():
        return f"{model} is a file; name the folder of a model, with its config.json"
    return f"No model at {model!r}: neither a folder with a config.json nor a Hub id (owner/name, owner/name@revision)"


def adapter_base(folder: str | Path) -> str | None:
    """Return the model that a folder's PEFT adapter is for; `None` where the folder holds none."""
    path = Path(folder).expanduser() / ADAPTER_CONFIG_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        base, revision = content["base_model_name_or_path"], content.get("revision")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it names no base_model_name_or_path ({error})") from error
    return f"{base}@{revision}" if revision and "@" not in base else base
