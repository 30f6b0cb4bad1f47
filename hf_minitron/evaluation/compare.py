"""Quality of several models on the same text and tasks, gathered in a `Report`.

It must not know how a model was made. One model is in memory at a time.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.checkpoint import Checkpoint, best_device, best_dtype, load_model, resolve
from hf_minitron.data import text_hash
from hf_minitron.distillation.losses.chunked import head_of, next_token_rows
from hf_minitron.families.family import family_of
from hf_minitron.modeling.configuration_pruned import PrunedConfig


@dataclass(frozen=True)
class Report:
    """What was measured: the only source of numbers for tables, cards and README.

    Args:
        models (`Mapping`): Name to its facts: `path`, `parameters`, `bytes`, `shape`, `perplexity` and `tasks` (each a value
            with its standard error).
        text (`Mapping`): The held-out text: source, hash, tokens.
        speed (`Mapping`): Name to tokens per second, measured in one run.
    """

    models: Mapping[str, dict]
    text: Mapping[str, object]
    speed: Mapping[str, dict] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read what `save` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def compare(
    models: Mapping[str, str | Path],
    blocks: Dataset,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Report:
    """Measure models by perplexity on held-out text and by lm-eval tasks.

    Args:
        models (`Mapping[str, str | Path]`): Name to folder or Hub id, teacher first.
        blocks (`Dataset`): Held-out text from `token_blocks`.
        tasks (`Sequence[str]`, *optional*): Names of lm-eval tasks.
        include_path (`str` or `Path`, *optional*): A folder with task files of your own.
        limit (`int`, *optional*): Documents per task; all when left out.
        batch_size (`int`, *optional*, defaults to 8): Sequences per forward pass.

    Returns:
        `Report`: Without speed.

    Example:

    ```python
    >>> report = compare({"teacher": "teacher", "student": "student"}, blocks, tasks=["lambada_openai"])
    >>> report.save("report.json")
    ```
    """
    device = best_device()
    results = {}
    for name, source in models.items():
        folder = resolve(source)
        model = load_model(folder, best_dtype(device), device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        results[name] = {
            "path": str(source),
            "parameters": model.num_parameters(),
            "bytes": sum(spec.num_bytes for spec in Checkpoint(folder).specs.values()),
            "shape": shape_of(model.config),
            "perplexity": perplexity(model, blocks, batch_size, f"Perplexity of {name}"),
            "tasks": lm_eval_tasks(model, tokenizer, tasks, include_path, limit, batch_size) if tasks else {},
        }
        del model
    text = {"sha256": text_hash(blocks), "tokens": len(blocks) * len(blocks[0]["input_ids"]), "blocks": len(blocks)}
    return Report(results, text)


def shape_of(config: PreTrainedConfig) -> dict[str, int | list[int]]:
    """Return the size of every axis; of a nonuniform model, lists for what differs from layer to layer."""
    if isinstance(config, PrunedConfig):
        return {"layers": config.num_hidden_layers, "hidden": config.hidden_size, **config.layer_sizes}
    return family_of(config).shape_of(config).axes


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    blocks: Dataset,
    batch_size: int = 8,
    description: str = "Perplexity",
    chunk_size: int = 256,
) -> dict[str, float]:
    """Return the perplexity of a model on token blocks, with its standard error.

    The error is that of the mean loss over blocks, carried through the exponential: tokens of one block are not independent.

    Args:
        model (`PreTrainedModel`): A causal language model.
        blocks (`Dataset`): `input_ids` of equal length.
        batch_size (`int`, *optional*, defaults to 8): Blocks per forward pass.
        description (`str`, *optional*): Label of the progress bar.
        chunk_size (`int`, *optional*, defaults to 256): Tokens whose logits exist at the same time.

    Returns:
        `dict[str, float]`: `value`, `stderr`, and the predicted `tokens`.
    """
    head, losses = head_of(model), []
    for batch in tqdm(blocks.with_format("torch").iter(batch_size), desc=description, total=-(-len(blocks) // batch_size)):
        ids = batch["input_ids"].to(model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        rows, targets = next_token_rows(hidden, ids)
        chunks = zip(rows.split(chunk_size), targets.split(chunk_size), strict=True)
        nll = [torch.nn.functional.cross_entropy(head.logits(h), t, reduction="none") for h, t in chunks]
        losses += torch.cat(nll).view(len(ids), -1).double().mean(1).tolist()
    mean = torch.tensor(losses, dtype=torch.float64)
    stderr = (mean.std() / math.sqrt(len(mean))).item() if len(mean) > 1 else float("nan")
    value = math.exp(mean.mean())
    return {"value": value, "stderr": value * stderr, "tokens": len(losses) * (len(blocks[0]["input_ids"]) - 1)}


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict]:
    """Run lm-eval on a model in memory.

    Returns:
        `dict[str, dict]`: Task to metric to `value`, `stderr` and `samples`.
    """
    from lm_eval import simple_evaluate  # seconds to import; only evaluation needs it
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model in memory, which is what we want
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=task_manager(include_path),
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
    )
    return {task: _metrics(metrics, results["n-samples"][task]["effective"]) for task, metrics in results["results"].items()}


@cache
def task_manager(include_path: str | Path | None):
    """Return lm-eval's task manager, which also knows the task files in `include_path`; it takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include_path is None else str(Path(include_path).expanduser()))


def _metrics(metrics: dict, samples: int) -> dict[str, dict]:
    """Read lm-eval's `metric,filter` keys; of several filters of a metric the first counts."""
    found = {}
    for key, value in metrics.items():
        name, comma, filtered = key.partition(",")
        if not comma or "_stderr" in key or name in found:
            continue
        stderr = metrics.get(f"{name}_stderr,{filtered}")
        found[name] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else float("nan"),
            "samples": samples,
        }
    return found
