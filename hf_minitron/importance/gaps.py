"""What dropped layers added to the residual stream, seen from the MLP before them, so that it can take it over.

ReplaceMe (2505.02819) folds a linear map of the MLP's output into it; here the whole projection is fitted, by its inputs.
"""

from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.importance.calibrate import input_device
from hf_minitron.importance.taps import run_batch
from hf_minitron.plan import Plan
from hf_minitron.probe import Visit, probe
from hf_minitron.pruning.compensate import GAP, moments_path
from hf_minitron.pruning.effects import DROPPED


@torch.inference_mode()
def read_gaps(model: PreTrainedModel, blocks: Dataset, plan: Plan, folder: str | Path, batch_size: int = 4) -> Path:
    """Write E[x yᵀ], E[y], E[x xᵀ] and E[x] of every layer that stays before layers that go.

    x enters its down projection, y is what they add. Every token counts: from the quarter that other moments are made
    of, merging did nothing for text of another domain.

    Args:
        model (`PreTrainedModel`): The teacher.
        blocks (`Dataset`): `input_ids` of shape `(seq,)` per row, and `attention_mask` where blocks are padded.
        plan (`Plan`): What is kept; dropped layers before the first that stays are not merged.
        folder (`str` or `Path`): Where to write, for `prune_model(..., gaps=...)`; one file per gap.
        batch_size (`int`, *optional*, defaults to 4): Blocks per forward pass.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: for a family whose MLPs are not added to the stream as they are.
    """
    architecture = Architecture.of(model.config)
    if not architecture.supports("layer_merge"):
        raise ValueError(f"corrections: layer_merge is not for {model.config.model_type}; leave it out")
    layers, projections = dict(architecture.taps("layers")), dict(architecture.taps("ffn"))
    seen = {layer: _Gap() for layer in plan.gaps}
    before = [(projections[layer], gap.enter) for layer, gap in seen.items()]
    after = [(layers[other], seen[layer].add) for layer, dropped in plan.gaps.items() for other in dropped]
    last = [(architecture.prefix, gap.update) for gap in seen.values()]
    with probe(model, [*after, *last], before):
        for batch in tqdm(list(blocks.with_format("torch").iter(batch_size)), desc="Reading dropped layers", unit="batch"):
            run_batch(model, batch, input_device(model))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for layer, gap in seen.items():
        added, entered = gap.finish()
        tensors = {f"{projections[layer]}{GAP}": added, projections[layer]: entered}
        save_file(tensors, moments_path(folder, layer), metadata={DROPPED: str(plan.gaps[layer])})
    return folder


class _Gap:
    """One kept layer and the dropped ones behind it."""

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
        found = (x.T @ y, y.sum(0), x.T @ x, x.sum(0), len(x))
        self.totals = [total + more for total, more in zip(self.totals, found, strict=True)]

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return E[x yᵀ] with E[y] as its last row, shape `(ffn + 1, hidden)`, and E[x xᵀ] with E[x], `(ffn + 1, ffn)`."""
        xy, y, xx, x, count = self.totals
        return tuple((torch.cat([table, row[None]]) / count).cpu().contiguous() for table, row in ((xy, y), (xx, x)))
