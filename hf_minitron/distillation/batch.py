"""A batch: how rows become one, and what each of its tokens may be compared by and look at."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor


def collate(rows: Sequence[dict]) -> dict[str, Tensor]:
    """Batch rows of `input_ids` (and `labels`); pad shorter ones at the end, where nothing is learnt.

    Padding is told by length, never by a token id: many models use their end token for both. With `position_ids` a row holds
    documents that do not see each other, each from position 0 on: its first token is not predicted from the document before.
    There is no attention mask then, for Transformers finds documents in its absence only; a padding token is a document.
    """
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    labels = [torch.as_tensor(row.get("labels", row["input_ids"])) for row in rows]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    batch = {"input_ids": pad(ids), "labels": pad(labels, padding_value=-100)}
    if "position_ids" in rows[0]:
        batch["position_ids"] = pad([torch.as_tensor(row["position_ids"]) for row in rows])
        batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, -100)
    elif len({len(row) for row in ids}) > 1:
        batch["attention_mask"] = pad([torch.ones_like(row) for row in ids])
    return batch


def predicts(labels: Tensor) -> Tensor:
    """Return which positions predict a labelled token, shape `(batch, seq)`."""
    return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))


def visible(inputs: dict[str, Tensor]) -> Tensor | None:
    """Return which tokens each may look at beside the causal mask, shape `(batch, seq, seq)`: its document's, no padding."""
    seen = None
    if "position_ids" in inputs:
        document = (inputs["position_ids"] == 0).cumsum(-1)
        seen = document[:, :, None] == document[:, None]
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"][:, None].bool().expand(-1, inputs["attention_mask"].shape[1], -1)
        seen = mask if seen is None else seen & mask
    return seen
