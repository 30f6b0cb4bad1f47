"""Held-out text: perplexity, bits per byte, agreement with the teacher, and metrics of one's own, block by block.

Logits exist for a chunk of tokens at a time; the teacher is there as its last hidden
states and its head, so that one model is in memory at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.data.packing import adds_bos_token
from hf_minitron.distillation.signals import DenseSignal
from hf_minitron.evaluation.report import TEXT, Entry
from hf_minitron.evaluation.scored import check_scored, of_answers, plain_blocks
from hf_minitron.evaluation.text_metrics import TEXT_METRICS, Predictions, TextMetric
from hf_minitron.head import Head, head_chunks, head_of, next_token_rows
from hf_minitron.probe import base_model


def text_bytes(
    blocks: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, labels: Sequence[Sequence[int]] | None = None
) -> list[int]:
    """Count the bytes of what is predicted in each block: its text in UTF-8, less that of its first token.

    Special tokens, such as the one between documents, are predicted but count no bytes.

    Args:
        blocks (`Sequence[Sequence[int]]`): Token ids.
        tokenizer (`PreTrainedTokenizerBase`): Theirs.
        labels (`Sequence[Sequence[int]]`, *optional*): The blocks with -100 for tokens that are not predicted.
    """
    if labels is not None and of_answers(blocks, labels, tokenizer):
        wanted = [[token for token in row[1:] if token != -100] for row in labels]
        return [len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
                for ids in wanted]  # fmt: skip
    # a piece of a character alone decodes to a replacement of up to three bytes, so a block's count can be off by as many
    whole, first = ([tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                     for ids in blocks] for end in (None, 1))  # fmt: skip
    return [len(text.encode()) - len(start.encode()) for text, start in zip(whole, first, strict=True)]


def in_tokens_of(
    other: PreTrainedTokenizerBase, blocks: Dataset, tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the blocks in another tokenizer's tokens, documents separated by its own end token, and their labels.

    Args:
        other (`PreTrainedTokenizerBase`): The other one.
        blocks (`Dataset`): From `token_blocks`.
        tokenizer (`PreTrainedTokenizerBase`): The one that made them.
        add_bos_token (`bool`, *optional*): Whether blocks and documents begin with the other's BOS token; as it does by itself
            when left out.
    """
    if of_answers(*plain_blocks(blocks), tokenizer):
        raise ValueError("the text is of chats, whose answers are not found in the tokens of another tokenizer: compare this "
                         "model on plain text")  # fmt: skip
    rows, labels = [], []
    opening = [other.bos_token_id] if adds_bos_token(other, add_bos_token) else []
    for ids, targets in zip(*plain_blocks(blocks), strict=True):
        ids = [token for token, target in zip(ids, targets, strict=True) if target != -100]  # without BOS tokens
        pieces, start = [], 0
        for place in [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]:
            pieces.append((ids[start:place], True))
            start = place + 1
        pieces.append((ids[start:], False))
        tokens: list[int] = []
        wanted: list[int] = []
        for piece, ended in pieces:
            text = tokenizer.decode(piece, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            own = other(text, add_special_tokens=False, verbose=False)["input_ids"] + [other.eos_token_id] * ended
            begun = opening if own or not tokens else []
            tokens += begun + own
            wanted += [-100] * len(begun) + own
        rows.append(tokens)
        labels.append(wanted)
    return rows, labels


def in_kept_tokens(
    student: PreTrainedTokenizerBase, blocks: Dataset, teacher: PreTrainedTokenizerBase, kept: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the blocks in the tokens of a student that has some of the teacher's, and their labels.

    Args:
        student (`PreTrainedTokenizerBase`): The student's tokenizer.
        blocks (`Dataset`): From `token_blocks`.
        teacher (`PreTrainedTokenizerBase`): The one that made them.
        kept (`Sequence[int]`): The teacher's ids of the student's tokens.
    """
    special = {index: kept.index(index) for index in teacher.all_special_ids if index in kept}
    rows, labels = [], []
    for pair in zip(*plain_blocks(blocks), strict=True):
        tokens: list[int] = []
        wanted: list[int] = []
        for (sign, hidden), part in groupby(zip(*pair, strict=True), lambda two: (special.get(two[0]), two[1] == -100)):
            ids = [token for token, _ in part]
            if sign is None:
                text = teacher.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                own = student(text, add_special_tokens=False, verbose=False)["input_ids"]
            else:
                own = [sign] * len(ids)
            tokens += own
            wanted += [-100] * len(own) if hidden else own
        rows.append(tokens)
        labels.append(wanted)
    return rows, labels


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's reading of the text: what a student's distribution is compared with.

    Args:
        hidden (`Tensor` of shape `(tokens, hidden)`): Its last hidden states at all positions that predict, on the CPU.
        head (`Head`): Its output head.
    """

    hidden: Tensor
    head: Head

    def on(self, device: torch.device) -> "TeacherStates":
        """Return it with the head on a device."""
        return TeacherStates(self.hidden, self.head.to(device))


def read_text(
    model: PreTrainedModel,
    blocks: Sequence[Sequence[int]],
    batch_size: int | str = 8,
    teacher: TeacherStates | None = None,
    keep: bool = False,
    description: str = "Held-out text",
    chunk_size: int = 256,
    labels: Sequence[Sequence[int]] | None = None,
    metrics: Sequence[TextMetric] = TEXT_METRICS,
) -> tuple[dict[str, np.ndarray], TeacherStates | None]:
    """Run a model over token blocks.

    Args:
        model (`PreTrainedModel`): A causal language model.
        blocks (`Sequence[Sequence[int]]`): Token ids, at least two in each block.
        batch_size (`int` or `str`, *optional*, defaults to 8): Blocks per forward pass; `"auto"` for what fits, at most 64.
        teacher (`TeacherStates`, *optional*): The teacher's reading of the same blocks.
        keep (`bool`, *optional*, defaults to `False`): Whether to return this model's reading, for others to be compared with.
        description (`str`, *optional*): Label of the progress bar.
        chunk_size (`int`, *optional*, defaults to 256): Tokens whose logits exist at the same time.
        labels (`Sequence[Sequence[int]]`, *optional*): The blocks with -100 for tokens that are not predicted (BOS tokens).
        metrics (`Sequence[TextMetric]`, *optional*): What to measure; those that need a teacher only with one.

    Returns:
        `tuple`: Per-block sums by metric, each of shape `(blocks,)`. And the reading, or `None`.

    Raises:
        ValueError: when `labels` leave nothing to predict.
    """
    metrics = [metric for metric in metrics if teacher is not None or not metric.teacher]
    check_scored(blocks, labels or blocks)

    @torch.inference_mode()
    def read(size: int) -> tuple[dict[str, np.ndarray], TeacherStates | None]:
        head, sums, kept, start = _whole_head(model), [], [], 0
        signal = teacher and teacher.on(model.device)
        for ids, wanted in tqdm(_batches(blocks, labels or blocks, size), desc=description, total=-(-len(blocks) // size)):
            hidden = base_model(model)(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
            rows, targets = next_token_rows(hidden, wanted.to(model.device))
            states = None
            if signal is not None:
                states = DenseSignal(signal.hidden[start : start + len(rows)].to(rows.device), signal.head)
            values = _token_values(head, rows, targets, states, chunk_size, metrics)
            lengths = (wanted[:, 1:] != -100).sum(1).tolist()
            sums += [[part.sum().item() for part in parts] for parts in zip(*(f.split(lengths) for f in values), strict=True)]
            start += len(rows)
            if keep:
                kept.append(rows.cpu())
        columns = np.array(sums, dtype=float).reshape(len(blocks), len(metrics))
        reading = TeacherStates(torch.cat(kept), head) if kept else None
        return {metric.name: columns[:, i] for i, metric in enumerate(metrics)}, reading

    if batch_size != "auto":
        return read(batch_size)
    return find_executable_batch_size(read, starting_batch_size=64)() if model.device.type != "cpu" else read(8)


def text_records(
    sums: dict[str, np.ndarray],
    blocks: Sequence[Sequence[int]],
    num_bytes: Sequence[int],
    first: int = 0,
    metrics: Sequence[TextMetric] = TEXT_METRICS,
) -> list[dict]:
    """Return the records of blocks (or of their labels), numbered from `first`: see `save_samples`."""
    weights = {"token": [sum(label != -100 for label in ids[1:]) for ids in blocks], "byte": num_bytes}
    return [
        {"task": TEXT, "doc": first + i, "metric": metric.name, "value": float(value), "weight": float(weight)}
        for metric in metrics
        if metric.name in sums
        for i, (value, weight) in enumerate(zip(sums[metric.name], weights[metric.per], strict=True))
    ]


def text_entries(
    model: str, records: Sequence[dict], metrics: Sequence[TextMetric] = TEXT_METRICS, tokens_of: str | None = None
) -> list[Entry]:
    """Return a model's entries of the text, from the records of its blocks.

    Args:
        model (`str`): The model's name.
        records (`Sequence[dict]`): From `text_records`.
        metrics (`Sequence[TextMetric]`, *optional*): The metrics.
        tokens_of (`str`, *optional*): Where its tokens are not the teacher's, the first model that has them: what is counted
            per token then has a unit that models with other tokens do not have.
    """
    entries = []
    for metric in metrics:
        rows = np.array([[row["value"], row["weight"]] for row in records if row["metric"] == metric.name])
        if len(rows) and rows[:, 1].sum() > 0:
            unit = f"{metric.unit}, in tokens of {tokens_of}" if tokens_of and metric.per == "token" else metric.unit
            direction = metric.direction
            entries.append(Entry.of_samples(model, TEXT, metric.name, rows, metric.aggregation, direction=direction, unit=unit))
    return entries


def perplexity(model: PreTrainedModel, blocks: Dataset, batch_size: int = 8, chunk_size: int = 256) -> Entry:
    """Return the perplexity of a model on token blocks, with its standard error.

    The error is that of the mean loss over blocks, carried through the exponential: tokens of one block are not independent.

    Args:
        model (`PreTrainedModel`): A causal language model.
        blocks (`Dataset`): `input_ids`, and `labels` where not all are predicted.
        batch_size (`int`, *optional*, defaults to 8): Blocks per forward pass.
        chunk_size (`int`, *optional*, defaults to 256): Tokens whose logits exist at the same time.
    """
    ids, labels = plain_blocks(blocks)
    metrics = TEXT_METRICS[:1]
    sums, _ = read_text(model, ids, batch_size, description="Perplexity", chunk_size=chunk_size, labels=labels, metrics=metrics)
    return text_entries("model", text_records(sums, labels, [], metrics=metrics), metrics)[0]


def _token_values(
    head: Head, rows: Tensor, targets: Tensor, teacher: DenseSignal | None, chunk_size: int, metrics: Sequence[TextMetric]
) -> list[Tensor]:
    """Return the numbers of every metric, each of shape `(tokens,)` in float64."""
    found = []
    for part, logits in head_chunks(head.logits, rows, chunk_size):
        both = () if teacher is None else teacher.aligned_log_probs(logits, part, 1)
        predictions = Predictions(logits, targets[part], *both)
        found.append([metric.values(predictions).double().cpu() for metric in metrics])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _batches(
    blocks: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and labels; shorter blocks are filled up on the right, where no token before looks, and not predicted."""
    for start in range(0, len(blocks), batch_size):
        part = slice(start, start + batch_size)
        longest = max(map(len, blocks[part]))
        yield tuple(
            torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=torch.long)
            for rows, fill in ((blocks[part], 0), (labels[part], -100))
        )


def _whole_head(model: PreTrainedModel) -> Head:
    """Return a model's head, gathered where tensor parallelism has split it."""
    head = head_of(model)
    if not hasattr(head.weight, "full_tensor"):
        return head
    return replace(head, weight=head.weight.full_tensor(), bias=None if head.bias is None else head.bias.full_tensor())
