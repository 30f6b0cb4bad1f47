"""What a model loses with a layer or a contiguous block of layers: measured by running it without them.

Removing each of L layers costs L + L (L - 1) / 2 layer forwards, about half of L passes.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.head import head_chunks, head_of
from hf_minitron.importance.calibrate import input_device, own_batches
from hf_minitron.importance.metrics import BlockImportance
from hf_minitron.importance.without import Removal, WholePass, layer_names, without_layers

CHUNK = 256  # tokens whose logits exist at the same time


def removal_costs(model: PreTrainedModel, blocks: Dataset, metric: str, size: int = 1, batch_size: int = 4) -> Tensor:
    """Measure what removing each contiguous block of layers costs.

    Under `accelerate launch` every process calls it with all blocks, reads its share of them, and gets the same costs.

    Args:
        model (`PreTrainedModel`): A causal language model of a known family, in memory.
        blocks (`Dataset`): `input_ids` of shape `(seq,)` per row, and `attention_mask` where blocks are padded.
        metric (`str`): `block_importance`: one minus the cosine of the block's input and output (2407.14679, section 2.2).
            `loss`, `perplexity`: how much the mean next-token loss of the model, or its exponential, rises. `logit_mse`: the
            squared change of the logits over the squared logits (2511.16664).
        size (`int`, *optional*, defaults to 1): Layers per block.
        batch_size (`int`, *optional*, defaults to 4): Blocks of text per forward pass. The states between all layers of one
            batch are held in memory, twice unless the metric is `block_importance`.

    Returns:
        `Tensor` of shape `(layers - size + 1,)`: float32, the cost of the block that starts at each layer.

    Raises:
        ValueError: for an unknown metric, a size that leaves no layer, or costs
            that are NaN or infinite.

    Example:

    ```python
    >>> costs = removal_costs(teacher, blocks, "loss", size=2)
    >>> layer_scores(costs, size=2).shape == (teacher.config.num_hidden_layers,)
    True
    ```
    """
    layers = len(layer_names(model))
    check_removal(layers, metric, size)
    return _measure(model, blocks, metric, batch_size, _contiguous(layers, size))


def greedy_removal(
    model: PreTrainedModel, blocks: Dataset, metric: str, count: int, batch_size: int = 4
) -> tuple[list[int], Tensor]:
    """Remove the layer that costs least, measure again without it, and so on, `count` times; the model stays unchanged.

    Returns:
        `tuple[list[int], Tensor]`: The layers in the order of their removal, and every layer's cost of shape `(layers,)` in the
            last round that it took part in, as `removal_costs` measures it.
    """
    layers, removed = len(layer_names(model)), []
    check_removal(layers, metric, count=count)
    costs = torch.zeros(layers)
    while len(removed) < count:
        left = [layer for layer in range(layers) if layer not in removed]
        with without_layers(model, removed):
            costs[left] = _measure(model, blocks, metric, batch_size, [Removal(range(layer, layer + 1)) for layer in left])
        removed.append(min(left, key=lambda layer: float(costs[layer])))
    return removed, costs


def task_costs(model: PreTrainedModel, size: int, measure: Callable[[PreTrainedModel], float]) -> Tensor:
    """Measure what removing each contiguous block of layers costs on a task (2408.11796: Winogrande).

    Returns:
        `Tensor` of shape `(layers - size + 1,)`: float32, how far the model's score, from `measure`, falls without the block
            that starts at each layer.
    """
    layers = len(layer_names(model))
    check_removal(layers, size=size)
    whole, costs, removals = measure(model), [], _contiguous(layers, size)
    for block in tqdm(removals, desc="Removing layers (task)"):
        with without_layers(model, block.block):
            costs.append(whole - measure(model))
    return _finite(torch.tensor(costs), "task", removals, model)


def layer_scores(costs: Tensor, size: int = 1) -> Tensor:
    """Turn the costs of blocks into scores of layers, so that the `size` lowest are those of the cheapest block.

    Returns:
        `Tensor` of shape `(layers,)`: The least cost of a block that holds the layer. Of blocks that cost the same the first is
            the cheapest: its layers score a little lower.
    """
    absent = costs.new_full((size - 1,), torch.inf)
    scores = torch.cat([absent, costs, absent]).unfold(0, size, 1).amin(1)
    cheapest = int(costs.argmin())
    scores[cheapest : cheapest + size] = torch.nextafter(costs[cheapest], costs.new_tensor(-torch.inf))
    return scores


def removal_scores(removed: Sequence[int], costs: Tensor) -> Tensor:
    """Turn what `greedy_removal` returns into scores of shape `(layers,)`: removed layers below all others, in order."""
    scores = costs.clone()
    left = [layer for layer in range(len(costs)) if layer not in removed]
    lowest = costs[left].min()
    steps = torch.arange(len(removed), 0, -1, dtype=costs.dtype)
    scores[list(removed)] = lowest - steps * lowest.abs().clamp(min=1)  # a float32 step that does not vanish
    return scores


def check_removal(layers: int, metric: str | None = None, size: int = 1, count: int = 1) -> None:
    """Refuse an unknown metric, and a block or a count that leaves a model of so many layers without any."""
    if metric is not None and metric not in METRICS:
        raise ValueError(f"{metric!r} is no metric of layers; there are {', '.join(METRICS)}")
    for number, what in ((size, "a block of"), (count, "the removal of")):
        if not 0 < number < layers:
            raise ValueError(f"{what} {number} layers, of {layers}: 1 to {layers - 1} can be removed")


def sublayer_costs(model: PreTrainedModel, blocks: Dataset, metric: str = "loss", batch_size: int = 4) -> dict[str, Tensor]:
    """Measure what removing the attention, and what removing the MLP, of each layer costs, as `removal_costs` does.

    Returns:
        `dict[str, Tensor]`: `heads` and `ffn`, each of shape `(layers,)`; 0 for a layer without that sublayer.
    """
    architecture = Architecture.of(model.config)
    places = [(axis, layer, name) for axis in ("heads", "ffn") for layer, name in architecture.taps(axis)]
    removals = [Removal(range(layer, layer), (name,)) for _, layer, name in places]
    costs = {axis: torch.zeros(len(layer_names(model))) for axis in ("heads", "ffn")}
    for (axis, layer, _), cost in zip(places, _measure(model, blocks, metric, batch_size, removals), strict=True):
        costs[axis][layer] = cost
    return costs


def _contiguous(layers: int, size: int) -> list[Removal]:
    return [Removal(range(start, start + size)) for start in range(layers - size + 1)]


def _measure(model: PreTrainedModel, blocks: Dataset, metric: str, batch_size: int, removals: Sequence[Removal]) -> Tensor:
    """Return the cost of every removal from the model as it is, float32."""
    sums_of, finish = METRICS[metric]
    device, batches = input_device(model), own_batches(blocks, batch_size)
    totals = torch.zeros(len(removals) + 2, dtype=torch.float64)
    with torch.inference_mode(), tqdm(total=len(batches) * len(removals), desc=f"Removing layers ({metric})") as bar:
        for batch in batches:
            sums = sums_of(WholePass.of(model, batch, device), removals, bar)
            totals += torch.tensor([float(number) for number in sums], dtype=torch.float64)
    if PartialState().num_processes > 1:
        totals = reduce(totals.to(device), "sum").cpu()
    *without, whole, tokens = totals
    return _finite(finish(torch.stack(without), whole, tokens).float(), metric, removals, model)


def _state_sums(run: WholePass, removals: Sequence[Removal], bar: tqdm) -> list:
    """Return each block's change of its states, 0, and the number of tokens."""
    sums = []
    for block, _ in removals:
        metric = BlockImportance()
        after = run.states[block.stop]
        metric.update((run.states[block.start].to(after.device), after), run.text_mask.to(after.device))
        sums.append(metric.totals[0])
        bar.update()
    return [*sums, 0, run.text_mask.sum()]


def _logit_sums(each_of: Callable, reference: Callable, run: WholePass, removals: Sequence[Removal], bar: tqdm) -> list:
    """Return a sum over the text of the logits without each block, the same of the reference, and the number of targets."""
    head = replace(head_of(run.model), module=run.model.get_output_embeddings())
    following = torch.nn.functional.pad(run.labels[:, 1:], (0, 1), value=-100)
    following = following.masked_fill(~torch.nn.functional.pad(run.text_mask[:, 1:], (0, 1)), -100)
    targets = following[run.text_mask].to(run.last.device)
    states = []
    for removal in removals:
        states.append(run.without(removal))
        bar.update()
    sums = [0] * (len(removals) + 1)
    for rows, whole in head_chunks(head.logits, run.last, CHUNK):
        each = (head.logits(state[rows]) for state in states)  # one after the other
        for i, logits in enumerate(itertools.chain(each, [reference(whole)])):
            sums[i] = sums[i] + each_of(logits, whole, targets[rows].to(logits.device)).sum(dtype=torch.float64)
    return [*sums, (targets != -100).sum()]


def _finite(costs: Tensor, metric: str, removals: Sequence[Removal], model: PreTrainedModel) -> Tensor:
    """Refuse costs that are no numbers, naming the first block."""
    for cost, (block, zeroed) in zip(costs, removals, strict=True):
        if not cost.isfinite():
            what = f"a sublayer of layer {block.start}" if zeroed else f"the layers {list(block)}"
            raise ValueError(
                f"{metric} without {what} is {float(cost)}: weights hold NaN or infinity, the text has no "
                f"token to predict, or {model.dtype} is too narrow for this model, which float32 is not"
            )
    return costs


# metric: what is summed over a batch for every block, the whole model and its tokens; the costs made of these sums
_LOSSES = partial(_logit_sums, lambda logits, _, targets: cross_entropy(logits, targets, reduction="none"), lambda whole: whole)
_ERRORS = partial(_logit_sums, lambda logits, whole, _: (logits - whole).square(), torch.zeros_like)
METRICS: dict[str, tuple[Callable, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "block_importance": (_state_sums, lambda without, whole, tokens: without / tokens),
    "loss": (_LOSSES, lambda without, whole, tokens: (without - whole) / tokens),
    "perplexity": (_LOSSES, lambda without, whole, tokens: (without / tokens).exp() - (whole / tokens).exp()),
    # beside logits of zeros, whose squared error is the square of the whole model's logits
    "logit_mse": (_ERRORS, lambda without, whole, tokens: without / whole),
}
