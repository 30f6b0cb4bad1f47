"""A batch: how rows become one, which tokens are learnt, and which tokens each may attend to."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import Trainer

from hf_minitron.data.vocabulary import check_row_ids

# What a row may hold, and what its padding is: one entry per token.
COLUMNS = {"input_ids": 0, "labels": -100, "attention_mask": 0, "position_ids": 0}
# Columns of a batch: the targets, which the Trainer counts under this name, where they are, and the prefix of a cached
# teacher's columns.
TARGETS, POSITIONS, TEACHER = "shift_labels", "target_positions", "teacher_"


def collate(rows: Sequence[Mapping], ignored: Sequence[str] = (), vocab_size: int | None = None) -> dict[str, Tensor]:
    """Batch rows of `input_ids` (and `labels`, `attention_mask`, `position_ids`); pad shorter ones at the end.

    Padding is told by length and by the rows' own masks, never by a token id: many models use their end token for both. Nothing
    is learnt there. With `position_ids` attention is document-masked: positions start at 0 in each document, whose first
    token is not predicted from the document before. There is no attention mask then, for Transformers finds documents in its
    absence only; a padding token is a document.

    Args:
        rows (`Sequence[Mapping]`): Rows of a dataset.
        ignored (`Sequence[str]`, *optional*): Columns of other use, such as the length that rows are grouped by.
        vocab_size (`int`, *optional*): Ids that the model has.

    Raises:
        ValueError: for another column, one that has not an entry for every token, or an id that the model does not have.
    """
    parts = {name: [torch.as_tensor(row[name]) for row in rows if name in row] for name in COLUMNS}
    for row in rows:
        _check_row(row, rows[0], ignored)
    ids = parts["input_ids"]
    for row in (*ids, *(row.clamp(0) for row in parts["labels"])) if vocab_size else ():
        check_row_ids(row, vocab_size)
    parts["labels"] = parts["labels"] or ids
    if parts["position_ids"]:
        if not all(mask.all() for mask in parts["attention_mask"]):
            raise ValueError("attention_mask: with position_ids attention is document-masked, which a mask undoes: leave "
                             "padding out of the rows")  # fmt: skip
        del parts["attention_mask"]
    elif len({len(row) for row in ids}) > 1 or not all(mask.all() for mask in parts["attention_mask"]):
        parts["attention_mask"] = parts["attention_mask"] or [torch.ones_like(row) for row in ids]
    else:
        del parts["attention_mask"]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    batch = {name: pad(values, padding_value=COLUMNS[name]) for name, values in parts.items() if values}
    return batch | {"labels": supervised(batch)}


def _check_row(row: Mapping, first: Mapping, ignored: Sequence[str]) -> None:
    """Refuse a row that differs from the first one in kind, or whose columns cannot be batched."""
    if unknown := [name for name in row if name not in (*COLUMNS, *ignored)]:
        raise ValueError(f"the rows' column {unknown[0]!r} is none of {', '.join(COLUMNS)}: remove it, rename it, or give a "
                         "data_collator that knows it")  # fmt: skip
    if "input_ids" not in row or row.keys() != first.keys():
        raise ValueError(
            f"a row has the columns {sorted(row)}, another {sorted(first)}: all need input_ids, and the same others"
        )
    for name in COLUMNS.keys() & row.keys():
        if len(row[name]) != len(row["input_ids"]):
            raise ValueError(f"{name}: a row has {len(row[name])} of them for {len(row['input_ids'])} input_ids")


def supervised(batch: Mapping[str, Tensor]) -> Tensor:
    """Return a batch's labels, -100 at those that are not learnt: padding, after padding, and a document's first token.

    Args:
        batch (`Mapping[str, Tensor]`): `labels` of shape `(batch, seq)`, and perhaps `attention_mask` and `position_ids`.
    """
    labels, mask = batch["labels"], batch.get("attention_mask")
    if mask is not None:
        if mask.shape != labels.shape:
            raise ValueError(f"attention_mask: its shape is {tuple(mask.shape)}, not (batch, seq) as that of labels, "
                             f"{tuple(labels.shape)}: where padding is cannot be told")  # fmt: skip
        real = mask.bool()
        labels = labels.masked_fill(~real | ~torch.nn.functional.pad(real[:, :-1], (1, 0), value=True), -100)
    if batch.get("position_ids") is not None:
        labels = labels.masked_fill(batch["position_ids"] == 0, -100)
    return labels


def with_targets(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch with `shift_labels`, its targets: what each position learns to predict, -100 for nothing.

    Args:
        inputs (`Mapping[str, Tensor]`): `input_ids` and `labels`, or `shift_labels`; and perhaps a mask and positions.
    """
    labels, targets = inputs.get("labels"), inputs.get(TARGETS)
    if "input_ids" not in inputs or (labels is None and targets is None):
        raise ValueError(
            f"data_collator: it makes {', '.join(inputs)}; a batch needs input_ids and labels that are not shifted"
        )
    if targets is not None:
        labels = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=-100)
    return {**inputs, TARGETS: torch.nn.functional.pad(supervised({**inputs, "labels": labels})[:, 1:], (0, 1), value=-100)}


def positions_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return where a batch has targets, shape `(tokens,)`, in the flattened batch: its column, or looked up.

    Looking waits for an accelerator, so it is done once for a batch.
    """
    if POSITIONS in inputs:
        return inputs[POSITIONS]
    return (with_targets(inputs)[TARGETS].flatten() != -100).nonzero().squeeze(1)


def at_positions(values: Tensor, positions: Tensor) -> Tensor:
    """Select positions of the flattened batch: `(tokens, ...)` of `values`, `(batch, seq, ...)`."""
    return values.flatten(0, 1).index_select(0, positions)


def model_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a model is called with: all of a batch but what is learnt from it."""
    learnt = ("labels", TARGETS, POSITIONS, "skip_logits")
    return {name: value for name, value in inputs.items() if name not in learnt and not name.startswith(TEACHER)}


def attention_of(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens each may attend to beside the causal mask, shape `(batch, seq, seq)`: its document's, no padding."""
    seen = None
    if "position_ids" in inputs:
        document = (inputs["position_ids"] == 0).cumsum(-1)
        seen = document[:, :, None] == document[:, None]
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"][:, None].bool().expand(-1, inputs["attention_mask"].shape[1], -1)
        seen = mask if seen is None else seen & mask
    return seen


def rows_read(trainer: Trainer) -> int:
    """Count the rows of all steps of all processes: as many as were found to fit, and fewer at the end of an epoch."""
    args, state = trainer.args, trainer.state
    batch = (state.train_batch_size or args.train_batch_size) * args.world_size
    if isinstance(trainer.train_dataset, IterableDataset):
        return state.global_step * batch * args.gradient_accumulation_steps
    rows = len(trainer.train_dataset)
    rows -= rows % batch if args.dataloader_drop_last else 0
    epochs, steps = divmod(state.global_step, math.ceil(math.ceil(rows / batch) / args.gradient_accumulation_steps))
    return epochs * rows + steps * batch * args.gradient_accumulation_steps
