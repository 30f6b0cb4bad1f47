"""On-policy distillation: in some steps the student writes the completions that it learns from (GKD, 2306.13649).

What it writes depends on the seed, the step and the row alone, neither on the processes nor on how rows are batched.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from hf_minitron.architecture.config import positions_of
from hf_minitron.distillation.batch import COLUMNS, TARGETS, collate, with_targets
from hf_minitron.distillation.synthesis import continued, generating, sampling
from hf_minitron.distillation.teacher import base_of


class OnPolicy:
    """The batches of a training: those of the data or, in `lmbda` of the steps, prompts with the student's own completions.

    Args:
        trainer (`Trainer`): Its arguments are `DistillationArguments`.

    Attributes:
        width (`int`): Tokens of a row of the last batch of the data.

    Raises:
        ValueError: for completions that leave no room for a prompt.
    """

    def __init__(self, trainer: Trainer):
        self._trainer, self.width, self._completions, self._tokens = trainer, 0, 0, 0
        args, positions = trainer.args, positions_of(base_of(trainer.model).config)
        if args.lmbda and args.max_new_tokens >= positions:
            raise ValueError(f"max_new_tokens: {args.max_new_tokens} leave no room for a prompt in the model's {positions} "
                             "positions; set it lower")  # fmt: skip

    def __call__(self, batches: Iterator[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batches of a step."""
        args, step = self._trainer.args, self._trainer.state.global_step
        sampled = np.random.default_rng([args.seed, step]).random() < args.lmbda
        for number, batch in enumerate(batches):
            self.width = batch["input_ids"].shape[1]
            yield self._sampled(batch, step, number) if sampled else batch

    def take(self) -> dict[str, float]:
        """Return how many completions all processes have sampled since the last call, and their mean length."""
        if not self._trainer.args.lmbda:
            return {}
        counts = torch.tensor([self._completions, self._tokens], device=self._trainer.args.device)
        completions, tokens = self._trainer.accelerator.reduce(counts, "sum").tolist()
        self._completions = self._tokens = 0
        return {"completions": completions, "completion_length": tokens / max(completions, 1)}

    def _sampled(self, batch: Mapping[str, Tensor], step: int, number: int) -> Mapping[str, Tensor]:
        trainer, args = self._trainer, self._trainer.args
        rows = trainer.state.train_batch_size or args.train_batch_size
        first = (number * args.world_size + args.process_index) * rows  # of this batch among those of all processes
        rngs = [np.random.default_rng([args.seed, step, first + row]) for row in range(len(batch["input_ids"]))]
        model, tokenizer = base_of(trainer.model), trainer.processing_class
        most = positions_of(model.config) - args.max_new_tokens
        prompts = {row: prompt[-most:] for row, prompt in prompts_of(batch, rngs, args.max_new_tokens).items()}
        if not prompts:  # nothing is learnt of this batch
            return batch
        tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        rngs = [rngs[row] for row in prompts]
        with trainer.accelerator.autocast():
            completions = complete(model, tokenizer, [*prompts.values()], rngs, args.max_new_tokens, args.sampling_temperature)
        self._completions += len(completions)
        self._tokens += sum(map(len, completions))
        made = collate([
            {"input_ids": [*prompt, *completion], "labels": [-100] * len(prompt) + completion}
            for prompt, completion in zip(prompts.values(), completions, strict=True)
        ])  # fmt: skip
        return {name: value.to(batch["input_ids"].device) for name, value in made.items()}


def prompts_of(batch: Mapping[str, Tensor], rngs: list[np.random.Generator], max_new_tokens: int) -> dict[int, list[int]]:
    """Return the prompt in every row of a batch of which something is learnt, by the row's number.

    A chat, or a prompt with its completion, has answers: they begin where a token is learnt after two or more that are not. The
    prompt is all that the answer attends to; of several answers one is drawn. Any other text is a prompt but for its last
    `max_new_tokens` tokens.

    Args:
        batch (`Mapping[str, Tensor]`): `input_ids`, what is learnt, and perhaps a mask and positions.
        rngs (`list[np.random.Generator]`): One for each row.
        max_new_tokens (`int`): Tokens of a completion, at most.

    Raises:
        ValueError: for a column that says something of the tokens of the data alone.
    """
    if unknown := sorted(batch.keys() - {*COLUMNS, TARGETS}):
        raise ValueError(f"lmbda: the batch has {unknown[0]}, which says nothing of what the student writes: leave it out of "
                         "the rows, or set lmbda to 0")  # fmt: skip
    nothing = torch.ones_like(batch["input_ids"])
    ids, mask, positions = (batch.get(name, nothing).cpu().numpy() for name in ("input_ids", "attention_mask", "position_ids"))
    targets = with_targets(batch)[TARGETS]
    learnt = torch.nn.functional.pad(targets[:, :-1] != -100, (1, 0)).cpu().numpy()
    prompts = {}
    for row, rng in enumerate(rngs):
        if not learnt[row].any():
            continue
        starts = (positions[row] == 0).nonzero()[0]
        second = starts[1] if len(starts) > 1 else 0  # the first document of a packed sequence may lack its beginning
        end = _end_of_prompt(learnt[row], mask[row].astype(bool), second, rng, max_new_tokens)
        begin = max(starts[starts < end], default=0)
        prompts[row] = ids[row, begin:end][mask[row, begin:end].astype(bool)].tolist()
    return prompts


def _end_of_prompt(learnt: np.ndarray, real: np.ndarray, second: int, rng: np.random.Generator, max_new_tokens: int) -> int:
    """Return where in a row, of shape `(seq,)`, a completion shall begin.

    It has room for all of it, and its document stands there as a whole, if any place has that.
    """
    given, last = real & ~learnt, int(learnt.nonzero()[0][-1]) + 1
    answers = (learnt[2:] & given[1:-1] & given[:-2]).nonzero()[0] + 2
    if len(answers):
        roomy = answers[answers + max_new_tokens <= len(learnt)]
        choice = next(some for some in (roomy[roomy > second], roomy, answers[:1]) if len(some))
        return int(rng.choice(choice))
    places = learnt.nonzero()[0]
    early = places[places <= last - max_new_tokens]
    return int(early[-1] if len(early) else places[0])


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: list[list[int]],
    rngs: list[np.random.Generator],
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Sample a completion of every prompt: new ids, the end token included.

    Args:
        model (`PreTrainedModel`): Dropout is off while it writes, and its own generation settings do not count.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its end token ends a completion, as do the model's.
        prompts (`list[list[int]]`): Ids, of any lengths.
        rngs (`list[np.random.Generator]`): One for each prompt; of its draws a completion depends on nothing else.
        max_new_tokens (`int`): Tokens of a completion, at most.
        temperature (`float`, *optional*, defaults to 1): Divides the logits; 0 takes the most probable token.
    """
    seeds = [int(rng.integers(2**63)) for rng in rngs]
    noise = [_GumbelNoise(temperature, seeds, model.device)] if temperature else []
    with generating(model):  # the largest sum of a logit and Gumbel noise is a draw from their softmax
        config = sampling(model, tokenizer, max_new_tokens, temperature=0)
        return continued(model, prompts, config, logits_processor=LogitsProcessorList(noise))


class _GumbelNoise(LogitsProcessor):
    """Adds to every row's logits noise of its own generator."""

    def __init__(self, temperature: float, seeds: list[int], device: torch.device):
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        waits = torch.empty_like(scores)
        for row, generator in zip(waits, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self._temperature - waits.log()
