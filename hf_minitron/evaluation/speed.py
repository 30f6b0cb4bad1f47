"""How fast models are on this machine, and how fast the machine is.

Models take turns inside one run, so that a machine that slows down slows all of them.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_minitron.families.family import family_of
from hf_minitron.families.student import student_config
from hf_minitron.plan import Plan
from hf_minitron.shape import Shape


@torch.inference_mode()
def tokens_per_second(
    models: Mapping[str, PreTrainedModel], prompt_tokens: int = 512, new_tokens: int = 24, rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Measure prefill and decoding of several models in turn, at batch size 1.

    Args:
        models (`Mapping[str, PreTrainedModel]`): The models, all on one device.
        prompt_tokens (`int`, *optional*, defaults to 512): Length of the prompt that is read.
        new_tokens (`int`, *optional*, defaults to 24): Tokens generated, one after the other, with a KV cache.
        rounds (`int`, *optional*, defaults to 3): Measurements of each model after one warm-up; their median counts.

    Returns:
        `dict[str, dict[str, float]]`: Name to `prefill` and `decode`, in tokens per second.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    generator = torch.Generator().manual_seed(0)
    vocab = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(0, vocab, (1, prompt_tokens), generator=generator)
    for turn in tqdm(range(rounds + 1), desc="Measuring speed", unit="round"):
        for name, model in models.items():
            ids = prompt.to(model.device)
            prefill = _seconds(partial(model, input_ids=ids, use_cache=True, logits_to_keep=1))
            # both calls read the same short prompt: their difference is the decoding alone
            short, long = (_seconds(partial(_generate, model, ids[:, :32], count)) for count in (1, 1 + new_tokens))
            if turn:
                times[name]["prefill"].append(prompt_tokens / prefill)
                times[name]["decode"].append(new_tokens / max(long - short, 1e-9))
    return {name: {kind: statistics.median(values) for kind, values in kinds.items()} for name, kinds in times.items()}


def shape_tokens_per_second(
    config: PreTrainedConfig, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Measure prefill and decoding of a random model of some shape: how fast a student would be, before there is one.

    Args:
        config (`PreTrainedConfig`): The teacher's config.
        shape (`Shape`): The shape to measure, the teacher's or what it can be cut to.
        dtype (`torch.dtype`): The dtype it will run in.
        device (`torch.device`): Where it will run.
    """
    family = family_of(config)
    config = student_config(config, family, Plan(family.shape_of(config), shape, {"layers": list(range(shape["layers"]))}))
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return tokens_per_second({"": model})[""]


@torch.inference_mode()
def flops_per_second(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Measure this machine on one random layer of a model: for estimates, in a fraction of a second.

    Args:
        config (`PreTrainedConfig`): The model's config.
        dtype (`torch.dtype`): The dtype it will run in.
        device (`torch.device`): Where it will run.
    """
    layer = random_layer(config, dtype).to(device)
    tokens = torch.zeros(4, min(512, config.max_position_embeddings), dtype=torch.long, device=device)
    seconds = min(_seconds(lambda: layer.base_model(input_ids=tokens, use_cache=False)) for _ in range(3))
    family = family_of(layer.config)
    return tokens.numel() * family.shape_of(layer.config).flops_per_token(family.rows_of(layer.config)) / seconds


def random_layer(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a random model of one layer, few experts and a vocabulary of 8: to try things before any weight is read."""
    family = family_of(config)
    shape = family.shape_of(config)
    target = {"layers": 1}
    if "experts" in shape.sizes:  # a token meets as many of them, whatever their number
        target["experts"] = min(shape["experts"], 4 * shape["experts_per_token"])
    config = student_config(config, family, Plan(shape, shape.cut_to(target), {"layers": [shape["layers"] - 1]}))
    config.vocab_size, config.pad_token_id = 8, None
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _generate(model: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )


def _seconds(work: Callable) -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start
