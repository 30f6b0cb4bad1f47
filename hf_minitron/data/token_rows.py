"""Rows that are tokens already, with masks beside them."""

from collections.abc import Mapping

import numpy as np

from hf_minitron.data.columns import MASKS


def read_tokens(row: Mapping, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a row, without padding, and which of them are predicted.

    Args:
        row (`Mapping`): `input_ids`, and masks beside them.
        most (`int`): The largest id.

    Raises:
        ValueError: for what are no ids, or masks that do not fit them.
    """
    ids = np.asarray(row["input_ids"])
    if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError("has input_ids that are no list of whole numbers. Leave it out")
    if len(ids) and not 0 <= ids.min() <= ids.max() <= most:
        raise ValueError(f"holds the id {ids.max() if ids.max() > most else ids.min():,}, which the tokenizer does not have")
    real, learnt = np.ones(len(ids), bool), np.ones(len(ids), bool)
    for name in MASKS:
        if (mask := row.get(name)) is None:
            continue
        mask = np.asarray(mask)
        if mask.shape != ids.shape:
            raise ValueError(f"has {len(mask)} {name} for {len(ids)} input_ids. Leave it out")
        if name == "attention_mask":
            real = mask.astype(bool)
        elif name == "labels":
            if not np.array_equal(mask[mask != -100], ids[mask != -100]):
                raise ValueError("has labels that are neither its input_ids nor -100: they must not be shifted")
            learnt &= mask != -100
        else:
            learnt &= mask.astype(bool)
    return ids[real], learnt[real]
