"""Nonuniform models: `PrunedConfig`, `PrunedModel`, `PrunedForCausalLM`, known to transformers' Auto classes from here on."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.modeling.modeling_pruned import PrunedForCausalLM, PrunedModel

__all__ = ["PrunedConfig", "PrunedForCausalLM", "PrunedModel"]

AutoConfig.register(PrunedConfig.model_type, PrunedConfig, exist_ok=True)
AutoModel.register(PrunedConfig, PrunedModel, exist_ok=True)
AutoModelForCausalLM.register(PrunedConfig, PrunedForCausalLM, exist_ok=True)
