"""LoRA: low-rank additions to a student, or to a teacher that is corrected; merged in the end: the result is a stock model."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from hf_minitron.architecture.config import model_of
from hf_minitron.architecture.vision import TOWERS
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.distillation.checks import check_number
from hf_minitron.errors import one_line
from hf_minitron.known_names import LORA_FIELDS

# What is not said in a recipe.
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# What no recipe says: it follows from the model and from training.
OURS = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")

# How the frozen base of adapters is held: what it is loaded with. nf4 is 4-bit NormalFloat (2305.14314), by bitsandbytes.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
BASES = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "nf4": {"dtype": torch.bfloat16, "quantization_config": NF4},
}


def check_base(lora: Mapping | None, name: str) -> None:
    """Refuse a base that is not known, that has no adapters, or whose package is not installed."""
    if name not in BASES:
        raise ValueError(f"base_dtype: {name!r} is none of {', '.join(BASES)}")
    if lora is None and name != "float32":
        raise ValueError(f"base_dtype: {name} is for the frozen base of adapters, and here all weights are trained, in "
                         "float32; set lora, or leave it out")  # fmt: skip
    if "quantization_config" in BASES[name] and not is_bitsandbytes_available():
        raise ValueError(f"base_dtype: {name} needs a package that is not installed: pip install bitsandbytes")


def load_base(folder: Path, name: str, device: torch.device) -> PreTrainedModel:
    """Load a model that adapters are added to, as `BASES` says; a quantized one on the device on which it stays."""
    kwargs = dict(BASES[name])
    if "quantization_config" in kwargs:
        kwargs |= {"quantization_config": BitsAndBytesConfig(**NF4), "device_map": {"": device}}
    return load_model(folder, **kwargs)


def check_lora(settings: Mapping, config: PreTrainedConfig) -> None:
    """Refuse settings that `add_lora` would refuse for a model of this config, without its weights."""
    known, hints = [setting.name for setting in dataclasses.fields(LoraConfig)], typing.get_type_hints(LoraConfig)
    for key, value in settings.items():
        if key not in known:
            near = [LORA_FIELDS[key]] if key in LORA_FIELDS else difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            raise ValueError(f"lora: {key!r} is no field of peft.LoraConfig" + (f"; did you mean {near[0]!r}?" if near else ""))
        if key in OURS:
            raise ValueError(f"lora: {key} is set for you; leave it out")
        if hints[key] in (int, float):
            check_number(f"lora: {key}", value, whole=hints[key] is int)
        if hints[key] is bool and not isinstance(value, bool):
            raise ValueError(f"lora: {key}: {value!r} is neither true nor false")
    with torch.device("meta"):  # no weights
        tuned = add_lora(model_of(config), settings)
    if not any(parameter.requires_grad for parameter in tuned.parameters()):
        raise ValueError(f"lora: {dict(settings)} adds to no layer, so nothing would be trained; name other target_modules")


def add_lora(model: PreTrainedModel, settings: Mapping) -> PeftModel:
    """Return a model of which only low-rank additions are trained.

    Args:
        model (`PreTrainedModel`): The model; it is changed.
        settings (`Mapping`): Fields of `peft.LoraConfig`; what is left out is that of `LORA`.

    Raises:
        ValueError: for settings that peft refuses, and for additions to the embedding or the head, which the chunked loss
            would not see.
    """
    try:
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**LORA, **_text_only(model.config), **settings}))
    except Exception as error:  # peft does not look at most settings before it uses them
        raise ValueError(f"lora: {one_line(error)}") from error
    for layer, kind in ((model.get_input_embeddings(), torch.nn.Embedding), (model.get_output_embeddings(), torch.nn.Linear)):
        if not isinstance(layer, kind):
            raise ValueError(f"lora: {settings} changes the embedding or the output head; name other target_modules")
    return tuned


def _text_only(config: PreTrainedConfig) -> dict[str, str]:
    """Return settings that leave out all but the text model of a vision-language model: no text passes it."""
    tower = TOWERS.get(config.model_type)
    return {"exclude_modules": rf"(?!{re.escape(tower.prefix)}\.).*"} if tower else {}


def merge_lora(source: str | Path, adapter: str | Path) -> PreTrainedModel:
    """Return the model of a folder, in float32, with a saved adapter added to its weights: a stock model."""
    return PeftModel.from_pretrained(load_model(source, torch.float32), adapter).merge_and_unload()
