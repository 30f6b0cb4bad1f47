"""Whether an exported file computes what the model does: loaded by its runtime, compared with Transformers token by token."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.distillation.signals import log_probabilities
from hf_minitron.evaluation.scored import check_scored, of_answers
from hf_minitron.evaluation.text_metrics import TEXT_METRICS, Predictions

MESSAGES = ({"role": "user", "content": "What is a library?"},)
METRICS = {metric.name: metric for metric in TEXT_METRICS if metric.name in ("perplexity", "teacher_kl", "top1_match")}
# KL in nats per token from which a file is not the model: converted wrongly, or quantized beyond use.
LIMITS = {"F16": 0.01, "Q8_0": 0.05, "MLX 8-bit": 0.2}
LIMIT = 1.0


class Runtime(Protocol):
    """What runs an exported model."""

    version: str
    most_tokens: int | None  # to compare, where it is slow here; all when left out

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits after every token, shape `(tokens, vocab)`."""

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that begin and end it."""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a chat in its template, up to where the answer begins."""

    def close(self) -> None:
        """Free its memory."""


@torch.inference_mode()
def compare_exports(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[Sequence[int]],
    files: Mapping[str, Callable[[], Runtime]],
    labels: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Measure exported files on some text, and compare each with the model that they were made of.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        blocks (`Sequence[Sequence[int]]`): Token ids of held-out text.
        files (`Mapping[str, Callable]`): Type of each file (`F16`, ...), and what loads it.
        labels (`Sequence[Sequence[int]]`, *optional*): The blocks with -100 for tokens that are not scored; all are when left
            out.

    Returns:
        `dict`: `perplexity` of the model, the `tokens` that were scored, whether these are `answers` of chats alone, and
            `files`: by type, `runtime`, `perplexity`, `teacher_kl` (nats per token from the model) `top1_match` (share of
            tokens) and `tokens`.

    Raises:
        ValueError: when no token is scored, a runtime makes other tokens of the text or of a chat, or predicts something else.
    """
    labels = labels or blocks
    check_scored(blocks, labels)
    own, found = [], {kind: [] for kind in files}
    runtimes = {kind: load() for kind, load in files.items()}
    try:
        for kind, runtime in runtimes.items():
            _check_tokens(kind, runtime, tokenizer, blocks[0])
        fast = {kind: runtime for kind, runtime in runtimes.items() if runtime.most_tokens is None}
        for ids, wanted in zip(blocks, labels, strict=True):
            rows, others = _read(model, ids, wanted, fast)
            own.append(rows)
            for kind, values in others.items():
                found[kind].append(values)
        for kind in runtimes.keys() - fast.keys():
            part = _part(blocks, labels, runtimes[kind].most_tokens)
            found[kind].append(_read(model, *part, {kind: runtimes[kind]})[1][kind])
    finally:
        for runtime in runtimes.values():
            runtime.close()
    measured = {kind: {"runtime": runtimes[kind].version, **_summary(rows)} for kind, rows in found.items()}
    for kind, facts in measured.items():
        limit = LIMITS.get(kind, LIMIT)
        if not facts["teacher_kl"] <= limit:
            raise ValueError(f"{kind}: what {facts['runtime']} predicts is {facts['teacher_kl']:.3g} nats per token from what "
                             f"Transformers does, more than {limit}: leave this type out")  # fmt: skip
    summary, answers = _summary(own), of_answers(blocks, labels, tokenizer)
    return {"perplexity": summary["perplexity"], "tokens": summary["tokens"], "answers": answers, "files": measured}


def export_rows(facts: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of a table of what `export_model` returns: a header, the model itself, every file."""
    rows = [["file", "MB", "perplexity", "KL (nats per token)", "same best token", "loaded in"]]
    rows.append(["the model itself", "", f"{facts['perplexity']:.3f}", "", "", "Transformers, float32"])
    for file in facts["files"]:
        cells, loaded = ["", "", ""], file.get("runtime", "not loaded yet")
        if "runtime" in file:
            whole = file["tokens"] == facts["tokens"]  # of fewer, a perplexity has nothing to be compared with
            loaded += "" if whole else f", {file['tokens']} tokens"
            cells = [f"{file['perplexity']:.3f}" * whole, f"{file['teacher_kl']:.2g}", f"{file['top1_match']:.1%}"]
        rows.append([file["file"], f"{file['bytes'] / 1e6:,.1f}", *cells, loaded])
    return rows


def _read(
    model: PreTrainedModel, ids: Sequence[int], labels: Sequence[int], runtimes: Mapping[str, Runtime]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the numbers of the scored tokens of a block, the model's and those of runtimes that read it, too."""
    targets = torch.tensor(labels[1:], device=model.device)
    scored = targets != -100
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1][scored].float()
    targets, reference = targets[scored], log_probabilities(logits)
    found = {}
    for kind, runtime in runtimes.items():
        made = torch.from_numpy(runtime.logits(ids)[:-1, : logits.shape[-1]]).to(logits)
        found[kind] = _values(made[scored], targets, reference)
    return _values(logits, targets, reference), found


def _part(blocks: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], most: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return so many tokens of the first block in which some are scored, half of them before the first of these; and labels."""
    places = ([place for place, label in enumerate(row) if place and label != -100] for row in labels)
    number, first = next((number, found[0]) for number, found in enumerate(places) if found)
    part = slice(max(0, first - most // 2), max(0, first - most // 2) + most)
    return blocks[number][part], labels[number][part]


def _values(logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """Return the numbers of every metric, shape `(metrics, tokens)`."""
    predictions = Predictions(logits, targets, log_probabilities(logits), reference)
    return torch.stack([metric.values(predictions).double().cpu() for metric in METRICS.values()]).numpy()


def _summary(rows: Sequence[np.ndarray]) -> dict[str, float]:
    values = np.concatenate(rows, 1)
    means = dict(zip(METRICS, values.mean(1).tolist(), strict=True))
    perplexity = float(np.exp(-means["perplexity"]))  # of which it is the log-likelihood
    return means | {"perplexity": perplexity, "tokens": values.shape[1]}


def _check_tokens(kind: str, runtime: Runtime, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Refuse a file whose tokenizer or chat template gives other tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    pairs = {"the text": (tokenizer(text, verbose=False)["input_ids"], runtime.tokenize(text))}
    if isinstance(tokenizer.chat_template, str):
        own = tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True, return_dict=False)
        pairs["a chat"] = (own, runtime.chat(MESSAGES))
    for what, (wanted, made) in pairs.items():
        if wanted != made:
            at = next((i for i, (a, b) in enumerate(zip(wanted, made, strict=False)) if a != b), min(len(wanted), len(made)))
            raise ValueError(f"{kind}: {runtime.version} makes other tokens of {what} than Transformers from token {at + 1} "
                             f"({made[at : at + 4]}, not {wanted[at : at + 4]}): this tokenizer is not exported")  # fmt: skip
