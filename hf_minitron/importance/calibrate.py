"""The one forward pass that scores every axis.

It opens the taps of a family, hands what they read to one metric per tap, and makes `Scores` of what the metrics say. It must
not know how a metric computes its score.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import hf_minitron
from hf_minitron import axes
from hf_minitron.data import text_hash
from hf_minitron.families.family import Family, family_of
from hf_minitron.importance.activation import ActivationNorm
from hf_minitron.importance.layers import BlockImportance
from hf_minitron.scores import Scores


class Metric(Protocol):
    """What an importance metric must have; `calibrate` makes one per tap."""

    def update(self, activation: Tensor | tuple[Tensor, Tensor], mask: Tensor | None = None) -> None:
        """Add one batch: `(batch, seq, size)`, or for `layers` a pair of `(batch, seq, hidden)`."""

    def finish(self) -> Tensor:
        """Return the score of every index."""


METRICS: dict[str, type[Metric]] = {
    "ffn": ActivationNorm,
    "heads": ActivationNorm,
    "hidden": ActivationNorm,
    "layers": BlockImportance,
}


def calibrate(model: PreTrainedModel, blocks: Dataset, batch_size: int = 4) -> Scores:
    """Score every axis of a model with one forward pass over a text.

    Args:
        model (`PreTrainedModel`): A causal language model of a known family, in any dtype; scores are float32.
        blocks (`Dataset`): `input_ids` of shape `(seq,)` per row, and `attention_mask` where blocks are padded. The
            papers use 1024 samples (2407.14679, section 4); a few dozen already order the indices well.
        batch_size (`int`, *optional*, defaults to 4): Blocks per forward pass.

    Returns:
        `Scores`: `ffn` and `heads` per layer, `hidden` summed over all norms, `layers` by Block Importance.

    Raises:
        ValueError: naming the tensor, when weights or activations hold NaN or infinity.

    Example:

    ```python
    >>> scores = calibrate(model, token_blocks(documents, tokenizer, block_size=512, max_tokens=32_768))
    >>> scores.save("scores.safetensors")
    ```
    """
    family = family_of(model.config)
    shape = family.shape_of(model.config)
    padded = "attention_mask" in blocks.column_names
    batches = blocks.with_format("torch").iter(batch_size)
    with torch.inference_mode(), _open_taps(model, family, shape.sizes) as (metrics, masks):
        for batch in tqdm(batches, desc="Scoring", total=-(-len(blocks) // batch_size), unit="batch"):
            ids = batch["input_ids"].to(model.device)
            masks[0] = batch["attention_mask"].to(model.device) if padded else None
            model.base_model(input_ids=ids, attention_mask=masks[0], use_cache=False)  # the head scores nothing
            _check_finite(model, metrics)
    by_axis = {}
    for axis, by_tap in metrics.items():
        scores = [metric.finish().cpu() for metric in by_tap.values()]
        by_axis[axis] = torch.stack(scores).sum(0) if axis == "hidden" else torch.stack(scores)
    return Scores(by_axis, _provenance(model, blocks))


@contextmanager
def _open_taps(model: PreTrainedModel, family: Family, sizes: Mapping[str, int]) -> Iterator[tuple[dict, list]]:
    """Yield one metric per axis and tap, fed by hooks, and a one-item list that holds the mask of the current batch."""
    metrics: dict[str, dict[str, Metric]] = {axis: {} for axis in family.taps}
    masks: list[Tensor | None] = [None]
    modules = dict(model.named_modules())
    hooks = []
    for axis, rows in family.taps.items():
        layers = range(sizes["layers"])
        names = [row.format(layers=i) for i in layers for row in rows if axes.placeholders(row)]
        names += [row for row in rows if not axes.placeholders(row)]
        for name in names:
            metric = metrics[axis][name] = METRICS[axis]()
            hooks.append(modules[name].register_forward_hook(_hook(axis, name, metric, masks, family, sizes), with_kwargs=True))
    try:
        yield metrics, masks
    finally:
        for hook in hooks:
            hook.remove()


def _hook(axis: str, name: str, metric: Metric, masks: list, family: Family, sizes: Mapping[str, int]):
    if axis in ("ffn", "heads"):  # read before the projection, whose input is the axis
        row, _ = axes.match(f"{name}.weight", family.rows)
        dim = axes.parse(family.rows[row])[-1]

        def hook(module, args, kwargs, output):
            metric.update(axes.norm_along(args[0], dim, axis, sizes), masks[0])

    elif axis == "hidden":

        def hook(module, args, kwargs, output):
            metric.update(output, masks[0])

    else:

        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            metric.update((before, output[0] if isinstance(output, tuple) else output), masks[0])

    return hook


def _check_finite(model: PreTrainedModel, metrics: Mapping[str, Mapping[str, Metric]]) -> None:
    """Name the first tap that has seen NaN or infinity, and the weight that caused it where one did."""
    taps = [(axis, name, m.finish()) for axis, by_tap in metrics.items() for name, m in by_tap.items()]
    if all(flags := [bool(score.isfinite().all()) for _, _, score in taps]):
        return
    for weight_name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not weight.isfinite().all():
            raise ValueError(f"The weight {weight_name!r} holds NaN or infinity; the checkpoint is damaged")
    order = list(dict(model.named_modules()))  # a block stands before its parts, but is read after them
    bad = [(axis == "layers", order.index(name), axis, name) for (axis, name, _), ok in zip(taps, flags, strict=True) if not ok]
    _, _, axis, name = min(bad)
    raise ValueError(
        f"NaN or infinity in the activations at {name!r} ({axis}), while all weights are finite: {model.dtype} is too "
        "narrow for this model. Score it with dtype: float32"
    )


def _provenance(model: PreTrainedModel, blocks: Dataset) -> dict[str, str]:
    return {
        "model": model.config.name_or_path,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text_sha256": text_hash(blocks),
        "tokens": str(sum(int(m.sum()) for m in blocks["attention_mask"]) if "attention_mask" in blocks.column_names
                      else len(blocks) * len(blocks[0]["input_ids"])),
        "blocks": str(len(blocks)),
        "hf_minitron": hf_minitron.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }  # fmt: skip
