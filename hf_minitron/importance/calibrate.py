"""The one pass over a text that scores every axis: of a model in memory, or of a checkpoint layer by layer.

It runs models with their taps open and makes `Statistics` of what the taps read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

import hf_minitron
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import text_config
from hf_minitron.checkpoint.checkpoint import resolve
from hf_minitron.data.packing import text_hash
from hf_minitron.data.vocabulary import check_ids
from hf_minitron.importance.baselines import BASELINES
from hf_minitron.importance.metrics import DEFAULT, DEFAULTS, Chosen, metrics_of, name_of
from hf_minitron.importance.streamed import read_layers
from hf_minitron.importance.taps import Reading, check_activations, open_taps, run_batch, take_moments
from hf_minitron.shape import Shape
from hf_minitron.statistics import MOMENTS, Moments, Statistics


def calibrate(
    model: PreTrainedModel | str | Path,
    blocks: Dataset,
    batch_size: int = 4,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    state_bytes: int = 4_000_000_000,
    moments: bool = False,
    metric: Chosen | Mapping[str, Chosen] = DEFAULT,
    save_to: str | Path | None = None,
) -> Statistics:
    """Score every axis of a model with one forward pass over a text.

    Under `accelerate launch` every process calls it with all blocks, reads its share of them, and gets the same scores.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): A causal language model in memory, on one device or several; or a folder,
            whose layers are read one at a time.
        blocks (`Dataset`): `input_ids` of shape `(seq,)` per row, and `attention_mask` where rows are padded. The papers use
            1024 samples (2407.14679, section 4); a few dozen order the indices well.
        batch_size (`int`, *optional*, defaults to 4): Rows per forward pass.
        dtype (`torch.dtype`, *optional*): Of a folder's weights; as stored when left out.
        device (`torch.device`, *optional*, defaults to the CPU): Where a folder's layers run.
        state_bytes (`int`, *optional*, defaults to 4 GB): Memory for the states between a folder's layers; the rest is spilled.
        moments (`bool`, *optional*, defaults to `False`): Whether to measure what corrections need as well: second moments of
            the inputs of projections (`ffn` squared numbers a layer), energies of those of norms.
        metric (`str`, `Metric` or `Mapping`, *optional*, defaults to `"l2_mean"`): How indices are scored, for all width axes
            or by axis: one of `METRICS`, the baselines `magnitude` or `random`, or a class of your own (see `Metric`).
        save_to (`str` or `Path`, *optional*): A folder for the statistics, moments layer by layer; in memory when left out.

    Returns:
        `Statistics`: `ffn`, `heads` and `experts` per layer; `hidden` summed over all norms; `layers` by Block Importance.

    Raises:
        ValueError: for NaN or infinity, naming the tensor; fewer blocks than processes; an unknown metric; ids of no token.

    Example:

    ```python
    >>> calibrate(teacher, calibration).scores["ffn"].shape == (shape["layers"], shape["ffn"])
    True
    ```
    """
    metrics, batches = metrics_of(metric), own_batches(blocks, batch_size)
    read = {axis: chosen for axis, chosen in metrics.items() if chosen not in BASELINES}
    store = Moments(None if save_to is None else Path(save_to) / MOMENTS)
    if isinstance(model, PreTrainedModel):
        config, dtype = model.config, model.dtype
        check_ids(blocks, text_config(config).vocab_size)
        readings = take_moments(_read_model(model, batches, moments, read), store)
    else:
        wanted, device = store if moments else None, torch.device(device)
        config, dtype, readings = read_layers(resolve(model), batches, dtype, device, state_bytes, read, wanted)
    scores = _by_axis(readings, Architecture.of(config).shape)
    for axis in scores.keys() & metrics.keys() - read.keys():
        scores |= BASELINES[metrics[axis]](model, {axis: scores[axis]})
    statistics = Statistics(scores, store, **_text_facts(blocks, config), provenance=_provenance(config, dtype, metrics))
    if save_to is not None and PartialState().is_main_process:
        statistics.save(save_to)
    return statistics


def own_batches(blocks: Dataset, batch_size: int) -> list[dict[str, Tensor]]:
    """Return the batches of this process's share of the blocks (`accelerate launch`)."""
    state = PartialState()
    if len(blocks) < state.num_processes:
        raise ValueError(f"{len(blocks)} calibration blocks for {state.num_processes} processes; give every process one at "
                         "least")  # fmt: skip
    blocks = blocks.shard(state.num_processes, state.process_index, contiguous=True)
    return list(blocks.with_format("torch").iter(batch_size))


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where a model wants its token ids."""
    device = model.get_input_embeddings().weight.device
    return model.device if device.type == "meta" else device  # offloaded: its hooks move what it needs


def _read_model(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], moments: bool, metrics: Mapping
) -> list[Reading]:
    """Run a model in memory over all batches with its taps open."""
    device = input_device(model)
    with torch.inference_mode(), open_taps(model, moments, metrics) as readings:
        for batch in tqdm(batches, desc="Scoring", unit="batch"):
            run_batch(model, batch, device)
            check_activations(model, readings)
    return readings


def _by_axis(readings: Sequence[Reading], shape: Shape) -> dict[str, Tensor]:
    """Add up what processes have read and make one tensor per axis."""
    by_axis: dict[str, list] = {}
    for reading in sorted(readings, key=lambda r: (r.axis, -1 if r.layer is None else r.layer, r.module)):  # alike everywhere
        by_axis.setdefault(reading.axis, []).append((reading.layer, reading.finish()))
    scores = {}
    for axis, scored in by_axis.items():
        if axis == "hidden":
            scores[axis] = torch.stack([score for _, score in scored]).sum(0)
        else:
            by_layer, most = dict(scored), max((score for _, score in scored), key=Tensor.numel)
            for layer, score in scored if most.dim() else ():
                by_layer[layer] = torch.nn.functional.pad(score, (0, most.shape[-1] - score.shape[-1]), value=torch.nan)
            absent = torch.full_like(most, torch.nan)
            scores[axis] = torch.stack([by_layer.get(layer, absent) for layer in range(shape["layers"])])
    return scores


def token_counts(blocks: Dataset, config: PreTrainedConfig) -> Tensor:
    """Count how often each token of a model is in a text, shape `(vocab,)`; padding is none of it."""
    vocab_size = text_config(config).vocab_size
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for rows in blocks.with_format("numpy").iter(batch_size=256):
        nothing = [None] * len(rows["input_ids"])
        masks = rows.get("attention_mask", nothing)
        read = [ids if mask is None else ids[mask.astype(bool)] for ids, mask in zip(rows["input_ids"], masks, strict=True)]
        counts += torch.from_numpy(np.bincount(np.concatenate(read), minlength=vocab_size))
    return counts


def _text_facts(blocks: Dataset, config: PreTrainedConfig) -> dict[str, Any]:
    """Return what identifies the text that was read, and how often it has each token."""
    masks = "attention_mask" in blocks.column_names
    tokens = sum(int(mask.sum()) for mask in blocks["attention_mask"]) if masks else len(blocks) * len(blocks[0]["input_ids"])
    identity = {"sha256": text_hash(blocks), "tokens": tokens, "blocks": len(blocks)}
    return {"text": identity, "token_counts": token_counts(blocks, config)}


def _provenance(config: PreTrainedConfig, dtype: torch.dtype, metrics: Mapping[str, Chosen]) -> dict[str, Any]:
    return {
        "model": config.name_or_path,
        "model_type": config.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "metrics": {axis: name_of(metrics.get(axis, default)) for axis, default in DEFAULTS.items()},
        "versions": {module.__name__: module.__version__ for module in (hf_minitron, transformers, torch)},
    }
