"""What dropped layers added to the residual stream, seen from the MLP before them, so that it can take it over.

ReplaceMe (2505.02819) folds a linear map of the MLP's output into it; here the whole projection is fitted, by its inputs.
"""

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.importance.calibrate import input_device
from hf_minitron.importance.taps import run_batch
from hf_minitron.plan import Plan
from hf_minitron.probe import Visit, probe
from hf_minitron.statistics import Residuals


@torch.inference_mode()
def read_residuals(model: PreTrainedModel, blocks: Dataset, plan: Plan, batch_size: int = 4) -> Residuals:
    """Measure what dropped layers add to the residual stream, by what the MLP of the kept layer before them reads.

    Every token counts: from the quarter that other moments are made of, merging did nothing for text of another domain.

    Args:
        model (`PreTrainedModel`): The teacher.
        blocks (`Dataset`): `input_ids` of shape `(seq,)` per row, and `attention_mask` where blocks are padded.
        plan (`Plan`): What is kept; dropped layers before the first that stays are not merged.
        batch_size (`int`, *optional*, defaults to 4): Blocks per forward pass.

    Returns:
        `Residuals`: For `prune_model(..., residuals=...)`.

    Raises:
        ValueError: for a family whose MLPs are not added to the stream as they are.
    """
    architecture = Architecture.of(model.config)
    if not architecture.supports("layer_merge"):
        raise ValueError(f"corrections: layer_merge is not for {model.config.model_type}; leave it out")
    layers, projections = dict(architecture.taps("layers")), dict(architecture.taps("ffn"))
    seen = {layer: _Sums() for layer in plan.dropped_after}
    before = [(projections[layer], sums.enter) for layer, sums in seen.items()]
    after = [(layers[other], seen[layer].add) for layer, dropped in plan.dropped_after.items() for other in dropped]
    last = [(architecture.prefix, sums.update) for sums in seen.values()]
    with probe(model, [*after, *last], before):
        for batch in tqdm(list(blocks.with_format("torch").iter(batch_size)), desc="Reading dropped layers", unit="batch"):
            run_batch(model, batch, input_device(model))
    inputs = {projections[layer]: _mean(*sums.totals[2:]) for layer, sums in seen.items()}
    added = {projections[layer]: _mean(*sums.totals[:2], sums.totals[4]) for layer, sums in seen.items()}
    return Residuals(plan.dropped_after, inputs, added)


def _mean(table: Tensor, row: Tensor, count: int) -> Tensor:
    """Return the means of products, with those of one factor as the last row."""
    return (torch.cat([table, row[None]]) / count).cpu().contiguous()


class _Sums:
    """Sums over tokens of one kept layer and the dropped ones behind it: x yᵀ, y, x xᵀ, x and 1."""

    def __init__(self):
        self.entered: Tensor | None = None
        self.added: Tensor | float = 0.0
        self.totals: list[Tensor | float] = [0.0, 0.0, 0.0, 0.0, 0]

    def enter(self, visit: Visit) -> None:
        self.entered, self.added = visit.input, 0.0

    def add(self, visit: Visit) -> None:
        self.added = self.added + (visit.states - visit.input).float()

    def update(self, visit: Visit) -> None:
        x, y = self.entered.flatten(0, 1), self.added.flatten(0, 1)
        if visit.mask is not None:
            text = visit.mask.flatten() > 0
            x, y = x[text.to(x.device)], y[text.to(y.device)]
        x, y = x.float(), y.to(x.device)
        sums = (x.T @ y, y.sum(0), x.T @ x, x.sum(0), len(x))
        self.totals = [total + more for total, more in zip(self.totals, sums, strict=True)]
