"""A model that is measured beside others: the held-out text in its tokens, and what was found of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import pruned_vocab, text_config
from hf_minitron.checkpoint.checkpoint import DTYPES, Checkpoint, best_device, best_dtype
from hf_minitron.checkpoint.model_files import resolve, revision_of
from hf_minitron.data.vocabulary import check_ids, difference, teacher_ids
from hf_minitron.evaluation.report import Report, load_samples, save_samples
from hf_minitron.evaluation.scored import plain_blocks
from hf_minitron.evaluation.text import (
    TeacherStates,
    in_kept_tokens,
    in_tokens_of,
    read_text,
    text_bytes,
    text_records,
)
from hf_minitron.evaluation.text_metrics import TextMetric, dropped_mass
from hf_minitron.modeling.configuration_pruned import PrunedConfig

CHECKPOINTS = "checkpoints"  # as a run's, which go when a stage is done


class Subject:
    """A model that is measured, in memory or opened when its turn comes, with the text in its tokens and what was found.

    Its `vocabulary` is `None` where its tokens are the teacher's, the teacher's ids of them where they are some of these, and
    its name where it has others.
    """

    def __init__(self, name: str, source: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None):
        self.name, self.report, self.records = name, None, []
        if isinstance(source, PreTrainedModel):
            if tokenizer is None:
                raise ValueError(f"processing_class: {name} is a model in memory, so give its tokenizer")
            self.folder, self.model, self.config, self.tokenizer = None, source, source.config, tokenizer
            self.path, dtype = source.name_or_path or "in memory", source.dtype
        else:
            self.folder, self.model, self.path, dtype = resolve(source), None, str(source), best_dtype(best_device())
            self.config, self.tokenizer = (kind.from_pretrained(self.folder) for kind in (AutoConfig, AutoTokenizer))
        self.dtype = str(dtype).removeprefix("torch.")

    def take_text(self, blocks: Dataset, teacher: "Subject", add_bos_token: bool | None) -> None:
        """Read the held-out text in this model's tokens."""
        size = min(text_config(config).vocab_size for config in (self.config, teacher.config))
        self.vocabulary = self._vocabulary(teacher) if difference(self.tokenizer, teacher.tokenizer, size) else None
        if self.vocabulary is None:
            check_ids(blocks, size, self.tokenizer)
            self.blocks, self.labels = plain_blocks(blocks)
        elif self.vocabulary == self.name:
            self.blocks, self.labels = in_tokens_of(self.tokenizer, blocks, teacher.tokenizer, add_bos_token)
        else:
            self.blocks, self.labels = in_kept_tokens(self.tokenizer, blocks, teacher.tokenizer, self.vocabulary)
        self._check_positions()
        self.num_bytes = text_bytes(self.blocks, self.tokenizer, self.labels)

    def _check_positions(self) -> None:
        """Refuse blocks that have more tokens in this model's than its table has positions.

        Raises:
            ValueError: naming both.
        """
        longest = max(map(len, self.blocks))
        positions = getattr(text_config(self.config), "max_position_embeddings", longest)
        if longest > positions and "positions" in Architecture.of(self.config).shape.sizes:
            raise ValueError(f"block_size: a block of the text has {longest:,} tokens in those of {self.name}, which has "
                             f"{positions:,} positions; make blocks shorter")  # fmt: skip

    def _vocabulary(self, teacher: "Subject") -> tuple[int, ...] | str:
        if pruned_vocab(self.config) is None:
            return self.name
        sizes = [text_config(config).vocab_size for config in (teacher.config, self.config)]
        try:
            return tuple(teacher_ids(teacher.tokenizer, self.tokenizer, *sizes))
        except ValueError:  # cut out of another model
            return self.name

    def read_by_teacher(self, teacher: PreTrainedModel, batch_size: int | str, split: bool) -> tuple[TeacherStates, list[dict]]:
        """Return the teacher's reading of the text in tokens of this model, which has some of the teacher's, and records of
        the mass that it gives to the others.
        """
        rows, states = self.read(teacher, [dropped_mass(self.vocabulary)], batch_size, None, True, split, self.vocabulary)
        return replace(states, head=states.head.rows(self.vocabulary)), rows

    def read(
        self,
        model: PreTrainedModel,
        metrics: Sequence[TextMetric],
        batch_size: int | str,
        teacher: TeacherStates | None,
        keep: bool,
        split: bool,
        ids: Sequence[int] | None = None,
    ) -> tuple[list[dict], TeacherStates | None]:
        """Return records and, where it is to be kept, a model's reading of this process's share of the text.

        The model is this one, or has the `ids` of its tokens.
        """
        state = PartialState()
        rank, processes = (state.process_index, state.num_processes) if split else (0, 1)
        first, last = (len(self.blocks) * n // processes for n in (rank, rank + 1))
        blocks, labels = self.blocks[first:last], self.labels[first:last]
        if ids is not None:
            blocks = [[ids[token] for token in row] for row in blocks]
            labels = [[token if token == -100 else ids[token] for token in row] for row in labels]
        name = f"Text of {self.name}"
        sums, reading = read_text(model, blocks, batch_size, teacher, keep, name, labels=labels, metrics=metrics)
        rows = text_records(sums, labels, self.num_bytes[first:last], first, metrics)
        rows = gather_object(rows) if processes > 1 else rows
        rows.sort(key=lambda row: (row["metric"], row["doc"]))
        return rows, reading

    def facts(self, model: PreTrainedModel) -> dict:
        """Return what the model is: where it came from, and its sizes in memory and on disk."""
        if self.folder is None:
            stored = [(tensor.dtype, tensor.numel(), tensor.nbytes) for tensor in model.parameters()]
        else:
            specs = Checkpoint(self.folder).specs.values()
            stored = [(DTYPES[spec.dtype], torch.Size(spec.shape).numel(), spec.num_bytes) for spec in specs]
        numbers, revision = Counter(), self.folder and revision_of(self.folder)
        for dtype, count, _ in stored:
            numbers[str(dtype).removeprefix("torch.")] += count * dtype.is_floating_point
        return {
            "path": self.path,
            **({"revision": revision} if revision else {}),
            "parameters": model.num_parameters(),
            "bytes": sum(size for _, _, size in stored),
            "dtype": ", ".join(dtype for dtype, count in numbers.most_common() if count),
            "shape": shape_of(model.config),
            **({} if self.vocabulary is None else {"tokenizer": self._tokenizer}),
        }

    @property
    def _tokenizer(self) -> str:
        some = self.vocabulary != self.name
        return f"{len(self.vocabulary):,} of the teacher's tokens" if some else "another"

    def load(self, folder: Path | None, how: Mapping) -> None:
        """Take what an interrupted comparison has left of a folder's model, measured in the same way, on every process."""
        saved = [(None, [])]
        path = folder and folder / CHECKPOINTS / f"{self.name}.json"
        if PartialState().is_main_process and path and self.folder and path.is_file():
            report = Report.load(path)
            if report.settings == {**how, "path": self.path}:
                saved = [(report, load_samples(folder / "samples" / f"{self.name}.parquet"))]
        self.report, self.records = (broadcast_object_list(saved) if PartialState().num_processes > 1 else saved)[0]

    def save(self, folder: Path | None) -> None:
        """Write the records, then the report: that is there only when all is."""
        if folder is not None and PartialState().is_main_process:
            save_samples(self.records, folder / "samples" / f"{self.name}.parquet")
            path = folder / CHECKPOINTS / f"{self.name}.json"
            path.parent.mkdir(exist_ok=True)
            self.report.save(path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)


def shape_of(config: PreTrainedConfig) -> dict[str, int | list[int]]:
    """Return the size of every axis; of a nonuniform model, lists for what differs from layer to layer."""
    if isinstance(config, PrunedConfig):
        return {"layers": config.num_hidden_layers, "hidden": config.hidden_size, **config.layer_sizes}
    return Architecture.of(config).shape.axes
